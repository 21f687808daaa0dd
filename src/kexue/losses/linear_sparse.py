"""Sparse cross entropy behind a linear map to a large vocabulary (分块的线性稀疏 Softmax 交叉熵), without all scores.

Source: 科学空间 8046; the loss is that of ``sparse_softmax.py`` on the scores W h + b.

The usual way writes N x V scores and needs three matrix products of the size N x V x D. Here the scores of a block of
rows and words live just long enough to be compared with the k best so far; the loss then takes k + 1 products of D
numbers a row, and its gradients as many: one large product is left of three. The scores that enter the loss are
computed in float32 (float64 for float64), also where those that choose Omega are in low precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_int
from kexue._tensors import check_float, compute_dtype, once_differentiable
from kexue.losses._topk_kernel import run_linear_top
from kexue.losses.linear_cross_entropy import _products
from kexue.losses.sparse_softmax import (
    K,
    check_ignored,
    check_options,
    check_target,
    picked_losses,
    reduce_counted,
    sparse_cross_entropy,
)

__all__ = ["LinearSparseCrossEntropyLoss", "linear_sparse_cross_entropy"]

_PIECE = 1 << 18  # numbers of the rows of a table that are gathered at a time


def linear_sparse_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    k: int = K,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sparse_grad: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor:
    """:func:`sparse_cross_entropy` of ``hidden @ weight.T + bias``, without holding the scores. Differentiable once.

    With k >= V nothing is left out, and the scores are made as usual, with the memory that this takes.

    Args:
        hidden: (..., D) floating.
        weight: (V, D), a row for each word.
        target: (...) integers in [0, V), or ``ignore_index``.
        bias: (V,), or None. A word whose bias is -inf is masked.
        k: Size of Omega.
        class_weight: (V,), the ``weight`` of :func:`sparse_cross_entropy`.
        ignore_index: Target of rows that do not count; nothing is computed for them.
        reduction: "mean" over the rows that count (0 if none does), "sum", or "none" (0 for rows that do not count).
        label_smoothing: As in :func:`sparse_cross_entropy`.
        sparse_grad: Let the gradient of ``weight`` be a sparse tensor of the rows touched, as torch.optim.SparseAdam
            takes it; ``weight`` should be a parameter. Not under torch.compile, and not with k >= V. The dense gradient
            is V D numbers where the dense head holds 3 N V: with few rows it is most of the memory.
        chunk_bytes: Bound on the scores that are held at a time; None is 4 MiB on a CPU, 256 MiB elsewhere.

    Returns:
        A scalar, or (...) for "none"; float32, or float64 for float64.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, or a value out of range.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> from kexue.losses import sparse_cross_entropy
        >>> h, w = torch.eye(3, 4), torch.arange(40.0).reshape(10, 4).sin()
        >>> target = torch.tensor([1, -100, 7])
        >>> usual = sparse_cross_entropy(h @ w.T, target, k=3)
        >>> torch.allclose(linear_sparse_cross_entropy(h, w, target, k=3), usual)
        True
    """
    check_float("hidden", hidden)
    check_float("weight", weight, 2)
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must be (..., {weight.shape[1]}), the width of weight; got {tuple(hidden.shape)}")
    vocabulary, width = weight.shape
    if vocabulary == 0:
        raise ValueError(f"weight must have at least one row; got shape {tuple(weight.shape)}")
    if bias is not None:
        check_float("bias", bias, 1)
        if bias.shape[0] != vocabulary:
            raise ValueError(f"bias must have {vocabulary} entries, one for each row of weight; got {len(bias)}")
    check_int("k", k, 1)
    if chunk_bytes is not None:
        check_int("chunk_bytes", chunk_bytes, 1)
    check_options(class_weight, vocabulary, reduction, label_smoothing, "class_weight")
    shape = tuple(hidden.shape[:-1])
    check_target(target, shape, vocabulary, ignore_index)
    _check_sparse(sparse_grad)
    if sparse_grad and (k >= vocabulary or torch.compiler.is_compiling()):
        raise ValueError(f"sparse_grad needs k below {vocabulary} and no torch.compile; got k = {k}")
    rows, flat = hidden.reshape(target.numel(), width), target.reshape(-1).long()
    ignored = flat == ignore_index
    place = None
    if torch.compiler.is_compiling():  # a data-dependent number of rows would break the graph
        rows = torch.where(ignored.unsqueeze(1), 0.0, rows)
    elif bool(ignored.any()):
        place = (~ignored).nonzero().squeeze(1)
        rows, flat, ignored = rows[place], flat[place], ignored[place]
    flat = torch.where(ignored, 0, flat)
    dtype = compute_dtype(hidden, weight)
    factor = None if class_weight is None else class_weight.detach().to(dtype)
    product = torch.float64 if dtype == torch.float64 else _products(hidden)
    if k >= vocabulary:
        shift = None if bias is None else bias.to(product)
        scores = F.linear(rows.to(product), weight.to(product), shift)
        losses = sparse_cross_entropy(
            scores, torch.where(ignored, -1, flat), k=k, weight=factor, ignore_index=-1, reduction="none",
            label_smoothing=label_smoothing,
        )  # fmt: skip
    else:
        index = run_linear_top(rows, weight, bias, k, chunk_bytes, product)
        both = torch.cat([index, flat.unsqueeze(1)], 1)
        picked = _PickedScores.apply(rows, weight, bias, both, sparse_grad)
        losses = picked_losses(picked, index, None, flat, ignored, factor, label_smoothing)
    loss = reduce_counted(losses, flat, ignored, factor, reduction)
    if reduction != "none":
        return loss
    if place is not None:
        loss = loss.new_zeros(target.numel()).index_put((place,), loss)
    return loss.view(shape)


def _check_sparse(sparse_grad: Any) -> None:
    if not isinstance(sparse_grad, bool):
        raise TypeError(f"sparse_grad must be True or False; got {sparse_grad!r}")


class _PickedScores(torch.autograd.Function):
    """Scores (R, m) of the words at ``index`` (R, m), each row of which is its own choice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, sparse: bool) -> Tensor:
        ctx.sparse = sparse
        ctx.save_for_backward(hidden, weight, bias, index)
        scores = hidden.new_empty(index.shape, dtype=compute_dtype(hidden, weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _parts(index, weight):
                rows = hidden[part].to(scores.dtype)
                scores[part] = torch.bmm(_gathered(weight, index[part], scores.dtype), rows.unsqueeze(2)).squeeze(2)
        return scores if bias is None else scores + bias[index].to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, index = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_hidden = d_weight = d_bias = None
        if needs[0]:
            d_hidden = torch.empty_like(hidden)
            with torch.autocast(hidden.device.type, enabled=False):
                for part in _parts(index, weight):
                    table = _gathered(weight, index[part], grad.dtype)
                    d_hidden[part] = torch.bmm(grad[part].unsqueeze(1), table).squeeze(1).to(hidden.dtype)
        if needs[1]:
            d_weight = _weight_gradient(hidden, weight, index, grad, ctx.sparse)
        if bias is not None and needs[2]:
            d_bias = grad.new_zeros(len(bias)).index_add(0, index.flatten(), grad.flatten()).to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None


def _parts(index: Tensor, weight: Tensor) -> list[slice]:
    """The rows, in parts whose words' rows of the table are held at a time."""
    count, m = index.shape
    step = max(1, _PIECE // max(1, m * weight.shape[1]))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _gathered(weight: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.index_select(0, index.flatten()).to(dtype).view(*index.shape, weight.shape[1])


def _weight_gradient(hidden: Tensor, weight: Tensor, index: Tensor, grad: Tensor, sparse: bool) -> Tensor:
    """Sum over rows r and places m of grad[r, m] hidden[r] into row index[r, m]."""
    words, place = None, index
    if sparse or (weight.dtype != grad.dtype and not torch.compiler.is_compiling()):
        # Only the words that occur are summed in float32 before they are rounded.
        words, place = index.unique(return_inverse=True)
    total = grad.new_zeros(len(weight) if words is None else len(words), weight.shape[1])
    for part in _parts(index, weight):
        outer = grad[part].unsqueeze(2) * hidden[part].to(grad.dtype).unsqueeze(1)
        total.index_add_(0, place[part].flatten(), outer.flatten(0, 1))
    total = total.to(weight.dtype)
    if words is None:
        return total
    if sparse:
        return torch.sparse_coo_tensor(
            words.unsqueeze(0), total, weight.shape, is_coalesced=True, check_invariants=False
        )
    return torch.zeros_like(weight).index_copy_(0, words, total)


class LinearSparseCrossEntropyLoss(nn.Module):
    """:func:`linear_sparse_cross_entropy` as a Module; the table of words is an argument, so that it can be tied.

    Args:
        k: Size of Omega.
        class_weight: (V,) factors of the words, kept as a buffer.
        ignore_index: Target of rows that do not count.
        reduction: "mean", "sum" or "none".
        label_smoothing: Share that is spread over Omega and the target.
        sparse_grad: Whether the gradient of the table is a sparse tensor.
        chunk_bytes: As in :func:`linear_sparse_cross_entropy`.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range.

    Reference:
        https://spaces.ac.cn/archives/8046

    Example:
        >>> table = torch.nn.Embedding(50_000, 16)
        >>> loss = LinearSparseCrossEntropyLoss(k=10)(torch.randn(8, 16), table.weight, torch.arange(8))
        >>> loss.backward()
        >>> table.weight.grad.shape
        torch.Size([50000, 16])
    """

    class_weight: Tensor | None

    def __init__(
        self,
        k: int = K,
        *,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        sparse_grad: bool = False,
        chunk_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_int("k", k, 1)
        if chunk_bytes is not None:
            check_int("chunk_bytes", chunk_bytes, 1)
        check_options(class_weight, None, reduction, label_smoothing, "class_weight")
        check_ignored(ignore_index)
        _check_sparse(sparse_grad)
        self.k, self.ignore_index, self.reduction, self.chunk_bytes = k, ignore_index, reduction, chunk_bytes
        self.label_smoothing, self.sparse_grad = label_smoothing, sparse_grad
        self.register_buffer("class_weight", class_weight)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"k={self.k}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"

    def forward(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        """Loss of a batch; arguments as in :func:`linear_sparse_cross_entropy`."""
        return linear_sparse_cross_entropy(
            hidden, weight, target, bias, k=self.k, class_weight=self.class_weight, ignore_index=self.ignore_index,
            reduction=self.reduction, label_smoothing=self.label_smoothing, sparse_grad=self.sparse_grad,
            chunk_bytes=self.chunk_bytes,
        )  # fmt: skip
