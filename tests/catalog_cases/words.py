"""Words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from catalog_cases.base import EstimatorCase, TensorCase

CASES: dict[str, list[TensorCase | EstimatorCase]] = {}


def _sentences(seed: int) -> list[str]:
    import numpy as np

    words = np.minimum(np.random.default_rng(seed).zipf(1.5, (60, 20)), 30)
    return [" ".join(f"w{k}" for k in row) for row in words]


def _pmi_embedding(solver: str) -> Callable[[int], tuple[Any, Any]]:
    def build(seed: int) -> tuple[Any, Any]:
        from kexue.words import CooccurrenceCounter, PMIEmbedding

        counter = CooccurrenceCounter(window=3, min_count=1)
        return PMIEmbedding(dim=8, solver=solver, reg=0.1, x_max=5, random_state=seed, counter=counter), _sentences(
            seed
        )

    return build


def _save_load_vectors(model: Any, folder: Any) -> Any:
    model.save(folder / "vectors")
    return type(model).load(folder / "vectors")


def _counter(seed: int) -> tuple[Any, Any]:
    from kexue.words import CooccurrenceCounter

    return CooccurrenceCounter(window=3, min_count=1), _sentences(seed)


CASES["geometric-word-vectors"] = [
    EstimatorCase("CooccurrenceCounter", _counter, lambda fitted: fitted.matrix_.toarray(), []),
    *(
        EstimatorCase(
            f"PMIEmbedding-{solver}", _pmi_embedding(solver), lambda fitted: fitted.vectors_, [], _save_load_vectors
        )
        for solver in ("als", "adagrad", "spectral")
    ),
]


def _spaceless(seed: int) -> list[str]:
    return [line.replace(" ", "") for line in _sentences(seed)]


def _gram_counter(seed: int) -> tuple[Any, Any]:
    from kexue.words import NGramCounter

    return NGramCounter(order=3), _spaceless(seed)


def _word_discovery(method: str) -> Callable[[int], tuple[Any, Any]]:
    def build(seed: int) -> tuple[Any, Any]:
        from kexue.words import WordDiscovery

        return WordDiscovery(min_count=3, method=method), _spaceless(seed)

    return build


def _phrases(seed: int) -> tuple[Any, Any]:
    from kexue.words import PhraseMiner

    return PhraseMiner(min_count=2, min_npmi=0.0), [line.split() for line in _sentences(seed)]


def _templates(count: str) -> Callable[[int], tuple[Any, Any]]:
    def build(seed: int) -> tuple[Any, Any]:
        from kexue.words import TemplateMiner

        return TemplateMiner(min_support=2, min_pmi=0.5, window=3, count=count), _sentences(seed)

    return build


def _save_load_json(model: Any, folder: Any) -> Any:
    model.save(folder / "model.json")
    return type(model).load(folder / "model.json")


def _gram_counts(fitted: Any) -> Any:
    import numpy as np

    return np.array([f"{gram} {count}" for n in (1, 2, 3) for gram, count in fitted.items(n)])


def _rows(attribute: str) -> Callable[[Any], Any]:
    def output(fitted: Any) -> Any:
        import numpy as np

        found = getattr(fitted, attribute)
        return np.array([repr(row) for row in (found.items() if isinstance(found, dict) else found)])

    return output


CASES["sentence-templates"] = [
    EstimatorCase("NGramCounter", _gram_counter, _gram_counts, []),
    *(
        EstimatorCase(f"WordDiscovery-{method}", _word_discovery(method), _rows("vocabulary_"), [])
        for method in ("solidity", "adjacent")
    ),
    EstimatorCase("PhraseMiner", _phrases, _rows("phrases_"), [], _save_load_json),
    *(
        EstimatorCase(f"TemplateMiner-{count}", _templates(count), _rows("templates_"), [], _save_load_json)
        for count in ("sentences", "paths")
    ),
]
