"""Sentences found by similarity."""

from __future__ import annotations

from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}
PAIRS = [("how old are you", 0), ("what is your age", 0), ("where do you live", 1), ("your address", 1), ("", 2)]
QUERIES = ["OLD", "address", "", "你好", "what"]


def _similarity(seed: int) -> tuple[Any, list[tuple[str, int]]]:
    from kexue.tasks import SentenceSimilarity

    class OnPairs(SentenceSimilarity):
        """The shared test gives ``fit`` one argument."""

        def fit(self, data: Any) -> Any:
            return super().fit([text for text, _ in data], [group for _, group in data])

    return OnPairs(d=8, embedding_dim=8, min_count=1, epochs=2, batch_size=2, random_state=seed), PAIRS


def _saved(fitted: Any, folder: Any) -> Any:
    fitted.save(folder / "model")
    return type(fitted).load(folder / "model")


CASES["sentence-similarity"] = [
    EstimatorCase("SentenceSimilarity", _similarity, lambda fitted: fitted.transform(QUERIES), [], _saved),
]
