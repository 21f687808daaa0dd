"""The command ``kexue explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kexue.cli.common import Json, interruptible, print_json, print_table
from kexue.cli.language import _batches, _offline


def explain(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A folder with a transformers model (sequence classification, causal or masked) and its tokenizer, or "
            "a model made by `kexue pretrain` or `kexue similarity train`.",
        ),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...",
            help="Texts; without, the lines of standard input. For a masked model with [MASK] where it is asked; of a "
            "similarity model exactly two.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS|TEXT", help="The class, or the continuation, to be explained; without, the most probable."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="CLASS|TEXT", help="Why the target rather than this one.")
    ] = None,
    every_class: Annotated[
        bool, typer.Option("--every-class", help="Explain each class of a classifier, not the target alone.")
    ] = False,
    baseline: Annotated[
        str, typer.Option(metavar="pad|mask|mean|zero", help="What the tokens are compared with.")
    ] = "pad",
    output: Annotated[str, typer.Option(metavar="logit|log-prob|prob", help="What of a classifier.")] = "logit",
    tol: Annotated[float, typer.Option(help="Largest gap between the change and the sum of the scores.")] = 1e-3,
    max_evals: Annotated[int, typer.Option(min=3, help="Most evaluations for a text.")] = 200,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens of a text that are read; without, all.")] = None,
    k: Annotated[int, typer.Option("-k", min=0, help="Strongest tokens that are listed.")] = 5,
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a page.")] = None,
    as_json: Json = False,
) -> None:
    """Which tokens make a model say what it says: red ones speak for it, blue ones against.

    The scores add up to the change of the output from a text without content; a text whose integral did not converge
    says so.
    """
    _offline()
    from kexue.workbench.explain import explain_similarity, explain_texts, is_similarity

    listed = [text for part in _batches(texts) for text in part]
    if not tol > 0:
        raise typer.BadParameter(f"must be above 0; got {tol}", param_hint="--tol")
    for option, chosen, known in (
        ("--baseline", baseline, ("pad", "mask", "mean", "zero")),
        ("--output", output, ("logit", "log-prob", "log_prob", "prob")),
    ):
        if chosen not in known:
            raise typer.BadParameter(f"must be one of {', '.join(known)}; got {chosen!r}", param_hint=option)
    if every_class and target is not None:
        raise typer.BadParameter("--every-class explains all classes; leave --target out")
    if page is not None and not page.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {page.parent}", param_hint="--html")
    if is_similarity(model):
        useless = {"--target": target, "--against": against, "--html": page, "--max-length": max_length,
                   "--every-class": every_class or None}  # fmt: skip
        for name, value in useless.items():
            if value is not None:
                raise typer.BadParameter(f"{name} has no effect on a model of similarity")
        if len(listed) != 2:
            raise typer.BadParameter(f"a model of similarity explains a pair: give two texts; got {len(listed)}")
        with interruptible("interrupted"):
            pairs = explain_similarity(model, listed[0], listed[1], tol)
        _print_pairs(pairs, k, as_json)
        return
    with interruptible("interrupted"):
        found = explain_texts(
            model, listed, target=target, against=against, baseline=baseline, output=output, tol=tol,
            max_evals=max_evals, every_class=every_class, max_length=max_length,
        )  # fmt: skip
    if page is not None:
        found.to_html(page)
    if as_json:
        print_json([one.to_dict() for one in found])
        return
    from rich.console import Console
    from rich.text import Text

    from kexue.explain._text_result import visible

    console = Console(highlight=False, soft_wrap=True)
    scale = found.scale
    for one in found:
        console.print(Text(visible(one.headline), style="bold"))
        line = Text()
        for token, strength in one.shown(scale):
            line.append(visible(token), style=_style(strength))
        console.print(line)
        rows = [
            (score, token)
            for token, score, fixed in zip(one.tokens, one.scores.tolist(), one.fixed, strict=True)
            if not fixed
        ]
        for score, token in sorted(rows, key=lambda row: -abs(row[0]))[:k]:
            console.print(Text(f"  {score:+8.3f}  {visible(token).strip() or repr(token)}", style="dim"))
    if page is not None:
        print(f"page: {page}")


def _style(strength: float) -> str:
    """Black on red or blue, the stronger the deeper."""
    from kexue.explain._text_result import _mixed

    if abs(strength) < 0.02:
        return ""
    r, g, b = (round(255 * c) for c in _mixed(strength))
    return f"black on rgb({r},{g},{b})"


def _print_pairs(pairs: Any, k: int, as_json: bool) -> None:
    found = pairs.found
    if as_json:
        print_json(
            {
                "first": pairs.first,
                "second": pairs.second,
                "cosine": found.cosine,
                "rest": found.rest,
                "gap": found.gap,
                "converged": found.converged,
                "pairs": found.pairs.tolist(),
            }
        )
        return
    state = "" if found.converged else ", NOT CONVERGED"
    total = float(found.pairs.sum())
    print(f"cosine {found.cosine:.3f} = pairs {total:.3f} + rest {found.rest:.3f} (gap {found.gap:.1e}{state})")
    print_table(
        [
            {"adds": round(score, 4), "first": f"{i + 1} {pairs.first[i]!r}", "second": f"{j + 1} {pairs.second[j]!r}"}
            for i, j, score in pairs.strongest(k)
        ]
    )
