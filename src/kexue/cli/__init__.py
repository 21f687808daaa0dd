"""The command ``kexue``: thin calls into the workbench, the reproductions and the catalogue.

Exit codes: 0 fine, 1 the work failed, 2 wrong usage, 130 interrupted. Results go to standard output, everything else to
standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kexue.workbench import Hit

app = typer.Typer(
    name="kexue",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn your own text into small, fast, explainable language models on your own machine.",
)
words_app = typer.Typer(no_args_is_help=True, help="Words and their relations.")
app.add_typer(words_app, name="words")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A workspace made by `kexue build`.")]
Count = Annotated[int, typer.Option("-k", min=1, help="Number of results.")]


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


@app.command()
def build(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Text files, folders, .jsonl, .csv, .parquet. None: the documentation of the installed packages."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The new workspace.")] = Path("workspace"),
    packages: Annotated[
        str | None, typer.Option(metavar="A,B", help="Without PATHS: only the documentation of these packages.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR when the new build is complete.")] = False,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Run the full evaluation (trains two more encoders).")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes of the encoder over the corpus; without, its size decides.")
    ] = None,
    dim: Annotated[int, typer.Option(min=2, help="Width of the document vectors.")] = 256,
    id_column: Annotated[str | None, typer.Option(help="Column of the ids; guessed without.")] = None,
    title_column: Annotated[str | None, typer.Option(help="Column of the titles; guessed without.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts; guessed without.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels; guessed without.")] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of text files.")] = "utf-8",
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Leave out unreadable files instead of stopping.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Learn words, vectors and a search engine from raw text.

    An interrupted build continues when the same command is given again.
    """
    from kexue.workbench import Workspace

    columns = {
        "id_column": id_column,
        "title_column": title_column,
        "text_column": text_column,
        "label_column": label_column,
    }
    options: dict[str, Any] = {key: value for key, value in columns.items() if value is not None}
    if encoding != "utf-8":
        options["encoding"] = encoding
    if skip_errors:
        options["on_error"] = "skip"
    if options and not paths:
        raise typer.BadParameter("column, encoding and --skip-errors options need PATHS")
    if packages is not None and paths:
        raise typer.BadParameter("--packages chooses among the installed documentation; leave PATHS out")
    chosen = None
    if packages is not None:
        chosen = [name.strip() for name in packages.split(",") if name.strip()]
        if not chosen:
            raise typer.BadParameter("--packages is empty; give names such as numpy,scipy")
    with _interruptible("interrupted; give the same command again to continue"), _option_names(skip_errors):
        workspace = Workspace.build(
            list(paths) if paths else None,
            out,
            force=force,
            packages=chosen,
            evaluate=evaluate,
            seed=seed,
            epochs=epochs,
            dim=dim,
            read_options=options,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    if as_json:
        _print_json(workspace.info())
    else:
        print(f"{out}: {len(workspace)} documents. Report: {out / 'report.html'}")
        print(f'Try: kexue search {out} "..."')


@app.command()
def search(
    folder: Folder,
    query: Annotated[str, typer.Argument(help="Words or a question.")],
    k: Count = 10,
    as_json: Json = False,
) -> None:
    """Find documents by meaning and words."""
    if not query.strip():
        raise typer.BadParameter("the query is empty; expected at least one word")
    from kexue.workbench import Workspace

    _print_hits(Workspace.open(folder).search(query, k=k), as_json)


@app.command()
def similar(
    folder: Folder,
    identifier: Annotated[str, typer.Argument(metavar="ID", help="Id of a document.")],
    k: Count = 10,
    as_json: Json = False,
) -> None:
    """Find documents related to a document."""
    from kexue.workbench import Workspace

    _print_hits(Workspace.open(folder).similar(identifier, k=k), as_json)


@words_app.command()
def related(
    folder: Folder,
    word: Annotated[str, typer.Argument(help="A word of the corpus.")],
    k: Count = 10,
    as_json: Json = False,
) -> None:
    """Words that occur together with a word more often than chance."""
    from kexue.workbench import Workspace

    found = Workspace.open(folder).words(word, k=k)
    if as_json:
        _print_json([{"word": other, "score": score} for other, score in found])
    else:
        for other, score in found:
            print(f"{score:6.3f}  {other}")


@app.command()
def info(folder: Folder, as_json: Json = False) -> None:
    """What a workspace holds and how good it is."""
    from kexue.workbench import Workspace
    from kexue.workbench.steps import summary

    found = Workspace.open(folder).info()
    if as_json:
        _print_json(found)
        return
    print(f"{folder}: built from {found['source']} with kexue {found['kexue']}")
    for name, figures in found["figures"].items():
        print(f"  {name:9} {summary(figures)}")
    for title, rows in found["evaluation"].items():
        print(f"\n{title}")
        _print_table(rows)


@app.command()
def methods(
    slug: Annotated[str | None, typer.Argument(help="One method; all without.")] = None, as_json: Json = False
) -> None:
    """List the methods and what exists of each."""
    from kexue.catalog import METHODS, state

    if slug is not None and slug not in METHODS:
        raise typer.BadParameter(f"unknown method {slug!r}; `kexue methods` lists all {len(METHODS)}")
    rows: list[dict[str, Any]] = []
    for method in [METHODS[slug]] if slug is not None else METHODS.values():
        found = state(method)
        rows.append(
            {
                "slug": method.slug,
                "name": method.name,
                "name_zh": method.name_zh,
                "article": method.article,
                "names": list(method.names),
                "page": method.page,
                "state": {
                    "importable": found.importable,
                    "reproduced": found.reproduced,
                    "page": found.page,
                    "missing": list(found.missing),
                },
            }
        )
    if as_json:
        _print_json(rows if slug is None else rows[0])
        return
    mark = {True: "yes", False: "-"}
    table = [
        {
            "slug": row["slug"],
            "importable": mark[row["state"]["importable"]],
            "reproduced": mark[row["state"]["reproduced"]],
            "page": mark[row["state"]["page"]],
            "method": f"{row['name']} {row['name_zh']}",
        }
        for row in rows
    ]
    _print_table(table)
    if slug is not None:
        print("\n" + "\n".join(rows[0]["names"]))
        if rows[0]["state"]["missing"]:
            print("missing: " + ", ".join(rows[0]["state"]["missing"]))


@app.command()
def reproduce(
    slug: Annotated[str | None, typer.Argument(help="A method; all that have a reproduction without.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The small version, a few seconds.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for figures and report.html.")] = Path(
        "reports"
    ),
    as_json: Json = False,
) -> None:
    """Measure a method's claim again."""
    from kexue.reproduce import available, run, write_report
    from kexue.reproduce.report import figure_tables

    if slug is not None and slug not in available():
        raise typer.BadParameter(f"no reproduction of {slug!r}; expected one of {', '.join(available())}")
    results = []
    for name in [slug] if slug is not None else available():
        with _interruptible("interrupted"):
            results.append(run(name, quick=quick, seed=seed, out=out))
        result = results[-1]
        if as_json:
            continue
        print(f"{result.slug}: {result.verdict} ({result.seconds:.1f} CPU s)\n{result.claim}")
        for title, (head, rows) in figure_tables(result.figures):
            print(f"\n{title}")
            _print_table([dict(zip(head, row, strict=True)) for row in rows])
        if result.note:
            print(f"\n{result.note}")
        print(f"\nfigure: {result.figure_path}\n")
    page = write_report(results, out / "report.html")
    if as_json:
        _print_json([{**result.__dict__, "figure_path": str(result.figure_path)} for result in results])
    else:
        print(f"report: {page}")


def _print_hits(hits: list[Hit], as_json: bool) -> None:
    if as_json:
        _print_json([hit.to_dict() for hit in hits])
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


def _print_table(rows: list[dict[str, Any]]) -> None:
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


@contextmanager
def _option_names(skipping: bool) -> Iterator[None]:
    """Let errors of the reader speak of options of the command line, and of the one that passes over bad files."""
    from kexue.corpus import CorpusError

    try:
        yield
    except ValueError as error:
        message = str(error)
        for name in ("id_column", "title_column", "text_column", "label_column"):
            message = message.replace(name, "--" + name.replace("_", "-"))
        message = message.replace("encoding='utf-16'", "--encoding utf-16")
        message = message.replace("has another encoding, name it", "has another encoding, name it with --encoding")
        if isinstance(error, CorpusError) and not skipping and not message.endswith(": empty"):
            message += ". --skip-errors leaves out what cannot be read"
        raise ValueError(message) from error


@contextmanager
def _interruptible(message: str) -> Iterator[None]:
    """End a long command that was interrupted with a word instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print(message, file=sys.stderr)
        # Training notes which signal asked it to end; without a result the command has not succeeded.
        raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from None


def main() -> None:
    """Entry point of the command ``kexue`` and of ``python -m kexue``."""
    try:
        app()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
