"""Attention over sums of scores, tile by tile: the kernels of ``residual.py``.

A tile is a block of query rows of one head (or all rows of several heads, when those are small) against all the keys
it may see. For each tile the layers are run through one after another while the running sum stays in the processor's
cache, so that no (T, S) matrix of scores exists for any layer:

    forward    A += scale Q_l K_l^T,  O_l = softmax(A) V_l                                       l = 1 .. L
    backward   the same again keeps P_l = softmax(A_l) of this tile for all l, then for l = L .. 1
               dV_l += P_l^T dO_l,  D += P_l * (dO_l V_l^T - rowsum),  dQ_l = scale D K_l,  dK_l += scale D^T Q_l

D is the gradient of A_l: the sum over m >= l of what the softmax of layer m sends back. Within a tile the mask is put
into A once, before the first layer, so it is never added to itself. dK and dV are accumulated transposed: d x rows
times rows x keys is half as fast again as keys x rows times rows x d.

``step_*`` do one layer with the scores in a matrix of the caller, for networks that need O_l before Q_(l+1).
Everything is computed in float32 (float64 stays). Shapes: B batch, H heads, T queries, S keys, D width of q and k,
E width of v; G = B H.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kexue._tensors import compute_dtype

TILE = 2**18  # elements of a tile: 1 MiB of float32, which a core keeps in its second-level cache
LEAST_ROWS = 64  # fewer rows make a slow matrix product, however many keys there are


@dataclass(frozen=True)
class Tile:
    """Heads ``g`` of the G, query rows ``r``, and the number of keys that the last of these rows may see."""

    g: slice
    r: slice
    keys: int

    @property
    def heads(self) -> int:
        """Number of heads."""
        return int(self.g.stop - self.g.start)

    @property
    def rows(self) -> int:
        """Number of query rows."""
        return int(self.r.stop - self.r.start)


@dataclass(frozen=True)
class Plan:
    """How (B, H, T, S) scores are cut into tiles, and which of them take part.

    Attributes:
        shape: (B, H, T, S).
        keep: (B, 1 or H, 1 or T, S) bool, True = takes part; None: all.
        causal: Query i sees the keys up to i + S - T.
        device: Of the tensors.
    """

    shape: tuple[int, int, int, int]
    keep: Tensor | None
    causal: bool
    device: torch.device

    @property
    def tile(self) -> int:
        """Elements of a tile; an accelerator wants large ones."""
        return TILE if self.device.type == "cpu" else 64 * TILE

    def groups(self) -> Iterator[slice]:
        """Slices of the G heads: within one sequence of the batch, or whole sequences."""
        batch, heads, rows, keys = self.shape
        size = max(1, self.tile // max(rows * keys, 1))
        if size >= heads:
            step = size // max(heads, 1) * heads
            for start in range(0, batch * heads, max(step, 1)):
                yield slice(start, min(start + step, batch * heads))
        else:
            for first in range(0, batch * heads, heads):
                for start in range(first, first + heads, size):
                    yield slice(start, min(start + size, first + heads))

    def row_tiles(self, g: slice) -> Iterator[Tile]:
        """The tiles of a group of heads."""
        _, _, rows, keys = self.shape
        height = rows
        if rows * keys * (g.stop - g.start) > self.tile:
            height = max(LEAST_ROWS, self.tile // max(keys, 1))
        for start in range(0, rows, max(height, 1)):
            stop = min(start + height, rows)
            yield Tile(g, slice(start, stop), stop + keys - rows if self.causal else keys)

    def tile_elements(self) -> int:
        """Elements of the largest tile."""
        found = 0
        for g in self.groups():
            for t in self.row_tiles(g):
                found = max(found, t.heads * t.rows * self.shape[3])
                break
        return found

    def view(self, x: Tensor, t: Tile) -> Tensor:
        """A contiguous (heads, rows, keys) tile as (sequences, heads of each, rows, keys)."""
        heads = self.shape[1]
        return x.view(max(t.heads // heads, 1), min(heads, t.heads), *x.shape[1:])

    def masks(self, t: Tile) -> tuple[Tensor | None, Tensor | None]:
        """What is left out of a tile, and its rows without any key, both to be broadcast over ``view``.

        Rows without any key are not left out (their softmax would be NaN); they are set to zero afterwards.
        """
        drop = None
        if self.keep is not None:
            batch, heads = divmod(t.g.start, self.shape[1])
            k = self.keep[batch : batch + max(t.heads // self.shape[1], 1)]
            if k.shape[1] > 1:
                k = k[:, heads : heads + min(self.shape[1], t.heads)]
            if k.shape[2] > 1:
                k = k[:, :, t.r]
            drop = ~k[..., : t.keys]
        if self.causal and t.rows > 1:
            last = torch.arange(t.r.start, t.r.stop, device=self.device) + (self.shape[3] - self.shape[2])
            future = torch.arange(t.keys, device=self.device) > last[:, None]
            drop = future if drop is None else drop | future
        if drop is None or self.keep is None:  # causality alone leaves every row a key
            return drop, None
        dead = drop.all(-1, keepdim=True)
        if not bool(dead.any()):
            return drop, None
        return drop & ~dead, dead


def plan_of(q: Tensor, k: Tensor, keep: Tensor | None, causal: bool) -> Plan:
    """The plan for q (B, H, T, D) and k (B, H, S, D)."""
    batch, heads, rows, _ = q.shape
    return Plan((batch, heads, rows, k.shape[2]), keep, causal, q.device)


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, T, D) as (G, T, D) in the dtype of the computation."""
    return x.to(dtype).reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def softmax_backward(grad: Tensor, probs: Tensor) -> Tensor:
    """Gradient of the scores, probs * (grad - rowsum(grad * probs)), overwriting ``grad``."""
    return grad.sub_(torch.linalg.vecdot(grad, probs).unsqueeze(-1)).mul_(probs)


def _probabilities(plan: Plan, t: Tile, scores: Tensor, dead: Tensor | None, out: Tensor) -> Tensor:
    torch.softmax(scores, -1, out=out)
    if dead is not None:
        plan.view(out, t).masked_fill_(dead, 0)
    return out


def _add_scores(
    plan: Plan, t: Tile, a: Tensor, q: Tensor, k: Tensor, scale: float, drop: Tensor | None, first: bool
) -> None:
    """A += scale q k^T; the first layer overwrites A, which then holds the mask."""
    if first and drop is not None:
        a.zero_()
        plan.view(a, t).masked_fill_(drop, -math.inf)
    beta = 0.0 if first and drop is None else 1.0
    torch.baddbmm(a, q[t.g, t.r], k[t.g, : t.keys].transpose(1, 2), beta=beta, alpha=scale, out=a)


def stack_forward(
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    keep: Tensor | None,
    causal: bool,
    scale: float,
    mean: bool,
    kept: Tensor | None = None,
) -> list[Tensor]:
    """The outputs (B, H, T, E) of all layers.

    Args:
        qs: L tensors (B, H, T, D).
        ks: L tensors (B, H, S, D).
        vs: L tensors (B, H, S, E).
        keep: As in :class:`Plan`.
        causal: As in :class:`Plan`.
        scale: Factor on q·k.
        mean: The scores of layer l are divided by l.
        kept: (G, T, S), one layer only: its probabilities are written here.
    """
    dtype = compute_dtype(*qs)
    plan = plan_of(qs[0], ks[0], keep, causal)
    q3, k3, v3 = ([flat(x, dtype) for x in xs] for xs in (qs, ks, vs))
    outs = [q.new_zeros(q.shape[0], q.shape[1], v.shape[2]) for q, v in zip(q3, v3, strict=True)]
    size = plan.tile_elements()
    a_buffer, p_buffer = q3[0].new_empty(size), q3[0].new_empty(size)
    for t in _all_tiles(plan):
        drop, dead = plan.masks(t)
        a, p = _tile(a_buffer, t), _tile(p_buffer, t)
        for n, (q, k, v, out) in enumerate(zip(q3, k3, v3, outs, strict=True)):
            _add_scores(plan, t, a, q, k, scale, drop, n == 0)
            shown = torch.mul(a, 1 / (n + 1), out=p) if mean and n else a
            _probabilities(plan, t, shown, dead, p)
            if kept is not None:
                kept[t.g, t.r, : t.keys] = p
            torch.bmm(p, v[t.g, : t.keys], out=out[t.g, t.r])
    return [out.to(q.dtype).view(*q.shape[:3], out.shape[2]) for out, q in zip(outs, qs, strict=True)]


def _all_tiles(plan: Plan) -> Iterator[Tile]:
    if plan.shape[3] == 0:  # no keys: the outputs stay zero
        return
    for g in plan.groups():
        yield from plan.row_tiles(g)


def _tile(buffer: Tensor, t: Tile) -> Tensor:
    return buffer[: t.heads * t.rows * t.keys].view(t.heads, t.rows, t.keys)


def stack_backward(
    qs: Sequence[Tensor],
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    keep: Tensor | None,
    causal: bool,
    scale: float,
    mean: bool,
    detach: bool,
    kept: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of qs, ks and vs (3 L tensors) from those of the outputs; the scores are computed again.

    Args:
        qs: As in :func:`stack_forward`.
        ks: As in :func:`stack_forward`.
        vs: As in :func:`stack_forward`.
        grads: Gradients of the outputs, None = zero.
        keep: As in :class:`Plan`.
        causal: As in :class:`Plan`.
        scale: Factor on q·k.
        mean: As in :func:`stack_forward`.
        detach: The scores of earlier layers count as constants.
        kept: Probabilities from the forward pass (one layer only).
    """
    dtype = compute_dtype(*qs)
    plan = plan_of(qs[0], ks[0], keep, causal)
    q3, k3, v3 = ([flat(x, dtype) for x in xs] for xs in (qs, ks, vs))
    g3 = [None if x is None else flat(x, dtype) for x in grads]
    dq, dk, dv = ([torch.zeros_like(x) for x in xs] for xs in (q3, k3, v3))
    layers = max((n + 1 for n, g in enumerate(g3) if g is not None), default=0)
    size = plan.tile_elements()
    p_buffers = [q3[0].new_empty(0 if g3[n] is None or kept is not None else size) for n in range(layers)]
    a_buffer, w_buffer, d_buffer = (q3[0].new_empty(size) for _ in range(3))
    keys = plan.shape[3]
    for g in plan.groups() if keys else ():
        heads = g.stop - g.start
        dkt = [x.new_zeros(heads, x.shape[2], keys) for x in k3[:layers]]
        dvt = [x.new_zeros(heads, x.shape[2], keys) for x in v3[:layers]]
        for t in plan.row_tiles(g):
            a, w, d = (_tile(x, t) for x in (a_buffer, w_buffer, d_buffer))
            probs: list[Tensor] = []
            if kept is not None:
                probs = [kept[t.g, t.r, : t.keys]]
            else:
                drop, dead = plan.masks(t)
                for n in range(layers):
                    _add_scores(plan, t, a, q3[n], k3[n], scale, drop, n == 0)
                    p = _tile(p_buffers[n], t) if g3[n] is not None else w[:0]
                    if g3[n] is not None:
                        shown = torch.mul(a, 1 / (n + 1), out=p) if mean and n else a
                        _probabilities(plan, t, shown, dead, p)
                    probs.append(p)
            empty = True
            for n in reversed(range(layers)):
                grad = g3[n]
                if grad is not None:
                    grad = grad[t.g, t.r]
                    torch.bmm(grad, v3[n][t.g, : t.keys].transpose(1, 2), out=w)
                    _accumulate(dvt[n], grad, probs[n], 1.0)
                    softmax_backward(w, probs[n])
                    factor = 1 / (n + 1) if mean else 1.0
                    if empty or detach:
                        torch.mul(w, factor, out=d)
                    else:
                        d.add_(w, alpha=factor)
                    empty = False
                elif detach:
                    continue
                torch.baddbmm(dq[n][t.g, t.r], d, k3[n][t.g, : t.keys], beta=0, alpha=scale, out=dq[n][t.g, t.r])
                _accumulate(dkt[n], q3[n][t.g, t.r], d, scale)
        for n in range(layers):
            dk[n][g] = dkt[n].transpose(1, 2)
            dv[n][g] = dvt[n].transpose(1, 2)
    shapes = [*qs, *ks, *vs]
    return [x.to(y.dtype).view(y.shape) for x, y in zip([*dq, *dk, *dv], shapes, strict=True)]


def _accumulate(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add up total (heads, D, S) += scale left^T right, for left (heads, rows, D) and right (heads, rows, keys)."""
    part = total[:, :, : right.shape[2]]
    torch.baddbmm(part, left.transpose(1, 2), right, alpha=scale, out=part)


def step_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prev: Tensor | None,
    scores: Tensor,
    keep: Tensor | None,
    causal: bool,
    scale: float,
    layers: int,
    dropout: float,
    seed: int,
    whole: bool,
) -> Tensor:
    """One layer: writes ``scores`` = ``prev`` + scale q k^T and returns softmax(scores / layers) v.

    Args:
        q: (B, H, T, D).
        k: (B, H, S, D).
        v: (B, H, S, E).
        prev: (G, T, S) scores of the earlier layers; may be ``scores`` itself; None: zero.
        scores: (G, T, S), overwritten; never masked.
        keep: As in :class:`Plan`.
        causal: As in :class:`Plan`.
        scale: Factor on q·k.
        layers: What the scores are divided by.
        dropout: Share of the probabilities that are set to 0 (the others grow by 1 / (1 - dropout)).
        seed: Of the dropout.
        whole: Also compute the scores of keys that causality hides from a whole tile.
    """
    dtype = scores.dtype
    plan = plan_of(q, k, keep, causal)
    q3, k3, v3 = (flat(x, dtype) for x in (q, k, v))
    out = q3.new_zeros(q3.shape[0], q3.shape[1], v3.shape[2])
    buffer = q3.new_empty(plan.tile_elements())
    for index, t in enumerate(_all_tiles(plan)):
        width = plan.shape[3] if whole else t.keys
        a = scores[t.g, t.r, :width]
        before = a if prev is None else prev[t.g, t.r, :width]
        kt = k3[t.g, :width].transpose(1, 2)
        torch.baddbmm(before, q3[t.g, t.r], kt, beta=float(prev is not None), alpha=scale, out=a)
        p, noise = _step_probabilities(plan, t, a, buffer, layers, dropout, seed + index)
        if noise is not None:
            p.mul_(noise)
        torch.bmm(p, v3[t.g, : t.keys], out=out[t.g, t.r])
    return out.to(q.dtype).view(*q.shape[:3], v.shape[3])


def _step_probabilities(
    plan: Plan, t: Tile, a: Tensor, buffer: Tensor, layers: int, dropout: float, seed: int
) -> tuple[Tensor, Tensor | None]:
    """softmax(a / layers) of the keys that take part, in ``buffer``, and what dropout multiplies it by."""
    p = _tile(buffer, t)
    a = a[:, :, : t.keys]
    drop, dead = plan.masks(t)
    if layers > 1:
        a = torch.mul(a, 1 / layers, out=p)
    if drop is not None:
        a = a if layers > 1 else p.copy_(a)
        plan.view(a, t).masked_fill_(drop, -math.inf)
    _probabilities(plan, t, a, dead, p)
    if not dropout:
        return p, None
    # A generator of its own for each tile: the backward pass draws the same numbers again instead of keeping them.
    generator = torch.Generator(p.device).manual_seed(seed)
    return p, torch.empty_like(p).bernoulli_(1 - dropout, generator=generator).mul_(1 / (1 - dropout))


def step_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    grad: Tensor | None,
    d: Tensor,
    keep: Tensor | None,
    causal: bool,
    scale: float,
    layers: int,
    dropout: float,
    seed: int,
    fresh: bool,
    whole: bool,
    before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v for one layer, and a bound on what was lost in ``before``.

    Args:
        q: As in :func:`step_forward`.
        k: As in :func:`step_forward`.
        v: As in :func:`step_forward`.
        scores: (G, T, S) of this layer.
        grad: (B, H, T, E) gradient of the output, or None.
        d: (G, T, S): in, the gradient of the scores from later layers; out, this layer's added.
        keep: As in :class:`Plan`.
        causal: As in :class:`Plan`.
        scale: As in :func:`step_forward`.
        layers: As in :func:`step_forward`.
        dropout: As in :func:`step_forward`.
        seed: As in :func:`step_forward`.
        fresh: Nothing has been written to ``d`` yet: it counts as zero.
        whole: ``d`` may hold gradients of keys that causality hides.
        before: Overwritten by scores - scale q k^T, the scores of the layer before; may be ``scores`` itself.

    Returns:
        Gradients in the dtypes of q, k, v; the largest absolute score of the tiles, a 0-dimensional tensor.
    """
    dtype = scores.dtype
    plan = plan_of(q, k, keep, causal)
    q3, k3, v3 = (flat(x, dtype) for x in (q, k, v))
    g3 = None if grad is None else flat(grad, dtype)
    dq, dk, dv = (torch.zeros_like(x) for x in (q3, k3, v3))
    size = plan.tile_elements()
    p_buffer, w_buffer = q3.new_empty(size), q3.new_empty(size)
    keys, index = plan.shape[3], 0
    largest = scores.new_zeros(())
    for g in plan.groups() if keys else ():
        dkt = q3.new_zeros(g.stop - g.start, k3.shape[2], keys)
        dvt = q3.new_zeros(g.stop - g.start, v3.shape[2], keys)
        for t in plan.row_tiles(g):
            width = keys if whole else t.keys
            a, total = scores[t.g, t.r, :width], d[t.g, t.r, :width]
            if fresh:
                total.zero_()
            if g3 is not None:
                p, noise = _step_probabilities(plan, t, a, p_buffer, layers, dropout, seed + index)
                w, go = _tile(w_buffer, t), g3[t.g, t.r]
                torch.bmm(go, v3[t.g, : t.keys].transpose(1, 2), out=w)
                if noise is not None:
                    w.mul_(noise)
                _accumulate(dvt, go, p if noise is None else noise.mul_(p), 1.0)
                total[:, :, : t.keys].add_(softmax_backward(w, p), alpha=1 / layers)
            torch.baddbmm(dq[t.g, t.r], total, k3[t.g, :width], beta=0, alpha=scale, out=dq[t.g, t.r])
            _accumulate(dkt, q3[t.g, t.r], total, scale)
            if before is not None:
                low, high = torch.aminmax(a)
                largest = torch.maximum(largest, torch.maximum(-low, high))
                kt = k3[t.g, :width].transpose(1, 2)
                torch.baddbmm(a, q3[t.g, t.r], kt, alpha=-scale, out=before[t.g, t.r, :width])
            index += 1
        dk[g] = dkt.transpose(1, 2)
        dv[g] = dvt.transpose(1, 2)
    dq, dk, dv = (x.to(y.dtype).view(y.shape) for x, y in zip((dq, dk, dv), (q, k, v), strict=True))
    return dq, dk, dv, largest
