"""The command ``kexue grow``."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kexue.cli.common import Json, Seed, interruptible, print_json

# Arguments of the library as its errors write them, heads='more' or hidden_size=30
_ARGUMENT = re.compile(r"\b(width|heads|depth|hidden_size|intermediate_size|convention|rope)='?(\w+)'?")


@contextmanager
def _option_names() -> Iterator[None]:
    """Let errors of the library speak of the options of the command."""
    try:
        yield
    except ValueError as error:
        message = str(error).replace("exact=False", "--inexact")
        message = _ARGUMENT.sub(lambda match: f"--{match[1].replace('_', '-')} {match[2]}", message)
        raise ValueError(message) from error


def grow(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A folder that save_pretrained wrote (config.json, weights).")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The larger model.")],
    width: Annotated[int | None, typer.Option(help="Factor of all widths; 2 if no other size is given.")] = None,
    heads: Annotated[str, typer.Option(help="more heads, or wider ones.")] = "more",
    depth: Annotated[int | None, typer.Option(help="Number of layers.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Instead of --width: any larger width.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Any larger inner width.")] = None,
    noise: Annotated[
        float, typer.Option(help="Break the symmetry of the copies without changing any output; .1 to train further.")
    ] = 0.0,
    convention: Annotated[str, typer.Option(help="copy, or orthogonal: vectors keep their length.")] = "copy",
    rope: Annotated[str, typer.Option(help="Wider heads with rotary positions: stride, or pair (inexact).")] = "stride",
    exact: Annotated[bool, typer.Option("--exact/--inexact", help="Refuse what cannot be exact.")] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare both models in float64 before DIR is written.")
    ] = True,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make a saved Transformer larger without changing what it computes."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: nothing is ever looked up
    from kexue._transformers import show_loading
    from kexue.models import grow_checkpoint

    show_loading(sys.stderr.isatty())
    stopped = "interrupted; nothing was written"
    with interruptible(stopped), _option_names(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        report = grow_checkpoint(
            checkpoint,
            out,
            width,
            seed=seed,
            verify=verify,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
            heads=heads,
            depth=depth,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            noise=noise,
            convention=convention,
            rope=rope,
            exact=exact,
        )
    for warning in caught:
        if str(warning.message).startswith("growth of "):
            print(f"note: {warning.message}", file=sys.stderr)
    if as_json:
        record: dict[str, Any] = json.loads((out / "growth.json").read_text(encoding="utf-8"))
        print_json({"out": str(out), **record})
        return
    print(f"{out}: {'not verified' if report is None else report}")
