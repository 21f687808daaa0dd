"""Entropy of attention while a model runs as it is: the calls of torch are watched, none is changed.

What counts as attention: ``F.scaled_dot_product_attention``, ``F.multi_head_attention_forward`` (of which
``nn.MultiheadAttention`` consists), and a softmax over the last axis of a tensor of 3 dimensions or more whose result
multiplies another such tensor (``@``, ``bmm``, ``einsum``), as attention that is written out does; dropout, casts and
changes of shape in between do not matter. A softmax over a vocabulary multiplies nothing and does not count.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kexue._tensors import compute_dtype

__all__ = ["AttentionWatch", "row_entropy", "sdpa_entropy"]

TILE = 1 << 22  # entries of the matrix of probabilities that exist at a time, beside those of the model itself
_SAME = frozenset({
    "dropout", "dropout_", "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone",
    "view", "reshape", "unsqueeze", "squeeze", "flatten",
})  # fmt: skip
_CHANGED = frozenset({"masked_fill", "masked_fill_", "nan_to_num", "where"})
_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "einsum"})
_MHA = inspect.signature(F.multi_head_attention_forward)
Found = Callable[[Tensor, Tensor | None, Tensor | None], None]


@torch.no_grad()
def row_entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of each row of probabilities (..., S), in float32 (float64 stays): (...)."""
    rows = weights.detach().reshape(-1, weights.shape[-1])
    count = max(1, TILE // max(1, rows.shape[-1]))
    parts = [torch.special.entr(part.to(compute_dtype(part))).sum(-1) for part in rows.split(count)]
    return torch.cat(parts).view(weights.shape[:-1]) if parts else rows.new_zeros(weights.shape[:-1])


@torch.no_grad()
def sdpa_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What ``F.scaled_dot_product_attention`` attends to.

    Returns:
        Entropies (..., T); whether each query sees a key; with as many keys as queries, whether each token is seen as a
        key by any query. The last two are broadcastable to the first; None means all.
    """
    wide = compute_dtype(query)
    t, s = query.shape[-2], key.shape[-2]
    if enable_gqa and key.dim() > 2 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keep = seen = None
    if attn_mask is not None:
        low = torch.finfo(attn_mask.dtype).min / 2 if attn_mask.is_floating_point() else 0
        visible = attn_mask > low  # models write -inf or the lowest number for "hidden"
        keep = visible.any(-1)
        if t == s == visible.shape[-1]:
            seen = visible.any(-2)
    lead = math.prod(query.shape[:-2])
    step = max(1, TILE // max(1, lead * s))
    keys, parts = key.to(wide).mT, []
    for start in range(0, t, step):
        stop = min(t, start + step)
        scores = query[..., start:stop, :].to(wide) @ keys * scale
        if attn_mask is not None:
            mask = attn_mask if attn_mask.shape[-2] == 1 else attn_mask[..., start:stop, :]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        if is_causal:
            rows = torch.arange(start, stop, device=query.device)[:, None]
            scores = scores.masked_fill(torch.arange(s, device=query.device) > rows, -math.inf)
        if keep is not None:  # rows without any key would be nan
            scores = scores.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
        parts.append(row_entropy(scores.softmax(-1)))
    entropies = torch.cat(parts, -1) if parts else query.new_zeros(query.shape[:-1])
    return entropies, keep, seen


def _mha_entropy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Entropies (B, H, T) of ``F.multi_head_attention_forward``, whose weights are computed beside its output."""
    bound = _MHA.bind(*args, **kwargs)
    given = bound.arguments
    given |= {"need_weights": True, "average_attn_weights": False, "dropout_p": 0.0}
    with torch.no_grad():
        weights = F.multi_head_attention_forward(*bound.args, **bound.kwargs)[1]
    if weights is None:
        raise ValueError("multi_head_attention_forward returned no weights")
    entropies = row_entropy(weights)
    hidden = given.get("key_padding_mask")
    if hidden is None or given["query"] is not given["key"]:
        return entropies, None, None
    hidden = hidden if hidden.dtype == torch.bool else hidden == -math.inf
    return entropies, ~(hidden if hidden.dim() == 1 else hidden[:, None]), None


class AttentionWatch(TorchFunctionMode):
    """While active, report the entropies of every attention that is computed.

    Args:
        found: Called with the entropies (..., T) of all queries and the two bool tensors of :func:`sdpa_entropy`.
        depth: Tells how many modules are being called, one inside the other.
    """

    def __init__(self, found: Found, depth: Callable[[], int]) -> None:
        super().__init__()
        self._found, self._depth = found, depth
        self._pending: dict[int, tuple[Tensor, Tensor, int]] = {}  # id -> (that tensor, entropies, depth)

    def leave(self, depth: int) -> None:
        """Forget the softmaxes of modules called by one that ends; its own may be its result, for the caller."""
        self._pending = {key: kept for key, kept in self._pending.items() if kept[2] <= depth}

    def _follow(self, name: str, operands: list[Tensor], out: Any) -> None:
        """Keep track of the result of a softmax up to the product that uses it."""
        known = next((self._pending[id(x)] for x in operands if id(x) in self._pending), None)
        if known is None or not isinstance(out, Tensor):
            return
        if name in _PRODUCTS:
            if all(x.dim() >= 3 for x in operands):
                for x in operands:
                    self._pending.pop(id(x), None)
                self._found(known[1], None, None)
        else:
            self._pending[id(out)] = (out, row_entropy(out) if name in _CHANGED else known[1], known[2])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention and not any(getattr(x, "is_nested", False) for x in args):
            self._found(*sdpa_entropy(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            self._found(*_mha_entropy(args, kwargs))
        out = func(*args, **kwargs)
        if name == "softmax" and isinstance(out, Tensor) and out.dim() >= 3:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if axis in (-1, out.dim() - 1):
                self._pending[id(out)] = (out, row_entropy(out), self._depth())
        elif self._pending and (name in _SAME or name in _CHANGED or name in _PRODUCTS):
            self._follow(name, [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)], out)
        return out
