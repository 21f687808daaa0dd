"""The multi-label softmax loss on rows of scores, its gradient built in the same pass, by blocks of rows.

With u = s - s_0 and weights t of the positive side (0 or 1 for hard labels):

    negative side  log(1 + sum (1 - t_i) e^{u_i})       positive side  log(1 + sum t_i e^{-u_i})

``hard_pass`` takes label indices. The scores are copied once, into the buffer that becomes the gradient; positives are
overwritten by -inf, never subtracted from a sum that they may dominate; one exponential is taken of each score. What is
left to do in the backward pass is one multiplication in place.

``soft_pass`` takes dense weights and uses no logarithm: e^{-u} t is a division by e^u, exact at t = 0 and 1. Rows in
which a score with a weight lies beyond +-60 are computed again with the maximum of each side taken out, a maximum over
the scores that have a weight on that side alone. A logit of -inf or -1e12 with t = 0 so harms neither side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kexue._tensors import compute_dtype
from kexue.losses._common import LOG2E

MASKED = -9e11  # the -1e12 that masks logits in common code, after rounding to any dtype
LIMIT = 16.0  # |maximum| up to which exponentials are taken without a shift: at most 1e-6 of relative rounding
WIDE = 60.0  # soft labels: e^60 times any number of labels is far inside float32, and so is its inverse
SPARE = 40.0  # a term is left at e^40 times its weight, so that the smallest weights keep a sum with an inverse
BLOCK = 2**20  # scores of a block on a CPU: 4 MiB of float32, so that all passes over it stay in the cache
DEVICE_BLOCK = 2**26
SPARSE = 16  # a dense hard target with at most n / 16 labels in each row is turned into indices
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of the width of a float


class Positives(NamedTuple):
    """The positive side of each row, by slots of its label indices.

    Attributes:
        slots: (N, K) a label of the row in each slot; padding repeats one of the row's labels.
        given: (N, 1) whether the row has a label at all; if not, its slots point anywhere and write nothing. None if
            every row has.
        weight: (N, K) minus the gradient of the score in the slot.
        loss: (N, 1) log(1 + sum e^-u).
        mass: (N, 1) sum of the weights of the row's labels.
    """

    slots: Tensor
    given: Tensor | None
    weight: Tensor
    loss: Tensor
    mass: Tensor


def with_zero(total: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + total e^shift), and e^shift / (1 + total e^shift), for a shift of any size and sign."""
    up = shift.clamp(min=0)
    scale, one = torch.exp(shift - up), torch.exp(-up)
    scaled = total * scale
    loss = torch.where(up > 0, up + torch.log(scaled + one), torch.log1p(scaled))
    return loss, scale / (scaled + one)


def slope_of(loss_p: Tensor, mass_p: Tensor, loss_n: Tensor, mass_n: Tensor) -> Tensor:
    """Derivative by the threshold: mass_p - mass_n, where both are near 1 the difference of what they lack."""
    return torch.where(mass_p + mass_n > 1, torch.exp(-loss_n) - torch.exp(-loss_p), mass_p - mass_n)


def block_rows(scores: Tensor, share: int = 1) -> int:
    """Rows of a block."""
    size = BLOCK if scores.device.type == "cpu" else DEVICE_BLOCK
    return max(1, min(scores.shape[0], size // share // scores.shape[1]))


def refuse_masked() -> None:
    """A label at a place that does not take part is a contradiction in the data."""
    raise ValueError("a positive label must take part; got one whose mask is False or whose logit is -inf or -1e12")


def labels_of(target: Tensor) -> Tensor | None:
    """A dense (N, n) target that is 0 or 1 -> (N, K) indices padded with -1, or None where it is not or not sparse."""
    rows, n = target.shape
    target, cpu = target.contiguous(), target.device.type == "cpu"
    if target.is_floating_point():
        if not cpu or target.element_size() not in BITS:
            return None
        # numpy compares and looks for bits several times faster than torch
        bits = target.view(BITS[target.element_size()]).numpy()
        if rows and np.count_nonzero(bits[0]) > max(1, n // SPARSE):  # soft labels mostly show in the first row
            return None
        some = torch.from_numpy(bits != 0)
    else:
        some = target if target.dtype == torch.bool else target != 0
    if cpu:
        if np.count_nonzero(some.numpy()) * SPARSE > max(some.numel(), SPARSE * rows):
            return None
        flat = torch.from_numpy(np.flatnonzero(some.numpy()))
    else:
        flat = some.view(-1).nonzero().squeeze(1)
    if target.is_floating_point() and not bool((target.view(-1)[flat] == 1).all()):
        return None
    row = flat // n
    counts = torch.bincount(row, minlength=rows)
    width = int(counts.max()) if rows else 0
    if width > 1 and width * SPARSE > n:
        return None
    slot = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[row]
    index = flat.new_full((rows, width), -1)
    index[row, slot] = flat - row * n
    return index


def indices_of(target: Tensor, ignore: int | None, weights: bool) -> Tensor | None:
    """Label indices of a target, or None where it is dense, or where its gradient as ``weights`` is wanted."""
    if ignore is not None:
        return target
    return None if weights else labels_of(target.detach())


def positives(
    scores: Tensor, target: Tensor, ignore: int, threshold: Tensor | None, mask: Tensor | None, check: bool
) -> Positives:
    """The positive side for label indices (N, K), padded with ``ignore``; a repeated label counts once."""
    dtype, target = compute_dtype(scores), target.long()
    index = target.masked_fill(target == ignore, -1)
    if index.shape[1] == 0:
        index = index.new_full((index.shape[0], 1), -1)
    index = index.sort(1).values
    counted = index >= 0
    counted[:, 1:] &= index[:, 1:] != index[:, :-1]
    last = index[:, -1:]
    given = last >= 0
    index = torch.where(index < 0, last.clamp(min=0), index)
    value = scores.gather(1, index).to(dtype)
    hidden = value <= MASKED
    if mask is not None:
        hidden |= ~mask.gather(1, index)
    if check and bool((counted & hidden).any()):
        refuse_masked()
    counted &= ~hidden
    u = -value if threshold is None else threshold - value
    shift = torch.where(counted, u, -math.inf).amax(1, keepdim=True)
    shift = torch.where(shift > -math.inf, shift, 0.0)
    e = torch.where(hidden, 0.0, torch.exp(u - shift))
    total = torch.where(counted, e, 0.0).sum(1, keepdim=True)
    loss, factor = with_zero(total, shift)
    return Positives(index, None if bool(given.all()) else given, e * factor, loss, total * factor)


def put(x: Tensor, slots: Tensor, given: Tensor | None, value: Tensor | float) -> None:
    """Write the values at the slots of the rows that have labels; equal slots of a row carry equal values."""
    x.scatter_(1, slots, value if given is None else torch.where(given, value, x.gather(1, slots)))


def load(x: Tensor, scores: Tensor, threshold: Tensor | None, mask: Tensor | None) -> Tensor:
    """Copy scores - threshold into x, -inf where the mask is False."""
    x.copy_(scores)
    if threshold is not None:
        x.sub_(threshold)
    return x if mask is None else x.masked_fill_(~mask, -math.inf)


def hidden_of(x: Tensor, threshold: Tensor | None) -> Tensor:
    """Which scores do not take part, from what ``load`` made of them."""
    return (x if threshold is None else x + threshold) <= MASKED


def power(x: Tensor, factor: Tensor) -> Tensor:
    """The factor times e^x, exact to the last digits; by halves, since e^x alone may overflow."""
    half = torch.exp(x / 2)
    return half * factor * half


def plain(x: Tensor, scores: Tensor, threshold: Tensor | None, mask: Tensor | None) -> bool:
    """Whether the scores can be read as they are."""
    return threshold is None and mask is None and scores.dtype == x.dtype


def rows_of(x: Tensor | None, rows: slice) -> Tensor | None:
    """The rows of an optional tensor."""
    return None if x is None else x[rows]


def exponentials(
    x: Tensor,
    scores: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    slots: Tensor,
    given: Tensor | None,
    hopeful: bool,
) -> tuple[Tensor, Tensor | None]:
    """Fill x with e^{u - shift} of the negatives, 0 elsewhere; return its sums and the shift (None for 0).

    A row is shifted by its maximum where that lies beyond +-LIMIT: the rule of a row is its own, so that equal rows
    give equal bits. ``hopeful`` tries without looking for maxima first; sums show whether that was right. If not, the
    scores are read again, so x may be the scores themselves only without it.
    """
    if hopeful:
        torch.mul(scores if plain(x, scores, threshold, mask) else load(x, scores, threshold, mask), LOG2E, out=x)
        put(x, slots, given, -math.inf)
        total = x.exp2_().sum(1, keepdim=True)
        low, high = (float(edge) for edge in torch.aminmax(total))
        if low >= math.exp(-LIMIT) * x.shape[1] and high <= math.exp(LIMIT):
            return total, None
    load(x, scores, threshold, mask)
    put(x, slots, given, -math.inf)
    top = x.amax(1, keepdim=True)
    shift = torch.where((top.abs() > LIMIT) & (top > -math.inf), top, 0.0)
    moved = bool(shift.any())
    if moved:
        x.sub_(shift)
    return x.mul_(LOG2E).exp2_().sum(1, keepdim=True), shift if moved else None


class HardPass(NamedTuple):
    """Result of ``hard_pass``: loss (N, 1), its derivative by the threshold (N, 1), and what ``finish`` needs."""

    loss: Tensor
    slope: Tensor
    factor: Tensor
    positive: Positives


def finish(x: Tensor, factor: Tensor, positive: Positives, coef: Tensor, rows: slice = slice(None)) -> None:
    """Turn exponentials into the gradient of sum(coef * loss), in place."""
    x.mul_(factor * coef)
    put(x, positive.slots[rows], rows_of(positive.given, rows), positive.weight[rows] * -coef)


def hard_pass(
    scores: Tensor,
    target: Tensor,
    ignore: int,
    threshold: Tensor | None,
    mask: Tensor | None,
    out: Tensor | None,
    coef: Tensor | None,
    check: bool,
) -> HardPass:
    """Loss of each row for label indices.

    Args:
        scores: (N, n).
        target: (N, K) label indices, padded with ``ignore``.
        ignore: Padding.
        threshold: (N, 1) in the dtype of the computation, or None for 0.
        mask: (N, n) bool, or None.
        out: (N, n) for the gradient, or None. Without ``coef`` it must have the dtype of the computation and gets the
            exponentials, to be turned into the gradient by ``finish``.
        coef: (N, 1) upstream gradient.
        check: Raise where a positive does not take part.
    """
    dtype = compute_dtype(scores)
    count, n = scores.shape
    positive = positives(scores, target, ignore, threshold, mask, check)
    total, shift = positive.loss.new_empty(count, 1), positive.loss.new_zeros(count, 1)
    direct = out is not None and out.dtype == dtype
    rows = block_rows(scores, 1 if direct else 4)
    scratch = scores.new_empty((0 if direct else rows, n), dtype=dtype)
    hopeful = separate = not direct or out is None or out.data_ptr() != scores.data_ptr()
    for start in range(0, count, rows):
        block = slice(start, min(start + rows, count))
        x = out[block] if direct and out is not None else scratch[: block.stop - start]
        total[block], moved = exponentials(
            x,
            scores[block],
            rows_of(threshold, block),
            rows_of(mask, block),
            positive.slots[block],
            rows_of(positive.given, block),
            hopeful,
        )
        hopeful = separate and moved is None
        if moved is not None:
            shift[block] = moved
        if coef is not None and out is not None:
            finish(x, with_zero(total[block], shift[block])[1], positive, coef[block], block)
            if not direct:
                out[block] = x
    loss, factor = with_zero(total, shift)
    slope = slope_of(positive.loss, positive.mass, loss, total * factor)
    return HardPass(loss + positive.loss, slope, factor, positive)


def soft_pass(
    scores: Tensor,
    target: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    out: Tensor | None,
    out_target: Tensor | None,
    coef: Tensor | None,
    check: bool,
) -> tuple[Tensor, Tensor]:
    """Loss (N, 1) of each row for weights (N, n), and its derivative by the threshold.

    Args:
        scores: (N, n).
        target: (N, n) in [0, 1], any dtype.
        threshold: (N, 1) in the dtype of the computation, or None for 0.
        mask: (N, n) bool, or None.
        out: (N, n) for the gradient of the scores, or None.
        out_target: (N, n) for the gradient of the weights, or None.
        coef: (N, 1) upstream gradient, or None for 1.
        check: Raise where a weight is not 0 at a score that does not take part.
    """
    dtype = compute_dtype(scores)
    count, n = scores.shape
    loss, slope = (scores.new_empty((count, 1), dtype=dtype) for _ in range(2))
    rows = block_rows(scores, 2)
    direct = out is not None and out.dtype == dtype
    buffers = scores.new_empty((1 if direct else 2, rows, n), dtype=dtype)
    for start in range(0, count, rows):
        block = slice(start, min(start + rows, count))
        s, edge, shown = scores[block], rows_of(threshold, block), rows_of(mask, block)
        x, t = buffers[0, : len(s)], target[block].to(dtype)
        neg = out[block] if direct and out is not None else buffers[1, : len(s)]
        pos, top_p, top_n = weighted(x, neg, t, s, edge, shown, check)
        sum_p, sum_n = pos.sum(1, keepdim=True), neg.sum(1, keepdim=True)
        (loss_p, by_p), (loss_n, by_n) = with_zero(sum_p, top_p), with_zero(sum_n, top_n)
        loss[block] = loss_p + loss_n
        slope[block] = slope_of(loss_p, sum_p * by_p, loss_n, sum_n * by_n)
        if out is not None:
            neg.mul_(by_n).addcmul_(pos, by_p, value=-1)
            if coef is not None:  # last, as for a gradient that waited for it: both ways give the same bits
                neg.mul_(coef[block])
            if not direct:
                out[block] = neg
        if out_target is not None:
            load(x, s, edge, shown)
            hidden, scale = hidden_of(x, edge), 1 if coef is None else coef[block]
            slopes = power(-x - top_p, by_p * scale) - power(x - top_n, by_n * scale)
            out_target[block] = slopes.masked_fill_(hidden, 0.0)
    return loss, slope


def weighted(
    x: Tensor, neg: Tensor, t: Tensor, scores: Tensor, threshold: Tensor | None, mask: Tensor | None, check: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of both sides: t e^{-u - top_p}, in x or a new tensor, and (1 - t) e^{u - top_n}, in neg; and the tops.

    The tops, (rows, 1), are the maxima over scores with a weight, less SPARE, and 0 for rows where those are within
    WIDE: equal rows give equal bits, whichever way their block goes.
    """
    u = scores if plain(x, scores, threshold, mask) else load(x, scores, threshold, mask)
    if float(u.amin()) >= -WIDE:  # one exponential for both sides
        torch.exp(u, out=x)
        if float(x.amax()) <= math.exp(WIDE):
            torch.sub(1, t, out=neg).mul_(x)
            none = x.new_zeros(len(x), 1)
            return torch.div(t, x, out=x), none, none
    load(x, scores, threshold, mask)
    torch.sub(1, t, out=neg)
    # A score without a weight is bounded by 0 here, which changes no maximum that matters.
    most = torch.finfo(x.dtype).max
    top_n = torch.minimum(torch.ceil(neg).mul_(most), x).amax(1, keepdim=True)
    top_p = torch.maximum(torch.ceil(t).mul_(-most), x).amin(1, keepdim=True).neg_()
    if not float(top_p.max()) <= WIDE:  # perhaps because of a label that is masked
        hidden = hidden_of(x, threshold)
        if check and bool((hidden & (t > 0)).any()):
            refuse_masked()
        t = t.masked_fill(hidden, 0.0)
        top_p = torch.maximum(torch.ceil(t).mul_(-most), x).amin(1, keepdim=True).neg_()
    top_n, top_p = (torch.where(top > WIDE, top - SPARE, 0.0) for top in (top_n, top_p))
    neg.mul_((x - top_n).clamp_(max=WIDE).exp_())
    return t / x.add_(top_p).clamp_(min=-WIDE).exp_(), top_p, top_n


def zlpr_pass(
    scores: Tensor,
    target: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    coef: Tensor | None,
    ignore: int | None,
    needs: tuple[bool, bool],
    check: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (N,), derivative by the threshold (N, 1), gradients of scores and target (empty where not wanted).

    ``ignore`` is the padding of label indices, or None for a dense target. With ``in_place`` the gradient overwrites
    the scores, which must be contiguous.
    """
    index = indices_of(target, ignore, needs[1])
    out = None
    if needs[0]:
        out = scores if in_place else torch.empty_like(scores, memory_format=torch.contiguous_format)
    if index is not None:
        made = hard_pass(scores, index, -1 if ignore is None else ignore, threshold, mask, out, coef, check)
        loss, slope, out_target = made.loss, made.slope, None
    else:
        out_target = torch.empty_like(target, memory_format=torch.contiguous_format) if needs[1] else None
        loss, slope = soft_pass(scores, target, threshold, mask, out, out_target, coef, check)
    if coef is not None:
        slope = slope * coef
    grad, grad_target = (scores.new_empty(0) if x is None else x for x in (out, out_target))
    return loss.squeeze(1), slope, grad, grad_target


@torch.library.custom_op(
    "kexue::zlpr_pass",
    mutates_args=(),
    schema=(
        "(Tensor scores, Tensor target, Tensor? threshold, Tensor? mask, Tensor? coef, int? ignore,"
        " bool needs_scores, bool needs_target) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _zlpr_op(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, target, threshold, mask, coef, ignore, *needs = args
    return zlpr_pass(scores, target, threshold, mask, coef, ignore, (needs[0], needs[1]), False)


@_zlpr_op.register_fake
def _(scores, target, threshold, mask, coef, ignore, needs_scores, needs_target):  # type: ignore[no-untyped-def]
    dtype, count = compute_dtype(scores), scores.shape[0]
    loss, slope = scores.new_empty(count, dtype=dtype), scores.new_empty((count, 1), dtype=dtype)
    grad = scores.new_empty(scores.shape if needs_scores else (0,))
    return loss, slope, grad, target.new_empty(target.shape) if needs_target else scores.new_empty(0)


def run(
    scores: Tensor,
    target: Tensor,
    threshold: Tensor | None,
    mask: Tensor | None,
    coef: Tensor | None,
    ignore: int | None,
    needs: tuple[bool, bool],
    check: bool,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`zlpr_pass`; one opaque node while torch.compile traces, never in the precision of autocast."""
    if torch.compiler.is_compiling():  # which looks at no values, and reuses memory as it sees fit
        return _zlpr_op(scores, target, threshold, mask, coef, ignore, *needs)
    with torch.autocast(scores.device.type, enabled=False):
        return zlpr_pass(scores, target, threshold, mask, coef, ignore, needs, check, in_place)


def prepare(
    scores: Tensor, target: Tensor, threshold: Tensor | None, mask: Tensor | None, ignore: int | None, check: bool
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Loss (N,), derivative by the threshold (N, 1), and a function from coef (N, 1) to the gradient of the scores.

    The function owns the buffer of the gradient and can be called once. For scores in the dtype of the computation.
    """
    with torch.autocast(scores.device.type, enabled=False):
        index = indices_of(target, ignore, target.requires_grad)
        buffer = torch.empty_like(scores, memory_format=torch.contiguous_format)
        if index is None:
            loss, slope = soft_pass(scores, target, threshold, mask, buffer, None, None, check)
            return loss.squeeze(1), slope, buffer.mul_
        made = hard_pass(scores, index, -1 if ignore is None else ignore, threshold, mask, buffer, None, check)

    def gradient(coef: Tensor) -> Tensor:
        finish(buffer, made.factor, made.positive, coef)
        return buffer

    return made.loss.squeeze(1), made.slope, gradient


def take(made: list[Any]) -> Any:
    """What the forward pass made for the first backward pass; None for any later one, in whichever thread it comes."""
    if torch.compiler.is_compiling():
        return None
    try:
        return made.pop()
    except IndexError:
        return None
