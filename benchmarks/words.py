"""Counting and word vectors against plain scipy and numpy programs and gensim."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from benchmarks.harness import Row, Table, compare, cpu_seconds, installed, versions
from benchmarks.peers import glove, run_glove
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
    """From a file to the counts, against scipy and GloVe's C programs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.txt"
        corpus.write_text("\n".join(texts) + "\n", encoding="utf-8")

        def ours(n_jobs: int = 1) -> CooccurrenceCounter:
            return CooccurrenceCounter(WINDOW, MIN_COUNT, n_jobs=n_jobs, progress=False).fit(corpus)

        def saved() -> None:
            ours().save(folder / "ours")

        def spilled() -> None:
            CooccurrenceCounter(WINDOW, MIN_COUNT, memory="64MB", progress=False).fit(corpus)

        counter, (words, matrix) = ours(), scipy_counts(texts)
        difference = abs(matrix - counter.matrix_ / counter.unit_).max()
        contenders = {
            "kexue": ours,
            "kexue, and saved to disk": saved,
            "kexue, two threads": lambda: ours(2),
            "kexue, memory 64 MB (pairs on disk)": spilled,
            "str.split + scipy COO": lambda: scipy_counts(texts),
        }
        peer, remarks = "str.split + scipy COO", []
        if glove() is not None:
            peer = "GloVe: vocab_count, cooccur, shuffle"
            contenders[peer] = lambda: run_glove(folder, corpus, WINDOW, MIN_COUNT, "count")
        else:
            remarks.append("GloVe's C programs could not be fetched or compiled here.")
        walls = {}
        for n_jobs in (1, 2):
            start = time.perf_counter()
            ours(n_jobs)
            walls[n_jobs] = time.perf_counter() - start
        tokens = sum(len(text.split()) for text in texts)
        return compare(
            "Text to co-occurrence counts",
            f"{tokens / 1e6:.2f} M words of documentation, from a file: tokenise, vocabulary ({len(words)} words, "
            f"min_count {MIN_COUNT}), window {WINDOW}, harmonic weights; {counter.lower_.nnz / 1e6:.2f} M pairs.",
            contenders,
            peer=peer,
            packages=("numpy", "scipy", "numba"),
            repeats=3,
            remarks=[
                *remarks,
                f"Equal vocabularies: {words == counter.vocabulary_}; largest difference of a count: {difference:.1e} "
                "(ours is exact, the peers add floating-point numbers).",
                f"Clock time with one thread {walls[1]:.2f} s, with two {walls[2]:.2f} s.",
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


_DATA = "gensim/test/test_data"


def _evaluation(name: str) -> Path | None:
    """A file of judgements: from the folder KEXUE_EVALUATION, or as bundled with gensim."""
    given = os.environ.get("KEXUE_EVALUATION")
    if given:
        found = next(iter(sorted(Path(given).rglob(name))), None)
        if found is not None:
            return found
    spec = importlib.util.find_spec("gensim")
    bundled = Path(spec.origin).parents[1] / _DATA / name if spec is not None and spec.origin else None
    return bundled if bundled is not None and bundled.is_file() else None


def similarity(words: list[str], vectors: Any, name: str) -> str:
    """Spearman correlation with human judgements, and the number of pairs covered."""
    path = _evaluation(name)
    if path is None:
        return ""
    number = {word: k for k, word in enumerate(words)}
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    ours, human = [], []
    with open(path, encoding="utf-8") as file:
        for row in csv.reader((line for line in file if not line.startswith("#")), delimiter="\t"):
            if len(row) > 2 and row[0].lower() in number and row[1].lower() in number and row[2][:1].isdigit():
                ours.append(float(unit[number[row[0].lower()]] @ unit[number[row[1].lower()]]))
                human.append(float(row[2]))
    return f"{spearmanr(ours, human).statistic:.3f} ({len(human)})"


def analogies(words: list[str], vectors: Any, name: str) -> str:
    """Share of analogies whose answer comes first (unit vectors, inputs left out), and how many are covered."""
    path = _evaluation(name)
    if path is None:
        return ""
    number = {word: k for k, word in enumerate(words)}
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    asked = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = line.lower().split()
        if not line.startswith(":") and len(row) == 4 and all(word in number for word in row):
            asked.append([number[word] for word in row])
    if not asked:
        return "none covered"
    right = 0
    for part in np.array_split(np.array(asked), len(asked) // 500 + 1):
        a, b, c, d = part.T
        scores = (unit[b] - unit[a] + unit[c]) @ unit.T
        scores[np.arange(len(part))[:, None], part[:, :3]] = -np.inf
        right += int((scores.argmax(1) == d).sum())
    return f"{right / len(asked):.3f} ({len(asked)})"


def dictionary() -> list[str]:
    """The entries of GCIDE, a dictionary of English (Debian package dict-gcide), in lower case; empty if missing."""
    path = Path("/usr/share/dictd/gcide.dict.dz")
    if not path.is_file():
        return []
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    entries = (" ".join(re.findall(r"[a-z]+", entry.lower())) for entry in re.split(r"\n(?=\S)", text))
    return [entry for entry in entries if len(entry) > 20]


def quality() -> Table | None:
    """General English: our defaults, which were fixed on other text, against skip-gram."""
    texts = dictionary()
    if not texts or not installed("gensim"):
        return None
    from gensim.models import Word2Vec

    made: list[tuple[str, float, list[str], Any]] = []
    PMIEmbedding(dim=100, max_iter=1).fit(CooccurrenceCounter(WINDOW, MIN_COUNT).fit(texts[:2000]), progress=False)
    for seed in range(2):
        start = cpu_seconds()
        counter = CooccurrenceCounter(WINDOW, 10, progress=False).fit(texts)
        model = PMIEmbedding(dim=100, random_state=seed).fit(counter, progress=False)
        made.append((f"kexue, defaults, seed {seed}", cpu_seconds() - start, model.vocabulary_, model.vectors_))
    sentences = [text.split() for text in texts]
    for epochs in (1, 5):
        start = cpu_seconds()
        model = Word2Vec(
            sentences, vector_size=100, window=WINDOW, min_count=10, sg=1, workers=1, epochs=epochs, seed=0
        )
        spent = cpu_seconds() - start
        made.append((f"gensim skip-gram, {epochs} epochs", spent, model.wv.index_to_key, model.wv.vectors))
    peer = "gensim skip-gram, 1 epochs"
    base = next(row[1] for row in made if row[0] == peer)
    rows = []
    for name, spent, words, vectors in made:
        extra = {
            "MEN (pairs)": similarity(words, vectors, "men_en.txt"),
            "wordsim353": similarity(words, vectors, "wordsim353.tsv"),
            "simlex999": similarity(words, vectors, "simlex999.txt"),
            "analogies": analogies(words, vectors, "questions-words.txt"),
        }
        rows.append(Row(name, spent * 1e3, base / spent, extra))
    return Table(
        "Word vectors of general English",
        f"The entries of the dictionary GCIDE ({sum(map(len, sentences)) / 1e6:.2f} M words), D = 100, "
        f"window {WINDOW}, min_count 10; counting included, one thread.",
        peer,
        rows,
        versions("numpy", "numba", "gensim"),
        [
            "Settings are the defaults; they were chosen on other text and not changed for this one.",
            "Spearman correlation with human judgements, share of analogies answered first; covered questions in "
            "brackets. MEN is read from the folder that the variable KEXUE_EVALUATION names (men_en.txt).",
        ],
    )


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


def reaching(counter: CooccurrenceCounter, texts: list[str]) -> Table:
    """CPU time until the loss of 25 Adagrad epochs is reached, without penalty on either side."""
    settings: dict[str, Any] = {"dim": 100, "w0": 0.0, "reg": 0.1}
    PMIEmbedding(**settings, max_iter=1).fit(counter, progress=False)
    PMIEmbedding(dim=100, solver="adagrad", max_iter=1).fit(counter, progress=False)
    start = cpu_seconds()
    adagrad = PMIEmbedding(dim=100, solver="adagrad").fit(counter, progress=False)
    spent = cpu_seconds() - start
    target = adagrad.error_history_[-1]
    peer = "kexue Adagrad, 25 epochs"
    found = [(peer, spent, target)]
    for sweeps in range(1, 11):
        start = cpu_seconds()
        exact = PMIEmbedding(**settings, max_iter=sweeps).fit(counter, progress=False)
        if exact.error_history_[-1] <= target:
            found.append((f"kexue exact solver, {sweeps} sweeps", cpu_seconds() - start, exact.error_history_[-1]))
            break
    if glove() is not None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "corpus.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
            run_glove(folder, folder / "corpus.txt", WINDOW, MIN_COUNT, "count")
            start = cpu_seconds()
            run_glove(folder, folder / "corpus.txt", WINDOW, MIN_COUNT, "25", 100)
            found.append(("GloVe's C program, 25 epochs (its own loss)", cpu_seconds() - start, float("nan")))
    rows = [
        Row(name, spent * 1e3, found[0][1] / spent, {"loss": "" if np.isnan(loss) else f"{loss:.4f}"})
        for name, spent, loss in found
    ]
    return Table(
        "Time to the loss of 25 Adagrad epochs",
        f"{len(counter.vocabulary_)} words, {counter.lower_.nnz / 1e6:.2f} M pairs, D = 100, without "
        "counting, one thread.",
        peer,
        rows,
        versions("numpy", "numba"),
        ["Loss: mean of lambda (<v,v> - PMI)^2 over the seen pairs. The exact solver has reg = 0.1, w0 = 0 here."],
    )


def run() -> list[Table]:
    texts = documentation()
    first = counting(texts)
    counter = CooccurrenceCounter(WINDOW, MIN_COUNT, progress=False).fit(texts)
    counting_ms = next(row.milliseconds for row in first.rows if row.name == "kexue")
    tables = [first, solving(counter, 100), solving(counter, 128), reaching(counter, texts)]
    general = quality()
    return [*tables, training(texts, counter, counting_ms), *([general] if general is not None else [])]
