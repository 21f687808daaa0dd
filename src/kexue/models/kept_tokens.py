"""Reducing what belongs to the tokens of a row to those that DropToken kept; the method is in ``token_dropping.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kexue.attention.gated_attention import check_padding_mask

__all__ = ["gather_attention_bias", "gather_tokens"]


def check_tokens(tokens: Any) -> tuple[int, int]:
    """B and T."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a tensor; got {type(tokens).__name__}")
    if tokens.dim() < 2:
        raise ValueError(f"tokens must be (B, T) ids or (B, T, D) vectors; got shape {tuple(tokens.shape)}")
    return tokens.shape[0], tokens.shape[1]


def _check_kept(kept: Any, rows: int | None, length: int) -> None:
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64:
        got = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
        raise TypeError(f"kept must be a tensor of int64; got {got}")
    if kept.dim() != 2 or rows not in (None, kept.shape[0]):
        raise ValueError(f"kept must be ({'B' if rows is None else rows}, K); got shape {tuple(kept.shape)}")
    if kept.device.type == "cpu" and not torch.compiler.is_compiling() and kept.numel():
        low, high = (int(x) for x in torch.aminmax(kept))
        if low < 0 or high >= length:
            raise ValueError(f"kept must be from 0 to {length - 1}; got {low} to {high}")


def gather_rows(x: Tensor, kept: Tensor) -> Tensor:
    """(B, T, ...) and (B, K) -> (B, K, ...), without checks."""
    if x.dim() == 2:
        return x.gather(1, kept)
    rows, length = x.shape[:2]
    starts = torch.arange(rows, device=kept.device)[:, None] * length  # whole rows are copied, not single numbers
    return x.flatten(0, 1).index_select(0, (kept + starts).flatten()).unflatten(0, kept.shape)


def gather_tokens(x: Tensor, kept: Tensor, attention_mask: Tensor | None = None, fill: float = 0) -> Tensor:
    """Reduce labels, segments or hidden states of all tokens to the kept ones.

    Args:
        x: (B, T, ...).
        kept: (B, K) places, from :class:`DroppedTokens`.
        attention_mask: (B, K), from there; slots without a token get ``fill``.
        fill: -100 for labels.

    Returns:
        (B, K, ...), differentiable.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, or places out of range.

    Example:
        >>> labels = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
        >>> kept, mask = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1, 1], [1, 0]])
        >>> gather_tokens(labels, kept, mask, -100)
        tensor([[   1,    4],
                [   6, -100]])
    """
    rows, length = check_tokens(x)
    _check_kept(kept, rows, length)
    out = gather_rows(x, kept)
    if attention_mask is None:
        return out
    taken = check_padding_mask("attention_mask", attention_mask, (kept.shape[0], kept.shape[1]))
    return out.masked_fill(~taken.view(*taken.shape, *(1,) * (out.dim() - 2)), fill)


def gather_attention_bias(bias: Tensor, kept: Tensor) -> Tensor:
    """Reduce an attention bias, or relative positions, to the kept tokens on both axes.

    Args:
        bias: (B, H, T, T), or the same for every row: (1, H, T, T), (H, T, T) or (T, T).
        kept: (B, K) places, from :class:`DroppedTokens`.

    Returns:
        (B, H, K, K), or (B, K, K) for a bias (T, T); differentiable.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, or places out of range.

    Example:
        >>> bias = torch.arange(16).view(1, 1, 4, 4)
        >>> gather_attention_bias(bias, torch.tensor([[1, 3]]))
        tensor([[[[ 5,  7],
                  [13, 15]]]])
    """
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor; got {type(bias).__name__}")
    if not 2 <= bias.dim() <= 4 or bias.shape[-1] != bias.shape[-2]:
        raise ValueError(f"bias must be (B, H, T, T), (H, T, T) or (T, T); got shape {tuple(bias.shape)}")
    rows = bias.shape[0] if bias.dim() == 4 and bias.shape[0] != 1 else None
    length = bias.shape[-1]
    _check_kept(kept, rows, length)
    if rows is None:  # one table: both axes at once, nothing of size B T
        shared = bias[0] if bias.dim() == 4 else bias
        taken = shared[..., kept[:, :, None], kept[:, None, :]]  # (B, K, K), behind the heads
        return taken.movedim(-3, 0)
    batch, heads, slots = kept.shape[0], bias.shape[1], kept.shape[1]
    queries = bias.gather(2, kept[:, None, :, None].expand(batch, heads, slots, length))
    return queries.gather(3, kept[:, None, None, :].expand(batch, heads, slots, slots))
