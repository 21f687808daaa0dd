"""The commands ``kexue gan train`` and ``kexue gan sample``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kexue.cli.common import Json, Seed, interruptible, print_json

gan_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Pictures: learn to generate, encode and interpolate them, then draw new ones.",
)
_METHODS = "bigan-qp|gan-qp|sgan|gn|gran|r1|wgan-gp|wgan-gp1|wgan-div|wgan-sn|wgan-clip"


@gan_app.command()
def train(
    pictures: Annotated[
        str,
        typer.Argument(
            metavar="PICTURES", help="digits (those of scikit-learn), a folder of images, or an array in a .npy file."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The new model.")] = Path("gan-model"),
    method: Annotated[
        str, typer.Option(metavar=_METHODS, help="bigan-qp also encodes; the others only generate.")
    ] = "bigan-qp",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the generator.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=2, help="Pictures of a step.")] = 64,
    z_dim: Annotated[
        int | None, typer.Option(min=1, help="Width of the codes; without, 16, for large pictures 128.")
    ] = None,
    critic_steps: Annotated[
        int | None, typer.Option(min=1, help="Critic steps before each; without, 2 for gan-qp and bigan-qp, else 1.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; without, 5e-4, for large pictures 2e-4.")] = None,
    size: Annotated[
        int | None,
        typer.Option(min=2, help="Side that images of a folder get; without, their own up to 64 or else 32."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR when the new model is complete.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Learn to generate pictures, with figures and grids of what comes out.

    An interrupted run continues when the same command is given again.
    """
    from kexue.workbench.gan import GanModel, GanSettings, train_gan

    try:
        settings = GanSettings(method, steps, batch_size, z_dim, critic_steps, lr, size, seed)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    with interruptible("interrupted; give the same command again to continue", orderly=True):
        train_gan(
            pictures,
            out,
            settings,
            force=force,
            skip_bad=skip_bad,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    info = GanModel(out).info
    if as_json:
        print_json(info)
        return
    print(f"{out}: {method}, FID {info['figures']['fid']:.3g}. Pictures: {', '.join(info['files'])}")
    print(f"Try: kexue gan sample {out} --out new.png")


@gan_app.command()
def sample(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A model made by `kexue gan train`.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="A .png for a grid of pictures, a .npy for an array.")
    ] = Path("samples.png"),
    count: Annotated[int, typer.Option("-n", min=1, help="Number of pictures.")] = 64,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Draw new pictures."""
    if out.suffix not in (".png", ".npy"):
        raise typer.BadParameter(f"must end in .png or .npy; got {out.name}", param_hint="--out")
    from kexue.workbench.gan import GanModel

    path = GanModel(model).write(out, count, seed)
    if as_json:
        print_json({"file": str(path), "pictures": count, "seed": seed})
    else:
        print(f"{path}: {count} pictures")
