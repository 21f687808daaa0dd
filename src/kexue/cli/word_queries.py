"""The commands ``kexue words`` that ask: related and similar words, analogies, key words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kexue.cli.common import Count, Json, print_json
from kexue.cli.words import words_app

if TYPE_CHECKING:
    from kexue.workbench.word_queries import Ranked

Where = Annotated[
    Path, typer.Argument(metavar="WHERE", help="A word model, a workspace of `kexue build`, or a word2vec file.")
]


@words_app.command()
def related(
    where: Where,
    word: Annotated[str, typer.Argument(help="A word of the corpus.")],
    k: Count = 10,
    as_json: Json = False,
) -> None:
    """Words that occur together with a word more often than chance."""
    from kexue.workbench.word_queries import WordTable

    with WordTable.open(where) as table:
        if parts := table.parts_of(word):
            print(f"{word} is not one word here; the answer is for {' + '.join(parts)}", file=sys.stderr)
        _print_words(table.related(word, k), as_json)


@words_app.command()
def similar(
    where: Where,
    word: Annotated[str, typer.Argument(help="A word of the corpus.")],
    k: Count = 10,
    n_context: Annotated[
        int, typer.Option(min=2, help="Frequent words that are compared by: 10000 for meaning, 500 for grammar.")
    ] = 10_000,
    as_json: Json = False,
) -> None:
    """Words that could stand in the place of a word."""
    from kexue.workbench.word_queries import WordTable

    with WordTable.open(where) as table:
        _print_words(table.similar(word, k, n_context), as_json)


@words_app.command()
def analogy(
    where: Where,
    three: Annotated[
        list[str] | None, typer.Argument(metavar="[A B C]", help="The same as --positive A --negative B --positive C.")
    ] = None,
    positive: Annotated[list[str] | None, typer.Option(metavar="WORD", help="A word to add; may be repeated.")] = None,
    negative: Annotated[
        list[str] | None, typer.Option(metavar="WORD", help="A word to subtract; may be repeated.")
    ] = None,
    k: Count = 10,
    as_json: Json = False,
) -> None:
    """Words closest to A - B + C: king - man + woman."""
    if three and (positive or negative):
        raise typer.BadParameter("give either the three words A B C or --positive and --negative")
    if three and len(three) != 3:
        raise typer.BadParameter(f"expected three words A B C, for A - B + C; got {len(three)}")
    if not three and not positive:
        raise typer.BadParameter("give three words A B C, or at least one --positive word")
    plus, minus = ([three[0], three[2]], [three[1]]) if three else (positive or [], negative or [])
    from kexue.workbench.word_queries import WordTable

    with WordTable.open(where) as table:
        _print_words(table.analogy(plus, minus, k), as_json)


@words_app.command()
def keywords(
    where: Where,
    text: Annotated[str, typer.Argument(help="A sentence or more; - reads standard input.")],
    k: Count = 10,
    as_json: Json = False,
) -> None:
    """The words of a text that say most about it."""
    text = sys.stdin.read() if text == "-" else text
    if not text.strip():
        raise typer.BadParameter("the text is empty; expected at least one word")
    from kexue.workbench.word_queries import WordTable

    with WordTable.open(where) as table:
        found = table.keywords(text, k)
    if not found:
        print("no word of the text is known", file=sys.stderr)
    _print_words(found, as_json)


def _print_words(found: Ranked, as_json: bool) -> None:
    if as_json:
        print_json([{"word": word, "score": score} for word, score in found])
    else:
        for word, score in found:
            print(f"{score:6.3f}  {word}")
