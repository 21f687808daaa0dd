"""Counting and word vectors against plain scipy and numpy programs and gensim."""

from __future__ import annotations

import csv
import importlib.util
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from benchmarks.harness import Row, Table, compare, installed, versions
from kexue.words import CooccurrenceCounter, PMIEmbedding
from kexue.words._pairs import from_counter, make_pairs

SECTION = "Words"

WINDOW, MIN_COUNT = 10, 5


def documentation() -> list[str]:
    """Triple-quoted strings of numpy, scipy and scikit-learn as installed: English words in lower case."""
    texts = []
    for package in ("numpy", "scipy", "sklearn"):
        spec = importlib.util.find_spec(package)
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            for text in re.findall(r'"""(.*?)"""', path.read_text(encoding="utf-8", errors="replace"), re.S):
                texts.append(" ".join(re.findall(r"[a-z]+", text.lower())))
    return [text for text in texts if text]


def scipy_counts(texts: list[str]) -> tuple[list[str], sparse.csr_matrix]:
    """The plain program: str.split, a dict, one COO matrix for each distance."""
    number: dict[str, int] = {}
    ids, ends = [], []
    for text in texts:
        ids += [number.setdefault(word, len(number)) for word in text.split()]
        ends.append(len(ids))
    counts = np.bincount(ids)
    names = list(number)
    order = sorted((k for k in range(len(names)) if counts[k] >= MIN_COUNT), key=lambda k: (-counts[k], names[k]))
    new = np.full(len(names), -1)
    new[order] = np.arange(len(order))
    tokens = new[np.array(ids)]
    document = np.repeat(np.arange(len(ends)), np.diff([0, *ends]))[tokens >= 0]
    tokens = tokens[tokens >= 0]
    total = sparse.csr_matrix((len(order), len(order)))
    for distance in range(1, WINDOW + 1):
        same = document[distance:] == document[:-distance]
        pair = (tokens[distance:][same], tokens[:-distance][same])
        total = total + sparse.coo_matrix((np.full(same.sum(), 1 / distance), pair), total.shape).tocsr()
    total = (total + total.T).tolil()
    total.setdiag(0)
    return [names[k] for k in order], total.tocsr()


def counting(texts: list[str]) -> Table:
    def ours() -> CooccurrenceCounter:
        return CooccurrenceCounter(WINDOW, MIN_COUNT, progress=False).fit(texts)

    counter, (words, matrix) = ours(), scipy_counts(texts)
    difference = abs(matrix - counter.matrix_ / counter.unit_).max()
    tokens = sum(len(text.split()) for text in texts)
    return compare(
        "Text to co-occurrence counts",
        f"{tokens / 1e6:.2f} M words of documentation to the symmetric matrix: tokenise, vocabulary "
        f"({len(words)} words, min_count {MIN_COUNT}), window {WINDOW}, harmonic weights; one thread.",
        {"kexue": lambda: ours().matrix_, "str.split + scipy COO": lambda: scipy_counts(texts)},
        peer="str.split + scipy COO",
        packages=("numpy", "scipy", "numba"),
        repeats=3,
        remarks=[
            f"Equal vocabularies: {words == counter.vocabulary_}; largest difference of a count: {difference:.1e} "
            "(ours is exact, the peer adds floating-point numbers).",
            "GloVe's C programs are not on a package registry, so they are not measured here.",
        ],
    )


def numpy_sweep(pairs: Any, table: Any, reg: float, w0: float) -> None:
    """The plain program for one sweep of the exact solution: a product and a solve for each word."""
    gram = table.T @ table
    for i in range(len(table)):
        a, b = pairs.indptr[i], pairs.indptr[i + 1]
        near, weight = table[pairs.indices[a:b]], pairs.weights[a:b]
        system = (near * (weight - w0)[:, None]).T @ near + w0 * (gram - np.outer(table[i], table[i]))
        system.flat[:: len(system) + 1] += reg
        new = np.linalg.solve(system, (weight * pairs.targets[a:b]) @ near).astype(np.float32)
        gram += np.outer(new, new) - np.outer(table[i], table[i])
        table[i] = new


def solving(counter: CooccurrenceCounter, dim: int) -> Table:
    pairs = make_pairs(
        from_counter(counter),
        one_table=True,
        x_max=100.0,
        alpha=0.75,
        truncate=True,
        marginal="unigram",
        cds=1.0,
        shift=1.0,
        dtype=np.float32,
    )
    size = len(counter.vocabulary_)

    def ours() -> Any:
        return PMIEmbedding(dim=dim, max_iter=1).fit(counter, progress=False)

    def peer() -> Any:
        table = np.random.default_rng(0).standard_normal((size, dim)) / np.sqrt(dim)
        table = table.astype(np.float32)
        numpy_sweep(pairs, table, 1.0, 1e-3)
        return table

    difference = np.abs(ours().vectors_ - peer()).max()
    return compare(
        f"One sweep of the exact solver, D = {dim}",
        f"{size} words, {pairs.size / 1e6:.2f} M pairs, float32, one thread. "
        "Ours includes targets, weights and the loss.",
        {"kexue": ours, "numpy, a product and a solve a word": peer},
        peer="numpy, a product and a solve a word",
        packages=("numpy", "numba"),
        repeats=3,
        remarks=[f"Largest difference between the two tables: {difference:.1e}."],
    )


def similarity(words: list[str], vectors: Any, name: str) -> str:
    """Spearman correlation with human judgements bundled with gensim, and the number of pairs covered."""
    spec = importlib.util.find_spec("gensim")
    number = {word: k for k, word in enumerate(words)}
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    ours, human = [], []
    with open(Path(spec.origin).parent / "test" / "test_data" / name, encoding="utf-8") as file:
        for row in csv.reader((line for line in file if not line.startswith("#")), delimiter="\t"):
            if len(row) > 2 and row[0].lower() in number and row[1].lower() in number and row[2][:1].isdigit():
                ours.append(float(unit[number[row[0].lower()]] @ unit[number[row[1].lower()]]))
                human.append(float(row[2]))
    return f"{spearmanr(ours, human).statistic:.3f} ({len(human)})"


def training(texts: list[str], counter: CooccurrenceCounter, counting_ms: float) -> Table:
    """Each contender once: the stochastic ones take half a minute. Ours includes the counting."""
    made: dict[str, Any] = {
        "ALS, 3 sweeps (default)": {},
        "ALS, w0 = 0": {"w0": 0.0},
        "ALS, w0 = 0, reg = 0.1": {"w0": 0.0, "reg": 0.1},
        "ALS, t0 = -2": {"t0": -2.0},
        "ALS, 10 sweeps": {"max_iter": 10},
        "Adagrad, 25 epochs": {"solver": "adagrad"},
    }
    rows = []
    for name, changed in made.items():
        model = PMIEmbedding(dim=100, **changed)
        model.set_params(max_iter=1).fit(counter, progress=False)  # compiled before the clock starts
        model.set_params(max_iter=changed.get("max_iter"))
        start = time.process_time()
        model.fit(counter, progress=False)
        spent = (time.process_time() - start) * 1e3 + counting_ms
        rows.append((f"kexue {name}", spent, model.vocabulary_, model.vectors_, f"{model.error_history_[-1]:.4f}"))
    peer = rows[0][0]
    packages: tuple[str, ...] = ("numpy", "numba")
    if installed("gensim"):
        from gensim.models import Word2Vec

        sentences = [text.split() for text in texts]
        for epochs in (1, 5):
            start = time.process_time()
            model = Word2Vec(
                sentences, vector_size=100, window=WINDOW, min_count=MIN_COUNT, sg=1, workers=1, epochs=epochs, seed=0
            )
            spent = (time.process_time() - start) * 1e3
            rows.append((f"gensim skip-gram, {epochs} epoch", spent, model.wv.index_to_key, model.wv.vectors, ""))
        peer, packages = rows[-1][0], (*packages, "gensim")
    base = next(row[1] for row in rows if row[0] == peer)
    made_rows = []
    for name, spent, words, vectors, loss in rows:
        smallest = np.argsort(np.linalg.norm(vectors[:500], axis=1))[:15]
        extra = {
            "loss of the seen pairs": loss,
            "stop words of the 15 smallest norms": str(sum(words[k] in ENGLISH_STOP_WORDS for k in smallest)),
        }
        if installed("gensim"):
            extra["wordsim353 (pairs)"] = similarity(words, vectors, "wordsim353.tsv")
            extra["simlex999 (pairs)"] = similarity(words, vectors, "simlex999.txt")
        made_rows.append(Row(name, spent, base / spent, extra))
    remarks = [
        "One seed, one run each, few pairs covered: small differences mean nothing. No setting was tuned on them.",
        "Loss: mean of lambda (<v,v> - PMI)^2. Adagrad, as published, has no penalty; ALS has reg = 1 by default.",
        "Smallest norms among the 500 most frequent words; stop words by scikit-learn's list.",
        "The text is narrow (numerical documentation): compare the rows, not with figures from general text.",
    ]
    return Table(
        "Word vectors from text",
        "The same text, D = 100, counting included; CPU time of one call.",
        peer,
        made_rows,
        versions(*packages),
        remarks,
    )


def run() -> list[Table]:
    texts = documentation()
    first = counting(texts)
    counter = CooccurrenceCounter(WINDOW, MIN_COUNT, progress=False).fit(texts)
    counting_ms = next(row.milliseconds for row in first.rows if row.name == "kexue")
    return [first, solving(counter, 100), solving(counter, 128), training(texts, counter, counting_ms)]
