"""What the routing of ``_capsule_kernel.py`` asks of the votes, for a block of examples.

Keys have four methods; b examples, k capsules of width o, queries are scaled by log2(e) / temperature:

    total()                            sums of the votes (b, k, o)
    collect(query, hard, coupling)     one iteration: coefficients c = softmax over j of <v_ij, q_j>, sums of c_ij v_ij
    push(query, slope, upstream, ...)  backwards: db_ij = ln 2 c_ij (dc_ij - sum_l c_il dc_il), where
                                       dc_ij = <v_ij, slope_j> + upstream_ij; returns the sums of db_ij v_ij
    gradient(first, weight_grad)       of the inputs, after all pushes: dv_ij = first_j + sum c_ij slope_j + db_ij q_j;
                                       adds to that of the weight, if wanted

Votes that are given or dense are built for the block. For shared weights <u_i W_j, q> = <u_i, W_j q> and
sum_i c_ij u_i W_j = (sum_i c_ij u_i) W_j, so that they never are. In float32 on a CPU both kinds of layers go through
the kernels of ``_capsule_passes.py``; the classes in torch serve all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kexue._tensors import compute_dtype
from kexue.attention._threads import run_parts

LN2 = 0.6931471805599453
BLOCK = 2**20  # numbers of a block of examples, 4 MiB in float32: it stays in the cache
DENSE_BLOCK = 2**23  # with a matrix for every input, more examples make better use of each one that is read
EXAMPLES = 64  # that the kernel for dense weights takes at a time
FEWEST = 8  # examples that are worth its vectors of 16
WORTH_THREADS = 2**21  # multiplications: some 0.1 ms


def _coefficients(scores: Tensor, hard: bool) -> Tensor:
    """Softmax over axis 1 of base-2 logits (b, k, n); or all weight on the best capsule."""
    if hard:
        best = scores.argmax(1, keepdim=True)
        return torch.zeros_like(scores).scatter_(1, best, 1.0)
    scores = scores.sub(scores.amax(1, keepdim=True)).exp2_()  # several times faster than exp_ on a CPU
    return scores.mul_(scores.sum(1, keepdim=True).reciprocal_())


class _TorchKeys:
    """The iterations, from ``scores`` and ``sums`` of m vectors at once."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []  # factors (b, k, n) of the vectors (b, k, o) in the gradient of the votes
        self.vectors: list[Tensor] = []

    def scores(self, vectors: Tensor) -> Tensor:
        """(b, k, m, o) -> inner products (b, k, m, n)."""
        raise NotImplementedError

    def sums(self, c: Tensor) -> Tensor:
        """(b, k, m, n) -> weighted sums (b, k, m, o)."""
        raise NotImplementedError

    def collect(self, query: Tensor, hard: bool, coupling: Tensor | None) -> Tensor:
        c = _coefficients(self.scores(query[:, :, None]).squeeze(2), hard)
        if coupling is not None:
            coupling.copy_(c.mT)
        return self.sums(c[:, :, None]).squeeze(2)

    def push(self, query: Tensor, slope: Tensor, upstream: Tensor | None, hard: bool, constant: bool) -> Tensor:
        scores = self.scores(torch.stack([query] if constant else [query, slope], 2))
        c = _coefficients(scores[:, :, 0], hard)
        self.kept.append(c)
        self.vectors.append(slope)
        if constant:
            return torch.zeros_like(slope)
        dc = scores[:, :, 1] if upstream is None else scores[:, :, 1] + upstream.mT
        db = (dc - (c * dc).sum(1, keepdim=True)).mul_(c).mul_(LN2)
        self.kept.append(db)
        self.vectors.append(query)
        return self.sums(db[:, :, None]).squeeze(2)


class _VoteKeys(_TorchKeys):
    """Votes as (b * k, n, o), of any strides."""

    def __init__(self, votes: Tensor, capsules: int) -> None:
        super().__init__()
        self.votes, self.capsules = votes, capsules

    def total(self) -> Tensor:
        return self.votes.sum(1).unflatten(0, (-1, self.capsules))

    def scores(self, vectors: Tensor) -> Tensor:
        return torch.bmm(vectors.flatten(0, 1), self.votes.mT).unflatten(0, (-1, self.capsules))

    def sums(self, c: Tensor) -> Tensor:
        return torch.bmm(c.flatten(0, 1), self.votes).unflatten(0, (-1, self.capsules))

    def votes_gradient(self, first: Tensor) -> Tensor:
        """(b * k, n, o), in place of the votes."""
        ones = first.new_ones(*first.shape[:2], self.votes.shape[1])
        c = torch.stack([*self.kept, ones], 2).flatten(0, 1)
        vectors = torch.stack([*self.vectors, first], 2).flatten(0, 1)
        return self.votes.baddbmm_(c.mT, vectors, beta=0)


class _GivenKeys(_VoteKeys):
    """Votes given as (b, n, k, o)."""

    def __init__(self, x: Tensor) -> None:
        votes = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).copy_(x.transpose(1, 2))
        super().__init__(votes.flatten(0, 1), x.shape[2])

    def gradient(self, first: Tensor, weight_grad: Tensor | None) -> Tensor:
        return self.votes_gradient(first).unflatten(0, (-1, self.capsules)).transpose(1, 2)


class _DenseKeys(_VoteKeys):
    """Inputs (b, n, i) with a matrix for every input, (n, i, k * o)."""

    def __init__(self, x: Tensor, weight: Tensor, capsules: int) -> None:
        self.x, self.weight = x.transpose(0, 1), weight
        self.memory = torch.bmm(self.x, weight)  # (n, b, k * o), which `votes` is a view of
        super().__init__(self.memory.view(len(weight), -1, weight.shape[2] // capsules).transpose(0, 1), capsules)

    def gradient(self, first: Tensor, weight_grad: Tensor | None) -> Tensor:
        self.votes_gradient(first)
        if weight_grad is not None:
            weight_grad.baddbmm_(self.x.mT, self.memory)
        return torch.bmm(self.memory, self.weight.mT).transpose(0, 1)


class _SharedKeys(_TorchKeys):
    """Inputs (b, n, i) with one matrix for every capsule, together (i, k * o)."""

    def __init__(self, x: Tensor, weight: Tensor, capsules: int) -> None:
        super().__init__()
        self.x, self.weight, self.capsules = x, weight, capsules
        self.matrices = weight.unflatten(1, (capsules, -1)).transpose(0, 1)  # (k, i, o)
        self.sum = x.sum(1)

    def total(self) -> Tensor:
        return (self.sum @ self.weight).unflatten(1, (self.capsules, -1))

    def _mapped(self, vectors: Tensor, matrices: Tensor) -> Tensor:
        """(b, k, m, p) through (k, p, q) -> (k, b * m, q)."""
        return torch.bmm(vectors.transpose(0, 1).flatten(1, 2), matrices)

    def _queries(self, vectors: Tensor) -> Tensor:
        """(b, k, m, o) -> (b, k * m, i)."""
        b, k, m, _ = vectors.shape
        return self._mapped(vectors, self.matrices.mT).view(k, b, m, -1).transpose(0, 1).flatten(1, 2)

    def scores(self, vectors: Tensor) -> Tensor:
        return torch.bmm(self._queries(vectors), self.x.mT).unflatten(1, vectors.shape[1:3])

    def _collected(self, c: Tensor) -> Tensor:
        """(b, k, m, n) -> weighted sums of the inputs (b, k, m, i)."""
        return torch.bmm(c.flatten(1, 2), self.x).unflatten(1, c.shape[1:3])

    def sums(self, c: Tensor) -> Tensor:
        found = self._mapped(self._collected(c), self.matrices)
        return found.view(c.shape[1], c.shape[0], c.shape[2], -1).transpose(0, 1)

    def gradient(self, first: Tensor, weight_grad: Tensor | None) -> Tensor:
        base = first.flatten(1)
        if weight_grad is not None:
            weight_grad.addmm_(self.sum.mT, base)
        grad = (base @ self.weight.mT)[:, None].expand_as(self.x)
        if not self.kept:
            return grad
        c, vectors = torch.stack(self.kept, 2), torch.stack(self.vectors, 2)
        if weight_grad is not None:
            inputs = self._collected(c).transpose(0, 1).flatten(1, 2)
            weight_grad.view(len(self.weight), self.capsules, -1).transpose(0, 1).baddbmm_(
                inputs.mT, vectors.transpose(0, 1).flatten(1, 2)
            )
        return torch.baddbmm(grad, c.flatten(1, 2).mT, self._queries(vectors))


def _share(count: int, size: int, function: Callable[[int, int, int], None]) -> None:
    """Call ``function(part, begin, end)`` for as many parts as torch has threads; on these threads, if worth it."""
    parts = min(torch.get_num_threads(), count)
    run_parts(lambda i: function(i, count * i // parts, count * (i + 1) // parts), parts, size >= WORTH_THREADS)


class _SharedPasses:
    """Inputs (b, n, i) with shared weights, in float32 on a CPU."""

    def __init__(self, x: Tensor, weight: Tensor, capsules: int) -> None:
        self.x, self.weight, self.capsules = x.contiguous(), weight, capsules
        self.matrices = weight.unflatten(1, (capsules, -1)).transpose(0, 1).contiguous()  # (k, i, o)
        self.grad: Tensor | None = None
        self.collected: list[tuple[Tensor, Tensor]] = []

    def total(self) -> Tensor:
        return (self.x.sum(1) @ self.weight).unflatten(1, (self.capsules, -1))

    def collect(self, query: Tensor, hard: bool, coupling: Tensor | None) -> Tensor:
        from kexue.models import _capsule_passes as passes

        queries = torch.bmm(query.transpose(0, 1), self.matrices.mT)
        sums = torch.empty_like(queries)
        coupling = self.x.new_empty(0, 0, 0) if coupling is None else coupling
        x, q, s, c = self.x.numpy(), queries.numpy(), sums.numpy(), coupling.numpy()
        _share(len(x), x.size * self.capsules, lambda _, begin, end: passes.collect(x, q, s, c, begin, end, hard))
        return torch.bmm(sums, self.matrices).transpose(0, 1)

    def push(self, query: Tensor, slope: Tensor, upstream: Tensor | None, hard: bool, constant: bool) -> Tensor:
        from kexue.models import _capsule_passes as passes

        outer = torch.stack([query, slope], 2).transpose(0, 1).flatten(1, 2)  # (k, b * 2, o)
        vectors = torch.bmm(outer, self.matrices.mT).unflatten(1, (-1, 2))
        sums = torch.empty_like(vectors)
        fresh = self.grad is None
        self.grad = torch.empty_like(self.x) if self.grad is None else self.grad
        upstream = self.x.new_empty(0, 0, 0) if upstream is None else upstream.contiguous()
        x, v, u, s, g = (t.numpy() for t in (self.x, vectors, upstream, sums, self.grad))
        _share(
            len(x),
            x.size * self.capsules,
            lambda _, begin, end: passes.push(x, v, u, s, g, begin, end, fresh, hard, constant),
        )
        self.collected.append((sums.flatten(1, 2), outer))
        return torch.bmm(sums[:, :, 0], self.matrices).transpose(0, 1)

    def gradient(self, first: Tensor, weight_grad: Tensor | None) -> Tensor:
        base = first.flatten(1)
        if weight_grad is not None:
            # the coefficients of an input add up to 1
            total = self.collected[0][0][:, 1::2].sum(0) if self.collected else self.x.sum(1)
            weight_grad.addmm_(total.mT, base)
            for inputs, outputs in self.collected:
                found = torch.bmm(inputs.mT, outputs).transpose(0, 1)
                weight_grad.view(found.shape).add_(found)
        common = (base @ self.weight.mT)[:, None]
        return common.expand_as(self.x) if self.grad is None else self.grad.add_(common)


class _DensePasses:
    """Inputs (b, n, i) with dense weights (n, i, k * o), in float32 on a CPU; b up to ``EXAMPLES``."""

    def __init__(self, x: Tensor, weight: Tensor, capsules: int) -> None:
        self.x, self.weight, self.capsules = x, weight.contiguous(), capsules
        b, n, i = x.shape
        self.padded = -(-b // 16) * 16
        self.turned = x.new_zeros(n, i, self.padded)
        self.turned[:, :, :b] = x.permute(1, 2, 0)
        self.kept: list[Tensor] = []
        self.vectors: list[Tensor] = []

    def _turn(self, vectors: Tensor) -> Tensor:
        """(b, k, o) -> (k * o, B), the examples innermost."""
        out = vectors.new_zeros(vectors[0].numel(), self.padded)
        out[:, : len(vectors)] = vectors.flatten(1).mT
        return out

    def _back(self, sums: Tensor) -> Tensor:
        return sums.sum(0)[:, : len(self.x)].mT.unflatten(1, (self.capsules, -1))

    def total(self) -> Tensor:
        return (self.x.flatten(1) @ self.weight.flatten(0, 1)).unflatten(1, (self.capsules, -1))

    def collect(self, query: Tensor, hard: bool, coupling: Tensor | None) -> Tensor:
        from kexue.models import _capsule_passes as passes

        n, k = len(self.weight), self.capsules
        sums = query.new_zeros(torch.get_num_threads(), self.weight.shape[2], self.padded)
        found = query.new_empty((0, 0, 0) if coupling is None else (n, k, self.padded))
        x, w, q, s, c = (t.numpy() for t in (self.turned, self.weight, self._turn(query), sums, found))
        _share(
            n,
            x.size * w.shape[2],
            lambda part, begin, end: passes.dense_collect(x, w, q, k, s[part], c, begin, end, hard),
        )
        if coupling is not None:
            coupling.copy_(found[:, :, : len(query)].permute(2, 0, 1))
        return self._back(sums)

    def push(self, query: Tensor, slope: Tensor, upstream: Tensor | None, hard: bool, constant: bool) -> Tensor:
        from kexue.models import _capsule_passes as passes

        n, k = len(self.weight), self.capsules
        sums = query.new_zeros(torch.get_num_threads(), self.weight.shape[2], self.padded)
        kept = query.new_empty(2, n, k, self.padded)
        queries, slopes = self._turn(query), self._turn(slope)
        given = query.new_zeros((0, 0, 0) if upstream is None else (n, k, self.padded))
        if upstream is not None:
            given[:, :, : len(query)] = upstream.permute(1, 2, 0)
        x, w, q, d, u, s, f = (t.numpy() for t in (self.turned, self.weight, queries, slopes, given, sums, kept))

        def run(part: int, begin: int, end: int) -> None:
            passes.dense_push(x, w, q, d, u, s[part], f, begin, end, hard, constant)

        _share(n, x.size * w.shape[2], run)
        self.kept.append(kept)
        self.vectors += [queries, slopes]
        return self._back(sums)

    def gradient(self, first: Tensor, weight_grad: Tensor | None) -> Tensor:
        from kexue.models import _capsule_passes as passes

        n, k = len(self.weight), self.capsules
        start = self._turn(first)
        kept = torch.cat(self.kept) if self.kept else start.new_empty(0, n, k, 0)
        vectors = torch.stack(self.vectors) if self.vectors else start.new_empty(0, *start.shape)
        self.kept.clear()
        grad = torch.empty_like(self.turned)
        made = start.new_empty(0, 0, 0) if weight_grad is None else weight_grad
        x, w, c, v, f, g, m = (t.numpy() for t in (self.turned, self.weight, kept, vectors, start, grad, made))
        examples = len(self.x)
        _share(
            n,
            x.size * w.shape[2],
            lambda _, begin, end: passes.dense_gradient(x, w, c, v, f, examples, g, m, begin, end),
        )
        return grad[:, :, : len(self.x)].permute(2, 0, 1)


class Blocks:
    """The examples block by block, as keys in the precision of the computation."""

    def __init__(self, x: Tensor, weight: Tensor | None, mask: Tensor | None, capsules: int) -> None:
        self.x, self.mask, self.capsules, self.shared = x, mask, capsules, weight is not None and weight.dim() == 2
        self.dtype = compute_dtype(x) if weight is None else compute_dtype(x, weight)
        self.batch, inputs = x.shape[:2]
        self.width = x.shape[3] if weight is None else weight.shape[-1] // capsules
        self.weight = None if weight is None else weight.detach().to(self.dtype)
        kernels = self.dtype == torch.float32 and x.device.type == "cpu"
        self.make: Any
        if self.shared:
            self.make = _SharedPasses if kernels else _SharedKeys
            block, per_example = BLOCK, inputs * (x.shape[2] + 2 * capsules)
        else:
            kernels = kernels and weight is not None and self.batch >= FEWEST
            self.make = _DensePasses if kernels else _DenseKeys
            block, per_example = BLOCK if weight is None else DENSE_BLOCK, inputs * capsules * self.width
        rows = max(1, block // max(per_example, 1))
        if kernels and weight is not None:
            rows = self.batch if self.shared else EXAMPLES
        blocks = -(-self.batch // max(rows, 1))
        self.rows = -(-self.batch // max(blocks, 1))  # of equal size

    def __iter__(self) -> Iterator[tuple[slice, Any]]:
        for start in range(0, self.batch, max(self.rows, 1)):
            block = slice(start, start + self.rows)
            x = self.x[block].detach().to(self.dtype)
            if self.mask is not None:
                outside = ~self.mask[block]
                x = x.masked_fill(outside.view(*outside.shape, *(1,) * (x.dim() - 2)), 0.0)
            yield block, _GivenKeys(x) if self.weight is None else self.make(x, self.weight, self.capsules)
