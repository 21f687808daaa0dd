"""The commands ``kexue summarize train`` and ``kexue summarize DIR FILE...``."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kexue.cli.common import (
    Encoding,
    IdColumn,
    Json,
    Seed,
    SkipBad,
    TextColumn,
    column_options,
    interruptible,
    option_names,
    print_json,
)
from kexue.cli.common import print_table as print_rows

_STDIN = "standard input"
_DEFAULT = "DIR FILE..."  # no argument can be this, so it names the command that has no name


class _Summarize(TyperGroup):
    """``train`` is a command; everything else is a folder and files. A folder called train is ./train."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command that has no name in front of arguments that do not begin with a command or ask for help."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


class _Nameless(TyperCommand):
    """The command whose name is its usage already."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What stands behind the name."""
        return ["[OPTIONS]"]


summarize_app = typer.Typer(
    cls=_Summarize,
    no_args_is_help=True,
    add_completion=False,
    help="Summaries of texts: with a model learned from your own pairs of a text and its summary, or, without pairs, "
    "by the vectors of a workspace.\n\n"
    "kexue summarize train PAIRS... --out DIR   learns;  options: kexue summarize train --help\n\n"
    "kexue summarize DIR FILE...                summarises;  options: kexue summarize DIR --help",
    options_metavar="",
    subcommand_metavar="train PAIRS... | DIR FILE...",
)


@summarize_app.command()
def train(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="PAIRS...",
            help="Texts with their summaries: JSON lines with id, text, summary, or text<TAB>summary in .tsv; also "
            ".csv, .parquet with such columns.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The new model.")] = Path("summary-model"),
    language: Annotated[
        str, typer.Option(metavar="auto|zh|en", help="Where texts are cut into pieces, and what a word is.")
    ] = "auto",
    extract_only: Annotated[
        str,
        typer.Option(
            metavar="auto|yes|no",
            help="yes: a summary is made of pieces of the text; no: a generator rewrites them; auto: the generator, if "
            "it is better on pairs held out for that.",
        ),
    ] = "auto",
    folds: Annotated[int, typer.Option(min=2, help="Parts of the pairs that are extracted by the others.")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs.")] = 20,
    encoder: Annotated[
        str, typer.Option(metavar="hash|PATH", help="Features of the pieces: built in, or a local BERT checkpoint.")
    ] = "hash",
    held_out: Annotated[
        float, typer.Option(help="Share of the pairs that are measured on instead of learned from.")
    ] = 0.1,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR when the new model is complete.")] = False,
    seed: Seed = 0,
    id_column: IdColumn = None,
    text_column: TextColumn = None,
    summary_column: Annotated[str | None, typer.Option(help="Column of the summaries; guessed without.")] = None,
    encoding: Encoding = "utf-8",
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Learn to summarise from pairs of a text and its summary.

    An interrupted run continues when the same command is given again.
    """
    from kexue.workbench.summaries import SummaryModel, SummarySettings, train_summaries

    if extract_only not in ("auto", "yes", "no"):
        raise typer.BadParameter(f"must be auto, yes or no; got {extract_only!r}", param_hint="--extract-only")
    only: Any = {"auto": "auto", "yes": True, "no": False}[extract_only]
    try:
        settings = SummarySettings(language, only, folds, epochs, encoder, held_out, seed)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    given = {"id_column": id_column, "text_column": text_column, "summary_column": summary_column}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options |= {"encoding": encoding, "on_error": "skip" if skip_bad else "raise"}
    with interruptible("interrupted; give the same command again to continue", orderly=True), option_names(skip_bad):
        train_summaries(
            list(files),
            out,
            settings,
            force=force,
            read_options=options,
            log=lambda line: print(column_options(line), file=sys.stderr, flush=True),
        )
    info = SummaryModel(out).info
    if as_json:
        print_json(info)
        return
    print_rows(info["evaluation"])
    print(f"{out}: a model of summaries. Try:\n  kexue summarize {out} FILE")


@summarize_app.command(name=_DEFAULT, cls=_Nameless)
def files(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A model made by `kexue summarize train`, or a workspace of `kexue build`."),
    ],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Texts, a summary for each; .jsonl, .csv, .parquet: one for each record; - is standard input.",
        ),
    ],
    length: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most characters of a summary; without, as was learned.")
    ] = None,
    pieces: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most pieces of the text in a summary.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="auto|trained|vectors",
            help="auto: what the folder has learned; else by the vectors of the workspace, as vectors always does.",
        ),
    ] = "auto",
    format: Annotated[
        str | None, typer.Option(metavar="text|jsonl|csv|...", help="Of all files; without, by their names.")
    ] = None,
    id_column: IdColumn = None,
    text_column: TextColumn = None,
    encoding: Encoding = "utf-8",
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Summarise texts. Of several each summary is a line: the id, a tab, the summary.

    With --json each is a line {"id", "summary", "method", "pieces"}; the pieces say where in the text they stand.
    """
    from kexue.corpus.discovery import FORMATS
    from kexue.workbench.summaries import METHODS, open_summarizer, summarize_files

    for option, value, known in (("--method", method, METHODS), ("--format", format, (None, *FORMATS))):
        if value not in known:
            names = ", ".join(name for name in known if name)
            raise typer.BadParameter(f"must be one of {names}; got {value!r}", param_hint=option)
    options: dict[str, Any] = {"encoding": encoding, "on_error": "skip" if skip_bad else "raise"}
    columns = {"format": format, "id_column": id_column, "text_column": text_column}
    options |= {name: value for name, value in columns.items() if value is not None}
    if sum(str(path) == "-" for path in files) > 1:
        raise typer.BadParameter("standard input can be read only once; give - once", param_hint="FILE...")
    with interruptible("interrupted"), tempfile.TemporaryDirectory() as scratch, _bare(scratch), option_names(skip_bad):
        summarizer = open_summarizer(folder)
        paths = [_standard_input(Path(scratch)) if str(path) == "-" else path for path in files]
        alone = len(paths) == 1 and _is_text(paths[0], format)
        for name, found in summarize_files(
            summarizer, paths, length=length, pieces=pieces, method=method, read_options=options,
            log=lambda line: print(line.replace(f"{scratch}{os.sep}", ""), file=sys.stderr, flush=True),
        ):  # fmt: skip
            if as_json:
                print(json.dumps({"id": name, **_record(found)}, ensure_ascii=False), flush=True)
            else:
                print(found.text if alone else f"{name}\t{found.text}", flush=True)


@contextmanager
def _bare(scratch: str) -> Iterator[None]:
    """Errors about standard input name it, not the file in ``scratch`` that it was copied to."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(f"{scratch}{os.sep}", "")) from error


def _record(found: Any) -> dict[str, Any]:
    return {"summary": found.text, "method": found.method, "pieces": [piece._asdict() for piece in found.pieces]}


def _is_text(path: Path, format: str | None) -> bool:
    from kexue.corpus.discovery import format_of

    return path.is_file() and (format or format_of(str(path))) == "text"


def _standard_input(scratch: Path) -> Path:
    """Standard input as a file, so that it is read as one: encoding, compression of records, binary content."""
    path = scratch / _STDIN
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path
