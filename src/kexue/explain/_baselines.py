"""Where the paths of :func:`kexue.explain.integrated_gradients` end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_real
from kexue._tensors import compute_dtype
from kexue.explain._evaluations import Point

__all__ = ["NAMES", "baseline_tensor", "curve"]

NAMES = ("zero", "pad", "mask", "mean")


def baseline_tensor(baseline: Any, x: Tensor, modules: Sequence[nn.Module] = ()) -> Tensor:
    """The baseline as a tensor shaped like x (B, ...), or (K, B, ...) for K baselines.

    Args:
        baseline: What the user gave.
        x: The examples.
        modules: The models that may know what a named baseline is.
    """
    if isinstance(baseline, str):
        check_choice("baseline", baseline, NAMES)
        return _named(baseline, x, modules).to(x).expand_as(x)
    if not isinstance(baseline, Tensor):
        check_real("baseline", baseline)
        return torch.full_like(x, float(baseline))
    if baseline.is_complex() or baseline.dtype == torch.bool:
        raise TypeError(f"baseline must be real numbers; got {baseline.dtype}")
    shape, given = tuple(x.shape), tuple(baseline.shape)
    several = len(given) == len(shape) + 1 and given[2:] == shape[1:] and given[1] in (1, len(x)) and given[0] > 0
    if given not in ((), shape, shape[1:], (1, *shape[1:])) and not several:
        raise ValueError(
            f"baseline must be a number, have the shape {shape} of x or {shape[1:]} of a row of it, or one dimension "
            f"more for several baselines; got {given}"
        )
    baseline = baseline.detach().to(x.device, x.dtype if baseline.dtype == x.dtype else compute_dtype(x))
    if not bool(torch.isfinite(baseline).all()):
        raise ValueError(f"baseline must be finite; got {int((~torch.isfinite(baseline)).sum())} values that are not")
    return baseline.expand(given[0], *shape) if several else baseline.expand(shape)


def _named(name: str, x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    if name == "zero":
        return x.new_zeros(())
    tables: list[tuple[Any, Tensor]] = []
    for module in modules:
        table = _table(module) if hasattr(module, "get_input_embeddings") else None
        if table is not None and x.dim() > 1 and table.shape[1] == x.shape[-1]:
            tables.append((module, table))
    if name == "mean":
        if tables:
            return tables[0][1].float().mean(0)
        if len(x) < 2:
            raise ValueError(
                "baseline 'mean' is the mean of the embeddings of the model in f, or without one that of the rows of "
                f"x, which must be at least 2; got {len(x)}"
            )
        return x.to(compute_dtype(x)).mean(0)
    for model, table in tables:
        number = getattr(getattr(model, "config", None), f"{name}_token_id", None)
        if isinstance(number, int) and 0 <= number < len(table):
            return table[number]
    raise ValueError(
        f"baseline {name!r} needs a model in f that has embeddings as wide as x and {name}_token_id in its config; "
        "give the embedding as a tensor, or use explain_text"
    )


def _table(model: Any) -> Tensor | None:
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        return None
    return weight.detach() if isinstance(weight, Tensor) and weight.dim() == 2 else None


def curve(path: Callable[[Tensor], Tensor], x: Tensor, baseline: Any) -> tuple[Tensor, Point]:
    """The baseline and the points of a path that the user gave, from x to the baseline."""
    work = compute_dtype(x)

    def at(place: float) -> Tensor:
        out = path(torch.tensor(place, dtype=work, device=x.device))
        if not isinstance(out, Tensor):
            raise TypeError(f"path must return a tensor; got {type(out).__name__}")
        if out.shape != x.shape:
            raise ValueError(f"path must return the shape {tuple(x.shape)} of x; got {tuple(out.shape)}")
        if not out.is_floating_point() or not bool(torch.isfinite(out).all()):
            raise ValueError(f"path must return finite floating numbers; it does not at {place}")
        return out.detach().to(work)

    close = 16 * torch.finfo(x.dtype).eps * max(1.0, float(x.abs().max()) if x.numel() else 1.0)
    zero, one = at(0.0), at(1.0)
    forwards = bool(((zero - x).abs() <= close).all())
    if not forwards and not bool(((one - x).abs() <= close).all()):
        off = min(float((end - x).abs().max()) for end in (zero, one))
        raise ValueError(f"path must be x at 0 and the baseline at 1, or the other way round; it misses x by {off:g}")
    end = one if forwards else zero
    if isinstance(baseline, Tensor):
        wanted = baseline_tensor(baseline, x).to(work)
        if wanted.shape != end.shape or not torch.allclose(wanted, end, rtol=1e-3, atol=float(close)):
            raise ValueError("path must end in the baseline that is given; leave baseline out, the path says it")

    def point(rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        points = torch.empty((len(rows), *x.shape[1:]), dtype=work, device=x.device)
        speeds = torch.empty_like(points)
        for place in places.unique():
            here = places == place
            argument = (place if forwards else 1 - place).to(work)
            moving: Any = torch.func.jvp(path, (argument,), (torch.ones_like(argument),))
            where, speed = moving
            points[here] = where.detach().to(work)[rows[here]]
            speeds[here] = speed.detach().to(work)[rows[here]]
        return points, speeds if forwards else -speeds

    return end, point
