"""What the shared catalogue tests (test_catalog.py) run for each method: add one row per method.

A case builds one component with small inputs. The shared tests then check it in every dtype, on one row and on
none, for independence of rows, determinism, float64 gradients, `torch.compile(fullgraph=True)` and a state_dict round
trip, as far as the case says that they apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorCase:
    """A tensor function (or Module) whose inputs have rows on their first axis.

    Attributes:
        name: Shown in the test id.
        build: ``build(rows, dtype, generator) -> (function, inputs)``: ``function(*inputs)`` returns a tensor; floating
            inputs are differentiated. It must work for rows = 1; what rows = 0 gives is said by ``empty``.
        empty: "value" (a finite tensor or an empty one comes back) or the exception type that rows = 0 raises.
        row_independent: With ``reduction="none"`` style output of shape (rows, ...), row i depends on row i only.
        dtypes: Names of the supported floating dtypes.
        compile: Whether `torch.compile(fullgraph=True)` is promised.
        module: The function is an nn.Module with a state_dict to be round-tripped.
    """

    name: str
    build: Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]
    empty: str | type[Exception] = "value"
    row_independent: bool = False
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    compile: bool = True
    module: bool = False


@dataclass(frozen=True)
class EstimatorCase:
    """A scikit-learn style estimator.

    Attributes:
        name: Shown in the test id.
        build: ``build(seed) -> (estimator, data)``: unfitted; ``estimator.fit(data)`` must return the estimator.
        output: ``output(fitted) -> numpy array`` compared between two fits with equal seeds and after save and load.
        empty: ``data`` without any content; fitting it must raise ValueError.
        save_load: ``save_load(fitted, folder) -> loaded``; None when the estimator has no file format.
    """

    name: str
    build: Callable[[int], tuple[Any, Any]]
    output: Callable[[Any], Any]
    empty: Any
    save_load: Callable[[Any, Any], Any] | None = None


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


CASES: dict[str, list[TensorCase | EstimatorCase]] = {}
CASES["geometric-word-vectors"] = [
    EstimatorCase("CooccurrenceCounter", _counter, lambda fitted: fitted.matrix_.toarray(), []),
    *(
        EstimatorCase(
            f"PMIEmbedding-{solver}", _pmi_embedding(solver), lambda fitted: fitted.vectors_, [], _save_load_vectors
        )
        for solver in ("als", "adagrad", "spectral")
    ),
]
