"""The command ``kexue drift``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kexue.cli.common import (
    Encoding,
    IdColumn,
    Json,
    LabelColumn,
    Seed,
    SkipBad,
    TextColumn,
    TitleColumn,
    corpus_options,
    interruptible,
    option_names,
    print_json,
)

LEVEL = 0.05  # of the p-value at which a distance counts as more than chance
_SIDE = "Texts (a file or folder, as for `kexue build`), a workspace, or features: .npy, .npz of shape (N, D)."


def drift(
    a: Annotated[Path, typer.Argument(metavar="A", help=_SIDE)],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other side, of the same kind.")],
    workspace: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Compare texts in the vectors of this workspace; without, by their topics."),
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", min=1, help="Number of documents; without, 10, and in JSON all of them.")
    ] = None,
    permutations: Annotated[
        int, typer.Option(min=0, help="Random deals of the documents that tell what is chance; 0: none.")
    ] = 99,
    seed: Seed = 0,
    id_column: IdColumn = None,
    title_column: TitleColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    encoding: Encoding = "utf-8",
    skip_errors: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Compare two corpora or two files of features, and name the documents that make the difference.

    The distance is the squared Frechet distance (FID) of their vectors.
    """
    from kexue.workbench.drift import drift as compare

    options, _ = corpus_options(
        "A and B", [a, b], None, encoding, skip_errors, id_column=id_column, title_column=title_column,
        text_column=text_column, label_column=label_column,
    )  # fmt: skip
    with interruptible("interrupted"), option_names(skip_errors):
        found = compare(
            a,
            b,
            workspace=workspace,
            permutations=permutations,
            seed=seed,
            read_options=options,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    if as_json:
        shown = found.documents if k is None else found.documents[:k]
        print_json(
            {
                "distance": found.distance,
                "chance": found.chance,
                "p_value": found.p_value,
                "features": {"kind": found.features, "dim": found.dim},
                "sizes": {"A": found.sizes[0], "B": found.sizes[1]},
                "documents": [_record(share) for share in shown],
            }
        )
        return
    print(f"squared Frechet distance {found.distance:.4g}   A: {a} ({found.sizes[0]})   B: {b} ({found.sizes[1]})")
    if found.p_value is not None and found.chance is not None:
        verdict = "more than chance" if found.p_value <= LEVEL else "no more than chance explains"
        if found.p_value > LEVEL and found.p_value == 1 / (permutations + 1):
            verdict = f"fewer deals than the {round(1 / LEVEL) - 1} that could tell"
        print(f"random deals of the same documents: {found.chance:.4g} on average; p = {found.p_value:.2g}, {verdict}")
    print("\nshare of the distance")
    for number, share in enumerate(found.documents[: k or 10], 1):
        part = share.contribution / found.distance if found.distance > 0 else 0.0
        print(f"{number:3}. {part:7.2%}  {share.source}  {share.id}" + (f"  {share.title}" if share.title else ""))


def _record(share: Any) -> dict[str, Any]:
    record = {"id": share.id, "source": share.source, "contribution": share.contribution}
    return {**record, "title": share.title} if share.title else record
