"""InfoNCE and FlatNCE (FlatNCE): contrastive losses whose gradient survives small batches and half precision.

Source: 科学空间 8586 (FlatNCE:小批次对比学习效果差的原因竟是浮点误差?); Chen et al., https://arxiv.org/abs/2107.01152.

With scores s_j, positive t and xi = sum over j != t of exp(s_j - s_t):

    InfoNCE = log(1 + xi)        FlatNCE = log xi = logsumexp over j != t of s_j, minus s_t

In a small batch xi is near 0 and the usual cross-entropy returns rounding noise: softmax(s)_t - 1 rounds to 0, the
attraction of the positive is lost and the repulsion stays. With l = log xi, InfoNCE = softplus(l), so FlatNCE has the
gradient of InfoNCE without the weight sigmoid(l) of each row. What differs from the paper's code: the log-sum-exp form
instead of exp(l - stop_gradient(l)), which rounds s_j - s_t first and is many times less precise in half precision
(figures on the method's page); InfoNCE goes through softplus(l), which repairs it in float32; everything runs on
embeddings by blocks (``_contrast_kernel.py``), also over several processes (``_contrast_shards.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_real
from kexue._tensors import as_recorded, check_float, compute_dtype, once_differentiable
from kexue.losses._common import (
    MODES,
    check_modes,
    check_temperature,
    contrast_report,
    contrast_value,
    inverse_norms,
    reduce_loss,
    unit_rows,
)
from kexue.losses._contrast_kernel import run_pairs, run_self
from kexue.losses._contrast_shards import Rows, sharded_pairs, sharded_views
from kexue.losses._shards import GatherShared, Ranks, SumOfRanks

__all__ = ["FlatNCELoss", "FlatNegativesRankingLoss", "InfoNCELoss", "info_nce", "nt_xent"]


def _coefficients(
    x: Tensor, dtype: torch.dtype, reduction: str, needed: bool, rows: Rows | None, views: int = 1
) -> Tensor | None:
    """Upstream gradient of each row of "mean" and "sum", or None where no gradient is built in the forward."""
    if reduction == "none" or not (needed if rows is None else rows.any(needed, x.device)):
        return None
    count = x.shape[0] if rows is None else views * rows.total
    return torch.full((x.shape[0],), 1.0 / max(count, 1) if reduction == "mean" else 1.0, dtype=dtype, device=x.device)


def _reduce(loss: Tensor, reduction: str, rows: Rows | None, views: int = 1) -> Tensor:
    """Over the rows of all processes; "none" keeps the own ones."""
    if rows is None or reduction == "none":
        return reduce_loss(loss, reduction)
    total = SumOfRanks.apply(loss.sum(), rows.ranks)
    return total if reduction == "sum" else total / max(views * rows.total, 1)


def _pairs(
    rows: Rows | None,
    q: Tensor,
    k: Tensor,
    extra: Tensor | None,
    mask: Tensor | None,
    coef: Tensor | None,
    options: Any,
) -> tuple[Tensor, ...]:
    if rows is not None:
        return sharded_pairs(rows, q, k, extra, mask, coef, *options)
    return run_pairs(q.device.type, q, k, extra, mask, coef, *options)


def _views(rows: Rows | None, z: Tensor, coef: Tensor | None, inverse_t: float, flat: bool) -> tuple[Tensor, Tensor]:
    return run_self(z, coef, inverse_t, flat) if rows is None else sharded_views(rows, z, coef, inverse_t, flat)


def _gathered(process_group: Any, n: int, extra: int, device: torch.device) -> Rows | None:
    if process_group is None:
        return None
    ranks = Ranks(process_group)
    return Rows(ranks, ranks.counts(n, device), ranks.counts(extra, device))


class _Pairs(torch.autograd.Function):
    """info_nce on embeddings; see ``pair_pass``. "none" runs the kernel again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        extra: Tensor | None,
        mask: Tensor | None,
        options: tuple[float, float, bool, bool, bool],
        report: str,
        reduction: str,
        rows: Rows | None,
    ) -> Tensor:
        ctx.reduction, ctx.options, ctx.rows = reduction, options, rows
        ctx.dtypes = (q.dtype, k.dtype, q.dtype if extra is None else extra.dtype)
        coef = _coefficients(q, compute_dtype(q, k), reduction, any(ctx.needs_input_grad), rows)
        v, v_col, *grads = _pairs(rows, q, k, extra, mask, coef, options)
        if reduction == "none":
            ctx.save_for_backward(q, k, extra, mask)
        else:
            ctx.save_for_backward(*grads, q, k, extra)  # the inputs: see once_differentiable
        loss = contrast_value(v, report)
        return _reduce((loss + contrast_value(v_col, report)) / 2 if options[3] else loss.clone(), reduction, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.reduction == "none":
            q, k, extra, mask = ctx.saved_tensors
            coef = grad.to(compute_dtype(q, k))
            grads = _pairs(ctx.rows, q, k, extra, mask, coef, ctx.options)[2:]
        else:
            grads = tuple(x * grad for x in ctx.saved_tensors[:3])
        needs = ctx.needs_input_grad[:3]
        out = [g.to(d) if need else None for g, d, need in zip(grads, ctx.dtypes, needs, strict=True)]
        return (out[0], out[1], out[2], *([None] * 5))


class _Views(torch.autograd.Function):
    """nt_xent on the stacked views; see ``self_pass``."""

    @staticmethod
    def forward(
        ctx: Any, z1: Tensor, z2: Tensor, inverse_t: float, flat: bool, report: str, reduction: str, rows: Rows | None
    ) -> Tensor:
        ctx.reduction, ctx.options, ctx.dtypes, ctx.rows = reduction, (inverse_t, flat), (z1.dtype, z2.dtype), rows
        z = torch.cat([z1, z2])
        coef = _coefficients(z, compute_dtype(z), reduction, any(ctx.needs_input_grad), rows, views=2)
        v, grad = _views(rows, z, coef, inverse_t, flat)
        ctx.save_for_backward(grad, z1, z2)  # the inputs also for once_differentiable
        loss = contrast_value(v, report)
        return _reduce(loss.clone() if reduction == "none" else loss, reduction, rows, views=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made, z1, z2 = ctx.saved_tensors
        if ctx.reduction == "none":
            z = torch.cat([z1, z2])
            made = _views(ctx.rows, z, grad.to(compute_dtype(z)), *ctx.options)[1]
        else:
            made = made * grad
        first, second = made.split(z1.shape[0]) if len(made) else (made, made)
        return first.to(ctx.dtypes[0]), second.to(ctx.dtypes[1]), *([None] * 5)


def _check_mask(mask: Any, shape: tuple[int, ...], start: int | None, symmetric: bool, validate: bool) -> None:
    """``start``: the column of the first row's positive, None without in-batch negatives."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"negative_mask must be a bool tensor (True = takes part); got {getattr(mask, 'dtype', mask)}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"negative_mask must have shape {shape}; got {tuple(mask.shape)}")
    if validate and not torch.compiler.is_compiling():
        counts = mask.sum(1)
        if start is not None:
            counts = counts - mask.diagonal(start).long()
            if symmetric:
                counts = torch.minimum(counts, mask.sum(0) - mask.diagonal().long())
        if counts.numel() and int(counts.min()) == 0:
            raise ValueError(f"every row needs a negative; negative_mask leaves none to row {int(counts.argmin())}")


def info_nce(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float = 0.07,
    mode: str = "info",
    report: str | None = None,
    symmetric: bool = False,
    negative_mask: Tensor | None = None,
    reduction: str = "mean",
    margin: float = 0.0,
    in_batch: bool | None = None,
    validate: bool = True,
    process_group: Any = None,
) -> Tensor:
    """InfoNCE or FlatNCE of queries against their positives and negatives.

    Row i of ``k`` is the positive of row i of ``q``. The memory beside the inputs' gradients stays near 16 MiB at any
    batch size, except with negatives of their own for each row. The loss is differentiable once.

    Args:
        q: (N, D) queries, not normalised; fp16, bf16, float32 or float64. Computed in float32 (float64 stays).
        k: (N, D) positives; with given negatives also (N, P, D), several positives, whose losses are averaged.
        negatives: None: the other rows of ``k``; (K, D): shared by all rows; (N, K, D): for each row.
        temperature: T, positive; scores are cosines divided by it.
        mode: Which gradient: "info" or "flat". A FlatNCE gradient is larger, by 1 / sigmoid(l) in each row: adapt
            clipping thresholds.
        report: Which value is returned; None is the one of ``mode``. The flat value may be negative and depends on
            the number of negatives.
        symmetric: Average of q to k and k to q; needs in-batch negatives only.
        negative_mask: Bool, True = takes part as a negative: (N, N) for in-batch negatives (the diagonal is not
            looked at), (N, K) for given ones, (N, N + K) for both.
        reduction: "none" (N,), "mean" or "sum" over rows. "none" computes the scores a second time in the backward.
        margin: Subtracted from the positive's cosine.
        in_batch: Whether the other rows of ``k`` are negatives; None: only when none are given.
        validate: Check that the mask leaves every row a negative (never done under torch.compile).
        process_group: A torch.distributed group whose processes all call this with rows of their own (their numbers
            may differ) and get the loss and the gradients of one process that has all rows in order of rank: "mean"
            and "sum" are over all rows, "none" gives the own ones. The other rows of k and shared negatives come
            from all processes; ``negative_mask`` has the own rows and the columns of all. Under
            DistributedDataParallel, which averages gradients, multiply the loss by the number of processes.

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, a row without negatives (a batch of one), temperature not positive.

    Reference:
        https://spaces.ac.cn/archives/8586

    Example:
        >>> q, k = torch.eye(2), torch.eye(2)
        >>> round(float(info_nce(q, k, temperature=0.5, mode="flat")), 4)  # one negative at cosine 0: 0/T - 1/T
        -2.0
    """
    report = check_modes(mode, report, reduction)
    check_temperature(temperature)
    check_real("margin", margin)
    check_float("q", q, 2)
    check_float("k", k)
    n, width = q.shape
    if in_batch is not None and not isinstance(in_batch, bool):
        raise TypeError(f"in_batch must be True, False or None; got {in_batch!r}")
    in_batch = negatives is None if in_batch is None else in_batch
    if tuple(k.shape) != (n, width) and not (k.dim() == 3 and k.shape[0] == n and k.shape[2] == width):
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}; got {tuple(k.shape)}")
    if k.dim() == 3 and k.shape[1] == 0:
        raise ValueError(f"every row needs a positive; got k of shape {tuple(k.shape)}")
    if negatives is not None:
        check_float("negatives", negatives)
        if negatives.dim() not in (2, 3) or negatives.shape[-1] != width:
            raise ValueError(f"negatives must be (K, {width}) or ({n}, K, {width}); got {tuple(negatives.shape)}")
        if negatives.dim() == 3 and negatives.shape[0] != n:
            raise ValueError(f"negatives of each row must have {n} rows; got {tuple(negatives.shape)}")
    elif not in_batch:
        raise ValueError("without in-batch negatives, negatives must be given; got None")
    own = k.dim() == 3 or (negatives is not None and negatives.dim() == 3)
    if own and (in_batch or symmetric):
        raise ValueError("several positives or negatives for each row exclude in_batch and symmetric")
    if symmetric and (negatives is not None or not in_batch):
        raise ValueError("symmetric=True needs in-batch negatives only; got negatives")
    given = 0 if negatives is None else negatives.shape[-2]
    rows = _gathered(process_group, n, given if negatives is not None and negatives.dim() == 2 else 0, q.device)
    total = n
    if rows is not None:
        total = rows.total
        given = sum(rows.extra) if negatives is None or negatives.dim() == 2 else given
    columns = (total if in_batch else 0) + given
    if total and columns <= int(in_batch):
        raise ValueError(f"every row needs a negative; a batch of {total} without negatives has none")
    if negative_mask is not None:
        start = 0 if rows is None else rows.ranks.own(rows.counts).start
        _check_mask(negative_mask, (n, columns), start if in_batch else None, symmetric and rows is None, validate)
    if own:
        return _own_negatives(q, k, negatives, temperature, mode, report, negative_mask, reduction, margin, rows)
    options = (1.0 / temperature, float(margin), mode == "flat", symmetric, in_batch)
    q, k, negatives = as_recorded(q, k, negatives)
    return _Pairs.apply(q, k, negatives, negative_mask, options, report, reduction, rows)


def _own_negatives(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    temperature: float,
    mode: str,
    report: str,
    mask: Tensor | None,
    reduction: str,
    margin: float,
    rows: Rows | None,
) -> Tensor:
    """Negatives (N, K, D) or positives (N, P, D): the scores (N, K) exist, their number is that of the inputs."""
    dtype = compute_dtype(q, k)
    with torch.autocast(q.device.type, enabled=False):
        q, k, x = unit_rows(q, dtype)[0], k.to(dtype), negatives.to(dtype)  # type: ignore[union-attr]
        k = k[:, None] if k.dim() == 2 else k
        if rows is not None and x.dim() == 2:
            x = GatherShared.apply(x, rows.ranks, rows.extra)
        positive = (torch.einsum("npd,nd->np", k, q) * inverse_norms(k).squeeze(-1) - margin) / temperature
        dots = q @ x.T if x.dim() == 2 else torch.einsum("nkd,nd->nk", x, q)
        scores = dots * (inverse_norms(x).squeeze(-1) / temperature)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        v = torch.logsumexp(scores, 1)[:, None] - positive
        return _reduce(contrast_report(v, mode, report).mean(1), reduction, rows)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.5,
    mode: str = "flat",
    report: str | None = None,
    reduction: str = "mean",
    *,
    process_group: Any = None,
) -> Tensor:
    """SimCLR's loss: every view is a query, its other view the positive, the other 2N - 2 views the negatives.

    Only the upper triangle of the similarities is computed, in tiles; at most 16 MiB of it are kept. The loss is
    differentiable once.

    Args:
        z1: (N, D) embeddings of the first views, not normalised.
        z2: (N, D) embeddings of the second views.
        temperature: T, positive.
        mode: Which gradient: "flat" or "info".
        report: Which value is returned; None is the one of ``mode``.
        reduction: "none" gives (2N,), first views before second ones; "mean" or "sum".
        process_group: As in :func:`info_nce`: the views of all processes are one batch.

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, one pair only, temperature not positive.

    Reference:
        https://spaces.ac.cn/archives/8586, https://arxiv.org/abs/2002.05709

    Example:
        >>> z = torch.eye(2)
        >>> round(float(nt_xent(z, z, temperature=0.5)), 4)  # log(2 exp(0)) - 1/T
        -1.3069
    """
    report = check_modes(mode, report, reduction)
    check_temperature(temperature)
    check_float("z1", z1, 2)
    check_float("z2", z2, 2)
    if z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must have equal shapes; got {tuple(z1.shape)} and {tuple(z2.shape)}")
    rows = _gathered(process_group, z1.shape[0], 0, z1.device)
    if (z1.shape[0] if rows is None else rows.total) == 1:
        raise ValueError("every row needs a negative; a batch of 1 pair has none")
    z1, z2 = as_recorded(z1, z2)
    return _Views.apply(z1, z2, 1.0 / temperature, mode == "flat", report, reduction, rows)


class InfoNCELoss(nn.Module):
    """:func:`info_nce` as a Module.

    Args:
        temperature: T, positive.
        symmetric: As in :func:`info_nce`.
        report: As in :func:`info_nce`.
        margin: As in :func:`info_nce`.
        reduction: As in :func:`info_nce`.
        process_group: As in :func:`info_nce`.

    Raises:
        ValueError: A value out of range.

    Example:
        >>> InfoNCELoss(0.05)(torch.eye(4), torch.eye(4)) < 1e-7
        tensor(True)
    """

    mode = "info"

    def __init__(
        self,
        temperature: float = 0.07,
        symmetric: bool = False,
        report: str | None = None,
        margin: float = 0.0,
        reduction: str = "mean",
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check_modes(self.mode, report, reduction)
        check_temperature(temperature)
        check_real("margin", margin)
        self.temperature, self.symmetric, self.report = float(temperature), symmetric, report
        self.margin, self.reduction, self.process_group = float(margin), reduction, process_group

    def extra_repr(self) -> str:
        """What print shows."""
        return f"temperature={self.temperature:g}, symmetric={self.symmetric}, margin={self.margin:g}"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        negatives: Tensor | None = None,
        negative_mask: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch; arguments as in :func:`info_nce`."""
        return info_nce(
            q, k, negatives, temperature=self.temperature, mode=self.mode, report=self.report,
            symmetric=self.symmetric, negative_mask=negative_mask, reduction=self.reduction, margin=self.margin,
            process_group=self.process_group,
        )  # fmt: skip


class FlatNCELoss(InfoNCELoss):
    """:func:`info_nce` with ``mode="flat"`` as a Module.

    Args:
        temperature: T, positive.
        symmetric: As in :func:`info_nce`.
        report: As in :func:`info_nce`; "info" shows the InfoNCE value while the gradient is FlatNCE's.
        margin: As in :func:`info_nce`.
        reduction: As in :func:`info_nce`.
        process_group: As in :func:`info_nce`.

    Raises:
        ValueError: A value out of range.

    Example:
        >>> loss = FlatNCELoss(temperature=0.1)
        >>> float(loss(torch.eye(2), torch.eye(2)))
        -10.0
    """

    mode = "flat"


class FlatNegativesRankingLoss(nn.Module):
    """FlatNCE in the calling convention of sentence-transformers' MultipleNegativesRankingLoss.

    The first column of the batch holds the anchors, the second the positives, further columns hard negatives; the
    positives and hard negatives of all other rows are negatives too. sentence-transformers itself is not needed.

    Args:
        model: Called with each feature dict; its result holds "sentence_embedding" (B, D).
        scale: Factor on the cosines, 1 / temperature.
        report: "info" (default) returns the InfoNCE value, so that curves compare with other losses.
        process_group: As in :func:`info_nce`: positives and hard negatives of all processes are negatives.

    Raises:
        ValueError: Scale not positive, or fewer than two columns.

    Example:
        >>> table = torch.nn.Embedding(10, 4)
        >>> model = lambda features: {"sentence_embedding": table(features["input_ids"])}
        >>> loss = FlatNegativesRankingLoss(model)
        >>> columns = [{"input_ids": torch.arange(3)}, {"input_ids": torch.arange(3, 6)}]
        >>> loss(columns).shape
        torch.Size([])
    """

    def __init__(self, model: Any, scale: float = 20.0, report: str = "info", *, process_group: Any = None) -> None:
        super().__init__()
        check_real("scale", scale, above=0.0)
        check_choice("report", report, MODES)
        self.model, self.scale, self.report, self.process_group = model, float(scale), report, process_group

    def forward(self, sentence_features: Iterable[Mapping[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Loss of a batch of columns; ``labels`` are ignored."""
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        if len(columns) < 2:
            raise ValueError(f"a batch needs anchors and positives, two columns at least; got {len(columns)}")
        hard = torch.cat(columns[2:]) if len(columns) > 2 else None
        return info_nce(
            columns[0], columns[1], hard, temperature=1 / self.scale, mode="flat", report=self.report, in_batch=True,
            process_group=self.process_group,
        )  # fmt: skip

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for a model card."""
        return {"scale": self.scale, "report": self.report}
