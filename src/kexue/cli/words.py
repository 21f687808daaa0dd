"""The commands ``kexue words``: learn vocabulary, phrases, templates and vectors from text, and ask about words."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    TitleColumn,
    interruptible,
    option_names,
    print_json,
)

if TYPE_CHECKING:
    from kexue.workbench.word_corpus import WordCorpus
    from kexue.workbench.word_model import WordModel

_MEMORY = re.compile(r"\s*\d+(\.\d+)?\s*([KMGT]?B)?\s*", re.I)

_KINDS = ("auto", "words", "spaces", "characters")

words_app = typer.Typer(no_args_is_help=True, help="Words, phrases, templates and word vectors of a text.")

Corpus = Annotated[
    list[Path],
    typer.Argument(metavar="CORPUS...", help="Text files, folders, .jsonl, .csv, .parquet; - is standard input."),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="MODEL", help="The word model: new, or one to extend.")]
Kind = Annotated[
    str,
    typer.Option(
        metavar="|".join(_KINDS),
        help="How text is cut into words. words: lower-case words, in scripts without spaces those of the model's "
        "vocabulary; auto: the same, the vocabulary being discovered first where it is missing; spaces: the text is "
        "cut already; characters: single characters of scripts without spaces.",
    ),
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Threads or processes; all cores without.")]
Memory = Annotated[str | None, typer.Option(metavar="2GB", help="Memory for counting.")]
Executor = Annotated[str | None, typer.Option(metavar="processes|ray", help="Count in processes or on a Ray cluster.")]
Runs = Annotated[
    Path | None,
    typer.Option(
        "--runs",
        metavar="DIR",
        help="Keep counted runs there; without, those of a long count lie beside MODEL until it is done. A killed "
        "count goes on.",
    ),
]


@words_app.command()
def vocabulary(
    corpus: Corpus,
    out: Out,
    min_count: Annotated[int | None, typer.Option(min=1, help="Least count of a word; 4 to 32 without.")] = None,
    order: Annotated[int, typer.Option(min=2, help="Longest run of characters that is tested.")] = 4,
    min_pmi: Annotated[
        str, typer.Option(metavar="auto|2,4,6", help="Least mutual information, one number for each length from 2.")
    ] = "auto",
    method: Annotated[str, typer.Option(metavar="solidity|adjacent", help="How words are found.")] = "solidity",
    redundancy: Annotated[
        str, typer.Option(metavar="length|article|none", help="By which rule words that others explain go.")
    ] = "length",
    max_words: Annotated[int, typer.Option(min=1, help="Keep the most frequent words only.")] = 50_000,
    jieba: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a dictionary for jieba.")] = None,
    hf: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write a tokenizer for transformers.")] = None,
    k: Count = 20,
    memory: Memory = None,
    jobs: Jobs = None,
    executor: Executor = None,
    runs: Runs = None,
    id_column: IdColumn = None,
    title_column: TitleColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    encoding: Encoding = "utf-8",
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Discover the words of a text without spaces, such as Chinese."""
    thresholds = _thresholds(min_pmi, order, method)
    _choice("--method", method, ("solidity", "adjacent"))
    _choice("--redundancy", redundancy, ("length", "article", "none"))
    _has_folder("--jieba", jieba)
    counting = _counting(jobs, memory, executor, runs)
    with _learning(
        corpus, out, skip_bad, encoding=encoding, id_column=id_column, title_column=title_column,
        text_column=text_column, label_column=label_column,
    ) as (model, text):  # fmt: skip
        from kexue.workbench.word_steps import learn_vocabulary

        figures = learn_vocabulary(
            model, text, order=order, min_count=min_count, min_pmi=thresholds, method=method,
            redundancy=None if redundancy == "none" else redundancy, max_words=max_words,
            counting=counting,
        )  # fmt: skip
        segmenter = model.segmenter
        if jieba is not None and segmenter is not None:
            segmenter.to_jieba_dict(jieba)
        if hf is not None and segmenter is not None:
            segmenter.to_hf_tokenizer().save_pretrained(hf)
        top = [{"word": word, "count": count} for word, count in figures.pop("top")[:k]]
        _answer(model, text, "vocabulary", figures, {"words": top}, as_json)
    if not as_json:
        print(" ".join(f"{row['word']} {row['count']:,}" for row in top))


@words_app.command()
def phrases(
    corpus: Corpus,
    out: Out,
    min_count: Annotated[int | None, typer.Option(min=1, help="Least count of a phrase.")] = None,
    min_gain: Annotated[
        float | None, typer.Option(help="Least gain of joining two words; without --min-npmi it alone decides.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Words of the longest phrase.")] = None,
    min_npmi: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Least normalised mutual information of its words.")
    ] = None,
    tokenizer: Kind = "auto",
    k: Count = 20,
    id_column: IdColumn = None,
    title_column: TitleColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    encoding: Encoding = "utf-8",
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Find phrases: neighbouring words that belong together."""
    _choice("--tokenizer", tokenizer, _KINDS)
    with _learning(
        corpus, out, skip_bad, encoding=encoding, id_column=id_column, title_column=title_column,
        text_column=text_column, label_column=label_column,
    ) as (model, text):  # fmt: skip
        from kexue.workbench.word_steps import choose_words, learn_phrases, phrase_rows
        from kexue.workbench.word_tokens import join_words

        words = choose_words(model, text, tokenizer)
        settings = _given(min_count=min_count, min_gain=min_gain, max_length=max_length, min_npmi=min_npmi)
        figures = learn_phrases(model, text, words, settings)
        rows = phrase_rows(model.phrases, k)
        _answer(model, text, "phrases", figures, {"phrases": rows}, as_json)
        if not as_json:
            for row in rows:
                print(f"{row['count']:8,}  {join_words(row['words'])}")


@words_app.command()
def templates(
    corpus: Corpus,
    out: Out,
    window: Annotated[int | None, typer.Option(min=1, help="Words between which relations are looked for.")] = None,
    min_prob: Annotated[float | None, typer.Option(min=0, help="Least probability of a pair of words.")] = None,
    min_pmi: Annotated[float | None, typer.Option(help="Least mutual information of a pair of words.")] = None,
    min_support: Annotated[int | None, typer.Option(min=1, help="Least number of sentences of a template.")] = None,
    max_words: Annotated[int | None, typer.Option(min=1, help="Most fixed words of a template.")] = None,
    tokenizer: Kind = "auto",
    k: Count = 20,
    id_column: IdColumn = None,
    title_column: TitleColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    encoding: Encoding = "utf-8",
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Find sentence templates: patterns of words with slots."""
    _choice("--tokenizer", tokenizer, _KINDS)
    with _learning(
        corpus, out, skip_bad, encoding=encoding, id_column=id_column, title_column=title_column,
        text_column=text_column, label_column=label_column,
    ) as (model, text):  # fmt: skip
        from kexue.workbench.word_steps import choose_words, learn_templates

        words = choose_words(model, text, tokenizer)
        settings = _given(
            window=window, min_prob=min_prob, min_pmi=min_pmi, min_support=min_support, max_words=max_words
        )
        figures = learn_templates(model, text, words, settings, examples=max(k, 100))
        rows = model.notes["templates"]["examples"][:k]
        _answer(model, text, "templates", figures, {"templates": rows}, as_json)
        if not as_json:
            for row in rows:
                print(f"{row['support']:8,}  {row['text']}    {_slots(row)}".rstrip())


@words_app.command()
def vectors(
    out: Out,
    corpus: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CORPUS...", help="Text files, folders, .jsonl, .csv, .parquet; - is standard input."),
    ] = None,
    dim: Annotated[int, typer.Option(min=1, max=4096, help="Width of the vectors.")] = 128,
    window: Annotated[int, typer.Option(min=1, help="Words to each side that are context.")] = 10,
    min_count: Annotated[int | None, typer.Option(min=1, help="Least count of a word; 5 to 25 without.")] = None,
    sweeps: Annotated[int | None, typer.Option(min=1, help="Passes over the counts.")] = None,
    solver: Annotated[str, typer.Option(metavar="als|adagrad|spectral", help="How vectors are fitted.")] = "als",
    tables: Annotated[
        str, typer.Option("--model", metavar="shared|concat|sum", help="One table of vectors, or two.")
    ] = "shared",
    tokenizer: Kind = "auto",
    word2vec: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a word2vec file.")] = None,
    binary: Annotated[bool, typer.Option("--binary", help="Write the word2vec file in binary.")] = False,
    from_word2vec: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take the vectors of a word2vec file instead of a CORPUS.")
    ] = None,
    memory: Memory = None,
    jobs: Jobs = None,
    executor: Executor = None,
    runs: Runs = None,
    seed: Seed = 0,
    id_column: IdColumn = None,
    title_column: TitleColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    encoding: Encoding = "utf-8",
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Learn word vectors whose inner product is the pointwise mutual information."""
    _choice("--solver", solver, ("als", "adagrad", "spectral"))
    _choice("--model", tables, ("shared", "concat", "sum"))
    _choice("--tokenizer", tokenizer, _KINDS)
    if bool(corpus) == (from_word2vec is not None):
        raise typer.BadParameter("give either a CORPUS or --from-word2vec FILE")
    if binary and word2vec is None:
        raise typer.BadParameter("--binary belongs to --word2vec FILE")
    _has_folder("--word2vec", word2vec)
    counting = _counting(jobs, memory, executor, runs)
    with _learning(
        corpus or [], out, skip_bad, encoding=encoding, id_column=id_column, title_column=title_column,
        text_column=text_column, label_column=label_column,
    ) as (model, text):  # fmt: skip
        from kexue.workbench.word_steps import choose_words, import_vectors, learn_vectors

        if text is None:
            figures = import_vectors(model, Path(str(from_word2vec)))
        else:
            words = choose_words(model, text, tokenizer, counting)
            figures = learn_vectors(
                model, text, words, dim=dim, window=window, min_count=min_count, sweeps=sweeps, solver=solver,
                tables=tables, seed=seed, counting=counting,
            )  # fmt: skip
        if word2vec is not None:
            model.vectors.save_word2vec_format(word2vec, binary=binary)
        _answer(model, text, "vectors", figures, {}, as_json)
    if not as_json:
        print(f"Try: kexue words related {out} WORD")


@words_app.command()
def parse(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A word model with templates, or a corpus.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT...", help="Sentences to parse; lines of standard input without.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="MODEL", help="With a corpus: the model whose templates are used or made."),
    ] = None,
    tokenizer: Kind = "auto",
    id_column: IdColumn = None,
    title_column: TitleColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    encoding: Encoding = "utf-8",
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Parse sentences by templates.

    SOURCE is a word model: its templates parse the TEXTs. SOURCE is a corpus: templates are learned from it into MODEL
    if that has none, and all of its sentences are parsed into MODEL/parses.jsonl.
    """
    from kexue.workbench.word_model import WordModel, is_model

    _choice("--tokenizer", tokenizer, _KINDS)
    if out is None:
        if not is_model(source) and source.exists():
            raise typer.BadParameter(f"{source} is a corpus; --out MODEL says where its templates and parses go")
        from kexue.workbench.word_steps import parser

        _print_trees(parser(WordModel.open(source)), texts or _lines(), as_json)
        return
    if is_model(source):
        raise typer.BadParameter(f"{source} is a word model and parses TEXTs; --out belongs to a corpus")
    with _learning(
        [source], out, skip_bad, encoding=encoding, id_column=id_column, title_column=title_column,
        text_column=text_column, label_column=label_column,
    ) as (model, text):  # fmt: skip
        from kexue.workbench.word_steps import choose_words, learn_templates, parse_corpus, parser

        if "templates" not in model.notes:
            learn_templates(model, text, choose_words(model, text, tokenizer))
        figures = parse_corpus(model, text)
        trees = _trees(parser(model), texts or [])
        _answer(model, text, "parses", figures, {"trees": trees} if texts else {}, as_json)
    if not as_json:
        for tree in trees:
            print(tree["parse"])


@contextmanager
def _learning(paths: list[Path], out: Path, skip_bad: bool, **read: Any) -> Iterator[tuple[WordModel, Any]]:
    """The model to write into and the text to learn from (None without paths), looked through for what is wrong."""
    from kexue.workbench.word_corpus import WordCorpus
    from kexue.workbench.word_model import WordModel

    with (
        interruptible(f"interrupted; {out} holds what was finished. The same command goes on where it can"),
        option_names(skip_bad, "--skip-bad"),
        WordModel.writing(out) as model,
        tempfile.TemporaryDirectory() as folder,
    ):
        corpus = None
        if paths:
            files = [_from_standard_input(Path(folder)) if str(path) == "-" else path for path in paths]
            corpus = WordCorpus(files, skip_bad=skip_bad, **read)
            corpus.paths = list(paths)  # as they were given
            for path, reason in corpus.skipped:
                print(f"left out: {path}: {reason}", file=sys.stderr)
        yield model, corpus


def _from_standard_input(folder: Path) -> Path:
    """Standard input as a file: counting reads it more than once."""
    path = folder / "standard-input.txt"
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path


def _answer(
    model: WordModel,
    corpus: WordCorpus | None,
    part: str,
    figures: Mapping[str, Any],
    more: dict[str, Any],
    as_json: bool,
) -> None:
    """Write the report of the model and tell what was learned."""
    from kexue.workbench.steps import summary
    from kexue.workbench.word_report import write_word_report

    report = write_word_report(model)
    for name in model.stale():
        print(f"the {name} of {model.folder} were made with an earlier vocabulary; make them again", file=sys.stderr)
    if as_json:
        skipped = [{"path": path, "reason": reason} for path, reason in corpus.skipped] if corpus else []
        print_json({"model": str(model.folder), "part": part, "figures": figures, "skipped": skipped, **more})
    else:
        print(f"{model.folder.name}: {part}: {summary(figures)}. Report: {_from_here(report)}")


def _from_here(path: Path) -> Path:
    """The shorter form of a path below the current folder."""
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, OSError):  # it is elsewhere; the current folder is the model itself, which was exchanged
        return path


def _trees(parse_text: Any, texts: Any) -> list[dict[str, Any]]:
    found = []
    for text in texts:
        tree = parse_text(text)
        found.append({"text": text, "parse": str(tree), "tree": tree.to_dict()})
    return found


def _print_trees(parse_text: Any, texts: Any, as_json: bool) -> None:
    trees = _trees(parse_text, texts)
    if as_json:
        print_json([{"text": tree["text"], "tree": tree["tree"]} for tree in trees])
    else:
        for tree in trees:
            print(tree["parse"])


def _lines() -> list[str]:
    """The lines of standard input that are not blank."""
    return [line.strip() for line in sys.stdin if line.strip()]


def _slots(row: Mapping[str, Any]) -> str:
    return " | ".join(", ".join(names[:4]) for names in row["fillers"])


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _counting(jobs: int | None, memory: str | None, executor: str | None, runs: Path | None) -> Any:
    from kexue.workbench.word_steps import Counting

    if executor is not None:
        _choice("--executor", executor, ("processes", "ray"))
    if memory is not None and not _MEMORY.fullmatch(memory):
        raise typer.BadParameter(f"expected an amount such as 2GB; got {memory!r}", param_hint="--memory")
    return Counting(jobs, memory, executor, None if runs is None else str(runs))


def _choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"expected one of {', '.join(allowed)}; got {value!r}", param_hint=option)


def _has_folder(option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written before the work begins, and not after it."""
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        what = f"{file} is a folder" if file.is_dir() else f"the folder {file.parent} does not exist"
        raise typer.BadParameter(f"expected a file in a folder that exists; {what}", param_hint=option)


def _thresholds(text: str, order: int, method: str) -> Any:
    """The numbers of ``--min-pmi``, or auto."""
    if text == "auto":
        return text
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"expected auto or numbers such as 2,4,6; got {text!r}", param_hint="--min-pmi"
        ) from None
    needed = order - 1 if method == "solidity" else 1
    if len(values) == 1:
        return values[0]
    if len(values) != needed:
        raise typer.BadParameter(f"expected 1 or {needed} numbers; got {len(values)}", param_hint="--min-pmi")
    return values
