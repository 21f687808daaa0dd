"""The pass over a stored path that gives the contributions of all training examples to all test points.

With g_ri the gradient of example i at step r, and G_s(t) the test point's gradient averaged over the chord of step s,
the step changes the output by <G_s(t), theta_(s+1) - theta_s>. For plain gradient descent that is
-lr sum_i <G_s(t), g_si>: the layered Gram. A buffer (momentum, Adam's first moment) holds sum_(r<=s) mu^(s-r) g_ri, and
its step is scaled by P_s (1, or Adam's preconditioner), so that the order of summation can be exchanged:

    sum_s <G_s, P_s sum_(r<=s) mu^(s-r) g_ri> = sum_r <H_r, g_ri>,   H_r = P_r G_r + mu H_(r+1)

which is one pass backwards along the path with one vector of parameters for each test point and output.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kexue._progress import progress
from kexue.explain._layer_gram import Gradients, Sides
from kexue.explain._path import Path, loss_gradient

__all__ = ["RULES", "contributions"]

# Points on the chord from theta_s (0) to theta_(s+1) (1), and their weights.
RULES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "left": ((0.0,), (1.0,)),
    "chord3": ((0.5 - 0.15**0.5, 0.5, 0.5 + 0.15**0.5), (5 / 18, 8 / 18, 5 / 18)),
}
_CHUNK = 1 << 25  # bytes held at once by the steps that are treated together: they stay in the cache
_LIMIT = 1 << 24  # numbers that one step may need; more test points are treated in blocks


def contributions(path: Path, gradients: Gradients, x: Tensor, rule: str, kernel: bool) -> tuple[Tensor, Tensor]:
    """Sum over the path.

    Args:
        path: The training.
        gradients: The model.
        x: (M, ...) test points, M >= 1.
        rule: Name of the quadrature.
        kernel: Path kernels instead of contributions: the gradients of the outputs of an example, not of its loss.

    Returns:
        (M, C, N) contributions, or (M, C, N, C) kernels, and (M, C) the part of weight decay; float64.
    """
    width = gradients.width
    ups = width if kernel else 1
    per_point = _floats(path, gradients, 2, ups) - _floats(path, gradients, 1, ups)
    size = max(1, min(len(x), _LIMIT // max(1, per_point)))
    blocks = x.split(size)
    made = []
    with progress("path kernel", len(blocks) * path.steps) as bar:
        for rows in blocks:
            one = _Block(path, gradients, rows, rule, kernel)
            for steps in one.run():
                bar.advance(steps)
            made.append((one.shares, one.decay))
    n = len(path.x)
    shares = torch.cat([s.view(width, -1, ups, n).permute(1, 0, 3, 2) for s, _ in made])
    decay = torch.cat([d.view(width, -1).T for _, d in made])
    return (shares if kernel else shares[..., 0]), decay


def _floats(path: Path, gradients: Gradients, m: int, ups: int, q: int = 3) -> int:
    """Numbers that one step needs for m test points, roughly."""
    width = gradients.width
    n = path.members
    sizes = gradients.layer_sizes()
    total = 0
    for a, z, t, matrix in sizes:
        total += q * m * (a + width * z) + n * (a + ups * z)
        gram, whole = 2 * q * width * m * ups * n * t * t, width * m * matrix + n * ups * matrix
        total += whole if path.settings.decay or path.settings.weight_decay else min(gram, whole)
    return total + (width * m + n * ups) * gradients.loose_size() + width * m * ups * n


class _Block:
    """The pass for some of the test points."""

    def __init__(self, path: Path, gradients: Gradients, x: Tensor, rule: str, kernel: bool) -> None:
        self.path, self.gradients, self.x, self.kernel = path, gradients, x, kernel
        self._repeated: dict[str, Tensor] = {}
        self.points, self.weights = RULES[rule]
        self.ups = gradients.width if kernel else 1
        self.rows = gradients.width * len(x)
        wide = {"dtype": torch.float64, "device": x.device}
        self.shares = torch.zeros(self.rows, self.ups * len(path.x), **wide)  # type: ignore[call-overload]
        self.decay = torch.zeros(self.rows, **wide)  # type: ignore[call-overload]

    def run(self) -> Iterator[int]:
        """Add up all steps; yields how many were done."""
        path, settings = self.path, self.path.settings
        carry = settings.decay > 0
        held: list[Tensor] | None = None
        floats = _floats(path, self.gradients, len(self.x), self.ups, len(self.points))
        chunk = max(1, _CHUNK // (floats * path.last.element_size()))
        for start, thetas, scales in path.segments(self.gradients, backwards=carry):
            count = len(thetas) - 1
            firsts = range(0, count, chunk)
            for first in reversed(firsts) if carry else firsts:
                stop = min(first + chunk, count)
                test = self._test(thetas[first : stop + 1])
                train = self._train(start + first, thetas[first:stop])
                if carry or scales is not None:
                    parts = self.gradients.gradients(test)
                    scale = None if scales is None else scales[first:stop]
                    held = self._backwards(start + first, parts, train, thetas[first:stop], scale, held)
                else:
                    self._add(start + first, self.gradients.inner(test, train, path.batches is None))
                    if settings.weight_decay:
                        parts = self.gradients.gradients(test)
                        for part, place in zip(parts, self.gradients.slices, strict=True):
                            self.decay += (part @ thetas[first:stop, place, None]).sum(0)[:, 0]
                yield stop - first
        factor = settings.rate if self.kernel else -settings.rate
        self.shares *= factor
        self.decay *= -settings.rate * settings.weight_decay

    def _test(self, thetas: Tensor) -> Sides:
        """Sides of the test points on the chords between the given points."""
        q, width = len(self.points), self.gradients.width
        u = thetas.new_tensor(self.points)[:, None]
        chords = torch.lerp(thetas[:-1, None], thetas[1:, None], u).flatten(0, 1)
        weights = thetas.new_tensor(self.weights).repeat(len(thetas) - 1)

        def upstream(out: Tensor) -> Tensor:
            made = out.new_zeros(width, *out.shape)
            for c in range(width):
                made[c, :, :, c] = weights[:, None]
            return made

        return self.gradients.sides(chords, self.x, upstream, q, repeated=self._repeat("test", self.x, len(chords)))[1]

    def _repeat(self, side: str, x: Tensor, count: int) -> Tensor:
        """The rows once for each of ``count`` parameter vectors; made again only when the count changes."""
        known = self._repeated.get(side)
        if known is None or len(known) != count * len(x):
            known = self._repeated[side] = x[None].expand(count, *x.shape).flatten(0, 1)
        return known

    def _train(self, step: int, thetas: Tensor) -> Sides:
        """Sides of the training examples at the given points."""
        path, gradients = self.path, self.gradients
        count = len(thetas)
        each = path.batches is not None
        rows = None if path.batches is None else path.batches[step : step + count]
        x, y = (path.x, path.y) if rows is None else (path.x[rows], path.y[rows])

        def upstream(out: Tensor) -> Tensor:
            if not self.kernel:
                return loss_gradient(path.settings.loss, out, y)[None]
            made = out.new_zeros(self.ups, *out.shape)
            for c in range(self.ups):
                made[c, :, :, c] = 1 / out.shape[-2]
            return made

        repeated = None if each else self._repeat("train", x, count)
        return gradients.sides(thetas, x, upstream, each=each, repeated=repeated)[1]

    def _backwards(
        self,
        step: int,
        parts: list[Tensor],
        train: Sides,
        thetas: Tensor,
        scales: Tensor | None,
        held: list[Tensor] | None,
    ) -> list[Tensor]:
        """Carry the test points' vectors H back over some steps."""
        gradients, settings = self.gradients, self.path.settings
        own = gradients.gradients(train)
        for j in reversed(range(len(thetas))):
            now = [part[j] for part in parts]
            if scales is not None:
                now = [g * scales[j, place] for g, place in zip(now, gradients.slices, strict=True)]
            if held is None:
                held = [g.clone() for g in now]
            else:
                held = [h.mul_(settings.decay).add_(g) for h, g in zip(held, now, strict=True)]
            products = held[0] @ own[0][j].mT
            for h, g in zip(held[1:], own[1:], strict=True):
                products.addmm_(h, g[j].mT)
            self._add(step + j, products if self.path.batches is None else products[None])
            if settings.weight_decay:
                for h, place in zip(held, gradients.slices, strict=True):
                    self.decay += h @ thetas[j, place]
        return held or []

    def _add(self, step: int, products: Tensor) -> None:
        """Add (C M, U N), or the (k, C M, U n) of the batches from ``step`` on."""
        if self.path.batches is None:
            self.shares += products
            return
        k = len(products)
        rows = self.path.batches[step : step + k].reshape(-1)
        products = products.view(k, self.rows, self.ups, -1).permute(1, 2, 0, 3).reshape(self.rows, self.ups, -1)
        self.shares.view(self.rows, self.ups, -1).index_add_(2, rows, products.to(self.shares.dtype))
