"""Elementary symmetric polynomials of exp(scores) by a tree of products, in plain floating point at any scores.

A row with scores s_i needs Z_k = sum over all sets S of k classes of exp(sum of s over S), the coefficient of z^k in
the product of 1 + exp(s_i) z. Newton's identities cancel, and the recurrence over the classes takes n steps of tiny
operations. Here the scores are tilted, x_i = s_i - c, and each factor is divided by max(1, exp(x_i)):

    log Z_k - sum of the targets' scores
        = log R_k + sum over negatives of relu(x) + sum over positives of relu(-x),
    R_k = coefficient of z^k in the product of exp(-relu(x_i)) + exp(-relu(-x_i)) z.

With c such that the expected number of ones among coins of probability sigmoid(x_i) is k (within 1/4), R_k is a
sizeable part of the sum of all coefficients: no logarithm is taken per product, only positive numbers are added, and
what underflows does not matter. The factors are multiplied pairwise, cut off above degree k: O(n k) multiplications in
log2(n) steps. The backward pass through the tree gives the inclusion probability of each negative and one minus that
of each positive as products, without a subtraction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kexue._tensors import compute_dtype

BUDGET = 8 * 2**20  # bytes of scratch for one block of rows on the CPU; less and the cost of calls shows
SMALL = 24  # up to this degree coefficients stay below exp(2.8 degree), which float32 holds without rescaling
NEAR = 0.25  # how far the expected number of ones may be from k
STEPS = 64  # bisection alone needs about 20; NaN rows would never arrive


def _even(width: int) -> int:
    return width + width % 2 if width > 1 else width


class _Tree:
    """Scratch for the products of one block of rows; the root holds the coefficients up to ``degree``.

    The views that the products work on are made once: small operations cost less than the slicing for them.
    """

    def __init__(self, like: Tensor, rows: int, classes: int, degree: int, with_grad: bool) -> None:
        self.levels: list[Tensor] = []
        width, terms = classes, 2
        while True:
            level = like.new_empty(terms, rows, _even(width))
            if width % 2 and width > 1:  # a last node alone is paired with the constant polynomial 1
                level[:, :, width] = 0.0
                level[0, :, width] = 1.0
            self.levels.append(level)
            if width == 1:
                break
            width, terms = _even(width) // 2, min(2 * terms - 1, degree + 1)
        pairs = list(zip(self.levels, self.levels[1:], strict=False))
        self.up = [_product(below, above) for below, above in pairs]
        self.factors: list[Tensor | None] = [None] * len(pairs)
        self.rescale = degree > SMALL
        self.root_adjoint = torch.empty_like(self.levels[-1])
        self.down: list[list[tuple[Tensor, ...]]] = []  # from the root
        self.adjoints = [self.root_adjoint]
        if with_grad:
            for below, _ in pairs[:0:-1]:
                made = torch.empty_like(below)
                self.down.append(_correlation(self.adjoints[-1], below, made))
                self.adjoints.append(made)

    @staticmethod
    def size(classes: int, degree: int) -> int:
        """Numbers of scratch for one row."""
        width, terms, total = classes, 2, 0
        while width > 1:
            total += 2 * terms * _even(width)
            width, terms = _even(width) // 2, min(2 * terms - 1, degree + 1)
        return total + 2 * terms

    def multiply(self) -> tuple[Tensor, Tensor]:
        """From the filled leaves to the root, (degree + 1, rows), divided by 2 to the power of ``exponent`` (rows,)."""
        exponent = self.levels[0].new_zeros(self.levels[0].shape[1])
        for number, (first, rest, steps) in enumerate(self.up):
            torch.mul(first[1], first[2], out=first[0])
            rest.zero_()
            for out, left, right in steps:
                out.addcmul_(left, right)
            if self.rescale and self.levels[number + 1].shape[0] > SMALL:  # by powers of two, which round nothing
                half = self.levels[number].shape[2] // 2
                made = self.levels[number + 1][:, :, :half]
                power = torch.frexp(made.amax(0)).exponent.to(made.dtype)
                factor = torch.exp2(-power)
                made.mul_(factor)
                exponent += power.sum(-1)
                self.factors[number] = factor
        return self.levels[-1][:, :, 0], exponent

    def pull_back(self, root: Tensor) -> Tensor:
        """Derivative with respect to the polynomials just above the leaves, (terms, rows, pairs of leaves)."""
        self.root_adjoint[:, :, 0] = root
        adjoint = self.root_adjoint
        for adjoint, factor, steps in zip(self.adjoints, self.factors[::-1], [*self.down, []], strict=False):
            if factor is not None:
                adjoint[:, :, : factor.shape[1]].mul_(factor)
            for number, (out, known, grad) in enumerate(steps):
                if number % (len(steps) // 2):
                    out.addcmul_(known, grad)
                else:  # the first of a half covers all terms
                    torch.mul(known, grad, out=out)
        return adjoint


def _product(below: Tensor, above: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, list[tuple[Tensor, ...]]]:
    """Views for the products of the first half of the nodes with the second, as (out, left, right)."""
    half, terms, most = below.shape[2] // 2, below.shape[0], above.shape[0]
    left, right, out = below[:, :, :half], below[:, :, half:], above[:, :, :half]
    first = (out[:terms], left[:1], right)  # overwrites; the others add
    steps: list[tuple[Tensor, ...]] = []
    for i in range(1, terms):
        count = min(terms, most - i)
        steps.append((out[i : i + count], left[i : i + 1], right[:count]))
    return first, out[terms:], steps


def _correlation(adjoint: Tensor, below: Tensor, made: Tensor) -> list[tuple[Tensor, ...]]:
    """Views for the derivative of those products: of each half, the adjoint with the other half."""
    half, terms = below.shape[2] // 2, below.shape[0]
    grad = adjoint[:, :, :half]
    steps: list[tuple[Tensor, ...]] = []
    for side, other in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        known, out = below[:, :, other], made[:, :, side]
        for i in range(terms):
            count = min(terms, grad.shape[0] - i)
            steps.append((out[:count], known[i : i + 1], grad[i : i + count]))
    return steps


def _tilt(d: Tensor, count: Tensor, free: Tensor) -> Tensor:
    """Tilt (rows,) at which the expected number of ones is ``count`` within NEAR.

    Args:
        d: (rows, n) scores minus the ``count``-th largest of their row.
        count: (rows,) expected number, at least 1 where ``free``.
        free: (rows,) where there are more finite scores than ``count``; elsewhere the result means nothing.
    """
    odds = d.clamp(max=60.0).exp_()  # saturated either way; 60 keeps odds / (odds + a) apart from inf / inf
    low, high = (NEAR / (2 * count)).log_(), torch.full_like(count, math.log(4.0 * d.shape[1]))
    tilt = torch.minimum(torch.maximum((odds.clamp(max=1.0).sum(1) / count).log_(), low), high)
    p = torch.empty_like(odds)
    for _ in range(STEPS):
        torch.add(odds, tilt.exp()[:, None], out=p)
        torch.div(odds, p, out=p)
        mean = p.sum(1)
        excess = mean - count
        far = (excess.abs() > NEAR) & free
        if not far.any():
            break
        low, high = torch.where(excess > 0, tilt, low), torch.where(excess > 0, high, tilt)
        newton = tilt + excess / (mean - torch.linalg.vecdot(p, p))
        inside = (newton > low) & (newton < high)
        tilt = torch.where(far, torch.where(inside, newton, (low + high) / 2), tilt)
    return tilt


def _block(x: Tensor, positive: Tensor, pad: Tensor | None, most: int, tree: _Tree, grad: Tensor | None) -> Tensor:
    """Losses (rows,) of one block; writes the gradient into ``grad`` (rows, n). ``x`` is overwritten."""
    n = x.shape[1]
    row, column = positive.nonzero(as_tuple=True)
    count = positive.sum(1, dtype=torch.int32)  # a sum in the default int64 is three times as slow
    size = count if pad is None else torch.full_like(count, most)
    lowest = x.amin(1)
    finite = torch.full_like(count, n) if bool((lowest > -math.inf).all()) else (x != -math.inf).sum(1)
    free = (size > 0) & (size < finite)
    # Scores relative to the size-th largest (or the pad class, if that is higher): no precision is lost, however far
    # away the others are.
    top = x.topk(most, 1).values
    pivot = top.gather(1, (torch.minimum(size, finite) - 1).clamp(min=0).long()[:, None]).squeeze(1)
    pivot = torch.where(pivot == -math.inf, 0.0, pivot) if pad is None else torch.maximum(pivot, pad)
    x.sub_(pivot[:, None])
    number = size.clamp(min=1).to(x.dtype)
    if pad is None:
        tilt = _tilt(x, number, free)
        gap = torch.zeros_like(tilt)
    else:  # the tilt is the pad class's score, unless that gives more than ``most`` ones
        shift = pad - pivot
        crowded = free & (torch.sigmoid(x - shift[:, None]).sum(1) > number + NEAR)
        tilt = torch.where(crowded, torch.maximum(_tilt(x, number, crowded), shift), shift)
        gap = tilt - shift
    x.sub_(tilt[:, None])

    leaves = tree.levels[0]
    over = x.clamp(min=0.0)
    torch.sub(x, over, out=leaves[1, :, :n])
    torch.neg(over, out=leaves[0, :, :n])
    leaves[:, :, :n].exp_()
    over[row, column] = x[row, column].neg_().clamp_(min=0.0)
    root, exponent = tree.multiply()
    j = torch.arange(root.shape[0], device=x.device)[:, None]
    if pad is None:
        weights = (j == size).to(x.dtype)
        trivial = ~free
    else:
        weights = torch.exp((j - most) * gap)
        trivial = finite == 0
    total = (weights * root).sum(0)
    loss = over.sum(1) + total.log() + exponent * math.log(2.0)
    if pad is not None:
        loss = loss + (most - count) * gap
    loss = loss.clamp(min=0.0).masked_fill_(trivial, 0.0)
    if grad is None:
        return loss

    adjoint = weights.div_(total)
    if n == 1:
        torch.mul(leaves[1], adjoint[1, :, None], out=grad)
        grad[row, column] = -leaves[0, row, column] * adjoint[0, row]
    else:
        above = tree.pull_back(adjoint)
        half = leaves.shape[2] // 2
        for start in (0, half):
            stop = min(start + half, n)
            other = leaves[:, :, half - start : half - start + stop - start]
            out = grad[:, start:stop]
            torch.mul(above[1, :, : stop - start], other[0], out=out)
            if above.shape[0] > 2:
                out.addcmul_(above[2, :, : stop - start], other[1])
        grad.mul_(leaves[1, :, :n])
        parent, partner = column % half, (column + half) % (2 * half)
        outer = above[0, row, parent] * leaves[0, row, partner] + above[1, row, parent] * leaves[1, row, partner]
        grad[row, column] = -leaves[0, row, column] * outer
    if trivial.any():
        grad.masked_fill_(trivial[:, None], 0.0)
    return loss


def combination_pass(
    scores: Tensor, positive: Tensor, pad: Tensor | None, most: int, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss of each row and its gradient with respect to the scores.

    Args:
        scores: (N, n); -inf takes no part.
        positive: (N, n) bool, the target set of each row.
        pad: (N,) score of the repeatable pad class, or None for sets of exactly the target's size.
        most: Largest size of a set, at most n; -1 is the largest count of the batch.
        with_grad: Whether the gradient is wanted.

    Returns:
        Losses (N,) and the gradient (N, n), or (0, 0) without, in float32 (float64 for float64 scores). The gradient
        with respect to the pad's score is minus the sum of a row.
    """
    dtype = compute_dtype(scores)
    count, n = scores.shape
    loss = scores.new_zeros(count, dtype=dtype)
    grad = scores.new_empty((count, n) if with_grad else (0, 0), dtype=dtype)
    largest = int(positive.sum(1, dtype=torch.int32).max()) if positive.numel() else 0
    if most < 0:
        most = largest
    if largest > most:
        raise ValueError(f"rows must have at most max_k={most} labels; got one with {largest}")
    if most == 0 or n == 0 or count == 0:
        return loss, grad.zero_()
    item = torch.finfo(dtype).bits // 8
    budget = BUDGET if scores.device.type == "cpu" else 64 * BUDGET
    rows = max(1, min(count, budget // (item * (_Tree.size(n, most) + 3 * n))))
    tree = _Tree(loss, rows, n, most, with_grad)
    for start in range(0, count, rows):
        start = min(start, count - rows)  # blocks are always full: the last may do some rows again
        block = slice(start, start + rows)
        loss[block] = _block(
            scores[block].to(dtype, copy=True),
            positive[block],
            None if pad is None else pad[block],
            most,
            tree,
            grad[block] if with_grad else None,
        )
    return loss, grad


@torch.library.custom_op(
    "kexue::combination_pass",
    mutates_args=(),
    schema="(Tensor scores, Tensor positive, Tensor? pad, int most, bool with_grad) -> (Tensor, Tensor)",
)
def _op(scores: Tensor, positive: Tensor, pad: Tensor | None, most: int, with_grad: bool) -> tuple[Tensor, Tensor]:
    return combination_pass(scores, positive, pad, most, with_grad)


@_op.register_fake
def _(scores, positive, pad, most, with_grad):  # type: ignore[no-untyped-def]
    dtype = compute_dtype(scores)
    shape = scores.shape if with_grad else (0, 0)
    return scores.new_empty(scores.shape[0], dtype=dtype), scores.new_empty(shape, dtype=dtype)


def run_combination(
    scores: Tensor, positive: Tensor, pad: Tensor | None, most: int, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """:func:`combination_pass`; one opaque node while torch.compile traces, never in the precision of autocast."""
    if torch.compiler.is_compiling():
        return _op(scores, positive, pad, most, with_grad)
    with torch.autocast(scores.device.type, enabled=False):
        return combination_pass(scores, positive, pad, most, with_grad)
