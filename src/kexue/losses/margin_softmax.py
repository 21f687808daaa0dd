"""Margin softmax (Margin Softmax), the classification head whose features are good for ranking.

Source: 科学空间 8656 (从三角不等式到Margin Softmax) and 5743 (基于GRU和AM-Softmax的句子相似度模型);
CosFace (https://arxiv.org/abs/1801.09414), ArcFace (https://arxiv.org/abs/1801.07698).

With z and the class vectors c_j normalised and s the scale:

    L = -log( e^{s psi(theta_t)} / ( e^{s psi(theta_t)} + sum over j != t of e^{s cos theta_j} ) )
    psi(theta) <= cos(theta)

psi is listed in ``_margins.py``. What differs from the usual implementations: the target is replaced in the sum, not
subtracted from it afterwards (which cancels when it dominates); the normalised class matrix, the one-hot mask and the
(B, C) logits never exist; the gradient is built in the forward pass (``_margin_kernel.py``); the loss stays accurate
relative to its own size when all classes are well separated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import as_recorded, check_float, compute_dtype, once_differentiable
from kexue.losses._common import REDUCTIONS, check_labels, inverse_norms, reduce_loss, split_scores, unit_rows
from kexue.losses._margin_kernel import MarginSoftmaxFunction, rows_per_block
from kexue.losses._margins import Kind, check_margin, margin_of_rows, resolve_margin, score, target_score
from kexue.losses._shards import GatherRows, OwnRows, Shards

__all__ = ["MarginSoftmax", "auto_scale", "margin_cross_entropy", "margin_softmax_loss"]


def auto_scale(num_classes: int, probability: float = 0.99, spread: float = 0.0) -> float:
    """Scale at which a perfectly placed sample reaches a given probability.

    With the target's cosine at 1 and those of the other classes at ``-spread``,
    s = log(p (C - 1) / (1 - p)) / (1 + spread).

    Args:
        num_classes: C, at least 1; one class counts as two.
        probability: Softmax probability of the target, in (0, 1).
        spread: How far below 0 the other cosines lie, in [0, 1].

    Returns:
        The scale, at least 1.

    Raises:
        ValueError: A value out of range.

    Example:
        >>> round(auto_scale(100_000), 2)
        16.11
    """
    check_int("num_classes", num_classes, 1)
    check_real("probability", probability, above=0.0)
    check_real("spread", spread, minimum=0.0)
    if probability >= 1 or spread > 1:
        raise ValueError(f"probability must be below 1 and spread at most 1; got {probability} and {spread}")
    odds = probability / (1 - probability)
    return max(1.0, math.log(odds * max(num_classes - 1, 1)) / (1 + spread))


def _resolve_scale(scale: Any, num_classes: int) -> float:
    if isinstance(scale, str):
        check_choice("scale", scale, ("auto",))
        return auto_scale(num_classes)
    check_real("scale", scale, above=0.0)
    return float(scale)


def _checked(z: Any, weight: Any, labels: Any, reduction: str) -> None:
    check_choice("reduction", reduction, REDUCTIONS)
    check_float("z", z, 2)
    check_float("weight", weight, 2)
    if z.shape[1] != weight.shape[1]:
        raise ValueError(f"z and weight must have equal width; got {tuple(z.shape)} and {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one class; got shape {tuple(weight.shape)}")


def _head(
    z: Tensor,
    weight: Tensor,
    labels: Tensor,
    kind: Kind,
    scale: float,
    margin: Any,
    reduction: str,
    block_rows: int | None,
    filter_eps: float,
    repeat: Tensor | None = None,
    shards: Shards | None = None,
) -> Tensor:
    """The loss for checked arguments; with ``shards`` all tensors are those of the whole batch and the own classes."""
    # The target's cosine alone, its gradient is part of the kernel. In float64: only B rows, and psi near cosine 1
    # multiplies the rounding of the cosine (by m^2 for "a", by 1 / sin theta for "arc").
    dtype = torch.float64 if z.device.type != "mps" else torch.float32
    with torch.no_grad():
        here = labels >= 0
        target, _ = unit_rows(weight[labels.clamp(min=0)], dtype)
        cosine = ((unit_rows(z, dtype)[0] * target).sum(1) * here).clamp(-1, 1)
        if shards is not None:
            shards.reduce(cosine, "sum")
        psi, slope = target_score(cosine, kind, margin)
    rows = rows_per_block(block_rows, weight.shape[0])
    metric = kind == "metric"
    logit = psi.detach() * scale
    z, weight = as_recorded(z, weight)
    loss, each = MarginSoftmaxFunction.apply(
        z, weight, labels, logit, slope.detach(), repeat, scale, metric, rows, filter_eps, reduction, shards
    )
    attached = None
    if isinstance(margin, Tensor) and margin.requires_grad:
        attached = target_score(cosine, kind, margin)[0] * scale
    elif callable(kind):
        attached = kind(cosine) * scale
    if attached is not None and attached.requires_grad:  # parameters of psi
        # value 0, gradient d loss / d psi = -(1 - p_target) = expm1(-loss), times d psi / d parameter
        loss = loss + reduce_loss(torch.expm1(-each) * (attached - attached.detach()).to(each.dtype), reduction)
    return loss


def _dense_loss(cosines: Tensor, labels: Tensor, kind: Kind, scale: float, margin: Any, reduction: str) -> Tensor:
    """Soft labels (B, C): scores t psi + (1 - t) cos, cross-entropy with t."""
    if isinstance(margin, Tensor) and margin.dim() == 1:
        if margin.shape[0] not in (cosines.shape[1], cosines.shape[0]):
            raise ValueError(f"a tensor margin must have one entry per class or row; got {tuple(margin.shape)}")
        margin = margin if margin.shape[0] == cosines.shape[1] else margin[:, None]
    masked = cosines == -math.inf  # a class that does not take part
    cosines = torch.where(masked, 0.0, cosines)
    psi = _attached(cosines, kind, margin)
    logits = scale * (labels * psi + (1 - labels) * score(cosines, kind))
    logits = torch.where(masked, -math.inf, logits)
    # With k the largest: sum over j != k of t_j (x_k - x_j), plus log(1 + sum over i != k of e^(x_i - x_k)) for all of
    # t. log_softmax would round x_k - logsumexp to 0 where k dominates; here the smallest loss keeps its digits.
    top, index = logits.max(-1, keepdim=True)
    largest = torch.zeros_like(masked).scatter(-1, index, True)
    rest = torch.exp((logits - top).masked_fill(largest, -math.inf)).sum(-1)
    short = labels * torch.where(largest | (labels == 0), 0.0, top - logits)
    return reduce_loss(short.sum(-1) + labels.sum(-1) * torch.log1p(rest), reduction)


class _Psi(torch.autograd.Function):
    """psi with the clamped slope of ``target_score`` as its gradient."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, kind: Kind, margin: Any) -> Tensor:
        value, slope = target_score(c, kind, margin)
        ctx.save_for_backward(slope, c)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope, _ = ctx.saved_tensors
        return grad * slope, None, None


def _attached(c: Tensor, kind: Kind, margin: Any) -> Tensor:
    if callable(kind):
        return kind(c)
    psi = _Psi.apply(c, kind, margin.detach() if isinstance(margin, Tensor) else margin)
    if isinstance(margin, Tensor) and margin.requires_grad:
        with_margin = target_score(c.detach(), kind, margin)[0]
        psi = psi + (with_margin - with_margin.detach())
    return psi


def _check_dense(labels: Tensor, shape: tuple[int, ...], validate: bool) -> None:
    if tuple(labels.shape) != shape:
        raise ValueError(f"soft labels must have shape {shape}; got {tuple(labels.shape)}")
    if validate and not torch.compiler.is_compiling() and labels.numel():
        low, high = (float(x) for x in torch.aminmax(labels.detach()))
        if not (low >= 0 and high <= 1):  # written so that NaN fails
            raise ValueError(f"soft labels must lie in [0, 1]; got values from {low} to {high}")


def margin_softmax_loss(
    z: Tensor,
    weight: Tensor,
    labels: Tensor,
    kind: Kind = "am",
    scale: float | str = 30.0,
    margin: Any = None,
    reduction: str = "mean",
    *,
    block_rows: int | None = None,
    filter_eps: float = 0.0,
    validate: bool = True,
) -> Tensor:
    """Margin softmax cross-entropy of embeddings against class vectors.

    With integer labels the memory beside the gradients is one block of scores, about 25 MiB for any batch, up to
    100 000 classes (``block_rows`` times C numbers when given); nothing of size (B, C) is made. Soft labels
    use several matrices of their own size. The loss is differentiable once.

    Args:
        z: (B, D) embeddings, not normalised; fp16, bf16, float32 or float64. Computed in float32 (float64 stays).
        weight: (C, D) class vectors, not normalised.
        labels: (B,) integers in [0, C), or (B, C) soft labels in [0, 1] as floats.
        kind: "softmax", "am" (AM-Softmax, CosFace), "arc" (ArcFace), "a" (SphereFace), "simpler_a", "combined",
            "metric" (scores -sqrt(1 - cos)), or a callable psi(cos) -> tensor of the same shape.
        scale: Factor s on the cosines, positive; "auto" is ``auto_scale(C)``.
        margin: Number or tensor () / (C,) per class / (B,) per row (per class if B = C), which may require a
            gradient. None is the kind's default: am and metric .35, arc .5 (radians, at most pi). "a" and "simpler_a"
            take the integer m (default 4), "combined" takes (m1, m2, m3); "softmax" has none and ignores it.
        reduction: "none" (B,), "mean" or "sum" over rows. "none" computes the scores a second time in the backward.
        block_rows: Rows of a block; None chooses.
        filter_eps: Approximate gradient: classes whose softmax mass, summed over a block of rows, is below it get
            and give no gradient. The gradient with respect to a normalised row changes by at most scale times the
            dropped mass of that row, which is below C * filter_eps. 0 is exact. The loss is exact in any case.
        validate: Check the range of the labels (one reduction; never done under torch.compile).

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, labels out of range, scale not positive, unknown kind or reduction.

    Reference:
        https://spaces.ac.cn/archives/8656, https://spaces.ac.cn/archives/5743

    Example:
        >>> z, weight = torch.eye(3), torch.eye(3)
        >>> loss = margin_softmax_loss(z, weight, torch.arange(3), kind="am", scale=4.0, margin=0.5)
        >>> round(float(loss), 4)  # log(1 + 2 exp(-2))
        0.2395
    """
    _checked(z, weight, labels, reduction)
    scale, margin = _resolve_scale(scale, weight.shape[0]), resolve_margin(kind, margin)
    if block_rows is not None:
        check_int("block_rows", block_rows, 1)
    check_real("filter_eps", filter_eps, minimum=0.0)
    check_margin(margin, validate)
    if isinstance(labels, Tensor) and labels.is_floating_point():
        _check_dense(labels, (z.shape[0], weight.shape[0]), validate)
        dtype = compute_dtype(z, weight)
        with torch.autocast(z.device.type, enabled=False):
            cosines = unit_rows(z, dtype)[0] @ unit_rows(weight, dtype)[0].T
            return _dense_loss(cosines, labels.to(dtype), kind, scale, margin, reduction)
    check_labels(labels, (z.shape[0],), weight.shape[0], validate)
    labels = labels.long()
    margin = margin_of_rows(margin, labels, weight.shape[0])
    return _head(z, weight, labels, kind, scale, margin, reduction, block_rows, float(filter_eps))


def margin_cross_entropy(
    cosines: Tensor,
    labels: Tensor,
    kind: Kind = "am",
    scale: float | str = 30.0,
    margin: Any = None,
    reduction: str = "mean",
    *,
    validate: bool = True,
) -> Tensor:
    """Margin softmax cross-entropy of cosines that are already there.

    Args:
        cosines: (..., C) in [-1, 1]; -inf leaves a class out.
        labels: (...) integers or (..., C) soft labels.
        kind: As in :func:`margin_softmax_loss`.
        scale: As in :func:`margin_softmax_loss`.
        margin: As in :func:`margin_softmax_loss`.
        reduction: "none", "mean" or "sum".
        validate: Check the range of the labels.

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, labels out of range, scale not positive.

    Example:
        >>> cosines = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> bool(margin_cross_entropy(cosines, torch.tensor([0, 1])) < 1e-3)
        True
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_float("cosines", cosines)
    if cosines.dim() == 0 or cosines.shape[-1] == 0:
        raise ValueError(f"cosines must have at least one class on the last axis; got shape {tuple(cosines.shape)}")
    rows, classes = tuple(cosines.shape[:-1]), cosines.shape[-1]
    scale, margin = _resolve_scale(scale, classes), resolve_margin(kind, margin)
    check_margin(margin, validate)
    dtype = compute_dtype(cosines)
    dense = isinstance(labels, Tensor) and labels.is_floating_point()
    if dense:
        _check_dense(labels, (*rows, classes), validate)
    else:
        check_labels(labels, rows, classes, validate)
    if len(rows) != 1:
        if isinstance(margin, Tensor) and tuple(margin.shape) == rows and rows:
            margin = margin.reshape(-1)
        loss = margin_cross_entropy(
            cosines.reshape(-1, classes), labels.reshape(-1, classes) if dense else labels.reshape(-1),
            kind, scale, margin, reduction, validate=False,
        )  # fmt: skip
        return loss.view(rows) if reduction == "none" else loss
    if dense:
        return _dense_loss(cosines.to(dtype), labels.to(dtype), kind, scale, margin, reduction)
    labels = labels.long()
    margin = margin_of_rows(margin, labels, classes)
    others, chosen = split_scores(score(cosines.to(dtype), "metric") if kind == "metric" else cosines, labels, scale)
    if kind == "metric":  # the target's own cosine, not its score
        chosen = cosines.to(dtype).gather(1, labels[:, None]).squeeze(1) * scale
    logit = scale * _attached(chosen / scale, kind, margin)
    return reduce_loss(F.softplus(others - logit, threshold=50.0), reduction)


class MarginSoftmax(nn.Module):
    """Classification head with a margin, for up to millions of classes.

    The one parameter is ``weight`` (C, D), the class vectors; throw the head away after training and keep the encoder.

    Args:
        in_features: D, width of the embeddings.
        num_classes: C, classes of the whole head.
        kind: As in :func:`margin_softmax_loss`.
        scale: As in :func:`margin_softmax_loss`.
        margin: As in :func:`margin_softmax_loss`; a Parameter is learned, another tensor becomes a buffer.
        sample_rate: Below 1, training uses the classes of the batch and random others, ``sample_rate * C`` together
            (PartialFC). In eval mode all classes are used.
        block_rows: Rows of a block; None chooses.
        log_q: With sampling, let each random class stand for ``others / drawn`` classes, which makes the sum over
            classes unbiased.
        sparse_grad: With sampling, give ``weight`` a sparse gradient instead of a dense one, for an optimizer that
            touches only those rows: SGD, ``torch.optim.SparseAdam`` or ``kexue.models.bag_encoder.RowAdam``.
        filter_eps: As in :func:`margin_softmax_loss`.
        reduction: "none", "mean" or "sum".
        validate: Check the range of the labels in each call.
        process_group: Class sharding: each of the P processes of this torch.distributed group holds C / P rows of
            the class matrix. Every process calls the head with its own rows (their number may differ) and gets the
            loss and the gradients of one process that has all rows: "mean" and "sum" are over the rows of all. A
            margin for each class holds all C classes on every process.
            Under DistributedDataParallel, which averages the encoder's gradients, multiply the loss by P.
        device: Where the class vectors are created.
        dtype: Their dtype.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range.

    Reference:
        https://spaces.ac.cn/archives/8656; PartialFC: https://arxiv.org/abs/2010.05222

    Example:
        >>> head = MarginSoftmax(16, 1000, kind="am", scale=30.0, margin=0.35)
        >>> loss = head(torch.randn(8, 16), torch.arange(8))
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 16])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        kind: Kind = "am",
        scale: float | str = 30.0,
        margin: Any = None,
        sample_rate: float = 1.0,
        block_rows: int | None = None,
        *,
        log_q: bool = False,
        sparse_grad: bool = False,
        filter_eps: float = 0.0,
        reduction: str = "mean",
        validate: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("num_classes", num_classes, 1)
        check_real("sample_rate", sample_rate, above=0.0)
        if sample_rate > 1:
            raise ValueError(f"sample_rate must be at most 1; got {sample_rate}")
        if (log_q or sparse_grad) and sample_rate == 1:
            raise ValueError("log_q and sparse_grad need sample_rate below 1; got sample_rate=1")
        if block_rows is not None:
            check_int("block_rows", block_rows, 1)
        check_real("filter_eps", filter_eps, minimum=0.0)
        check_choice("reduction", reduction, REDUCTIONS)
        self.in_features, self.num_classes, self.kind = in_features, num_classes, kind
        self.scale = _resolve_scale(scale, num_classes)
        self.sample_rate, self.log_q, self.sparse_grad = float(sample_rate), log_q, sparse_grad
        self.block_rows, self.filter_eps = block_rows, float(filter_eps)
        self.reduction, self.validate = reduction, validate
        margin = resolve_margin(kind, margin)
        if isinstance(margin, Tensor) and not isinstance(margin, nn.Parameter):
            self.register_buffer("margin", margin)
        else:
            self.margin = margin
        self.shards = None if process_group is None else Shards(process_group, num_classes)
        rows = num_classes if self.shards is None else self.shards.count
        self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors from a normal distribution with norms near 1."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def extra_repr(self) -> str:
        """What print shows."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, kind={self.kind!r}, "
            f"scale={self.scale:g}, margin={self.margin!r}, sample_rate={self.sample_rate:g}"
        )

    @torch.no_grad()
    def project_(self) -> MarginSoftmax:
        """Set every class vector to length 1, in place (call it after the optimizer's step).

        Vectors without a direction, which are zero or shorter than 1e-12, stay as they are.
        """
        inverse = inverse_norms(self.weight.to(compute_dtype(self.weight)))
        self.weight.mul_(torch.where(inverse > 0, inverse, 1.0))
        return self

    def _sample(self, labels: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Row numbers of the chosen classes, the labels among them, and how many classes each stands for."""
        classes, here = self.weight.shape[0], labels >= 0
        own, inverse = torch.unique(labels[here], return_inverse=True)
        mapped = torch.full_like(labels, -1)
        mapped[here] = inverse
        other = torch.ones(classes, dtype=torch.bool, device=labels.device)
        other[own] = False
        others = other.nonzero().squeeze(1)
        drawn = max(0, min(round(self.sample_rate * classes), classes) - own.numel())
        device = generator.device if generator is not None else labels.device
        order = torch.randperm(others.numel(), generator=generator, device=device)[:drawn].to(labels.device)
        repeat = None
        if self.log_q and drawn:
            repeat = self.weight.new_ones(own.numel() + drawn, dtype=compute_dtype(self.weight))
            repeat[own.numel() :] = others.numel() / drawn
        return torch.cat([own, others[order]]), mapped, repeat

    def forward(self, z: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Loss of a batch.

        Args:
            z: (B, D) embeddings, not normalised.
            labels: (B,) integers in [0, C), or (B, C) soft labels (neither sampled nor sharded).
            generator: Draws the sampled classes; None uses torch's default generator.

        Returns:
            The loss, reduced as the head was told.

        Raises:
            TypeError: Labels that are no integers (or soft labels where they are not supported).
            ValueError: Shapes that do not fit or labels out of range.
        """
        sampled = self.sample_rate < 1 and self.training
        if not sampled and self.shards is None:
            return margin_softmax_loss(
                z, self.weight, labels, self.kind, self.scale, self.margin, self.reduction,
                block_rows=self.block_rows, filter_eps=self.filter_eps, validate=self.validate,
            )  # fmt: skip
        _checked(z, self.weight, labels, self.reduction)
        check_margin(self.margin, self.validate)
        check_labels(labels, (z.shape[0],), self.num_classes, self.validate)
        labels = labels.long()
        weight: Tensor = self.weight
        repeat, shards, own = None, self.shards, None
        if shards is not None:
            own = shards.counts(z.shape[0], z.device)
            z, labels = GatherRows.apply(z, shards, own), shards.gather(labels, own)
        margin = margin_of_rows(self.margin, labels, self.num_classes)
        if shards is not None:
            labels = labels - shards.start
            labels = torch.where((labels >= 0) & (labels < shards.count), labels, -1)
        if sampled:
            index, labels, repeat = self._sample(labels, generator)
            weight = F.embedding(index, weight, sparse=self.sparse_grad)
        loss = _head(
            z, weight, labels, self.kind, self.scale, margin, self.reduction,
            self.block_rows, self.filter_eps, repeat, shards,
        )  # fmt: skip
        return OwnRows.apply(loss, shards, own) if shards is not None and self.reduction == "none" else loss
