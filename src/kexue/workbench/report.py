"""The report of a workspace: one self-contained page that shows what was learned and how good it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from kexue._files import atomic_path
from kexue.workbench import parts as layout
from kexue.workbench.evaluation import choose_held_out
from kexue.workbench.lexicon import explain, telling_words
from kexue.workbench.manifest import tables as measured_tables
from kexue.workbench.pages import page
from kexue.workbench.parts import Parts
from kexue.workbench.search import Hit, Searcher
from kexue.workbench.word_map import Mark, word_map

_MAP_WORDS = 160
_SAMPLE_WORDS = 8
_SAMPLE_SEARCHES = 4


def write_report(
    folder: Path, figures: Mapping[str, Any], timings: Mapping[str, Mapping[str, float]], seed: int = 0
) -> int:
    """Write ``report.html`` into a workspace whose parts are complete.

    Args:
        folder: The workspace, or the folder it is being built in.
        figures: Step -> figures.
        timings: Step -> seconds and memory.
        seed: Seed of the build; it chose the held-out documents.

    Returns:
        The size of the page in bytes.
    """
    parts = Parts.load(folder)
    searcher = Searcher(parts)
    chosen = _telling_words(parts)
    searches, held_out = _searches(searcher, parts, seed)
    text = page(
        "report.html.j2",
        figures=figures,
        words=explain(figures.get("tokenise", {}).get("choice", {})),
        timings=timings,
        tables=measured_tables(figures),
        summaries=figures.get("summaries", {}).get("examples", []),
        signals=figures.get("index", {}).get("signals", {}),
        searches=searches,
        held_out=held_out,
        neighbours=_neighbours(searcher, chosen[:_SAMPLE_WORDS], parts.surface),
        word_map=_word_map(parts, chosen[:_MAP_WORDS], seed),
        curve=_curve(json.loads((folder / layout.CURVE).read_text(encoding="utf-8"))["loss"]),
        mark=_mark,
    )
    with atomic_path(folder / layout.REPORT) as temporary:
        temporary.write_text(text, encoding="utf-8")
    parts.store.close()
    return (folder / layout.REPORT).stat().st_size


def _mark(hit: Hit) -> Markup:
    """The passage of a hit with the matched words marked."""
    out, last = Markup(""), 0
    for start, end in hit.evidence.get("spans", []):
        out += escape(hit.passage[last:start]) + Markup("<mark>") + escape(hit.passage[start:end]) + Markup("</mark>")
        last = end
    return out + escape(hit.passage[last:])


def _telling_words(parts: Parts) -> list[str]:
    if parts.words is None:
        return []
    norms = np.linalg.norm(parts.words.vectors_[:1500], axis=1)
    return telling_words(parts.words.vocabulary_, norms, 1500)


def _neighbours(searcher: Searcher, words: list[str], surface: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(surface.get(word, word), ", ".join(other for other, _ in searcher.words(word, k=8))) for word in words]


def _searches(searcher: Searcher, parts: Parts, seed: int) -> tuple[list[dict[str, Any]], bool]:
    """Sample searches next to plain keyword search, and whether training never saw query and document together."""
    rows = np.flatnonzero(choose_held_out(parts.tokens, seed=seed))
    held_out = bool(len(rows))
    if not held_out:
        rows = np.arange(len(parts.tokens))
    picked = np.random.default_rng(seed).permutation(rows)[:_SAMPLE_SEARCHES]
    out = []
    for document in parts.store.fetch(picked.tolist()):
        query = document.title or document.text.strip().partition("\n")[0][:120]
        if not query.strip():
            continue
        keyword = [row for row, _ in parts.store.keywords(parts.tokenizer(query), 5)]
        out.append(
            {
                "query": query,
                "hits": searcher.search(query, k=5),
                "keyword": parts.store.fetch(keyword),
                "expected": document.id,
            }
        )
    return out, held_out


def _word_map(parts: Parts, words: list[str], seed: int) -> list[Mark]:
    """The map of words, each shown in its usual form."""
    if parts.words is None:
        return []
    return word_map(
        parts.words.vectors_,
        [parts.words.index(word) for word in words],
        [parts.surface.get(word, word) for word in words],
        seed,
    )


def _curve(losses: list[float]) -> dict[str, Any]:
    """The training curve as an SVG path, smoothed to at most 300 points."""
    if len(losses) < 2:
        return {}
    values = np.asarray(losses)
    pieces = np.array_split(values, min(300, len(values)))
    means = np.array([piece.mean() for piece in pieces])
    x = np.linspace(0, 100, len(means))
    low, high = float(means.min()), float(means.max())
    y = 96 - 92 * (means - low) / max(high - low, 1e-12)
    path = "M" + " L".join(f"{a:.2f},{b:.2f}" for a, b in zip(x, y, strict=True))
    return {"path": path, "low": low, "high": high, "steps": len(losses)}
