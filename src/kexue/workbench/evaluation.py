"""Two tasks that documents set by themselves, asked of the classes that the application uses.

- *Related items* (A): the query is a document, relevant are those it names as related. The names are never in a text.
- *Questions* (B): the query is the head of a document (title or first line), the answer is that document among all
  bodies. Strict: the encoder is trained on the other half only, so no asked head was ever seen; both halves are asked
  and averaged; heads that several documents share are not asked.

tf-idf, BM25 and LSA-256 run beside them on the same texts, with scikit-learn where it has them. ``recall@k`` counts
relevant documents among the first k, divided by min(number of relevant ones, k); ``mrr`` is 1 / rank of the first
relevant one within the first ten.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from kexue._checks import check_int
from kexue.models._bags import count_words
from kexue.models.bag_encoder import BagEncoder
from kexue.workbench.encoder import document_vectors, text_vectors, train_encoder
from kexue.workbench.ranking import Impacts, Ranker, top_k
from kexue.workbench.signals import Signals
from kexue.workbench.tokens import Ragged, TokenizedCorpus, concatenate

Row = dict[str, Any]
Scorer = Callable[[NDArray[np.int64]], NDArray[np.float32]]
BLOCK = 256  # queries scored together: BLOCK x N floats


class Meter:
    """Adds up the figures of one method.

    Example:
        >>> meter = Meter("mine")
        >>> meter.add(np.array([4, 2]), {2, 3})
        >>> meter.row(0.5)
        {'name': 'mine', 'recall@1': 0.0, 'recall@10': 0.5, 'mrr': 0.5, 'seconds': 0.5, 'queries': 1}
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.figures: list[tuple[float, float, float]] = []

    def add(self, ranking: NDArray[Any], relevant: set[int]) -> None:
        """Count one query: the documents found, best first, and the relevant ones."""
        hits = [int(document) in relevant for document in ranking[:10]]
        first = hits.index(True) + 1 if any(hits) else 0
        self.figures.append((float(sum(hits[:1])), sum(hits) / min(len(relevant), 10), 1 / first if first else 0.0))

    def row(self, seconds: float) -> Row:
        """The means as a row of the table; ``seconds`` is CPU time."""
        means = np.mean(self.figures, axis=0) if self.figures else np.zeros(3)
        values = dict(zip(("recall@1", "recall@10", "mrr"), (round(float(x), 4) for x in means), strict=True))
        return {"name": self.name, **values, "seconds": round(seconds, 2), "queries": len(self.figures)}


def related_names(identifiers: Sequence[str], names: Sequence[Iterable[str]], limit: int = 3) -> list[set[int]]:
    """Resolve names of related items to document numbers.

    A name is looked up by its last part; one that more than ``limit`` documents bear is ambiguous and left out.

    Args:
        identifiers: Id of each document.
        names: For each document the names that it gives.
        limit: Most bearers of a name.

    Example:
        >>> related_names(["a.sin", "a.cos", "b.tan"], [["cos", "tan"], [], ["x.sin"]])
        [{1, 2}, set(), {0}]
    """
    bearers: dict[str, list[int]] = {}
    for number, identifier in enumerate(identifiers):
        bearers.setdefault(identifier.rpartition(".")[2], []).append(number)
    found = []
    for number, given in enumerate(names):
        candidates = (bearers.get(name.strip("` ").rpartition(".")[2], []) for name in given)
        found.append({j for some in candidates if len(some) <= limit for j in some} - {number})
    return found


def related_items(
    corpus: TokenizedCorpus, relevant: Sequence[set[int]], encoder: BagEncoder, *, baselines: bool = True
) -> list[Row]:
    """Task A.

    Args:
        corpus: The documents; related names must not stand in their texts.
        relevant: For each document the numbers of its related ones; documents with none are not asked.
        encoder: Trained on ``corpus``.
        baselines: Also measure tf-idf, BM25 and LSA-256.

    Returns:
        A row for each method: name, recall@1, recall@10, mrr, seconds (CPU, preparation and all queries), queries.
    """
    if len(relevant) != len(corpus):
        raise ValueError(f"relevant must have one set for each of the {len(corpus)} documents; got {len(relevant)}")
    asked = np.array([i for i, some in enumerate(relevant) if some], np.int64)
    text = concatenate(corpus.head, corpus.body)
    rows = []
    if baselines:
        for name, prepare in _baselines(text, text, len(corpus.vocabulary)):
            rows.append(_measure(name, prepare, asked, asked, relevant))
    rows.append(_measure("encoder, text only", lambda: _cosines(encoder.encode_ids(text)), asked, asked, relevant))
    meter, start = Meter("all signals"), time.process_time()
    signals = Signals.build(corpus, text_vectors(encoder, corpus))
    for i in asked.tolist():
        meter.add(np.array([j for j, _, _ in signals.similar(i, 10)], np.int64), relevant[i])
    rows.append(meter.row(time.process_time() - start))
    return rows


def questions(
    corpus: TokenizedCorpus,
    *,
    seed: int = 0,
    epochs: int | None = None,
    dim: int = 256,
    out: str | os.PathLike[str] | None = None,
    baselines: bool = True,
    halves: Sequence[int] = (0, 1),
    progress: bool | None = None,
) -> list[Row]:
    """Task B, strict: trains one encoder for each half.

    Args:
        corpus: The documents; heads are the questions.
        seed: Seed of the halves and of training.
        epochs: Passes of each training; None is the default rule.
        dim: Width of the vectors.
        out: Folder for checkpoints; None uses a temporary one.
        baselines: Also measure tf-idf, BM25 and LSA-256 on bodies.
        halves: Which halves are asked.
        progress: Show bars.

    Returns:
        A row for each method, means over all asked documents; ``seconds`` of the trained ones include training.
        Empty if the corpus has no heads that one document alone has.
    """
    check_int("seed", seed, 0)
    unique = _unique_heads(corpus)
    half = np.random.default_rng(seed).permutation(len(corpus)) % 2
    parts: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for h in halves:
            asked = np.flatnonzero(unique & (half == h))
            if not len(asked):
                continue
            start = time.process_time()
            folder = Path(out or scratch) / f"half-{h}"
            encoder = train_encoder(
                corpus, out=folder, dim=dim, epochs=epochs, seed=seed, held_out=half == h, progress=progress
            )
            training = time.process_time() - start
            for row in _ask(corpus, asked, encoder, baselines, training):
                parts.setdefault(row["name"], []).append(row)
    return [_mean(rows) for rows in parts.values()]


def choose_held_out(corpus: TokenizedCorpus, seed: int = 0, most: int = 500, share: float = 0.05) -> NDArray[np.bool_]:
    """Documents whose heads a default build keeps for its own evaluation: at most 500 and at most 5 %.

    Returns:
        Bool ``(N,)``; only heads of two words and more that one document alone has, with a body.
    """
    chosen = np.zeros(len(corpus), bool)
    candidates = np.flatnonzero(_unique_heads(corpus) & (corpus.head.lengths >= 2) & (corpus.body.lengths >= 5))
    count = min(most, int(share * len(corpus)), len(candidates))
    chosen[np.random.default_rng(seed).permutation(candidates)[:count]] = True
    return chosen


def held_out_questions(
    corpus: TokenizedCorpus, held_out: NDArray[np.bool_], encoder: BagEncoder, *, baselines: bool = True
) -> list[Row]:
    """Task B for a finished build: the held-out heads asked against the bodies of all documents.

    Args:
        corpus: The documents.
        held_out: What :func:`choose_held_out` gave to the training.
        encoder: Trained with it.
        baselines: Also measure tf-idf, BM25 and LSA-256 on bodies.
    """
    asked = np.flatnonzero(held_out)
    return list(_ask(corpus, asked, encoder, baselines, 0.0)) if len(asked) else []


def _ask(
    corpus: TokenizedCorpus, asked: NDArray[np.int64], encoder: BagEncoder, baselines: bool, training: float
) -> Iterator[Row]:
    relevant = [{i} for i in range(len(corpus))]
    heads = corpus.head
    if baselines:
        for name, prepare in _baselines(corpus.body, heads, len(corpus.vocabulary)):
            yield _measure(name, prepare, asked, None, relevant)

    def by_text() -> Scorer:
        return _cosines(encoder.encode_ids(corpus.body), encoder.encode_ids(heads))

    encoded = _measure("encoder, text only", by_text, asked, None, relevant)
    yield {**encoded, "seconds": round(encoded["seconds"] + training, 2)}
    meter, start = Meter("search"), time.process_time()
    ranker = Ranker.build(corpus, document_vectors(encoder, corpus, heads=False), heads=False)
    ranker.titles = None  # nobody's title may decide here
    queries = encoder.encode_ids(heads.take(asked))
    for i, vector in zip(asked.tolist(), queries, strict=True):
        meter.add(ranker.search(heads[i], vector, 10)[0], relevant[i])
    yield meter.row(time.process_time() - start + training)


def _unique_heads(corpus: TokenizedCorpus) -> NDArray[np.bool_]:
    keys = [corpus.head[i].tobytes() for i in range(len(corpus))]
    count = Counter(keys)
    return np.array([bool(key) and count[key] == 1 for key in keys], bool)


def _measure(
    name: str,
    prepare: Callable[[], Scorer],
    asked: NDArray[np.int64],
    left_out: NDArray[np.int64] | None,
    relevant: Sequence[set[int]],
) -> Row:
    """Rank for all asked documents; ``left_out`` is the one that each must not find (itself)."""
    meter, start = Meter(name), time.process_time()
    score = prepare()
    for first in range(0, len(asked), BLOCK):
        block = asked[first : first + BLOCK]
        scores = score(block)
        if left_out is not None:
            scores[np.arange(len(block)), left_out[first : first + BLOCK]] = -np.inf
        for row, i in zip(scores, block.tolist(), strict=True):
            meter.add(top_k(row, 10), relevant[i])
    return meter.row(time.process_time() - start)


def _cosines(documents: NDArray[np.float32], queries: NDArray[np.float32] | None = None) -> Scorer:
    source = documents if queries is None else queries
    return lambda rows: source[rows] @ documents.T


def _counts(text: Ragged, size: int) -> Any:
    ids, weights, offsets = count_words(np.ascontiguousarray(text.values), text.offsets, size)
    return sp.csr_array((np.exp(weights - 1), ids, offsets), shape=(len(text), size))


def _baselines(documents: Ragged, queries: Ragged, size: int) -> Iterator[tuple[str, Callable[[], Scorer]]]:
    """tf-idf, BM25 and LSA over the same tokens."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.preprocessing import normalize

    def tfidf() -> tuple[Any, Any]:
        transform = TfidfTransformer(sublinear_tf=True)
        found = transform.fit_transform(_counts(documents, size))
        return sp.csr_array(found), sp.csr_array(transform.transform(_counts(queries, size)))

    def by_tfidf() -> Scorer:
        found, asked = tfidf()
        across = found.T.tocsr()
        return lambda rows: (asked[rows] @ across).toarray()

    def by_bm25() -> Scorer:
        impacts = Impacts.build(documents, size)
        words = [np.unique(queries[i]) for i in range(len(queries))]
        return lambda rows: np.stack([impacts.scores_of(words[i], len(documents)) for i in rows])

    def by_lsa() -> Scorer:
        found, asked = tfidf()
        width = min(256, min(found.shape) - 1)
        if width < 2:
            return lambda rows: (asked[rows] @ found.T).toarray()
        svd = TruncatedSVD(width, random_state=0)
        vectors = normalize(svd.fit_transform(found)).astype(np.float32)
        return _cosines(vectors, normalize(svd.transform(asked)).astype(np.float32))

    yield "tf-idf", by_tfidf
    yield "BM25", by_bm25
    yield "LSA-256", by_lsa


def _mean(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Join the rows of several halves, weighted by their queries; seconds are added."""
    count = np.array([row["queries"] for row in rows], float)
    joined: Row = {"name": rows[0]["name"]}
    for key in ("recall@1", "recall@10", "mrr"):
        joined[key] = round(float(np.average([row[key] for row in rows], weights=count)), 4)
    return {**joined, "seconds": round(sum(row["seconds"] for row in rows), 2), "queries": int(count.sum())}
