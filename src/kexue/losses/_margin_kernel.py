"""Cross-entropy against C normalised classes without the (B, C) matrix, gradient built in the forward pass.

Rows go through in blocks. For one block the scores lie class-major, (C, rows), so that every chunk of classes is
contiguous and all three matrix products run on chunks that stay in cache:

    pass 1, chunk by chunk   u = W_j / |W_j|;  e = 2^(u z^T s log2 e - shift), 0 at the target;  total += sum e;
                             gradient of z += e^T u   (the row factor 1/total follows afterwards)
    between                  l = log total - s psi;  loss = softplus(l);  the target's entry of e becomes its gradient
    pass 2, chunk by chunk   gradient of W += e (z / total);  in the last block also through W / |W|

Taking the target out of the sum and using softplus keeps full relative precision when the target dominates. Cosines
are bounded, so up to scale 40 the exponent needs no shift; above, a pass for the maximum of each row is added.
W is read as it is stored (also fp16/bf16); only one chunk of it exists normalised at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._tensors import compute_dtype, once_differentiable
from kexue.losses._common import LOG2E, inverse_norms, reduce_loss, through_norm, unit_rows
from kexue.losses._margins import GAP
from kexue.losses._shards import Shards

CHUNK = 2048  # classes per chunk on the CPU: 64 rows and 128 columns of it fit a core's second-level cache
BUDGET = 6_500_000  # scores held at a time when the block size is chosen automatically
UNSHIFTED = 40.0  # e^40 times a hundred million classes is still far inside float32


def rows_per_block(block_rows: int | None, classes: int) -> int:
    """The given block size, or the multiple of 16 that keeps the scratch near 25 MiB of float32, at least 32."""
    return block_rows if block_rows is not None else max(32, BUDGET // max(classes, 1) // 16 * 16)


def margin_pass(
    z: Tensor,
    weight: Tensor,
    labels: Tensor,
    logit: Tensor,
    slope: Tensor,
    coef: Tensor | None,
    repeat: Tensor | None,
    scale: float,
    metric: bool,
    rows: int,
    filter_eps: float,
    needs: tuple[bool, bool] = (True, True),
    reduce: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each row and, with ``coef``, the gradients of sum(coef * loss).

    Args:
        z: (B, D) embeddings.
        weight: (C, D) class vectors.
        labels: (B,) target row of ``weight``; -1 when the target is not among them (another process holds it).
        logit: (B,) scale * psi of the target, in float64 where the device has it.
        slope: (B,) d psi / d cos of the target.
        coef: (B,) upstream gradient of each row, or None for the loss alone.
        repeat: (C,) how many classes each class stands for, or None for one.
        scale: Factor on the scores.
        metric: Scores are -sqrt(1 - cos) instead of cos.
        rows: Rows of a block.
        filter_eps: Classes whose softmax mass over the block is below it are left out of the gradient; 0 keeps all.
        needs: Whether the gradients of z and of weight are wanted.
        reduce: Called as reduce(tensor, "max" | "sum") to combine with the other processes of a class-sharded head.

    Returns:
        Loss (B,), gradient of z (B, D), gradient of weight (C, D); empty gradients where none is wanted.
    """
    dtype = compute_dtype(z, weight)
    (batch, width), classes = z.shape, weight.shape[0]
    needs_z, needs_w = (needs[0] and coef is not None), (needs[1] and coef is not None)
    unit_z, inverse_z = unit_rows(z, dtype)
    loss = unit_z.new_empty(batch)
    grad_z = unit_z.new_zeros((batch, width) if needs_z else (0,))
    grad_w = unit_z.new_empty((classes, width) if needs_w else (0,))
    if batch == 0:
        return loss, grad_z, grad_w.zero_()
    step = CHUNK if z.device.type == "cpu" else max(classes, 1)
    chunks = [(j, min(j + step, classes)) for j in range(0, classes, step)]
    rows = min(rows, batch)
    buffer = unit_z.new_empty(classes * rows + 1)  # one spare slot for targets that live elsewhere
    inverse_w = unit_z.new_empty(classes, 1)
    scratch = unit_z.new_empty(min(step, classes), width)
    distance = unit_z.new_empty(min(step, classes) * rows if metric else 0)
    factor = scale * LOG2E
    shifted = scale * (math.sqrt(2.0) if metric else 1.0) > UNSHIFTED
    slope = slope.to(dtype)

    def unit_chunk(j: int, k: int) -> Tensor:
        return torch.mul(weight[j:k], inverse_w[j:k], out=scratch[: k - j])

    def fill(j: int, k: int, left: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        unit, out = unit_chunk(j, k), buffer[j * left.shape[1] : k * left.shape[1]].view(k - j, left.shape[1])
        torch.mm(unit, left, out=out)
        if metric:
            out.neg_().add_(1).clamp_(min=GAP).sqrt_().mul_(-factor)
        buffer.index_fill_(0, position, -math.inf)  # positions in later chunks are overwritten by those
        return unit, out

    for start in range(0, batch, rows):
        block = slice(start, min(start + rows, batch))
        zb, yb = unit_z[block], labels[block]
        n = zb.shape[0]
        first, last = start == 0, block.stop == batch
        scores = buffer[: classes * n].view(classes, n)
        position = torch.where(yb >= 0, yb * n + torch.arange(n, device=yb.device), classes * n)
        left = (zb if metric else zb * factor).T
        total = zb.new_zeros(n)
        gz = zb.new_zeros(n, width)
        shift = zb.new_full((n,), -math.inf) if shifted else None

        if first:
            for j, k in chunks:
                inverse_w[j:k] = inverse_norms(weight[j:k].to(dtype))
        if shift is not None:
            for j, k in chunks:
                torch.maximum(shift, fill(j, k, left, position)[1].amax(0), out=shift)
            if reduce is not None:
                reduce(shift, "max")
            shift = torch.where(shift > -math.inf, shift, 0.0)
        for j, k in chunks:
            if shift is None:
                unit, e = fill(j, k, left, position)
            else:
                unit, e = unit_chunk(j, k), scores[j:k]
            if metric and coef is not None:  # the slope of -sqrt(1 - cos) is 0.5 / sqrt(1 - cos)
                d = torch.mul(e, -1 / factor, out=distance[: (k - j) * n].view(k - j, n))
            if shift is not None:
                e.sub_(shift)
            e.exp2_()
            if repeat is not None:
                e.mul_(repeat[j:k, None])
            total += e.sum(0)
            if metric and coef is not None:
                e.div_(d)
            if needs_z and not filter_eps:
                gz.addmm_(e.T, unit)
        if reduce is not None:
            reduce(total, "sum")
        others = total.to(logit.dtype).log() if shift is None else total.to(logit.dtype).log() + shift / LOG2E
        gap = others - logit[block]  # in float64: its rounding is the relative error of a small loss
        loss[block] = F.softplus(gap, threshold=50.0)
        if coef is None:
            continue
        missed = torch.sigmoid(gap).to(dtype) * coef[block] * scale  # 1 - p_target, times the outer factors
        safe = torch.where(total > 0, total, 1.0)
        pull = missed / safe * (0.5 if metric else 1.0)
        buffer[position] = -slope[block] * safe * (2.0 if metric else 1.0)
        if filter_eps:
            kept = scores @ (torch.sigmoid(gap).to(dtype) / safe) >= filter_eps
            kept[yb[yb >= 0]] = True
        zp = zb * pull[:, None]
        for j, k in chunks if needs_w or filter_eps else ():
            e = scores[j:k]
            if filter_eps:
                index = kept[j:k].nonzero().squeeze(1)
                chosen = e.index_select(0, index)
                if needs_z:  # the target's entry is still in e: taken out here, added once below
                    others_only = torch.where(yb[None, :] == (index + j)[:, None], 0.0, chosen)
                    gz.addmm_(others_only.T, unit_chunk(j, k).index_select(0, index))
                if needs_w:
                    if first:
                        grad_w[j:k] = 0
                    grad_w[j:k].index_add_(0, index, chosen @ zp)
            elif first:
                torch.mm(e, zp, out=grad_w[j:k])
            else:
                grad_w[j:k].addmm_(e, zp)
            if needs_w and last:  # while the chunk is warm: through W / |W|
                unit = unit_chunk(j, k)
                grad_w[j:k].addcmul_(unit, (grad_w[j:k] * unit).sum(1, keepdim=True), value=-1).mul_(inverse_w[j:k])
        if needs_z:
            here = (yb >= 0)[:, None]
            target = unit_rows(weight[yb.clamp(min=0)], dtype)[0] * here
            grad_z[block] = gz * pull[:, None] - target * (missed * slope[block])[:, None]
    if needs_z:
        if reduce is not None:
            reduce(grad_z, "sum")
        grad_z = through_norm(grad_z, unit_z, inverse_z)
    return loss, grad_z, grad_w


@torch.library.custom_op(
    "kexue::margin_pass",
    mutates_args=(),
    schema=(
        "(Tensor z, Tensor weight, Tensor labels, Tensor logit, Tensor slope, Tensor? coef, Tensor? repeat,"
        " float scale, bool metric, int rows, float filter_eps, bool needs_z, bool needs_w) -> (Tensor, Tensor, Tensor)"
    ),
)
def _margin_pass_op(
    z: Tensor,
    weight: Tensor,
    labels: Tensor,
    logit: Tensor,
    slope: Tensor,
    coef: Tensor | None,
    repeat: Tensor | None,
    scale: float,
    metric: bool,
    rows: int,
    filter_eps: float,
    needs_z: bool,
    needs_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = (needs_z, needs_w)
    return margin_pass(z, weight, labels, logit, slope, coef, repeat, scale, metric, rows, filter_eps, needs)


@_margin_pass_op.register_fake
def _(z, weight, labels, logit, slope, coef, repeat, scale, metric, rows, filter_eps, needs_z, needs_w):  # type: ignore[no-untyped-def]
    dtype = compute_dtype(z, weight)
    needs_z, needs_w = (needs_z and coef is not None), (needs_w and coef is not None)
    return (
        z.new_empty(z.shape[0], dtype=dtype),
        z.new_empty(z.shape if needs_z else (0,), dtype=dtype),
        z.new_empty(weight.shape if needs_w else (0,), dtype=dtype),
    )


def _run(
    z: Tensor,
    weight: Tensor,
    labels: Tensor,
    logit: Tensor,
    slope: Tensor,
    coef: Tensor | None,
    options: tuple[Any, ...],
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    repeat, scale, metric, rows, filter_eps, shards = options
    if torch.compiler.is_compiling():  # opaque to the compiler, one node of the graph
        return _margin_pass_op(
            z, weight, labels, logit, slope, coef, repeat, scale, metric, rows, filter_eps, needs[0], needs[1]
        )
    reduce = None if shards is None else shards.reduce
    with torch.autocast(z.device.type, enabled=False):
        return margin_pass(
            z, weight, labels, logit, slope, coef, repeat, scale, metric, rows, filter_eps, needs, reduce
        )


class MarginSoftmaxFunction(torch.autograd.Function):
    """Reduced loss, and the loss of each row without gradient.

    "mean" and "sum" know the upstream gradient of each row up to one factor, so the gradient is made in the forward
    pass. "none" does not and runs the kernel again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        labels: Tensor,
        logit: Tensor,
        slope: Tensor,
        repeat: Tensor | None,
        scale: float,
        metric: bool,
        rows: int,
        filter_eps: float,
        reduction: str,
        shards: Shards | None,
    ) -> tuple[Tensor, Tensor]:
        options = (repeat, scale, metric, rows, filter_eps, shards)
        needs = (ctx.needs_input_grad[0] or shards is not None, ctx.needs_input_grad[1])  # all processes take part
        ctx.reduction, ctx.options, ctx.dtypes = reduction, options[1:], (z.dtype, weight.dtype)
        coef = None
        if reduction != "none" and (needs[0] or needs[1]):
            value = 1.0 / max(z.shape[0], 1) if reduction == "mean" else 1.0
            coef = torch.full((z.shape[0],), value, dtype=compute_dtype(z, weight), device=z.device)
        loss, grad_z, grad_w = _run(z, weight, labels, logit, slope, coef, options, needs)
        if reduction == "none":
            ctx.save_for_backward(z, weight, labels, logit, slope, repeat)
            reduced = loss.clone()
        else:
            ctx.save_for_backward(grad_z, grad_w, z, weight)  # the inputs: see once_differentiable
            reduced = reduce_loss(loss, reduction)
        ctx.mark_non_differentiable(loss)
        return reduced, loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        if ctx.reduction == "none":
            z, weight, labels, logit, slope, repeat = ctx.saved_tensors
            wanted = (needs[0] or ctx.options[-1] is not None, needs[1])
            coef = grad.to(compute_dtype(z, weight))
            grads = _run(z, weight, labels, logit, slope, coef, (repeat, *ctx.options), wanted)[1:]
        else:
            grads = ctx.saved_tensors[:2]
            # the usual upstream gradient is exactly 1: no pass over the (C, D) gradient
            if torch.compiler.is_compiling() or grad.device.type != "cpu" or grad.item() != 1:
                grads = tuple(x * grad for x in grads)
        out = [g.to(dtype) if need else None for g, dtype, need in zip(grads, ctx.dtypes, needs, strict=True)]
        return (out[0], out[1], *([None] * 10))
