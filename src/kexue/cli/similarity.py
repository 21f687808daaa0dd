"""The commands ``kexue similarity train`` and ``kexue similarity query``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from kexue.cli.common import (
    Count,
    Encoding,
    IdColumn,
    Json,
    LabelColumn,
    Seed,
    SkipBad,
    TextColumn,
    corpus_options,
    interruptible,
    option_names,
    print_json,
)

similarity_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Sentences that mean the same: learn from groups of them, then ask which stored ones answer a new one.",
)


@similarity_app.command()
def train(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Sentences with their groups: JSON lines with id, text, labels (the group is the first), or "
            "text<TAB>group in .tsv; also .csv, .parquet.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The new model.")] = Path("similarity-model"),
    kind: Annotated[
        str, typer.Option(metavar="am|arc|simpler_a|softmax", help="Margin of the classifier over groups.")
    ] = "am",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the sentences; without, 20, of a small file more.")
    ] = None,
    dim: Annotated[int, typer.Option(min=1, help="Width of the vectors.")] = 128,
    max_length: Annotated[int, typer.Option(min=1, help="Characters of a sentence that are read.")] = 32,
    min_count: Annotated[
        int | None, typer.Option(min=1, help="Rarer characters are unknown; without, 5, of a small file less.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the groups that are measured on instead of learned from.")
    ] = 0.1,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR when the new model is complete.")] = False,
    seed: Seed = 0,
    id_column: IdColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    encoding: Encoding = "utf-8",
    skip_errors: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Learn which sentences mean the same from groups of them.

    An interrupted run continues when the same command is given again.
    """
    from kexue.workbench.similarity import SimilarityModel, SimilaritySettings, train_similarity

    options, _ = corpus_options(
        "FILE", files, None, encoding, skip_errors, id_column=id_column, text_column=text_column,
        label_column=label_column,
    )  # fmt: skip
    try:
        settings = SimilaritySettings(kind, epochs, dim, max_length, min_count, held_out, seed)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    with interruptible("interrupted; give the same command again to continue", orderly=True), option_names(skip_errors):
        train_similarity(
            list(files),
            out,
            settings,
            force=force,
            read_options=options,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    if as_json:
        print_json(SimilarityModel(out).info)
        return
    print(f'{out}: a model of sentence similarity. Try:\n  kexue similarity query {out} "..."')


@similarity_app.command()
def query(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A model made by `kexue similarity train`.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The sentence to find others for.")],
    k: Count = 10,
    threshold: Annotated[
        str | None,
        typer.Option(metavar="COSINE|best", help="Least cosine; best: what served the held-out groups best."),
    ] = None,
    as_json: Json = False,
) -> None:
    """The stored sentences that are nearest to a sentence."""
    if not text.strip():
        raise typer.BadParameter("the sentence is empty; expected at least one character", param_hint="TEXT")
    least: float | None = None
    if threshold is not None and threshold != "best":
        try:
            least = float(threshold)
        except ValueError:
            least = math.nan
        if not math.isfinite(least):
            raise typer.BadParameter(f"must be a cosine or best; got {threshold!r}", param_hint="--threshold")
    from kexue.workbench.similarity import SimilarityModel

    opened = SimilarityModel(model)
    if threshold == "best":
        least = opened.threshold
        if least is None:
            raise ValueError(f"{model} was trained without held-out groups, so it has no best threshold; give a cosine")
    found = opened.query(text, k, least)
    if as_json:
        print_json([{**match._asdict(), "score": round(match.score, 4)} for match in found])
        return
    for number, match in enumerate(found, 1):
        print(f"{number:2}. {match.score:6.3f}  {match.text}  [{match.group}]")
    if not found:
        print("nothing found", file=sys.stderr)
