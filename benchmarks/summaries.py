"""Summaries of documentation: quality and CPU time against the first pieces, TextRank and LexRank; one thread.

KEXUE_SUMMARY_PAIRS names a file of pairs of your own (one a line, text and summary as the last two columns between
tabs, or JSON lines with the keys "text" and "summary"), which then replaces the documentation.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, Table, cpu_seconds, installed, versions
from kexue.corpus import installed_documentation
from kexue.tasks import Summarizer, join_pieces, split_pieces, text_rank
from kexue.tasks._summary_data import language_of, scores
from kexue.tasks._text_words import tokens

SECTION = "Summaries"
SEEDS = (0, 1, 2)
PACKAGES = ("sklearn", "torch")  # no setting of the Summarizer was chosen on their docstrings
TRAINED, HELD_BACK = 800, 200


def documentation(package: str) -> tuple[list[str], list[str]]:
    """Docstrings without their first line, and the first lines, where there are 200 characters to summarize."""
    rest, first = [], []
    for document in installed_documentation([package]):
        line, _, text = document.text.strip().partition("\n")
        if len(text.strip()) > 200 and len(tokens(line)) > 2 and tokens(text):
            first.append(line.strip())
            rest.append(text.strip())
    return rest, first


def pairs(path: str) -> tuple[list[str], list[str]]:
    """The documents and summaries of a user's file."""
    texts, summaries = [], []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            text, summary = row["text"], row["summary"]
        else:
            *_, text, summary = line.split("\t")
        texts.append(text)
        summaries.append(summary)
    return texts, summaries


def lead(n: int) -> Callable[[list[str]], list[str]]:
    return lambda texts: [join_pieces(split_pieces(text)[:n]) for text in texts]


def central(texts: list[str]) -> list[str]:
    pieces = [split_pieces(text) for text in texts]
    return [row[int(np.argmax(text_rank(row)))] if row else "" for row in pieces]


def sumy(name: str) -> Callable[[list[str]], list[str]]:
    """A summarizer of sumy that takes the best piece; it gets our pieces and our words (in Chinese: characters)."""
    from importlib import import_module

    from sumy.models.dom import ObjectDocumentModel, Paragraph, Sentence

    class Words:
        def to_words(self, sentence: str) -> tuple[str, ...]:
            return tuple(tokens(sentence))

    summarizer = getattr(import_module(f"sumy.summarizers.{name}_rank"), f"{name.title()}RankSummarizer")()

    def summarize(texts: list[str]) -> list[str]:
        found = []
        for text in texts:
            sentences = [Sentence(piece, Words()) for piece in split_pieces(text) if tokens(piece)]
            best = summarizer(ObjectDocumentModel([Paragraph(sentences)]), 1) if sentences else ()
            found.append(str(best[0]) if best else "")
        return found

    return summarize


def quality(source: str, texts: list[str], summaries: list[str]) -> Table:
    peers: dict[str, Callable[[list[str]], list[str]]] = {"lead-1": lead(1), "lead-3": lead(3)}
    if installed("sumy"):
        peers |= {"sumy TextRank": sumy("text"), "sumy LexRank": sumy("lex")}
    peers["text_rank, best piece"] = central
    found: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    training = []
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(len(texts))
        held = order[: min(HELD_BACK, len(order) // 5)]
        train = order[len(held) :][:TRAINED]
        start = cpu_seconds()
        model = Summarizer(extract_only=True, random_state=seed, show_progress=False)
        model.fit([texts[i] for i in train], [summaries[i] for i in train])
        training.append(cpu_seconds() - start)
        documents, wanted = [texts[i] for i in held], [summaries[i] for i in held]
        for name, summarize in {**peers, "Summarizer, extracts": model.predict}.items():
            start = cpu_seconds()
            written = summarize(documents)
            seconds.setdefault(name, []).append(cpu_seconds() - start)
            found.setdefault(name, []).append(float(scores(written, wanted, model.unit_).mean()))
    ours = found["Summarizer, extracts"]
    base = "sumy TextRank" if "sumy TextRank" in seconds else "text_rank, best piece"
    times = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
    rows = [
        Row(name, times[name], times[base] / max(times[name], 1e-6), {
            "main": f"{np.mean(values):.3f}", "of each seed": " ".join(f"{x:.3f}" for x in values),
            "smallest lead of ours": "" if values is ours else f"{min(np.subtract(ours, values)):+.3f}",
        })
        for name, values in found.items()
    ]  # fmt: skip
    unit, _ = language_of("auto", texts)
    return Table(
        f"Summaries of held-back documents: {source}",
        f"{len(texts):,} pairs, of which {len(train)} to learn from, {len(held)} held back, seeds {SEEDS}; main metric "
        f"0.2 R1 + 0.4 R2 + 0.4 RL by {unit}s. Times are for the held-back documents.",
        base, rows, versions("torch", *(["sumy"] if installed("sumy") else [])),
        [
            f"Training takes {statistics.median(training):.0f} CPU seconds (median).",
            "All get the same pieces; the peers, which know no wanted length, give the one piece they rank first.",
        ],
    )  # fmt: skip


def memory() -> Table:
    """A document of a megabyte."""
    import resource

    texts, summaries = documentation("numpy")
    model = Summarizer(extract_only=True, folds=2, epochs=2, show_progress=False).fit(texts[:100], summaries[:100])
    long = "\n".join(texts)
    long = (long * (1 + 1_000_000 // len(long)))[:1_000_000]
    model.predict([long[:1000]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = cpu_seconds()
    model.predict([long])
    used = cpu_seconds() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    row: Any = Row("Summarizer.predict", used * 1e3, 1.0, {"memory above the start": f"{grown:.0f} MiB"})
    return Table(
        "A long document", f"One document of 1,000,000 characters, {len(split_pieces(long))} pieces.",
        "Summarizer.predict", [row], versions("torch"), ["Peak of the process's memory."],
    )  # fmt: skip


def run() -> list[Table]:
    """All comparisons."""
    given = os.environ.get("KEXUE_SUMMARY_PAIRS")
    sources = {"the user's pairs": pairs(given)} if given else {
        f"docstrings of {package}, first lines as summaries": documentation(package) for package in PACKAGES
    }  # fmt: skip
    return [*(quality(source, *both) for source, both in sources.items()), memory()]
