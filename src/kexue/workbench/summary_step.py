"""The step of a build that learns to summarise: documentation carries its own summaries, the first line of each text.

Corpora of other texts have none, unless their documents bring one as ``meta["summary"]``; then nothing is learned here,
and :meth:`kexue.workbench.Workspace.summarize` ranks sentences by the vectors of the workspace. So it does if what was
learned, with these vectors among its features, is no better on texts of modules that were held back.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np

from kexue.corpus import Document, split_summary
from kexue.workbench import parts
from kexue.workbench.steps import Context
from kexue.workbench.store import DocumentStore
from kexue.workbench.summaries import SummarySettings, compared, fitted
from kexue.workbench.summary_evaluation import usual_length
from kexue.workbench.summary_extract import summarize_by_model
from kexue.workbench.summary_pairs import Pair
from kexue.workbench.summary_text import sentence_spans
from kexue.workbench.summary_vectors import piece_features, summarize_by_vectors

__all__ = ["TITLE", "learn_summaries", "pair_of"]

TITLE = "Summaries: the first line of a text from the rest, of modules that training never saw"
FEWEST = 60  # pairs below which nothing is learned
MOST = 1800  # pairs that are used
HELD = 300  # of them, at most, and at most a fifth: held back
LEAST_HELD = 5  # without so many nothing tells whether learning pays
LONGEST = 6_000  # characters of a text
TRIED = 4  # times as many documents are looked at, since many have no summary or one that another has
_BLOCK = 256
FOLDS, EPOCHS = 2, 8  # what pays: a quarter of a minute
EXAMPLES = 4  # on the report page
_LEAST_WORDS = 3
_LOOKED_AT = 1500  # characters, to tell whether a text has several sentences


def learn_summaries(context: Context) -> dict[str, Any]:
    """Train a summarizer on the pairs that the documents hold, and keep it if it beats the vectors on other modules."""
    folder, seed = context.folder, context.settings.seed
    store = DocumentStore(folder / parts.DOCUMENTS)
    pairs = _sample(store, seed)
    store.close()
    if len(pairs) < FEWEST:
        why = f"{len(pairs)} texts bring a summary, fewer than {FEWEST}" if pairs else "no text brings a summary"
        return {"result": f"nothing to learn from ({why}); texts are summarised by their vectors"}
    train, held = ([pair for pair, _ in part] for part in _split(pairs, seed))
    if len(held) < LEAST_HELD:
        why = f"the {len(pairs)} texts that bring a summary are of too few modules to measure on some of these"
        return {"result": f"nothing learned ({why}); texts are summarised by their vectors"}
    settings = SummarySettings(extract_only=True, folds=FOLDS, epochs=EPOCHS, seed=seed)
    opened = parts.Parts.load(folder)
    model = fitted(train, settings, FOLDS, folder / parts.TRAINING / "summaries", piece_features(opened))
    length = usual_length([pair.summary for pair in train])
    by_vectors = [summarize_by_vectors(opened, pair.text, about=length).text for pair in held]
    opened.store.close()
    rows = compared(model, train, held, {"vectors": by_vectors})
    scores = {row["name"]: row["main"] for row in rows}
    better = scores["summarizer"] > scores["vectors"]
    if better:
        model.save(folder / parts.SUMMARIZER)
        shown = [summarize_by_model(model, pair.text).text for pair in held[:EXAMPLES]]
    else:  # a workspace without a summarizer takes its vectors
        shutil.rmtree(folder / parts.SUMMARIZER, ignore_errors=True)
        shown = by_vectors[:EXAMPLES]
    others = ", ".join(f"{name} {score:.3f}" for name, score in scores.items() if name != "summarizer")
    return {
        "pairs": len(train),
        "held back": len(held),
        "ROUGE on these": f"summarizer {scores['summarizer']:.3f}, {others}",
        "used": "the summarizer" if better else "the vectors, since the summarizer is not better",
        "tables": {TITLE: rows},
        "examples": [
            {"id": pair.id, "reference": pair.summary, "summary": summary}
            for pair, summary in zip(held, shown, strict=False)
        ],
    }


def pair_of(document: Document) -> Pair | None:
    """The text of a document without its summary, and the summary; None if it has none of its own.

    Example:
        >>> text = "Sum of two numbers.\\n\\nThe numbers are added. Both may be negative. Nothing is rounded."
        >>> pair = pair_of(Document("add", text, "Sum of two numbers.", ("math", "math"), {"package": "math"}))
        >>> pair.summary, pair.text[:22]
        ('Sum of two numbers.', 'The numbers are added.')
        >>> pair_of(Document("add", text, "Sum of two numbers.")) is None
        True
    """
    given = document.meta.get("summary")
    if isinstance(given, str) and given.strip():
        return Pair(document.id, document.text, given) if document.text.strip() else None
    if not document.title or "package" not in document.meta:
        return None
    summary, rest = split_summary(document.text)
    if summary != document.title or len(summary.split()) < _LEAST_WORDS or len(sentence_spans(rest[:_LOOKED_AT])) < 2:
        return None
    return Pair(document.id, rest[:LONGEST], summary)


def _sample(store: DocumentStore, seed: int) -> list[tuple[Pair, str]]:
    """At most MOST pairs with different summaries, of random documents, each with its module."""
    order = np.random.default_rng(seed).permutation(len(store))[: TRIED * MOST]
    found: dict[str, tuple[Pair, str]] = {}
    for start in range(0, len(order), _BLOCK):
        for document in store.fetch(order[start : start + _BLOCK].tolist()):
            pair = pair_of(document)
            if pair is not None and pair.summary not in found:
                found[pair.summary] = pair, document.labels[1] if len(document.labels) > 1 else document.id
            if len(found) == MOST:
                return list(found.values())
    return list(found.values())


def _split(pairs: list[tuple[Pair, str]], seed: int) -> tuple[list[tuple[Pair, str]], list[tuple[Pair, str]]]:
    """Pairs to learn from and those held back, which come from other modules."""
    modules = sorted({module for _, module in pairs})
    order = np.random.default_rng(seed + 1).permutation(len(modules))
    sizes = {module: sum(1 for _, other in pairs if other == module) for module in modules}
    most = min(HELD, len(pairs) // 5)
    held: set[str] = set()
    count = 0
    for module in (modules[i] for i in order):
        if count + sizes[module] <= most:
            held.add(module)
            count += sizes[module]
    return [pair for pair in pairs if pair[1] not in held], [pair for pair in pairs if pair[1] in held]
