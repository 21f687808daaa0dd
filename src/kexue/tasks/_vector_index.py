"""Nearest neighbours of unit vectors by cosine: exact in blocks, or through a usearch graph for large collections."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kexue.tasks._cosines import block_rows, cosines, distinct_rows, top_of_block

LARGE = 100_000  # vectors above which usearch is worth its building time, if it is installed
FETCH = 4  # times k: candidates of the graph, whose cosines are then computed exactly
BREADTH = 256  # nodes that a search of the graph keeps in sight; its recall grows with it, and so does its time
MANY = 200  # answers above which sorting everything beats keeping the best in order
SAMPLE = 500  # stored vectors whose neighbours are compared with the exact ones


class VectorIndex:
    """Search in N unit vectors.

    Args:
        vectors: (N, D) float32 rows of length 1 (or 0).
        approximate: True builds a usearch graph, False searches exactly, None builds one above 100 000 vectors if
            usearch is installed.
        graph: A saved graph of these vectors instead of a new one.

    Attributes:
        vectors: The vectors.
        recall: Share of the 10 nearest neighbours that the graph finds, over stored vectors; None: the search is exact.

    Raises:
        ImportError: ``approximate=True`` without usearch.
        ValueError: A saved graph that does not fit the vectors.
    """

    def __init__(
        self, vectors: NDArray[np.float32], approximate: bool | None = None, graph: Path | None = None
    ) -> None:
        if approximate is not None and not isinstance(approximate, bool | np.bool_):
            raise TypeError(f"approximate must be True, False or None; got {approximate!r}")
        self.vectors = vectors
        self.recall: float | None = None
        self._distinct: tuple[NDArray[Any], NDArray[np.int64] | None] | None = None
        self._graph: Any = None
        available = importlib.util.find_spec("usearch") is not None
        if approximate and not available:
            raise ImportError('an approximate index needs usearch: pip install "kexue[index]"')
        if len(vectors) and (approximate or (approximate is None and available and len(vectors) > LARGE)):
            self._graph = _build(vectors) if graph is None else _restore(graph, vectors)
            self.recall = self._measured_recall()

    @property
    def exact(self) -> bool:
        """Whether every answer is the true one."""
        return self._graph is None

    def search(
        self, queries: NDArray[np.float32], k: int, threshold: float | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k vectors with the highest cosine, highest first; of equal ones the lower position first.

        Args:
            queries: (Q, D) unit rows.
            k: Answers to a query; at most N are given.
            threshold: Lowest cosine of an answer.

        Returns:
            Positions (Q, min(k, N)) and cosines; -1 and -inf where there are fewer answers.
        """
        k = min(k, len(self.vectors))
        if self._graph is None:
            positions, scores = self._exact(queries, k)
        else:
            positions, scores = self._through_graph(queries, k)
        if threshold is not None:
            low = scores < threshold
            positions[low], scores[low] = -1, -np.inf
        return positions, scores

    def _exact(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        positions = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if k == 0 or len(queries) == 0:
            return positions, scores
        if self._distinct is None:
            self._distinct = distinct_rows(self.vectors)
        size = block_rows(len(self.vectors), 4)
        kernel: Any = top_of_block
        for first in range(0, len(queries), size):
            part = slice(first, first + size)
            block = cosines(queries[part], *self._distinct)
            if k <= MANY:
                kernel(block, positions[part], scores[part])
            else:
                positions[part] = np.argsort(-block, axis=1, kind="stable")[:, :k]
                scores[part] = np.take_along_axis(block, positions[part], 1)
        return positions, scores

    def _through_graph(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Candidates from the graph, ordered by their exact cosines."""
        positions = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        if k == 0 or len(queries) == 0:
            return positions, scores
        found = self._graph.search(queries, min(FETCH * k, len(self.vectors)), threads=1)
        keys, counts = np.atleast_2d(found.keys), np.atleast_1d(getattr(found, "counts", len(found.keys)))
        for row, (candidates, count) in enumerate(zip(keys, counts, strict=True)):
            near = np.sort(candidates[:count].astype(np.int64))
            values = np.clip(self.vectors[near] @ queries[row], -1, 1)
            order = np.argsort(-values, kind="stable")[:k]
            positions[row, : len(order)], scores[row, : len(order)] = near[order], values[order]
        return positions, scores

    def _measured_recall(self) -> float:
        chosen = np.linspace(0, len(self.vectors) - 1, min(SAMPLE, len(self.vectors))).astype(np.int64)
        queries, k = self.vectors[chosen], min(10, len(self.vectors))
        # by cosine, not by number: of equal vectors any will do
        lowest = self._exact(queries, k)[1][:, -1:]
        return float((self._through_graph(queries, k)[1] >= lowest - 1e-6).mean())

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which the graph itself does not offer."""
        return self.__dict__ | {"_graph": None if self._graph is None else bytes(self._graph.save())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._graph is not None:
            self._graph = _restore(self._graph, self.vectors)

    def save_graph(self, path: Path) -> None:
        """Write the usearch graph."""
        self._graph.save(str(path))


def _build(vectors: NDArray[np.float32]) -> Any:
    from usearch.index import Index

    graph = Index(ndim=vectors.shape[1], metric="ip", dtype="f32", expansion_search=BREADTH)
    graph.add(np.arange(len(vectors), dtype=np.uint64), vectors, threads=1)  # one thread: the same graph every time
    return graph


def _restore(saved: Path | bytes, vectors: NDArray[np.float32]) -> Any:
    from usearch.index import Index

    where = "the copy" if isinstance(saved, bytes) else saved
    try:
        # the breadth is not part of what is saved
        graph = Index.restore(saved if isinstance(saved, bytes) else str(saved), expansion_search=BREADTH)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{where} holds no graph of usearch: {error}") from None
    if graph is None or len(graph) != len(vectors) or graph.ndim != vectors.shape[1]:
        found = "no graph" if graph is None else f"one of {len(graph)} vectors of width {graph.ndim}"
        expected = f"a graph of {len(vectors)} vectors of width {vectors.shape[1]}"
        raise ValueError(f"{where}: expected {expected}; got {found}")
    return graph
