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
losses on sigmoid scores keep one buffer, the probabilities; on a CPU, large batches take one pass over it for all sums
and one for the gradient (``_smooth_kernel.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype, once_differentiable
from kexue.losses._common import check_labels, reduce_loss
from kexue.losses.smooth_functions import sharp_weights

__all__ = ["SmoothF1Loss", "smooth_accuracy_loss", "smooth_f1_loss"]

AVERAGES = ("binary", "macro", "micro")
LEAST = 1 << 14  # entries from which on compiled passes are used: for fewer, torch is as good and compiles nothing


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
        miss = _flip(logits.to(compute_dtype(logits)), labels).sigmoid_()
        ctx.save_for_backward(miss, labels, logits)
        return miss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        miss, labels, logits = ctx.saved_tensors
        return _flip(torch.ops.aten.sigmoid_backward(grad, miss), labels).to(logits.dtype), None


def _compiled(x: Tensor) -> bool:
    """Whether ``_smooth_kernel`` takes it; a compiler fuses torch's operations by itself."""
    return x.is_cpu and x.numel() >= LEAST and not torch.compiler.is_compiling()


def _array(labels: Tensor, dtype: torch.dtype) -> Any:
    """Labels as the kernel wants them, flat: bool as bytes without a copy, others converted."""
    flat = labels.contiguous().view(-1)
    return (flat.view(torch.uint8) if flat.dtype == torch.bool else flat.to(dtype)).numpy()


def _flip(x: Tensor, labels: Tensor) -> Tensor:
    """A new tensor: x for label 0, -x for label 1."""
    if not _compiled(x):
        return x * (1 - 2 * labels.to(x.dtype))
    from kexue.losses._smooth_kernel import flip

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    flip(x.contiguous().view(-1).numpy(), _array(labels, x.dtype), out.view(-1).numpy())
    return out


def _hard(y: Tensor, validate: bool) -> Tensor:
    """Floating labels as bool; raise unless they are 0 or 1."""
    labels = y.detach() != 0
    if validate and not torch.compiler.is_compiling():
        soft = labels & (y.detach() != 1)
        if bool(soft.any()):
            raise ValueError(f"y must be 0 or 1 for logits (N,); got {float(y.detach()[soft][0]):g}")
    return labels


def smooth_accuracy_loss(logits: Tensor, y: Tensor, *, reduction: str = "mean", validate: bool = True) -> Tensor:
    """1 - smooth accuracy: the mean of 1 - p_y, p the softmax of the logits.

    Bounded by 1 for each row, so that outliers do not dominate as they do in cross-entropy; its gradient p_y (1 - p_y)
    vanishes for hopeless rows as well, so train with cross-entropy first.

    Args:
        logits: (..., C) floating; -inf excludes a class. Or (N,), for two classes: p is sigmoid(logit).
        y: (...) integers in [0, C); for logits (N,) labels (N,), 0 or 1 of any dtype.
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
        labels = _hard(y, validate) if y.is_floating_point() else y
        check_labels(labels.int() if labels.dtype == torch.bool else labels, tuple(logits.shape), 2, validate)
        return reduce_loss(_BinaryMiss.apply(logits, labels), reduction)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits need at least one class; got shape {tuple(logits.shape)}")
    check_labels(y, tuple(logits.shape[:-1]), logits.shape[-1], validate)
    return reduce_loss(_Miss.apply(logits, y.long()), reduction)


def _column_sums(p: Tensor, target: Tensor) -> Tensor:
    """TP, sum t and sum p of each column, (3, C), from probabilities (N, C) and labels (N, C) or classes (N,)."""
    if target.dim() == 1:
        hits, count = p.new_zeros(2, p.shape[1]).unbind()
        hits = hits.index_add(0, target, p.gather(1, target.unsqueeze(1)).squeeze(1))
        return torch.stack([hits, count.index_add(0, target, p.new_ones(target.shape)), p.sum(0)])
    if _compiled(p):
        from kexue.losses._smooth_kernel import column_sums

        return torch.from_numpy(column_sums(p.view(-1).numpy(), _array(target, p.dtype), p.shape[1])).to(p.dtype)
    t = target.to(p.dtype)
    return torch.stack([(p * t).sum(0), t.sum(0), p.sum(0)])


def _score(sums: Tensor, recall: float, extra: float, skip: bool) -> tuple[Tensor, Tensor]:
    """1 - F, the mean over columns, from the sums; and its derivatives by TP and by sum p, (2, C)."""
    hits, count, mass = sums.unbind()
    tiny = torch.finfo(sums.dtype).tiny  # all probabilities may underflow
    below = (recall * count + extra).add_(mass, alpha=1 - recall).clamp_(min=tiny).reciprocal_()
    f = (hits + extra) * below
    weight = below / -len(f)
    by = torch.stack([weight, f * weight * (recall - 1)])
    loss = 1 - f
    if skip:
        absent = count == 0
        loss, by = loss.masked_fill_(absent, 0.0), by.masked_fill_(absent, 0.0)
    return loss.mean(), by


class _FLoss(torch.autograd.Function):
    """1 - F, and the sums of the batch (3, C), of scores (N, C). Keeps the probabilities.

    ``past`` is added to ``share`` times the sums of the batch, if given.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, past: Any, share: Any, pooled: bool, *options: Any
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(logits)
        if target.dim() == 1:
            p = sharp_weights(logits.to(dtype), 1, 1.0)
        else:
            p = torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
            torch.sigmoid(logits, out=p) if logits.dtype == dtype else p.copy_(logits).sigmoid_()
        sums = _column_sums(p, target)
        if pooled:
            sums = sums.sum(1, keepdim=True)
        loss, by = _score(sums if past is None else past + share * sums, *options)
        ctx.save_for_backward(p, target, by if share is None else by * share, logits)  # the input: see the decorator
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        p, target, by, logits = ctx.saved_tensors
        by_hits, by_mass = (by * grad).unbind()
        if target.dim() == 1:
            index = target.unsqueeze(1)
            hit = p.gather(1, index) * by_hits.expand(p.shape[1])[index]
            out = p * by_mass
            out = out.addcmul_(p, out.sum(1, keepdim=True) + hit, value=-1).scatter_add_(1, index, hit)
        elif _compiled(p):
            from kexue.losses._smooth_kernel import slopes

            out = torch.empty_like(p)
            slopes(p.view(-1).numpy(), _array(target, p.dtype), by_hits.numpy(), by_mass.numpy(), out.view(-1).numpy())
        else:
            out = torch.ops.aten.sigmoid_backward(target.to(p.dtype) * by_hits + by_mass, p)
        return out.to(logits.dtype), *[None] * 7


def _rows(logits: Any, t: Any, average: str, validate: bool) -> tuple[Tensor, Tensor, bool]:
    """Check the arguments; logits (N, C), labels (N, C) or classes (N,), and whether the columns are one pool."""
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
        return logits.reshape(-1, shape[-1]), t.reshape(-1).long(), pooled
    if tuple(t.shape) != shape:
        raise ValueError(f"t must have the shape of the logits, {shape}; got {tuple(t.shape)}")
    if t.is_complex():
        raise TypeError(f"t must be numbers in [0, 1]; got dtype {t.dtype}")
    if validate and t.dtype != torch.bool and t.numel() and not torch.compiler.is_compiling():
        low, high = (float(v) for v in torch.aminmax(t))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"t must lie in [0, 1]; got values from {low:g} to {high:g}")
    columns = 1 if pooled else shape[-1]  # one column is summed in one go
    return logits.reshape(-1, columns), t.detach().reshape(-1, columns), pooled


def _check_options(beta: Any, average: Any, smooth: Any) -> None:
    check_real("beta", 0.0 if isinstance(beta, float) and beta == math.inf else beta, minimum=0.0)
    check_choice("average", average, AVERAGES)
    check_real("smooth", smooth, minimum=0.0)


def _fraction(beta: float, smooth: float) -> tuple[float, float, bool]:
    """Weight of sum t against sum p, what is added to both parts (all divided by 1 + beta^2), whether to skip."""
    recall = beta * beta / (1 + beta * beta) if beta <= 1 else 1 / (1 + 1 / (beta * beta))
    return recall, smooth * (1 - recall) if recall < 1 else smooth, smooth == 0


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
    logits, t, pooled = _rows(logits, t, average, validate)
    return _FLoss.apply(logits, t, None, None, pooled, *_fraction(float(beta), float(smooth)))[0]


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
        logits, t, pooled = _rows(logits, t, self.average, True)
        if not pooled and self.num_classes not in (None, logits.shape[1]):
            raise ValueError(f"logits must have {self.num_classes} classes; got {logits.shape[1]}")
        options = pooled, *_fraction(self.beta, self.smooth)
        m = self.momentum
        if m is None or not self.training:
            return _FLoss.apply(logits, t, None, None, *options)[0]
        before = self.running.to(compute_dtype(logits))
        # Not in place: the backward pass of a compiled graph would see the later value.
        self.num_batches = self.num_batches + 1
        share = ((1 - m) / (1 - m ** self.num_batches.double())).to(before.dtype)
        loss, sums = _FLoss.apply(logits, t, before * (m / (1 - m)) * share, share, *options)
        self.running = m * before + (1 - m) * sums  # stays in float32 in a model of bfloat16, which cannot count
        return loss
