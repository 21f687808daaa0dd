"""The steps of a build. Each reads files of earlier steps, writes its own, and returns its figures.

Figures are equal for equal corpus, settings and machine; times and memory are kept apart (:func:`measured`).
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from kexue._files import atomic_path, write_json
from kexue._progress import progress, track
from kexue.corpus import Document
from kexue.words.tokenizer import stem
from kexue.workbench import parts
from kexue.workbench.lexicon import decide, threads, vector_min_count, word_vectors
from kexue.workbench.store import DocumentStore
from kexue.workbench.word_tokens import is_unspaced, unspaced_share

if TYPE_CHECKING:
    from kexue.words import Tokenizer
    from kexue.workbench.build import Settings
    from kexue.workbench.tokens import TokenizedCorpus

_SAMPLE = 4000  # documents looked at to tell the script
_MAX_FORMS = 1_000_000  # different words among which the form of a stem to show is chosen
_LATIN = re.compile(r"[a-z]{3,}")
_ASKED = 1000  # related-item questions of a build without --evaluate
_MAX_COUNTED = 50_000_000  # tokens among which pairs are counted; their memory grows with the text
_MAX_DISCOVERED = 50_000_000  # characters in which words are looked for
_MAX_EVALUATED = 100_000  # documents among which a build searches to measure itself; the baselines need several copies
_MAX_WORDS = 100_000  # words with a vector of their own; the rest is too rare to be learned


@dataclass
class Context:
    """What a step works with."""

    folder: Path
    settings: Settings
    figures: dict[str, Any]
    timings: dict[str, dict[str, float]]


@contextmanager
def measured(timings: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Note seconds and the peak memory of a step under ``timings[name]``."""
    _reset_peak()
    clock, cpu = time.perf_counter(), time.process_time()
    yield
    timings[name] = {
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "seconds": round(time.perf_counter() - clock, 2),
        "peak_mib": round(_peak_mib(), 1),
    }


def _reset_peak() -> None:
    with suppress(OSError):  # Linux only; elsewhere the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def summary(figures: Mapping[str, Any]) -> str:
    """One line with the plain values among the figures of a step."""
    shown = []
    for key, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            continue
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
        shown.append(f"{key.replace('_', ' ')} {text}")
    return ", ".join(shown)


def read(folder: Path, documents: Iterable[Document]) -> tuple[dict[str, Any], str]:
    """Copy the documents into the store; returns the figures and a digest of the content."""
    with progress("read") as bar:
        store, content, characters = DocumentStore.create(folder / parts.DOCUMENTS, documents, bar.advance)
    figures: dict[str, Any] = {"documents": len(store), "characters": characters}
    store.close()
    skipped = getattr(documents, "skipped", None)
    if skipped:
        figures["skipped"] = getattr(documents, "skipped_count", len(skipped))
        figures["skipped_examples"] = [f"{path}: {reason}" for path, reason in list(skipped)[:20]]
    return figures, content


def tokenise(context: Context) -> dict[str, Any]:
    """Find the words: learn a lexicon where the script has no spaces, number all tokens, index them."""
    from kexue.words import Tokenizer
    from kexue.workbench.tokens import tokenize_corpus

    folder = context.folder
    store = DocumentStore(folder / parts.DOCUMENTS, write=True)
    read_characters = int(context.figures["read"]["characters"])
    # A lexicon from so much text is complete; the tables of the counter grow with the text.
    texts = _Texts(store, max(1, -(-read_characters // _MAX_DISCOVERED)))
    segmenter, choice = decide(context.settings.words, _unspaced_share(store), read_characters, texts)
    tokenizer = Tokenizer(segmenter)
    write_json(folder / parts.TOKENIZER, tokenizer.to_config())
    corpus = tokenize_corpus(store, tokenizer, folder / parts.TOKENS)
    store.clear_words()
    forms: Counter[str] = Counter()
    store.index_words(_token_lists(store, tokenizer, forms))
    store.close()
    write_json(folder / parts.SURFACE, _surface_forms(forms, corpus.ids))
    found = {"discovered_words": choice["discovered_words"]} if "discovered_words" in choice else {}
    return {
        "choice": choice,  # in words: lexicon.explain
        **found,
        "vocabulary": len(corpus.vocabulary),
        "tokens": int(len(corpus.head.values) + len(corpus.body.values)),
        "signals": {name: bool(on) for name, on in corpus.flags.items()},
    }


class _Texts:
    """The texts of every ``step``-th document of a store, as often as they are asked for."""

    def __init__(self, store: DocumentStore, step: int = 1) -> None:
        self._store, self._step = store, step

    def __iter__(self) -> Iterator[str]:
        for document in islice(self._store, 0, None, self._step):
            yield document.text


def _unspaced_share(store: DocumentStore) -> float:
    """Share of letters of unspaced scripts in a sample spread over the corpus."""
    step = max(1, len(store) // _SAMPLE)
    return unspaced_share(document.text[:5000] for document in store.fetch(range(0, len(store), step)))


def _surface_forms(forms: Mapping[str, int], known: Mapping[str, int]) -> dict[str, str]:
    """Stem -> its most frequent form in the text (ties alphabetical), for showing words to people."""
    best: dict[str, tuple[int, str]] = {}
    for form, number in sorted(forms.items()):
        root = stem(form)
        if root in known and number > best.get(root, (0, ""))[0]:
            best[root] = (number, form)
    return {root: form for root, (_, form) in best.items() if form != root}


def _token_lists(store: DocumentStore, tokenizer: Tokenizer, forms: Counter[str]) -> Iterator[list[str]]:
    for document in track(store, "index words", len(store)):
        if len(forms) < _MAX_FORMS:
            forms.update(_LATIN.findall(document.text.lower()))
        # A query is met by the title, the text and the parts of the id alike.
        yield tokenizer(f"{document.title}\n{document.text}\n{document.id}")


def count(context: Context) -> dict[str, Any]:
    """Count which words stand near each other."""
    from kexue.words import CooccurrenceCounter
    from kexue.workbench.tokens import TokenizedCorpus, concatenate

    settings = context.settings
    corpus = TokenizedCorpus.load(context.folder / parts.TOKENS)
    corpus = _some(corpus, settings.seed)
    text = concatenate(corpus.head, corpus.body)
    ids = _without_repeated_characters(text.values, corpus.vocabulary)
    counts = np.bincount(ids[ids >= 0], minlength=len(corpus.vocabulary))
    min_count = settings.min_count or vector_min_count(len(ids))
    kept = np.flatnonzero(counts >= min_count)
    kept = kept[np.argsort(-counts[kept], kind="stable")][:_MAX_WORDS]
    number = np.full(len(corpus.vocabulary) + 1, -1, np.int32)
    number[kept] = np.arange(len(kept), dtype=np.int32)
    if len(kept) < 2:
        return {"words": len(kept), "pairs": 0}
    counter = CooccurrenceCounter(window=settings.window, min_count=1, n_jobs=threads())
    counter.fit_ids(number[ids], text.offsets, [corpus.vocabulary[i] for i in kept])
    lower = counter.lower_
    with atomic_path(context.folder / parts.COUNTS) as temporary:
        save_file(
            {
                "data": lower.data,
                "indices": lower.indices.astype(np.int32),
                "indptr": lower.indptr.astype(np.int64),
                "counts": counter.counts_,
                "kept": kept,
            },
            temporary,
        )
    return {"words": len(kept), "pairs": int(lower.nnz), "min_count": min_count}


def _some(corpus: TokenizedCorpus, seed: int) -> TokenizedCorpus:
    """The corpus, or of a very large one as many random documents as have ``_MAX_COUNTED`` tokens together."""
    lengths = corpus.head.lengths + corpus.body.lengths
    if lengths.sum() <= _MAX_COUNTED:
        return corpus
    order = np.random.default_rng(seed).permutation(len(corpus))
    count = max(1, int(np.searchsorted(np.cumsum(lengths[order]), _MAX_COUNTED, side="right")))
    return corpus.take(np.sort(order[:count]))


def _without_repeated_characters(ids: NDArray[np.int32], vocabulary: list[str]) -> NDArray[np.int32]:
    """Blank out (-1) the characters that the tokenizer repeats behind a word of an unspaced script.

    They would make the characters of a word its closest relatives. A word that is in the vocabulary has all its
    characters there too, so they are exactly the next tokens.
    """
    lengths = np.zeros(len(vocabulary), np.int8)
    for number, word in enumerate(vocabulary):
        if len(word) > 1 and is_unspaced(word):
            lengths[number] = sum(unicodedata.category(character) not in ("Mn", "Mc") for character in word)
    out = np.array(ids)
    if lengths.any():
        following = lengths[out]
        place = np.flatnonzero(following > 1)
        for offset in range(1, int(lengths.max()) + 1):
            target = place[following[place] >= offset] + offset
            out[target[target < len(out)]] = -1
    return out


def vectors(context: Context) -> dict[str, Any]:
    """Word vectors whose inner product is the pointwise mutual information."""
    if not context.figures["count"]["pairs"]:
        return {"dim": 0}
    from scipy.sparse import csr_matrix

    from kexue.words import CooccurrenceCounter
    from kexue.workbench.tokens import TokenizedCorpus

    corpus = TokenizedCorpus.load(context.folder / parts.TOKENS)
    stored = load_file(context.folder / parts.COUNTS)
    words = [corpus.vocabulary[i] for i in stored["kept"]]
    size = len(words)
    lower = csr_matrix((stored["data"], stored["indices"], stored["indptr"]), (size, size))
    # The triangle alone: the whole matrix and the checks of one would need many times the memory.
    counts = CooccurrenceCounter.from_counts(lower, words, stored["counts"], window=context.settings.window)
    model = word_vectors(counts, dim=context.settings.word_dim, seed=context.settings.seed, n_jobs=threads())
    model.save(context.folder / parts.WORDS)
    return {"dim": model.dim, "loss": float(model.loss_history_[-1])}


def encoder(context: Context) -> dict[str, Any]:
    """Train the text encoder; continues after its last checkpoint."""
    from kexue.workbench.encoder import train_encoder
    from kexue.workbench.evaluation import choose_held_out
    from kexue.workbench.tokens import TokenizedCorpus

    folder, settings = context.folder, context.settings
    corpus = TokenizedCorpus.load(folder / parts.TOKENS)
    held_out = choose_held_out(corpus, seed=settings.seed)
    model = train_encoder(
        corpus,
        out=folder / parts.TRAINING,
        dim=settings.dim,
        epochs=settings.epochs,
        seed=settings.seed,
        held_out=held_out,
    )
    model.save(folder / parts.ENCODER)
    curve = _training_curve(folder / parts.TRAINING)
    write_json(folder / parts.CURVE, curve)
    return {"dim": settings.dim, "steps": len(curve["loss"]), "loss": curve["loss"][-1] if curve["loss"] else 0.0}


def _training_curve(folder: Path) -> dict[str, list[float]]:
    losses = []
    for path in sorted(folder.rglob("metrics.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            losses.append(float(json.loads(line)["loss"]))
    return {"loss": losses}


def index(context: Context) -> dict[str, Any]:
    """Encode the documents and prepare the answers to queries and to "what is related"."""
    from kexue.models import BagEncoder
    from kexue.workbench.encoder import document_vectors, text_vectors
    from kexue.workbench.ranking import Ranker, heads_are_text
    from kexue.workbench.signals import Signals
    from kexue.workbench.tokens import TokenizedCorpus

    folder = context.folder
    corpus = TokenizedCorpus.load(folder / parts.TOKENS)
    model = BagEncoder.load(folder / parts.ENCODER)
    heads = heads_are_text(corpus)
    Ranker.build(corpus, document_vectors(model, corpus, heads=heads), heads=heads).save(folder / parts.RANKER)
    signals = Signals.build(corpus, text_vectors(model, corpus))
    signals.save(folder / parts.SIGNALS)
    return {"documents": len(corpus), "signals": {name: bool(on) for name, on in signals.used.items()}}


def evaluate(context: Context) -> dict[str, Any]:
    """Measure the search against tf-idf, BM25 and LSA in the same run."""
    from kexue.models import BagEncoder
    from kexue.workbench.evaluation import choose_held_out, held_out_questions, questions, related_items, related_names
    from kexue.workbench.tokens import TokenizedCorpus

    folder, settings = context.folder, context.settings
    corpus = TokenizedCorpus.load(folder / parts.TOKENS)
    model = BagEncoder.load(folder / parts.ENCODER)
    tables: dict[str, list[dict[str, Any]]] = {}
    held_out = choose_held_out(corpus, seed=settings.seed)
    among = _sample_rows(len(corpus), np.flatnonzero(held_out), settings.seed)
    rows = held_out_questions(corpus.take(among), held_out[among], model)
    if rows:
        tables["Held-out titles: which document does the title belong to?"] = rows
    store = DocumentStore(folder / parts.DOCUMENTS)
    identifiers, names = [], []
    for document in store:
        identifiers.append(document.id)
        names.append(document.meta.get("related", ()))
    store.close()
    relevant = related_names(identifiers, names)
    if not settings.evaluate:
        relevant = _sample(relevant, _ASKED, settings.seed)
    if any(relevant):
        needed = {number for i, some in enumerate(relevant) if some for number in (i, *some)}
        among = _sample_rows(len(corpus), np.array(sorted(needed), np.int64), settings.seed)
        place = {number: new for new, number in enumerate(among.tolist())}
        relevant = [{place[j] for j in relevant[i]} for i in among.tolist()]
        rows = related_items(corpus.take(among), relevant, model)
        tables["Related items: which documents does See Also name?"] = rows
    if settings.evaluate:
        # Checkpoints lie with those of the main training, so that this is resumed as well.
        out = folder / parts.TRAINING / "evaluation"
        rows = questions(corpus, seed=settings.seed, epochs=settings.epochs, dim=settings.dim, out=out)
        if rows:
            tables["Questions: first line to document, encoder trained on the other half"] = rows
    # CPU seconds differ from run to run, and figures must not.
    cleaned = {title: [_without(row, "seconds") for row in rows] for title, rows in tables.items()}
    last = [row for rows in cleaned.values() for row in rows[-1:]]  # one plain line for the log: the last row is ours
    line = "; ".join(f"recall@10 {row['recall@10']:.3f} on {row['queries']:,} questions" for row in last)
    figures: dict[str, Any] = {
        "result": line or "nothing to ask: no titles, first lines or See Also",
        "tables": cleaned,
    }
    if len(corpus) > _MAX_EVALUATED:
        figures["searched"] = f"{_MAX_EVALUATED:,} random documents of {len(corpus):,}"
    return figures


def _sample_rows(count: int, needed: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Which of ``count`` documents are searched: all, or those ``needed`` and random ones up to _MAX_EVALUATED."""
    if count <= _MAX_EVALUATED:
        return np.arange(count)
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(seed).permutation(count)[: max(0, _MAX_EVALUATED - len(needed))]] = True
    chosen[needed] = True
    return np.flatnonzero(chosen)


def _without(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


def _sample(relevant: list[set[int]], most: int, seed: int) -> list[set[int]]:
    """Keep the answers of at most ``most`` random questions."""
    asked = [number for number, some in enumerate(relevant) if some]
    kept = set(np.random.default_rng(seed).permutation(asked)[:most].tolist())
    return [some if number in kept else set() for number, some in enumerate(relevant)]


def summaries(context: Context) -> dict[str, Any]:
    """Learn to summarise from texts that bring their own summaries, as documentation does."""
    from kexue.workbench.summary_step import learn_summaries

    return learn_summaries(context)


def report(context: Context) -> dict[str, Any]:
    """Write the report page."""
    from kexue.workbench.report import write_report

    size = write_report(context.folder, context.figures, context.timings, context.settings.seed)
    return {"bytes": size}


def clean(folder: Path) -> None:
    """Remove what only the build needed, and what a killed one left of files it was writing."""
    shutil.rmtree(folder / parts.TRAINING, ignore_errors=True)
    (folder / parts.COUNTS).unlink(missing_ok=True)
    for path in folder.rglob(".*.tmp"):  # from kexue._files.atomic_path
        path.unlink()
