"""Text generation by search and sampling: a sampler with the parts of an estimator."""

from __future__ import annotations

from typing import Any

import numpy as np

from catalog_cases.base import EstimatorCase, TensorCase

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}

TEXTS = [(0, 1, 2), (0, 1, 1, 2), (2, 0, 1), (0, 2)]


class _Sampler:
    """Counts n-grams of the texts and samples from what it counted."""

    def __init__(self, seed: int, kind: str) -> None:
        self.seed, self.kind = seed, kind

    def fit(self, texts: Any) -> _Sampler:
        from kexue.generation import (
            MetropolisHastings,
            NGramLM,
            NGramSampler,
            RandomEdit,
            SimulatedAnnealing,
            Target,
            run_chain,
        )

        lm = NGramLM.fit(texts, vocab_size=3)
        if self.kind == "compiled":
            chains = NGramSampler(lm).run(texts[0], 300, kernel="edit", max_length=5, seed=self.seed)
            self.samples_ = chains.samples[0]
        elif self.kind == "chain":
            kernel = MetropolisHastings(Target(lm), RandomEdit(lm.vocab_size, 1, 5))
            self.samples_ = run_chain(kernel, texts[0], 200, seed=self.seed).samples
        else:

            def move(ids: Any, generator: Any) -> Any:
                i = int(generator.integers(len(ids)))
                return (*ids[:i], int(generator.integers(3)), *ids[i + 1 :]), 0.0

            search = SimulatedAnnealing(Target(lm), move, 0.5)
            self.samples_ = search.run(texts[0], 200, restarts=3, seed=self.seed).states
        return self


def _case(kind: str) -> EstimatorCase:
    def output(fitted: Any) -> Any:
        return np.array([(*text, *(-1,) * (5 - len(text))) for text in fitted.samples_])

    return EstimatorCase(kind, lambda seed: (_Sampler(seed, kind), TEXTS), output, empty=[])


CASES["search-sampling"] = [_case("compiled"), _case("chain"), _case("annealing")]
