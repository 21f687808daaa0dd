"""Routing by agreement with its gradient, by blocks of examples, keeping nothing between the passes but the sums.

Votes v_ij of n inputs for k capsules of width o, t = 1 ... r, scale = 1 / temperature:

    s_1 = sum_i v_ij / k,    s_t,j = sum_i c_t,ij v_ij,    c_t = softmax over j of scale <v_ij, G_t,j>
    G_t = s_{t-1} / |s_{t-1}| (kmeans),  squash(s_{t-1}) (squash),  G_{t-1} + squash(s_{t-1}) (hinton)

Hinton's logits accumulate, but they are linear in the votes: it is enough to accumulate G. So every rule needs only the
sums s_t, (r, B, k, o), to find all coefficients again. With ds_t the gradient of s_t,

    dc_ij = <v_ij, ds_j>,   db_ij = scale c_ij (dc_ij - sum_l c_il dc_il),   dG_j = sum_i db_ij v_ij
    dv_ij = sum_t c_t,ij ds_t,j + db_t,ij G_t,j

which is one product with 2r - 1 terms at the end. "Keys" answer what the loop asks of the votes: for shared weights
v_ij = u_i W_j, and <u_i W_j, G> = <u_i, W_j G>, sum_i c_ij u_i W_j = (sum_i c_ij u_i) W_j, so they are never built.

Shapes: B batch, n inputs, i their width, k capsules, o their width, m vectors asked about at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue._tensors import compute_dtype, once_differentiable

LOG2E = 1.4426950408889634
SQUASH_EPS = 1e-7  # added to the squared norm, as in the article's code
NORM_EPS = 1e-12
BLOCK = 2**20  # numbers of a block of examples, 4 MiB in float32: it stays in the cache
DENSE_BLOCK = 2**23  # with a matrix for every input, more examples make better use of each one that is read


def lengths(s: Tensor, eps: float, dim: int = -1) -> Tensor:
    """sqrt(|s|^2 + eps), also where the squares would overflow."""
    top = s.detach().abs().amax(dim, keepdim=True).clamp(min=1.0) if s.numel() else s.new_ones(())
    return top * ((s / top).square().sum(dim, keepdim=True) + eps / top.square()).sqrt()


def _direction(s: Tensor, rule: str) -> Tensor:
    """What agreement is measured with: the unit vector, or the squashed one (kappa = 1)."""
    if rule == "kmeans":
        return s / lengths(s, NORM_EPS)
    m = lengths(s, SQUASH_EPS)
    return s / (m.reciprocal() + m)


def _through_direction(grad: Tensor, s: Tensor, rule: str) -> Tensor:
    m = lengths(s, NORM_EPS if rule == "kmeans" else SQUASH_EPS)
    unit = s / m
    along = unit * (unit * grad).sum(-1, keepdim=True)
    if rule == "kmeans":
        return (grad - along) / m
    inverse = m.reciprocal()
    return (grad + along * ((inverse - m) / (inverse + m))) / (inverse + m)


class _VoteKeys:
    """Votes as (b * k, n, o), of any strides."""

    def __init__(self, votes: Tensor, capsules: int) -> None:
        self.votes, self.capsules = votes, capsules

    def total(self) -> Tensor:
        return self.votes.sum(1).unflatten(0, (-1, self.capsules))

    def scores(self, vectors: Tensor) -> Tensor:
        """(b, k, m, o) -> inner products (b, k, m, n)."""
        return torch.bmm(vectors.flatten(0, 1), self.votes.mT).unflatten(0, (-1, self.capsules))

    def sums(self, c: Tensor) -> Tensor:
        """(b, k, m, n) -> weighted sums (b, k, m, o)."""
        return torch.bmm(c.flatten(0, 1), self.votes).unflatten(0, (-1, self.capsules))

    def pull(self, db: Tensor, c: Tensor) -> Tensor:
        """Sums weighted by db (b, k, n), (b, k, o); c, the coefficients of the same iteration, will be needed too."""
        return self.sums(db[:, :, None]).squeeze(2)

    def votes_gradient(self, c: Tensor, vectors: Tensor, first: Tensor) -> Tensor:
        """(b, k, m, n), (b, k, m, o), (b, k, o) -> (b * k, n, o), in place of the votes."""
        c = torch.cat([c, c.new_ones(*c.shape[:2], 1, c.shape[3])], 2).flatten(0, 1)
        vectors = torch.cat([vectors, first[:, :, None]], 2).flatten(0, 1)
        return self.votes.baddbmm_(c.mT, vectors, beta=0)


class _GivenKeys(_VoteKeys):
    """Votes given as (b, n, k, o)."""

    def __init__(self, x: Tensor) -> None:
        votes = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).copy_(x.transpose(1, 2))
        super().__init__(votes.flatten(0, 1), x.shape[2])

    def gradient(self, c: Tensor, vectors: Tensor, first: Tensor, weight_grad: Tensor | None) -> Tensor:
        return self.votes_gradient(c, vectors, first).unflatten(0, (-1, self.capsules)).transpose(1, 2)


class _DenseKeys(_VoteKeys):
    """Inputs (b, n, i) with a matrix for every input, (n, i, k * o)."""

    def __init__(self, x: Tensor, weight: Tensor, capsules: int) -> None:
        self.x, self.weight = x.transpose(0, 1), weight
        self.memory = torch.bmm(self.x, weight)  # (n, b, k * o), which `votes` is a view of
        super().__init__(self.memory.view(len(weight), -1, weight.shape[2] // capsules).transpose(0, 1), capsules)

    def gradient(self, c: Tensor, vectors: Tensor, first: Tensor, weight_grad: Tensor | None) -> Tensor:
        self.votes_gradient(c, vectors, first)
        if weight_grad is not None:
            weight_grad.baddbmm_(self.x.mT, self.memory)
        return torch.bmm(self.memory, self.weight.mT).transpose(0, 1)


class _SharedKeys:
    """Inputs (b, n, i) with one matrix for every capsule, (k, i, o)."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.x, self.weight = x, weight
        self.sum = x.sum(1)[:, None, None].expand(-1, len(weight), 1, -1)
        self.collected: list[Tensor] = []

    def _mapped(self, vectors: Tensor, weight: Tensor) -> Tensor:
        """(b, k, m, p) through (k, p, q) -> (b, k, m, q)."""
        b, k, m, p = vectors.shape
        out = torch.bmm(vectors.transpose(0, 1).reshape(k, b * m, p), weight)
        return out.view(k, b, m, weight.shape[2]).transpose(0, 1)

    def total(self) -> Tensor:
        return self._mapped(self.sum, self.weight).squeeze(2)

    def _collected(self, c: Tensor) -> Tensor:
        """(b, k, m, n) -> weighted sums of the inputs (b, k, m, i)."""
        return torch.bmm(c.flatten(1, 2), self.x).unflatten(1, c.shape[1:3])

    def scores(self, vectors: Tensor) -> Tensor:
        queries = self._mapped(vectors, self.weight.mT).flatten(1, 2)
        return torch.bmm(queries, self.x.mT).unflatten(1, vectors.shape[1:3])

    def sums(self, c: Tensor) -> Tensor:
        return self._mapped(self._collected(c), self.weight)

    def pull(self, db: Tensor, c: Tensor) -> Tensor:
        both = self._collected(torch.stack([c, db], 2))
        self.collected.append(both)  # the gradient of the weight needs them again
        return self._mapped(both[:, :, 1:], self.weight).squeeze(2)

    def gradient(self, c: Tensor, vectors: Tensor, first: Tensor, weight_grad: Tensor | None) -> Tensor:
        b, k, m = c.shape[:3]
        if weight_grad is not None:  # sum over i of u_i (x) dv_ij, the uniform iteration last
            inputs = torch.cat([*(self.collected or [self._collected(c)]), self.sum], 2)
            outputs = torch.cat([vectors, first[:, :, None]], 2).transpose(0, 1).reshape(k, b * (m + 1), -1)
            weight_grad.baddbmm_(inputs.transpose(0, 1).reshape(k, b * (m + 1), -1).mT, outputs)
        grad = torch.bmm(c.flatten(1, 2).mT, self._mapped(vectors, self.weight.mT).flatten(1, 2))
        return grad.add_(self._mapped(first[:, :, None], self.weight.mT).sum((1, 2))[:, None])


def _coefficients(scores: Tensor, hard: bool) -> Tensor:
    """Softmax over axis 1 of base-2 logits (b, k, n), overwritten; or all weight on the best capsule."""
    if hard:
        best = scores.argmax(1, keepdim=True)
        return torch.zeros_like(scores).scatter_(1, best, 1.0)
    scores = scores.sub(scores.amax(1, keepdim=True)).exp2_()  # several times faster than exp_ on a CPU
    return scores.mul_(scores.sum(1, keepdim=True).reciprocal_())


class _Blocks:
    """The examples block by block, as keys in the precision of the computation."""

    def __init__(self, x: Tensor, weight: Tensor | None, mask: Tensor | None, capsules: int, routings: int) -> None:
        self.x, self.mask, self.capsules, self.shared = x, mask, capsules, weight is not None and weight.dim() == 2
        self.dtype = compute_dtype(x) if weight is None else compute_dtype(x, weight)
        self.batch, inputs = x.shape[:2]
        self.width = x.shape[3] if weight is None else weight.shape[-1] // capsules
        self.weight = None if weight is None else weight.to(self.dtype)
        if self.shared and self.weight is not None:
            self.weight = self.weight.unflatten(1, (capsules, -1)).transpose(0, 1).contiguous()
        per_example = inputs * (x.shape[2] + 2 * capsules if self.shared else capsules * self.width)
        rows = max(1, (DENSE_BLOCK if weight is not None and not self.shared else BLOCK) // max(per_example, 1))
        blocks = -(-self.batch // rows)
        self.rows = -(-self.batch // max(blocks, 1))  # of equal size

    def __iter__(self) -> Any:
        for start in range(0, self.batch, max(self.rows, 1)):
            block = slice(start, start + self.rows)
            x = self.x[block].to(self.dtype)
            if self.mask is not None:
                outside = ~self.mask[block]
                x = x.masked_fill(outside.view(*outside.shape, *(1,) * (x.dim() - 2)), 0.0)
            if self.weight is None:
                yield block, _GivenKeys(x)
            elif self.shared:
                yield block, _SharedKeys(x, self.weight)
            else:
                yield block, _DenseKeys(x, self.weight, self.capsules)


def route_forward(
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    capsules: int,
    routings: int,
    rule: str,
    scale: float,
    hard: bool,
    coupling: bool,
) -> tuple[Tensor, Tensor]:
    """Sums s_t of all iterations (r, B, k, o) and, if asked for, the last coefficients (B, n, k)."""
    blocks = _Blocks(x, weight, mask, capsules, routings)
    batch, inputs = x.shape[:2]
    states = x.new_empty(routings, batch, capsules, blocks.width, dtype=blocks.dtype)
    last = x.new_empty((batch, inputs, capsules) if coupling else 0, dtype=blocks.dtype)
    if coupling:
        last.fill_(1.0 / capsules)
    for block, keys in blocks:
        torch.div(keys.total(), capsules, out=states[0, block])
        direction: Tensor | float = 0.0
        for t in range(1, routings):
            found = _direction(states[t - 1, block], rule)
            direction = direction + found if rule == "hinton" else found
            c = _coefficients(keys.scores((direction * (scale * LOG2E))[:, :, None]).squeeze(2), hard)
            states[t, block] = keys.sums(c[:, :, None]).squeeze(2)
            if coupling and t == routings - 1:
                last[block] = c.mT
    if coupling and mask is not None:
        last.masked_fill_(~mask[..., None], 0.0)
    return states, last


def route_backward(
    grad: Tensor,
    grad_coupling: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    states: Tensor,
    rule: str,
    scale: float,
    hard: bool,
    detach: bool,
    weight_needed: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty if not needed), from those of s_r (B, k, o) and of c_r (B, n, k)."""
    routings, _, k = states.shape[:3]
    blocks = _Blocks(x, weight, mask, k, routings)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_w = None if blocks.weight is None or not weight_needed else torch.zeros_like(blocks.weight)
    if grad_coupling is not None and mask is not None:
        grad_coupling = grad_coupling.masked_fill(~mask[..., None], 0.0)
    for block, keys in blocks:
        directions = [_direction(s, rule) for s in states[:-1, block]]
        if rule == "hinton":
            for t in range(1, len(directions)):
                directions[t] = directions[t] + directions[t - 1]
        ds, carried = grad[block], torch.zeros_like(grad[block])
        kept: list[Tensor] = []
        vectors: list[Tensor] = []
        for t in range(routings - 1, 0, -1):
            direction = directions[t - 1]
            asked = [direction * (scale * LOG2E)] if detach else [direction * (scale * LOG2E), ds]
            scores = keys.scores(torch.stack(asked, 2))
            c = _coefficients(scores[:, :, 0], hard)
            kept.append(c)
            vectors.append(ds)
            if detach:
                break
            dc = scores[:, :, 1]
            if t == routings - 1 and grad_coupling is not None:
                dc = dc + grad_coupling[block].mT
            db = (dc - (c * dc).sum(1, keepdim=True)).mul_(c).mul_(scale)
            kept.append(db)
            vectors.append(direction)
            back = keys.pull(db, c)
            carried = carried + back if rule == "hinton" else back
            ds = _through_direction(carried, states[t - 1, block], rule)
        first = torch.zeros_like(ds) if detach and routings > 1 else ds / k
        if not kept:  # one iteration: uniform coefficients only
            kept, vectors = [grad.new_zeros(len(ds), k, x.shape[1])], [torch.zeros_like(ds)]
        grad_x[block] = keys.gradient(torch.stack(kept, 2), torch.stack(vectors, 2), first, grad_w)
    if mask is not None:
        grad_x.masked_fill_(~mask.view(*mask.shape, *(1,) * (x.dim() - 2)), 0.0)
    if grad_w is None or weight is None:
        return grad_x, x.new_empty(0)
    if blocks.shared:
        grad_w = grad_w.transpose(0, 1).reshape(weight.shape)
    return grad_x, grad_w.to(weight.dtype)


@torch.library.custom_op(
    "kexue::capsule_routing",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? weight, Tensor? mask, int capsules, int routings, str rule, float scale, bool hard,"
        " bool coupling) -> (Tensor, Tensor)"
    ),
)
def _forward_op(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return route_forward(x, *args)


@_forward_op.register_fake
def _(x, weight, mask, capsules, routings, rule, scale, hard, coupling):  # type: ignore[no-untyped-def]
    dtype = compute_dtype(x) if weight is None else compute_dtype(x, weight)
    width = x.shape[3] if weight is None else weight.shape[-1] // capsules
    last = (x.shape[0], x.shape[1], capsules) if coupling else (0,)
    return x.new_empty(routings, x.shape[0], capsules, width, dtype=dtype), x.new_empty(last, dtype=dtype)


@torch.library.custom_op(
    "kexue::capsule_routing_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? grad_coupling, Tensor x, Tensor? weight, Tensor? mask, Tensor states, str rule,"
        " float scale, bool hard, bool detach, bool weight_needed) -> (Tensor, Tensor)"
    ),
)
def _backward_op(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(grad.device.type, enabled=False):
        return route_backward(grad, *args)


@_backward_op.register_fake
def _(grad, grad_c, x, weight, mask, states, rule, scale, hard, detach, needed):  # type: ignore[no-untyped-def]
    shape = weight.shape if needed and weight is not None else (0,)
    found = x if weight is None or not needed else weight
    return x.new_empty(x.shape), found.new_empty(shape)


class Route(torch.autograd.Function):
    """(x, weight, mask, capsules, routings, rule, scale, hard, detach, coupling) -> s_r (B, k, o), c_r (B, n, k)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        capsules: int,
        routings: int,
        rule: str,
        scale: float,
        hard: bool,
        detach: bool,
        coupling: bool,
    ) -> tuple[Tensor, Tensor]:
        states, last = _forward_op(x, weight, mask, capsules, routings, rule, scale, hard, coupling)
        ctx.save_for_backward(x, weight, mask, states)
        ctx.options = (rule, scale, hard, detach or hard)
        ctx.coupling = coupling and routings > 1 and not (detach or hard)
        return states[-1].clone(), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_coupling: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, states = ctx.saved_tensors
        needed = ctx.needs_input_grad[1]
        grad_x, grad_w = _backward_op(
            grad, grad_coupling if ctx.coupling else None, x, weight, mask, states, *ctx.options, needed
        )
        return grad_x, grad_w if needed else None, *(None,) * 8
