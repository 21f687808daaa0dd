"""Sentence similarity against torch.nn.GRU and the usual retrieval code: one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.harness import Table, compare, cpu_seconds, installed
from kexue.models import CharGRUEncoder
from kexue.tasks import retrieval_report
from kexue.tasks._cosines import unit_rows
from kexue.tasks._vector_index import VectorIndex

SECTION = "Sentence similarity"


def texts(count: int, alphabet: int, longest: int, seed: int = 0) -> list[str]:
    """Random texts of 4 to ``longest`` characters; the characters fall off like those of a language."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest + 1, count)
    shares = 1 / np.arange(3, alphabet + 3)
    points = rng.choice(alphabet, lengths.sum(), p=shares / shares.sum()) + 0x4E00
    joined, ends = "".join(map(chr, points)), np.cumsum(lengths)
    return [joined[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def encoder(alphabet: int) -> CharGRUEncoder:
    torch.manual_seed(0)
    return CharGRUEncoder([chr(0x4E00 + i) for i in range(alphabet)])


def packed(model: CharGRUEncoder, ids: Tensor) -> Tensor:
    embedded, lengths = model.embedding(ids), (ids > 0).sum(1)
    return model.gru(pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False))[1][0]


def padded(model: CharGRUEncoder, ids: Tensor) -> Tensor:
    lengths = (ids > 0).sum(1)
    return model.gru(model.embedding(ids))[0][torch.arange(len(ids)), lengths - 1]


def own(model: CharGRUEncoder, ids: Tensor) -> Tensor:
    return model(ids)


def training() -> list[Table]:
    tables = []
    for alphabet, name in ((3000, "Chinese"), (60, "Latin")):
        model = encoder(alphabet)
        ids = model.lookup(texts(100, alphabet, 32))

        def step(states: Callable[[CharGRUEncoder, Tensor], Tensor], model: Any = model, ids: Tensor = ids) -> None:
            model.zero_grad()
            states(model, ids).square().sum().backward()

        tables.append(
            compare(
                f"Character GRU, a training step, {name}",
                f"B 100, 4 to 32 characters of {alphabet}, width 128, float32, forward and backward.",
                {
                    "nn.GRU, padded": lambda step=step: step(padded),
                    "nn.GRU, packed": lambda step=step: step(packed),
                    "CharGRUEncoder": lambda step=step: step(own),
                },
                peer="nn.GRU, packed",
                packages=("torch",),
                repeats=15,
            )
        )
    return tables


def inference(count: int = 20_000) -> Table:
    model, given = encoder(3000), texts(count, 3000, 32)
    by_length = sorted(given, key=len)

    def run(states: Callable[[CharGRUEncoder, Tensor], Tensor], rows: list[str]) -> None:
        with torch.no_grad():
            for first in range(0, len(rows), 512):
                states(model, model.lookup(rows[first : first + 512]))

    return compare(
        f"Character GRU, encoding {count:,} texts",
        "4 to 32 characters of 3000, width 128, float32, batches of 512; from the text to the vector.",
        {
            "nn.GRU, padded": lambda: run(padded, given),
            "nn.GRU, padded, sorted by length": lambda: run(padded, by_length),
            "nn.GRU, packed": lambda: run(packed, given),
            "nn.GRU, packed, sorted by length": lambda: run(packed, by_length),
            "CharGRUEncoder.encode": lambda: model.encode(given),
        },
        peer="nn.GRU, packed",
        packages=("torch",),
        repeats=1,
    )


def clusters(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    groups = np.arange(rows) // 4
    centres = rng.normal(size=(rows // 4, width))
    return (centres[groups] + 1.3 * rng.normal(size=(rows, width))).astype(np.float32), groups


def report() -> Table:
    rows, width = 8000, 128
    vectors, groups = clusters(rows, width)
    z, labels = torch.from_numpy(vectors), torch.from_numpy(groups)

    def whole_matrix() -> float:
        units = F.normalize(z)
        order = (units @ units.T).fill_diagonal_(-2).argsort(1, descending=True)
        first = (labels[order] == labels[:, None]).float().argmax(1) + 1
        return float((first <= 1).float().mean())

    def top_ten() -> float:
        units = F.normalize(z)
        nearest = (units @ units.T).fill_diagonal_(-2).topk(10).indices
        return float((labels[nearest[:, :1]] == labels[:, None]).any(1).float().mean())

    contenders: dict[str, Callable[[], Any]] = {
        "torch, whole matrix, argsort": whole_matrix,
        "torch, whole matrix, topk 10 (no ranks)": top_ten,
    }
    remarks = [
        f"top-1: {whole_matrix():.4f} (argsort), {retrieval_report(z, labels)['top1']:.4f} (retrieval_report).",
        f"Memory for the cosines: {4 * rows * rows / 2**20:.0f} MiB (and twice that for the order) against "
        "blocks of 32 MiB at any number of rows.",
    ]
    if installed("pytorch_metric_learning"):
        from pytorch_metric_learning.distances import CosineSimilarity
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        from pytorch_metric_learning.utils.inference import CustomKNN

        calculator = AccuracyCalculator(
            include=("precision_at_1", "mean_reciprocal_rank"), k=10, knn_func=CustomKNN(CosineSimilarity())
        )
        contenders["pytorch-metric-learning AccuracyCalculator, k 10"] = lambda: calculator.get_accuracy(z, labels)
    contenders["retrieval_report"] = lambda: retrieval_report(z, labels)
    return compare(
        "Retrieval report",
        f"N {rows}, D {width}, groups of 4, float32. retrieval_report also gives all ranks and the threshold "
        "curve, and settles near ties in float64.",
        contenders,
        peer="torch, whole matrix, argsort",
        packages=("torch", "pytorch-metric-learning") if installed("pytorch_metric_learning") else ("torch",),
        repeats=3,
        remarks=remarks,
    )


def search() -> Table | None:
    if not installed("usearch"):
        return None
    vectors = unit_rows(clusters(30_000, 64)[0])
    start = cpu_seconds()
    graph = VectorIndex(vectors, approximate=True)
    seconds, exact = cpu_seconds() - start, VectorIndex(vectors, approximate=False)
    queries = vectors[:200]

    def one_by_one(index: VectorIndex) -> None:
        for row in range(len(queries)):
            index.search(queries[row : row + 1], 10)

    return compare(
        "Search, exact and through a graph",
        "200 queries in 30 000 vectors of width 64, k 10, float32, one thread.",
        {
            "exact, one query at a time": lambda: one_by_one(exact),
            "exact, all at once": lambda: exact.search(queries, 10),
            "usearch graph, one query at a time": lambda: one_by_one(graph),
        },
        peer="exact, one query at a time",
        packages=("usearch",),
        repeats=3,
        remarks=[
            f"Measured recall of the graph: {graph.recall:.3f}. Building it and measuring that took {seconds:.1f} s; "
            "the exact search needs no building."
        ],
    )


def run() -> list[Table]:
    """All comparisons."""
    found = search()
    return [*training(), inference(), report(), *([found] if found else [])]
