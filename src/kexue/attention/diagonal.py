"""Attention that does not see itself (对角遮盖注意力): the diagonal mask of one-pass masked language models.

Source: 科学空间 7661 (修改Transformer结构,设计一个更快更好的MLM模型); Shin, Lee, Yoon, Jung, "Fast and Accurate Deep
Bidirectional Language Representations for Unsupervised Learning", ACL 2020 (T-TA).

    o_i = sum over j != own(i) of softmax_j(q_i k_j / sqrt(d)) v_j

Row i is the same to the last bit whatever k and v hold at its own key, and its gradient there is exactly 0: the score
is replaced by -inf before the softmax, whose weight is then 0. Taking the diagonal out of an unmasked result after the
fact, (exp(lse_i) o_i - exp(s_ii) v_i) / (exp(lse_i) - exp(s_ii)), is equal on paper only: rounding lets the own token
through, and it cancels where s_ii dominates. On CPUs the mask costs nothing: torch's flash kernel takes it as it is.
A row that sees no key gives 0, not NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._checks import check_real
from kexue._tensors import check_float
from kexue.attention.gated_attention import check_dropout, check_padding_mask

__all__ = ["diagonal_attention"]


def diagonal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    own: Tensor | None = None,
    self_visible: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention in which each query sees every key but its own.

    By default query i owns key i + S - T: the first S - T keys (an always visible start key, say) belong to no query.
    Memory O(T S) for the mask, one byte an entry, and O(B T S) with a padding mask.

    Args:
        q: (B, H, T, D) floating.
        k: (B, H, S, D), S >= T unless ``own`` is given.
        v: (B, H, S, E).
        key_padding_mask: (B, S), True = takes part; None: all do.
        own: (T,) or (B, T) integers, the key that each query does not see; a number outside [0, S) owns none.
        self_visible: True takes the diagonal mask away (fine-tuning); what remains is ordinary attention.
        scale: Factor of the scores; None is D^-1/2.
        dropout_p: Dropout of the weights. It is applied whenever it is above 0.

    Returns:
        (B, H, T, E); 0 where no key is visible.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, a value out of range.

    Example:
        >>> q, k = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2)
        >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
        >>> diagonal_attention(q, k, v).flatten()  # the mean of the two others
        tensor([4.0000, 3.5000, 1.5000])
    """
    _check(q, k, v, own)
    if scale is not None:
        check_real("scale", scale)
    check_dropout("dropout_p", dropout_p)
    batch, _, rows, _ = q.shape
    keys = k.shape[2]
    if key_padding_mask is not None:
        key_padding_mask = check_padding_mask("key_padding_mask", key_padding_mask, (batch, keys))
    if own is None:
        own = torch.arange(keys - rows, keys, device=q.device)
    visible, empty = diagonal_mask(None if self_visible else own, keys, key_padding_mask)
    return masked_attention(q, k, v, visible, empty, scale, dropout_p)


def _check(q: Tensor, k: Tensor, v: Tensor, own: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(name, x, 4)
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype; got {q.dtype} for q and {x.dtype} for {name}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"k must be (B, H, S, D) = ({q.shape[0]}, {q.shape[1]}, S, {q.shape[3]}); got {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be (B, H, S, E) = {(*k.shape[:3],)} and E; got {tuple(v.shape)}")
    if own is None:
        if k.shape[2] < q.shape[2]:
            raise ValueError(f"k must have at least as many rows as q, {q.shape[2]}, without own; got {k.shape[2]}")
        return
    if not isinstance(own, Tensor) or own.is_floating_point() or own.dtype == torch.bool:
        raise TypeError(f"own must be a tensor of integers; got {getattr(own, 'dtype', type(own).__name__)}")
    if own.shape not in (q.shape[2:3], (q.shape[0], q.shape[2])):
        raise ValueError(f"own must have shape ({q.shape[2]},) or {(q.shape[0], q.shape[2])}; got {tuple(own.shape)}")


def diagonal_mask(
    own: Tensor | None, keys: int, key_padding_mask: Tensor | None, never_empty: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """What :func:`masked_attention` needs, made once for all layers.

    Args:
        own: (T,) or (B, T), as in :func:`diagonal_attention`; None hides no own key.
        keys: S.
        key_padding_mask: (B, S) bool, or None.
        never_empty: It is known that every query sees some key.

    Returns:
        The visible keys, (1 or B, 1, T or 1, S) bool, and the rows without any, (1 or B, 1, T or 1, 1); None where
        nothing is hidden or no row can be empty.
    """
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None]
    if own is None:
        visible = padding
    else:
        visible = own.unsqueeze(-1) != torch.arange(keys, device=own.device)
        visible = visible[None, None] if own.dim() == 1 else visible[:, None]
        if padding is not None:
            visible = visible & padding
    if visible is None or never_empty or (padding is None and keys > 1):
        return visible, None
    empty = ~visible.any(-1, keepdim=True)
    # Such a row attends to everything and is thrown away: kernels differ in what they make of a row without keys.
    return visible | empty, empty


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    empty: Tensor | None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention over the visible keys; 0 in the rows that have none.

    Args:
        q: (B, H, T, D).
        k: (B, H, S, D).
        v: (B, H, S, E).
        visible: Broadcastable to (B, H, T, S), or None.
        empty: Broadcastable to (B, H, T, 1), or None.
        scale: Factor of the scores; None is D^-1/2.
        dropout_p: Dropout of the weights.

    Returns:
        (B, H, T, E).
    """
    if k.shape[2] == 0 or q.numel() == 0 or v.numel() == 0:  # kernels differ here as well
        return q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p, scale=scale)
    return out if empty is None else out.masked_fill(empty, 0)
