"""Smooth accuracy and smooth F1 as losses (光滑化的准确率与 F1).

Source: 科学空间 6620 (函数光滑化杂谈:不可导函数的可导逼近).

The one-hot vector of the decision is replaced by the probabilities p:

    accuracy = mean of <onehot(y), p> = mean of p_y
    F_b = (1 + b^2) TP / (b^2 sum t + sum p),  TP = sum of t p;  b = 0 is the precision, b = inf the recall

F is a statistic of the whole batch, not a mean over rows: in a small batch it is biased and noisy, and it starts to
train well only from a model that already separates (:class:`kexue.losses.SwitchLoss`). :class:`SmoothF1Loss` takes
running sums instead.

What we do differently: a class without a positive in the batch has no F1, so it contributes 0 and no gradient instead
of a constant 1 (unless ``smooth`` is positive); 1 - p_y is the sum of the other probabilities, not a difference. The
loss on sigmoid scores goes over them in cached blocks and keeps one buffer, the probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype, once_differentiable
from kexue.losses._common import check_labels, reduce_loss
from kexue.losses.smooth_functions import sharp_weights

__all__ = ["SmoothF1Loss", "smooth_accuracy_loss", "smooth_f1_loss"]

AVERAGES = ("binary", "macro", "micro")
BLOCK = 1 << 17  # entries: a block and a scratch of its size stay in the L2 cache


class _Miss(torch.autograd.Function):
    """1 - p_y of each row, one buffer of the size of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        index = labels.unsqueeze(-1)
        p = torch.softmax(logits, -1, dtype=compute_dtype(logits))
        hit = p.gather(-1, index)
        if torch.compiler.is_compiling() or bool(hit.isnan().any()):  # a row of -inf alone has no hit
            empty = logits.amax(-1, keepdim=True) == -math.inf
            p, hit = p.masked_fill(empty, 0.0), hit.masked_fill(empty, 0.0)
            alone = empty.to(p.dtype)
        else:
            alone = torch.zeros_like(hit)
        p.scatter_(-1, index, 0.0)
        miss = p.sum(-1, keepdim=True) + alone
        ctx.save_for_backward(p, hit, miss, index, logits)  # the input: see once_differentiable
        return miss.squeeze(-1).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, hit, miss, index, logits = ctx.saved_tensors
        weight = hit * grad.unsqueeze(-1)
        out = p * weight
        out.scatter_(-1, index, -weight * miss)
        return out.to(logits.dtype), None


class _BinaryMiss(torch.autograd.Function):
    """|t - sigmoid(x)|: sigmoid of x with the sign that makes it the probability of the other class."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        dtype = compute_dtype(logits)
        miss = _sign(labels, dtype).mul_(logits.to(dtype)).sigmoid_()
        ctx.save_for_backward(miss, labels, logits)
        return miss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        miss, labels, logits = ctx.saved_tensors
        slope = torch.addcmul(miss, miss, miss, value=-1).mul_(_sign(labels, miss.dtype)).mul_(grad)
        return slope.to(logits.dtype), None


def _bits(labels: Tensor) -> Tensor:
    """Bool as uint8, which torch converts ten times faster."""
    return labels.view(torch.uint8) if labels.dtype == torch.bool and not torch.compiler.is_compiling() else labels


def _sign(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """1 for label 0, -1 for label 1."""
    return labels.to(dtype, copy=True).mul_(-2).add_(1)


def smooth_accuracy_loss(logits: Tensor, y: Tensor, *, reduction: str = "mean", validate: bool = True) -> Tensor:
    """1 - smooth accuracy: the mean of 1 - p_y, p the softmax of the logits.

    Bounded by 1 for each row, so that outliers do not dominate as they do in cross-entropy; its gradient p_y (1 - p_y)
    vanishes for hopeless rows as well, so train with cross-entropy first.

    Args:
        logits: (..., C) floating; -inf excludes a class. Or (N,), for two classes: p is sigmoid(logit).
        y: (...) integers in [0, C); for logits (N,) labels (N,), 0 or 1 (integers or bool).
        reduction: "mean" (0 for no rows), "sum" or "none".
        validate: Check the range of the labels (one reduction; never done under torch.compile).

    Returns:
        The loss in float32 (float64 for float64 logits). Differentiable once.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, no class, or labels out of range.

    Reference:
        https://spaces.ac.cn/archives/6620

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> smooth_accuracy_loss(logits, torch.tensor([0, 0]), reduction="none")
        tensor([0.1192, 0.5000])
    """
    check_float("logits", logits)
    check_choice("reduction", reduction, ("none", "mean", "sum"))
    if logits.dim() == 0:
        raise ValueError("logits must be (..., C) or (N,); got a scalar")
    if isinstance(y, Tensor) and logits.dim() == 1 and y.dim() == 1:
        check_labels(y.int() if y.dtype == torch.bool else y, tuple(logits.shape), 2, validate)
        return reduce_loss(_BinaryMiss.apply(logits, _bits(y)), reduction)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits need at least one class; got shape {tuple(logits.shape)}")
    check_labels(y, tuple(logits.shape[:-1]), logits.shape[-1], validate)
    return reduce_loss(_Miss.apply(logits, y.long()), reduction)


class _Sums(torch.autograd.Function):
    """TP, sum t and sum p of sigmoid scores, down the columns of (N, C) or of everything.

    One pass by blocks, which keeps the probabilities; the backward pass is another one over them.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, pooled: bool) -> tuple[Tensor, Tensor, Tensor]:
        dtype = compute_dtype(logits)
        p = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
        hits, count, mass = p.new_zeros(3, 1 if pooled else logits.shape[1]).unbind()
        for x, t, out in _blocks(logits, target, p):
            out.copy_(x).sigmoid_() if x.dtype != dtype else torch.sigmoid(x, out=out)
            t = t.to(dtype)
            hits += torch.dot(out, t) if pooled else (out * t).sum(0)
            count += t.sum() if pooled else t.sum(0)
            mass += out.sum() if pooled else out.sum(0)
        ctx.save_for_backward(p, target, logits)  # the input: see once_differentiable
        ctx.mark_non_differentiable(count)
        return hits, count, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_hits: Tensor, by_count: Tensor, by_mass: Tensor) -> tuple[Tensor | None, ...]:
        p, target, logits = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for q, t, out in _blocks(p, target, grad):
            made = torch.mul(t.to(q.dtype), by_hits, out=out if out.dtype == q.dtype else None).add_(by_mass)
            torch.ops.aten.sigmoid_backward.grad_input(made, q, grad_input=made)  # times p (1 - p), in one pass
            if made is not out:
                out.copy_(made)
        return grad, None, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if tensors[0].numel() <= BLOCK:
        return iter((tensors,))
    rows = max(1, BLOCK // tensors[0][0].numel())
    return zip(*(x.split(rows) for x in tensors), strict=True)


def _plain_sums(logits: Tensor, target: Tensor, pooled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain operations, which a compiler fuses by itself."""
    p = torch.sigmoid(logits.to(compute_dtype(logits)))
    t = target.to(p.dtype)
    hits, count, mass = (v.sum().unsqueeze(0) if pooled else v.sum(0) for v in (p * t, t, p))
    return hits, count, mass


def _class_sums(logits: Tensor, labels: Tensor, pooled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """TP, sum t and sum p of softmax scores (N, C) with labels (N,)."""
    p = sharp_weights(logits.to(compute_dtype(logits)), -1, 1.0)
    hits = p.new_zeros(p.shape[1]).index_add(0, labels, p.gather(1, labels.unsqueeze(1)).squeeze(1))
    count = p.new_zeros(p.shape[1]).index_add(0, labels, p.new_ones(labels.shape))
    sums = hits, count, p.sum(0)
    return tuple(v.sum().unsqueeze(0) for v in sums) if pooled else sums  # type: ignore[return-value]


def _batch_sums(logits: Any, t: Any, average: str, validate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments; TP, sum t and sum p: (C,) for "macro", else (1,)."""
    check_float("logits", logits)
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor; got {type(t).__name__}")
    shape = tuple(logits.shape)
    if average == "binary" and logits.dim() != 1:
        raise ValueError(f'average="binary" takes logits (N,), "macro" and "micro" (..., C); got {shape}')
    if logits.dim() < (2 if average == "macro" else 1) or (logits.dim() > 1 and shape[-1] == 0):
        raise ValueError(f"logits must be (..., C) with at least one class; got {shape}")
    pooled = average != "macro"
    if logits.dim() > 1 and t.dim() == logits.dim() - 1:
        check_labels(t, shape[:-1], shape[-1], validate)
        return _class_sums(logits.reshape(-1, shape[-1]), t.reshape(-1).long(), pooled)
    if tuple(t.shape) != shape:
        raise ValueError(f"t must have the shape of the logits, {shape}; got {tuple(t.shape)}")
    if t.is_complex():
        raise TypeError(f"t must be numbers in [0, 1]; got dtype {t.dtype}")
    if validate and t.dtype != torch.bool and t.numel() and not torch.compiler.is_compiling():
        low, high = (float(v) for v in torch.aminmax(t))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"t must lie in [0, 1]; got values from {low:g} to {high:g}")
    flat = (-1,) if pooled else (-1, shape[-1])
    logits, t = logits.reshape(flat), t.detach().reshape(flat)
    if torch.compiler.is_compiling():
        return _plain_sums(logits, t, pooled)
    return _Sums.apply(logits, _bits(t), pooled)


def _check_options(beta: Any, average: Any, smooth: Any) -> None:
    if beta != math.inf:
        check_real("beta", beta, minimum=0.0)
    check_choice("average", average, AVERAGES)
    check_real("smooth", smooth, minimum=0.0)


class _FLoss(torch.autograd.Function):
    """The mean over classes of 1 - F, with its derivatives by the sums in closed form."""

    @staticmethod
    def forward(ctx: Any, hits: Tensor, count: Tensor, mass: Tensor, recall: float, extra: float, skip: bool) -> Tensor:
        tiny = torch.finfo(hits.dtype).tiny  # all probabilities may underflow
        below = (recall * count + extra).add_(mass, alpha=1 - recall).clamp_(min=tiny).reciprocal_()
        f = (hits + extra) * below
        loss, weight = 1 - f, below.div_(-len(f))
        if skip:
            absent = count == 0
            loss, weight = loss.masked_fill_(absent, 0.0), weight.masked_fill_(absent, 0.0)
        ctx.save_for_backward(
            weight, f.mul_(weight).mul_(recall - 1), hits, mass
        )  # the inputs: see once_differentiable
        return loss.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_hits, by_mass, _, _ = ctx.saved_tensors
        return grad * by_hits, None, grad * by_mass, None, None, None


def _f_loss(hits: Tensor, count: Tensor, mass: Tensor, beta: float, smooth: float) -> Tensor:
    """1 - F from the sums, both parts of the fraction divided by 1 + beta^2; the mean over classes."""
    recall = beta * beta / (1 + beta * beta) if beta <= 1 else 1 / (1 + 1 / (beta * beta))  # the weight of sum t
    return _FLoss.apply(hits, count, mass, recall, smooth * (1 - recall) if recall < 1 else smooth, smooth == 0)


def smooth_f1_loss(
    logits: Tensor,
    t: Tensor,
    beta: float = 1.0,
    average: str = "binary",
    smooth: float = 0.0,
    *,
    validate: bool = True,
) -> Tensor:
    """1 - F1 of the batch, with probabilities in the place of decisions.

    Args:
        logits: (N,) for "binary"; (..., C) for "macro" and "micro". -inf is a probability of 0.
        t: Labels of the shape of the logits, in [0, 1] (0/1 of any dtype, or soft), against sigmoid(logits). Or, for
            "macro" and "micro", class indices (...), against softmax(logits): micro F1 is then smooth accuracy.
        beta: Weight of the recall: F_beta; 0 is the precision, ``math.inf`` the recall.
        average: "binary"; "macro": the mean of the classes' losses; "micro": all entries in one pool.
        smooth: Added to both parts of (1 + beta^2) TP / (beta^2 sum t + sum p), to one count for recall. At 0 a class
            (or batch) without a positive contributes 0 and no gradient; the mean is over all C classes all the same.
        validate: Check the range of t (one reduction; never done under torch.compile).

    Returns:
        A scalar in float32 (float64 for float64 logits), 0 for an empty batch. Differentiable once, in the logits.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, t outside [0, 1], unknown average, beta or smooth below 0.

    Reference:
        https://spaces.ac.cn/archives/6620

    Example:
        >>> logits, t = torch.tensor([9.0, 0.0, -9.0]), torch.tensor([1, 1, 0])
        >>> smooth_f1_loss(logits, t)  # 1 - 2 * 1.5 / (2 + 1.5)
        tensor(0.1429)
        >>> smooth_f1_loss(logits, t, beta=math.inf)  # recall 1.5 / 2
        tensor(0.2501)
    """
    _check_options(beta, average, smooth)
    return _f_loss(*_batch_sums(logits, t, average, validate), float(beta), float(smooth))


class SmoothF1Loss(nn.Module):
    """:func:`smooth_f1_loss` as a Module, optionally on running sums, which small batches need.

    With ``momentum`` m the sums TP, sum t and sum p are S = m S_before + (1 - m) S_batch, started without bias, and the
    loss is that of S. The gradient flows through the current batch, so it is about 1 - m times that of a batch of
    1 / (1 - m) times the size: with plain SGD, raise the rate accordingly; Adam does not mind. In evaluation mode the
    loss is that of the batch alone and the sums stay as they are.

    Args:
        momentum: Weight of the past in [0, 1), for example .9; None: no running sums.
        beta: As in :func:`smooth_f1_loss`.
        average: As in :func:`smooth_f1_loss`.
        smooth: As in :func:`smooth_f1_loss`.
        num_classes: C, needed for running sums of "macro".

    Attributes:
        running: (3, C) or (3, 1) buffer: the sums, each not yet divided by 1 - m^(number of batches).
        num_batches: Batches seen in training mode.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range, or num_classes missing.

    Example:
        >>> loss = SmoothF1Loss(momentum=0.9)
        >>> logits = torch.tensor([9.0, -9.0], requires_grad=True)
        >>> first = loss(logits, torch.tensor([1, 0]))
        >>> bool(loss(logits, torch.tensor([0, 0])) < 0.4)  # no positive in this batch, but in the one before
        True
    """

    running: Tensor
    num_batches: Tensor

    def __init__(
        self,
        momentum: float | None = None,
        *,
        beta: float = 1.0,
        average: str = "binary",
        smooth: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        _check_options(beta, average, smooth)
        self.momentum, self.beta, self.average, self.smooth = momentum, float(beta), average, float(smooth)
        self.num_classes = num_classes
        if num_classes is not None:
            check_int("num_classes", num_classes, 1)
        if momentum is None:
            return
        check_real("momentum", momentum, minimum=0.0)
        if not momentum < 1:
            raise ValueError(f"momentum must be below 1; got {momentum!r}")
        if average == "macro" and num_classes is None:
            raise ValueError('running sums of average="macro" need num_classes; got None')
        self.register_buffer("running", torch.zeros(3, num_classes if average == "macro" else 1))  # type: ignore[arg-type]
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def extra_repr(self) -> str:
        """What print shows."""
        return f"momentum={self.momentum}, beta={self.beta:g}, average={self.average!r}, smooth={self.smooth:g}"

    def forward(self, logits: Tensor, t: Tensor) -> Tensor:
        """Loss of a batch; arguments as in :func:`smooth_f1_loss`."""
        sums = torch.stack(_batch_sums(logits, t, self.average, True))
        if self.average == "macro" and self.num_classes not in (None, sums.shape[1]):
            raise ValueError(f"logits must have {self.num_classes} classes; got {sums.shape[1]}")
        if self.momentum is not None and self.training:
            sums = self.momentum * self.running.to(sums.dtype) + (1 - self.momentum) * sums
            # Not in place: the backward pass of a compiled graph would see the later value.
            self.running = sums.detach().to(self.running.dtype)
            self.num_batches = self.num_batches + 1
            sums = (sums / (1 - self.momentum ** self.num_batches.double())).to(sums.dtype)
        hits, count, mass = sums.unbind()
        return _f_loss(hits, count, mass, self.beta, self.smooth)
