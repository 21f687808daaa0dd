"""A function along the paths of a batch of examples, with and without its gradient, in blocks."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kexue._tensors import compute_dtype

__all__ = ["Along", "modules_of", "quiet", "straight"]

Point = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def modules_of(f: Any) -> list[nn.Module]:
    """The modules that a function is, is bound to, closes over, names or holds: their mode decides what it returns."""
    found: list[Any] = [f]
    seen = {id(f)}
    for thing in found:  # grows while it is read
        for one in _leads_to(thing):
            if id(one) not in seen:
                seen.add(id(one))
                found.append(one)
    return [thing for thing in found if isinstance(thing, nn.Module)]


def _leads_to(thing: Any) -> list[Any]:
    if isinstance(thing, nn.Module) or _of_a_library(thing):
        return []
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
        names = [name for code in _codes(thing.__code__) for name in code.co_names]
        # Of what a function merely names, only functions and modules: a name may also stand for something enormous.
        named = [thing.__globals__.get(name) for name in names]
        named = [one for one in named if isinstance(one, nn.Module | types.FunctionType | functools.partial)]
        return [*cells, *named, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    if isinstance(thing, dict):
        return [one for one in thing.values() if _may_hold(one)]
    if isinstance(thing, list | tuple):
        return [one for one in thing if _may_hold(one)]
    if isinstance(thing, Tensor | type | types.ModuleType):
        return []
    return [one for one in getattr(thing, "__dict__", {}).values() if _may_hold(one)]


def _may_hold(one: Any) -> bool:
    kinds = (nn.Module, functools.partial, types.MethodType, types.FunctionType, dict, list, tuple)
    return isinstance(one, kinds)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of those that are written inside it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _codes(one)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that has no value yet
        return False
    return True


def _of_a_library(thing: Any) -> bool:
    # A function's own module, since functools.wraps gives it the name of another one's.
    home = thing.__globals__.get("__name__") if isinstance(thing, types.FunctionType) else type(thing).__module__
    return (home or "").startswith(("torch.", "transformers.", "tokenizers."))


@contextmanager
def quiet(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode and frozen parameters inside; afterwards everything is as it was."""
    training = [m for module in modules for m in module.modules() if m.training]
    trained = [p for module in modules for p in module.parameters() if p.requires_grad and p.is_leaf]
    try:
        for m in training:
            m.training = False
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for m in training:
            m.training = True
        for p in trained:
            p.requires_grad_(True)


def straight(x: Tensor, baseline: Tensor) -> Point:
    """The straight line from x (at 0) to the baseline (at 1): a function of rows (N,) and places (N,)."""
    work = compute_dtype(x)
    start, step = x.to(work), baseline.to(work) - x.to(work)

    def point(rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        direction = step[rows]
        return torch.addcmul(start[rows], direction, places.to(work).view(-1, *(1,) * (x.dim() - 1))), direction

    return point


class Along:
    """The output of f that is explained, on paths.

    Args:
        f: (N, ...) -> (N,) or (N, C).
        x: (B, ...), for its dtype and device.
        point: Rows (N,) and places (N,) -> points (N, ...) and derivatives of the path (N, ...), in float32 or float64.
        args: Further inputs of f, (B, ...) each.
        block: Points that f gets at a time.

    Attributes:
        picked: (B,) columns of the output that are explained; None: it has one.
        against: (B,) columns that are subtracted; None: none.
        n_grad: Points with a gradient so far.
        n_forward: Points without.
        detached: An output had no gradient with respect to the points.
    """

    def __init__(self, f: Any, x: Tensor, point: Point, args: tuple[Any, ...], block: int) -> None:
        self.f, self.x, self.point, self.args, self.block = f, x, point, args, block
        self.picked: Tensor | None = None
        self.against: Tensor | None = None
        self.n_grad = self.n_forward = 0
        self.detached = False

    def outputs(self, rows: Tensor, points: Tensor) -> Tensor:
        """Outputs at the points, checked: (N,) or (N, C)."""
        given = [a[rows] if isinstance(a, Tensor) else a for a in self.args]
        out = self.f(points.to(self.x.dtype), *given)
        if not isinstance(out, Tensor):
            raise TypeError(f"f must return a tensor; got {type(out).__name__}")
        if out.dim() not in (1, 2) or len(out) != len(rows):
            expected = f"({len(rows)},) or ({len(rows)}, C) for {len(rows)} points, one number or C for each"
            raise ValueError(f"f must return {expected}; got {tuple(out.shape)}")
        if not out.is_floating_point():
            raise TypeError(f"f must return floating numbers; got {out.dtype}")
        return out

    def _chosen(self, out: Tensor, rows: Tensor) -> Tensor:
        """(N,): the explained number, in at least float32."""
        out = out.to(compute_dtype(out))
        if out.dim() == 1:
            return out
        if self.picked is None:
            return out[:, 0]
        chosen = out.gather(1, self.picked[rows, None])[:, 0]
        return chosen if self.against is None else chosen - out.gather(1, self.against[rows, None])[:, 0]

    def of(self, out: Tensor) -> Tensor:
        """(B,): the explained number of all examples from all their outputs."""
        return self._chosen(out, torch.arange(len(out), device=out.device))

    def first(self, places: Sequence[float]) -> Tensor:
        """All outputs (len(places), B) or (len(places), B, C) of all examples at some places, without a gradient."""
        rows = torch.arange(len(self.x), device=self.x.device)
        parts = []
        with torch.no_grad():
            for place in places:
                for part in rows.split(self.block):
                    at = torch.full(part.shape, place, dtype=torch.float64, device=part.device)
                    parts.append(self.outputs(part, self.point(part, at)[0]))
        self.n_forward += len(places) * len(rows)
        return torch.cat(parts).unflatten(0, (len(places), len(rows)))

    def values(self, rows: Sequence[int], places: Sequence[float]) -> list[float]:
        """The explained number at places on the paths of some examples, without a gradient."""
        out: list[float] = []
        for r, a in self._blocks(rows, places, self.block):
            with torch.no_grad():
                out += self._chosen(self.outputs(r, self.point(r, a)[0]), r).tolist()
        self.n_forward += len(out)
        return out

    def slopes(self, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The explained number (N,), and what each input adds to its fall along the path (N, ...): -grad * path'."""
        parts = [self._slopes(r, a) for r, a in zip(rows.split(self.block), places.split(self.block), strict=True)]
        values, slopes = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(slopes)

    def _slopes(self, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        points, direction = self.point(rows, places)
        with torch.enable_grad():
            leaf = points.detach().to(self.x.dtype).requires_grad_()
            out = self._chosen(self.outputs(rows, leaf), rows)
            gradient = None
            if out.requires_grad:
                (gradient,) = torch.autograd.grad(out.sum(), leaf, allow_unused=True)
        self.n_grad += len(rows)
        if gradient is None:
            self.detached = True
            return out.detach(), torch.zeros_like(direction)
        slope = -gradient.to(direction.dtype) * direction
        if not bool(torch.isfinite(slope).all()):
            bad = int((~torch.isfinite(slope)).view(len(slope), -1).any(1).nonzero()[0])
            raise ValueError(
                f"the gradient of f must be finite; it is not for example {int(rows[bad])} at {float(places[bad]):.6g} "
                "of the way to the baseline"
            )
        return out.detach(), slope

    def _blocks(self, rows: Sequence[int], places: Sequence[float], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(rows), size):
            r = torch.tensor(rows[i : i + size], device=self.x.device)
            yield r, torch.tensor(places[i : i + size], dtype=torch.float64, device=self.x.device)
