"""The kinds of cases, and inputs that several rooms share."""

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


def normal(*shape: int, dtype: Any, generator: Any) -> Any:
    """Standard normal numbers, drawn in float64 so that every dtype gets the same ones."""
    import torch

    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
