"""Learn the parts of a word model from text. Each function adds one part and returns its figures."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kexue._files import atomic_path
from kexue._progress import track
from kexue.workbench.lexicon import (
    MIN_UNSPACED,
    Unspaced,
    discovery_min_count,
    threads,
    vector_min_count,
    word_vectors,
)
from kexue.workbench.word_corpus import WordCorpus
from kexue.workbench.word_model import WordModel
from kexue.workbench.word_tokens import clauses

_MAX_PARSED = 200  # words; a longer clause is a list or has no punctuation, and parsing takes their square
_ALL_UNSPACED = 0.9  # share of letters from which a text counts as one without spaces
_LONG = 30_000_000  # characters; counting so many takes long enough to keep what is counted
_FILLERS, _FILLER = 8, 40  # examples of what stands in a slot, and characters of one
_TYPICAL = {False: 6.0, True: 1.7}  # characters of a word with its space; of a word of an unspaced script


@dataclass(frozen=True)
class Counting:
    """How counting is done; what is counted does not depend on it.

    Args:
        jobs: Threads or processes; None takes all cores.
        memory: Budget, such as "2GB"; None leaves it to the counter.
        executor: None, "processes" or "ray".
        folder: Where counted runs are kept, so that a killed count goes on. None keeps those of a long count beside
            the model until the part is finished. Each kind of count gets a folder of its own inside.
    """

    jobs: int | None = None
    memory: str | None = None
    executor: str | None = None
    folder: str | None = None

    @contextmanager
    def options(self, model: WordModel, corpus: WordCorpus, *what: Any) -> Iterator[dict[str, Any]]:
        """Keyword arguments for a counter. Runs that were kept only for the case of a kill go when the block is done.

        Args:
            model: What the count is made for; the runs of a long count lie beside it.
            corpus: The text.
            *what: Names what is counted and how: runs of one count must not be taken for those of another.
        """
        options: dict[str, Any] = {"n_jobs": self.jobs or threads(), "executor": self.executor}
        if self.memory is not None:
            options["memory"] = self.memory
        beside = model.folder.with_name(f".{model.folder.name}.counts")
        folder = None if self.folder is None else Path(self.folder)
        if folder is None and corpus.characters >= _LONG:
            folder = beside
        if folder is not None:
            options["folder"] = folder / "-".join(str(word) for word in what if word is not None)
        yield options
        shutil.rmtree(beside, ignore_errors=True)  # also what a killed count of another text has left there


@dataclass(frozen=True)
class Words:
    """How text is cut into words for a part: ``kind`` of the tokenizer, and the function itself."""

    kind: str
    tokenize: Callable[[str], list[str]]


def learn_vocabulary(
    model: WordModel,
    corpus: WordCorpus,
    *,
    order: int = 4,
    min_count: int | None = None,
    min_pmi: Any = "auto",
    method: str = "solidity",
    redundancy: str | None = "length",
    max_words: int = 50_000,
    unspaced_only: bool = False,
    counting: Counting | None = None,
) -> dict[str, Any]:
    """Discover the words of a text and keep them as the model's segmenter.

    Args:
        model: Opened by :meth:`WordModel.writing`.
        corpus: The text.
        order: Longest n-gram that is tested.
        min_count: Least count of a word; None lets the size of the corpus decide (4 to 32).
        min_pmi: "auto", or one number for each n of 2 .. order.
        method: "solidity" or "adjacent".
        redundancy: "length", "article" or None.
        max_words: Keep the most frequent ones.
        unspaced_only: Look at scripts without spaces only: the thresholds of a mixed text must not be chosen for its
            English, whose words need no discovery.
        counting: How counting is done.

    Returns:
        Figures: ``words``, ``long_words`` (two or more characters), ``min_pmi``, ``entropy_per_char``, ``top``.
    """
    from kexue.words import WordDiscovery

    least = min_count or discovery_min_count(int(corpus.characters * (corpus.share if unspaced_only else 1)))
    with (counting or Counting()).options(model, corpus, "vocabulary", order if method == "solidity" else 2) as options:
        with _measured() as spent:
            discovery = WordDiscovery(
                order=order, min_count=least, min_pmi=min_pmi, method=method, redundancy=redundancy, **options
            )
            discovery.fit(Unspaced(corpus) if unspaced_only else corpus.source)
            segmenter = discovery.segmenter(max_words)
        long = [(word, count) for word, count in segmenter.vocabulary.items() if len(word) > 1]
        figures = {
            "words": len(segmenter.vocabulary),
            "long_words": len(long),
            "min_pmi": [float(value) for value in discovery.min_pmi_],
            "entropy_per_char": float(discovery.entropy_per_char_),
        }
        settings = {
            "order": order, "min_count": least, "min_pmi": _plain(min_pmi), "method": method, "redundancy": redundancy,
            "max_words": max_words, "unspaced_only": unspaced_only,
        }  # fmt: skip
        model.put("vocabulary", segmenter.save, _note(settings, corpus, figures, spent))
    return {**figures, "top": long}


def choose_words(model: WordModel, corpus: WordCorpus, kind: str = "auto", counting: Counting | None = None) -> Words:
    """Decide how text is cut into words, and discover them first where that is needed.

    Args:
        model: Opened by :meth:`WordModel.writing`.
        corpus: The text.
        kind: "words": lower-case words, and those of the model's vocabulary in unspaced scripts; "spaces": the pieces
            between white space; "characters": words, and single characters of unspaced scripts; "auto": "words",
            after discovering a vocabulary if the model has none and at least 5 % of the letters are of such scripts.
        counting: How counting is done.
    """
    if kind == "auto":
        if "vocabulary" not in model.notes and corpus.share >= MIN_UNSPACED:
            learn_vocabulary(model, corpus, unspaced_only=corpus.share < _ALL_UNSPACED, counting=counting)
        kind = "words"
    return Words(kind, model.tokenizer(kind))


def learn_phrases(
    model: WordModel, corpus: WordCorpus, words: Words, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Find phrases: neighbouring words that belong together.

    Args:
        model: Opened by :meth:`WordModel.writing`.
        corpus: The text.
        words: From :func:`choose_words`.
        options: Settings of :class:`kexue.words.PhraseMiner` that differ from its own.
    """
    from kexue.words import PhraseMiner

    with _measured() as spent:
        miner = PhraseMiner(**(options or {})).fit(Clauses(corpus, words.tokenize, "phrases"))
    figures = {"phrases": len(miner.phrases_)}
    model.put("phrases", miner.save, _note(_with_words(model, words, options), corpus, figures, spent))
    return figures


def phrase_rows(miner: Any, most: int) -> list[dict[str, Any]]:
    """The phrases of the largest gain, JSON-compatible."""
    best = itertools.islice(miner.phrases_.items(), most)
    return [{"words": list(words), "count": int(miner.counts_[words]), "gain": float(gain)} for words, gain in best]


def learn_templates(
    model: WordModel,
    corpus: WordCorpus,
    words: Words,
    options: Mapping[str, Any] | None = None,
    examples: int = 100,
) -> dict[str, Any]:
    """Find sentence templates.

    Args:
        model: Opened by :meth:`WordModel.writing`.
        corpus: The text, of which each clause is a sentence.
        words: From :func:`choose_words`.
        options: Settings of :class:`kexue.words.TemplateMiner` that differ from its own.
        examples: Of how many of the best templates the most frequent fillers are kept, under ``examples`` in the notes.
    """
    from kexue.words import TemplateMiner

    with _measured() as spent:
        miner = TemplateMiner(**(options or {})).fit(Clauses(corpus, words.tokenize, "templates"))
        # By support alone the first ones would be "… the …": frequent, and saying nothing.
        best = sorted(miner.templates_, key=lambda template: (-template.gain, -template.support, str(template)))
        rows = [_template_row(template) for template in best[:examples]]
    figures = {"templates": len(miner.templates_), "complete_from_support": int(miner.complete_)}
    note = _note(_with_words(model, words, options), corpus, figures, spent)
    model.put("templates", miner.save, {**note, "examples": rows})
    return figures


def _template_row(template: Any) -> dict[str, Any]:
    """A template with what stands in its slots most often, JSON-compatible."""
    return {
        "text": str(template),
        "pattern": list(template.pattern),
        "support": int(template.support),
        "gain": float(template.gain),
        "fillers": [_best_fillers(template.fillers(number)) for number in range(template.holes)],
    }


def _best_fillers(counts: Mapping[str, int]) -> list[str]:
    """The most frequent fillers, of equal ones the shortest, none so long that it hides the others."""
    best = sorted(counts, key=lambda filler: (-counts[filler], len(filler), filler))[:_FILLERS]
    return [filler if len(filler) <= _FILLER else filler[: _FILLER - 1].rstrip() + "…" for filler in best]


def learn_vectors(
    model: WordModel,
    corpus: WordCorpus,
    words: Words,
    *,
    dim: int = 128,
    window: int = 10,
    min_count: int | None = None,
    sweeps: int | None = None,
    solver: str = "als",
    tables: str = "shared",
    seed: int = 0,
    counting: Counting | None = None,
) -> dict[str, Any]:
    """Learn word vectors whose inner product is the pointwise mutual information.

    Args:
        model: Opened by :meth:`WordModel.writing`.
        corpus: The text; contexts end at the line or record.
        words: From :func:`choose_words`.
        dim: Width; at most one less than there are words.
        window: Words to each side that are context.
        min_count: Rarer words get no vector; None lets the size of the corpus decide (5 to 25).
        sweeps: Sweeps of "als" or epochs of "adagrad".
        solver: "als", "adagrad" or "spectral".
        tables: "shared", "concat" or "sum".
        seed: Seed of the initial vectors.
        counting: How counting is done.
    """
    from kexue.words import CooccurrenceCounter

    least = min_count or vector_min_count(int(corpus.characters / _TYPICAL[corpus.share >= 0.5]))
    # White space is split by the counter's own scanner, which is many times faster.
    tokenize = None if words.kind == "spaces" else words.tokenize
    source = corpus.source if tokenize is None else corpus.documents_source
    cut = (words.kind, model.lexicon() if words.kind == "words" else None)
    with (counting or Counting()).options(model, corpus, "vectors", window, *cut) as options:
        with _measured() as spent:
            counts = CooccurrenceCounter(window=window, min_count=least, tokenize=tokenize, **options).fit(source)
            embedding = word_vectors(
                counts, dim=dim, seed=seed, n_jobs=options["n_jobs"], model=tables, solver=solver, max_iter=sweeps
            )
        figures = {
            "words": len(embedding.vocabulary_),
            "dim": int(embedding.vectors_.shape[1]),
            "tokens": int(counts.n_tokens_),
            "pairs": int(counts.lower_.nnz),
            "reg": float(embedding.reg),
            "loss": float(embedding.loss_history_[-1]),
        }
        settings = {
            "dim": dim, "window": window, "min_count": least, "sweeps": sweeps, "solver": solver, "model": tables,
            "seed": seed,
        }  # fmt: skip
        model.put("vectors", embedding.save, _note(_with_words(model, words, settings), corpus, figures, spent))
    return figures


def import_vectors(model: WordModel, path: Path) -> dict[str, Any]:
    """Take the word vectors of a word2vec file (text or binary) into a model."""
    from kexue.words import PMIEmbedding

    with _measured() as spent:
        embedding = PMIEmbedding.load_word2vec_format(path)
    figures = {"words": len(embedding.vocabulary_), "dim": int(embedding.vectors_.shape[1])}
    note = {"settings": {"tokenizer": "spaces", "from_word2vec": str(path)}, "corpus": {}, "figures": figures, **spent}
    model.put("vectors", embedding.save, note)
    return figures


def parse_corpus(model: WordModel, corpus: WordCorpus) -> dict[str, Any]:
    """Parse each clause of a text by the model's templates and write the trees to ``parses.jsonl``.

    A line of that file is ``{"id", "text", "parse", "tree"}``; the last two are null for a clause of more than 200
    words. A tree has ``template`` (null: plain words), ``text`` and, where there are any, ``children``.
    """
    parse = parser(model)
    tokenize = model.tokenizer(part="templates")
    figures = {"sentences": 0, "with_template": 0, "too_long": 0}

    def save(path: Path) -> None:
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for identifier, text in track(corpus.located(), "parse"):
                for clause in clauses(text):
                    figures["sentences"] += 1
                    tree = None
                    if len(tokenize(clause)) > _MAX_PARSED:
                        figures["too_long"] += 1
                    else:
                        tree = parse(clause)
                        figures["with_template"] += tree.template is not None
                    known = (
                        {"parse": None, "tree": None}
                        if tree is None
                        else {"parse": str(tree), "tree": _slim(tree.to_dict())}
                    )
                    line = {"id": identifier, "text": clause, **known}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    # Parsed into a folder of its own first: the note needs the figures.
    with tempfile.TemporaryDirectory(dir=model.folder.parent, prefix=f".{model.folder.name}.parses.") as folder:
        parsed = Path(folder) / "parses.jsonl"
        with _measured() as spent:
            save(parsed)
        model.put("parses", parsed.rename, _note({"max_words": _MAX_PARSED}, corpus, figures, spent))
    return figures


def _slim(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree without what its text says already: a corpus of trees is many times larger than its text."""
    children = [_slim(child) for child in tree["children"]]
    return {"template": tree["template"], "text": tree["text"], **({"children": children} if children else {})}


def parser(model: WordModel) -> Callable[[Any], Any]:
    """A function from text, or words, to its Tree, by the templates of a model.

    Raises:
        WorkspaceError: The model has no templates.
    """
    from kexue.words import TemplateParser

    return TemplateParser(model.templates.templates_, tokenize=model.tokenizer(part="templates")).parse


class Clauses:
    """The clauses of a corpus as lists of words, as often as they are asked for."""

    def __init__(self, corpus: WordCorpus, tokenize: Callable[[str], list[str]], label: str) -> None:
        self._corpus, self._tokenize, self._label = corpus, tokenize, label

    def __iter__(self) -> Iterator[list[str]]:
        for text in track(self._corpus, self._label, self._corpus.documents):
            for clause in clauses(text):
                if words := self._tokenize(clause):
                    yield words


@contextmanager
def _measured() -> Iterator[dict[str, float]]:
    spent: dict[str, float] = {}
    clock, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent["seconds"] = round(time.perf_counter() - clock, 2)
    spent["cpu_seconds"] = round(time.process_time() - cpu, 2)


def _note(
    settings: Mapping[str, Any], corpus: WordCorpus, figures: Mapping[str, Any], spent: Mapping[str, float]
) -> dict[str, Any]:
    return {"settings": dict(settings), "corpus": corpus.describe(), "figures": dict(figures), **spent}


def _with_words(model: WordModel, words: Words, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    lexicon = {"lexicon": model.lexicon()} if words.kind == "words" else {}
    return {**(settings or {}), "tokenizer": words.kind, **lexicon}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
