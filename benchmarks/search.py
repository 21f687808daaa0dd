"""The main job: quality and CPU seconds of our search and related items against tf-idf, BM25 and LSA-256."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Table, versions
from kexue.corpus import installed_documentation
from kexue.words import Tokenizer
from kexue.workbench.encoder import train_encoder
from kexue.workbench.evaluation import questions, related_items, related_names
from kexue.workbench.tokens import TokenizedCorpus, tokenize_corpus

SECTION = "Search and related items"
# The first was looked at while the settings were chosen, the second never.
CORPORA = (("numpy", "scipy", "sklearn"), ("networkx", "matplotlib"))
PEER = "tf-idf"


def table(title: str, workload: str, rows: list[dict[str, Any]], remarks: list[str]) -> Table:
    """A quality table in the form of the harness; its times are whole runs and measured once."""
    base = max(next(row["seconds"] for row in rows if row["name"] == PEER), 1e-3)
    measured = [
        Row(
            row["name"],
            1e3 * row["seconds"],
            base / max(row["seconds"], 1e-3),
            {key: f"{row[key]:.3f}" for key in ("recall@1", "recall@10", "mrr")},
        )
        for row in rows
    ]
    return Table(title, workload, PEER, measured, versions("numpy", "scipy", "scikit-learn", "torch"), remarks)


def load(packages: tuple[str, ...], folder: Path) -> tuple[TokenizedCorpus, list[set[int]]]:
    """The documentation of some packages and its related items."""
    documents = list(installed_documentation(packages))
    related = related_names([d.id for d in documents], [d.meta.get("related", ()) for d in documents])
    return tokenize_corpus(documents, Tokenizer(), folder), related


def run() -> list[Table]:
    """Both tasks on both corpora."""
    tables = []
    for packages in CORPORA:
        with tempfile.TemporaryDirectory() as scratch:
            corpus, related = load(packages, Path(scratch) / "tokens")
            start = time.process_time()
            encoder = train_encoder(corpus, out=Path(scratch) / "encoder")
            training = time.process_time() - start
            name, size = " + ".join(packages), f"{len(corpus)} documents, {len(corpus.vocabulary)} words"
            rows = related_items(corpus, related, encoder)
            for row in rows[-2:]:
                row["seconds"] += training
            workload = (
                f"See Also entries as truth, cut out of every text; {size}, {rows[0]['queries']} queries; one thread."
            )
            remarks = ["Times hold preparation, training and all queries.", f"Training alone: {training:.1f} s."]
            tables.append(table(f"Related items: {name}", workload, rows, remarks))
            rows = questions(corpus)
            workload = (
                f"First line to body, no asked line seen in training; {size}, {rows[0]['queries']} queries; one thread."
            )
            tables.append(table(f"Questions: {name}", workload, rows, ["Two trainings, one for each half."]))
    return tables
