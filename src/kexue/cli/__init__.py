"""The command ``kexue``: thin calls into the workbench, the reproductions and the catalogue.

Exit codes: 0 fine, 1 the work failed, 2 wrong usage, 130 interrupted. Results go to standard output, everything else to
standard error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kexue.cli.common import (
    Count,
    Encoding,
    Folder,
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
    print_hits,
    print_json,
    print_table,
)
from kexue.cli.drift import drift
from kexue.cli.explain import explain
from kexue.cli.gan import gan_app
from kexue.cli.growth import grow
from kexue.cli.language import generate, pretrain, score, suggest
from kexue.cli.similarity import similarity_app
from kexue.cli.summaries import summarize_app
from kexue.cli.word_queries import words_app

app = typer.Typer(
    name="kexue",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn your own text into small, fast, explainable language models on your own machine.",
)
app.add_typer(words_app, name="words")
app.add_typer(similarity_app, name="similarity")
app.add_typer(summarize_app, name="summarize")
app.add_typer(gan_app, name="gan")
app.command()(grow)
for command in (drift, explain, pretrain, score, suggest, generate):
    app.command()(command)


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
    seed: Seed = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes of the encoder over the corpus; without, its size decides.")
    ] = None,
    dim: Annotated[int, typer.Option(min=2, help="Width of the document vectors.")] = 256,
    words: Annotated[
        str,
        typer.Option(
            metavar="auto|discover|characters|spaces|PATH",
            help="Words of scripts without spaces: auto discovers them if at least 5 % of the letters are of such "
            "scripts, discover always, characters never; spaces: the text is cut into words already; PATH: a word "
            "model or segmenter.",
        ),
    ] = "auto",
    id_column: IdColumn = None,
    title_column: TitleColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    encoding: Encoding = "utf-8",
    skip_errors: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Learn words, vectors and a search engine from raw text.

    An interrupted build continues when the same command is given again.
    """
    from kexue.workbench import Workspace
    from kexue.workbench.lexicon import check_choice_of_words

    options, chosen = corpus_options(
        "PATHS", paths, packages, encoding, skip_errors, id_column=id_column, title_column=title_column,
        text_column=text_column, label_column=label_column,
    )  # fmt: skip
    try:
        words = check_choice_of_words(words)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--words") from None
    with interruptible("interrupted; give the same command again to continue"), option_names(skip_errors):
        workspace = Workspace.build(
            list(paths) if paths else None,
            out,
            force=force,
            packages=chosen,
            evaluate=evaluate,
            seed=seed,
            epochs=epochs,
            dim=dim,
            words=words,
            read_options=options,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    if as_json:
        print_json(workspace.info())
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

    print_hits(Workspace.open(folder).search(query, k=k), as_json)


@app.command()
def similar(
    folder: Folder,
    identifier: Annotated[str, typer.Argument(metavar="ID", help="Id of a document.")],
    k: Count = 10,
    as_json: Json = False,
) -> None:
    """Find documents related to a document."""
    from kexue.workbench import Workspace

    print_hits(Workspace.open(folder).similar(identifier, k=k), as_json)


@app.command()
def info(folder: Folder, as_json: Json = False) -> None:
    """What a workspace holds and how good it is."""
    from kexue.workbench import Workspace
    from kexue.workbench.lexicon import explain as explain_choice
    from kexue.workbench.steps import summary

    found = Workspace.open(folder).info()
    if as_json:
        print_json(found)
        return
    print(f"{folder}: built from {found['source']} with kexue {found['kexue']}")
    for name, figures in found["figures"].items():
        print(f"  {name:9} {summary(figures)}")
    if chosen := explain_choice(found["figures"].get("tokenise", {}).get("choice", {})):
        print(f"  words: {chosen}")
    for title, rows in found["evaluation"].items():
        print(f"\n{title}")
        print_table(rows)


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
        print_json(rows if slug is None else rows[0])
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
    print_table(table)
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
    model: Annotated[Path | None, typer.Option(help="A model of yours, for nsp-zero-shot.")] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled texts of yours, with --model.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a method's claim again."""
    from kexue.reproduce import available, run, write_report
    from kexue.reproduce.report import figure_tables

    if slug is not None and slug not in available():
        raise typer.BadParameter(f"no reproduction of {slug!r}; expected one of {', '.join(available())}")
    given = {name: path for name, path in (("model", model), ("data", data)) if path is not None}
    if given and slug is None:
        raise typer.BadParameter("--model and --data need the method that they are for")
    if len(given) == 1:
        raise typer.BadParameter("--model and --data go together")
    results = []
    for name in [slug] if slug is not None else available():
        with interruptible("interrupted"):
            results.append(run(name, quick=quick, seed=seed, out=out, **given))
        result = results[-1]
        if as_json:
            continue
        print(f"{result.slug}: {result.verdict} ({result.seconds:.1f} CPU s)\n{result.claim}")
        for title, (head, rows) in figure_tables(result.figures):
            print(f"\n{title}")
            print_table([dict(zip(head, row, strict=True)) for row in rows])
        if result.note:
            print(f"\n{result.note}")
        print(f"\nfigure: {result.figure_path}\n")
    page = write_report(results, out / "report.html")
    if as_json:
        print_json([{**result.__dict__, "figure_path": str(result.figure_path)} for result in results])
    else:
        print(f"report: {page}")


def main() -> None:
    """Entry point of the command ``kexue`` and of ``python -m kexue``."""
    try:
        app()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, KeyError, FloatingPointError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
