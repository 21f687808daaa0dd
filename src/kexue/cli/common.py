"""What the commands share: options, printing, errors in the language of the command line."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kexue.workbench import Hit

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A workspace made by `kexue build`.")]
Count = Annotated[int, typer.Option("-k", min=1, help="Number of results.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]

IdColumn = Annotated[str | None, typer.Option(help="Column of the ids; guessed without.")]
TitleColumn = Annotated[str | None, typer.Option(help="Column of the titles; guessed without.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the texts; guessed without.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels; guessed without.")]
Encoding = Annotated[str, typer.Option(help="Encoding of text files.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", "--skip-errors", help="Leave out unreadable files instead of stopping.")
]

_COLUMNS = ("id_column", "title_column", "text_column", "label_column", "summary_column")
# Parameters of the library whose names in errors become those of the command line.
_PARAMETER = re.compile(r"\b(min_count|min_pmi|min_gain|min_prob|min_support|max_words|max_length|n_context|window)=")


def columns(**given: str | None) -> dict[str, str]:
    """The column options that were given."""
    return {key: value for key, value in given.items() if value is not None}


def corpus_options(
    name: str, paths: list[Path] | None, packages: str | None, encoding: str, skip: bool, **given: str | None
) -> tuple[dict[str, Any], list[str] | None]:
    """Options of the reader, and the chosen packages: of commands that read paths or, without, the documentation.

    Args:
        name: What the command calls its paths.
        paths: The paths.
        packages: Names separated by commas.
        encoding: Of text files.
        skip: Leave out what cannot be read.
        **given: Names of columns.

    Raises:
        typer.BadParameter: Options that do not go together.
    """
    options: dict[str, Any] = columns(**given)
    if encoding != "utf-8":
        options["encoding"] = encoding
    if skip:
        options["on_error"] = "skip"
    if options and not paths:
        raise typer.BadParameter(f"column, encoding and --skip-errors options need {name}")
    if packages is None:
        return options, None
    if paths:
        raise typer.BadParameter(f"--packages chooses among the installed documentation; leave {name} out")
    chosen = [package.strip() for package in packages.split(",") if package.strip()]
    if not chosen:
        raise typer.BadParameter("--packages is empty; give names such as numpy,scipy")
    return options, chosen


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def print_hits(hits: list[Hit], as_json: bool) -> None:
    """Print the answers of a search."""
    if as_json:
        print_json([hit.to_dict() for hit in hits])
        return
    if not hits:
        print("nothing found", file=sys.stderr)
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for number, hit in enumerate(hits, 1):
        console.print(Text(f"{number:2}. {hit.id}", style="bold") + Text(f"  {hit.score:.2f}", style="dim"))
        if hit.title:
            console.print(Text(f"    {hit.title}"))
        passage = Text(f"    {hit.passage}", style="dim")
        for start, end in hit.evidence.get("spans", []):
            passage.stylize("bold not dim", start + 4, end + 4)
        console.print(passage)
        console.print(Text(f"    {hit.explain()}", style="italic dim"))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, a column for each key."""
    from rich.cells import cell_len, set_cell_size  # Chinese characters are two cells wide

    if not rows:
        return
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key, "")) for key in head] for row in rows]
    widths = [max(cell_len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    for line in [head, *cells]:
        print("  ".join(set_cell_size(text, width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def column_options(message: str) -> str:
    """Let a message of the reader speak of ``--text-column`` instead of ``text_column``."""
    for name in _COLUMNS:
        message = message.replace(name, "--" + name.replace("_", "-"))
    return message


@contextmanager
def option_names(skipping: bool, flag: str = "--skip-errors") -> Iterator[None]:
    """Let errors of the reader speak of options of the command line, and of the one that passes over bad files."""
    from kexue.corpus import CorpusError

    try:
        yield
    except ValueError as error:
        message = column_options(str(error))
        message = message.replace("encoding='utf-16'", "--encoding utf-16")
        message = message.replace("has another encoding, name it", "has another encoding, name it with --encoding")
        message = _PARAMETER.sub(lambda match: f"--{match[1].replace('_', '-')} ", message)
        if message.startswith("no word ") and "--min-count" in message:
            message += "; lower --min-count"
        if isinstance(error, CorpusError) and not skipping and not message.endswith(": empty"):
            message += f". {flag} leaves out what cannot be read"
        raise ValueError(message) from error


@contextmanager
def interruptible(message: str, orderly: bool = False) -> Iterator[None]:
    """End a long command that was interrupted with a word instead of a traceback.

    Args:
        message: The word.
        orderly: The command is a training run, which has done what SIGTERM asks for when it has saved: exit code 0.
            Else it has not succeeded without its result, and the code is 128 + the number of the signal.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        print(message, file=sys.stderr)
        # Training notes which signal asked it to end.
        code = 128 + getattr(stop, "number", signal.SIGINT)
        raise typer.Exit(getattr(stop, "exit_code", code) if orderly else code) from None
