"""Linear attention as a layer on (B, T, D); see ``linear`` for the method and its source.

Rotary positions and positive features: rotating the features themselves would make weights negative. So either q and k
are rotated before the map (weights stay positive; they no longer depend on relative positions alone), or the features
are rotated in the numerator only and the denominator keeps the unrotated, positive ones (as in the RoFormer paper; the
weights of a row then do not sum to 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.attention._rotary import rotate
from kexue.attention.feature_maps import FeatureMap, feature_map_of
from kexue.attention.linear import LinearAttentionState, linear_attention

__all__ = ["LinearAttention"]


class _Given(FeatureMap):
    """Features that are computed already; they may be negative."""

    positive = False

    def query(self, q: Tensor) -> Tensor:
        """Features of queries."""
        return q

    def key(self, k: Tensor) -> Tensor:
        """Features of keys."""
        return k


class LinearAttention(nn.Module):
    """Multi-head attention whose cost is linear in the length, with a state of constant size for decoding.

    Args:
        dim: Width of the input and the output.
        heads: Number of query heads H; divides ``dim``.
        feature_map: As in :func:`linear_attention`; a FeatureMap becomes a submodule.
        causal: Position i sees positions up to i.
        rope: None, ``"before"`` (q and k are rotated before the map) or ``"after_numerator"`` (the features are rotated
            in the numerator only; not for maps in log space). What is rotated must have an even width.
        kv_heads: Heads of keys and values, shared by groups of query heads; default ``heads``.
        bias: Biases of the four linear maps.
        rope_base: Base of the rotary angles.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``dim`` is no multiple of ``heads``, an odd width with ``rope``, a map that cannot do what is asked.

    Reference:
        科学空间 7546.

    Example:
        >>> torch.manual_seed(0)
        <torch._C.Generator object at ...>
        >>> layer = LinearAttention(dim=32, heads=4, causal=True, rope="before")
        >>> x = torch.randn(2, 10, 32)
        >>> y, state = layer(x[:, :9], return_state=True)
        >>> last, state = layer(x[:, 9:], state=state, return_state=True)
        >>> torch.allclose(last, layer(x)[:, 9:], atol=1e-6)
        True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        feature_map: str | FeatureMap = "elu1",
        causal: bool = False,
        rope: str | None = None,
        *,
        kv_heads: int | None = None,
        bias: bool = True,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        check_int("dim", dim, 1)
        check_int("heads", heads, 1)
        kv_heads = heads if kv_heads is None else kv_heads
        check_int("kv_heads", kv_heads, 1)
        check_real("rope_base", rope_base, above=0.0)
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be True or False; got {causal!r}")
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads; got dim={dim}, heads={heads}")
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads; got heads={heads}, kv_heads={kv_heads}")
        if rope is not None:
            check_choice("rope", rope, ("before", "after_numerator"))
        self.features = feature_map_of(feature_map)
        self.feature_map = feature_map if isinstance(feature_map, str) else type(feature_map).__name__
        self.head_dim = dim // heads
        if causal and not self.features.causal:
            raise ValueError(
                f'{self.feature_map} normalises over the sequence: not with causal=True; use "softmax_exp"'
            )
        if rope == "after_numerator" and (self.features.log_space or not self.features.causal):
            raise ValueError(f'rope="after_numerator" needs plain features; got {self.feature_map}')
        rotated = self.features.num_features(self.head_dim) if rope == "after_numerator" else self.head_dim
        if rope is not None and rotated % 2:
            raise ValueError(f"rope={rope!r} rotates pairs of coordinates; got an odd number of them, {rotated}")
        self.dim, self.heads, self.kv_heads, self.causal, self.rope = dim, heads, kv_heads, causal, rope
        self.rope_base = float(rope_base)
        self.q_proj = nn.Linear(dim, dim, bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias)
        self.o_proj = nn.Linear(dim, dim, bias)

    def extra_repr(self) -> str:
        """The options that the submodules do not show."""
        return f"heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}, rope={self.rope!r}"

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        state: tuple[LinearAttentionState, int] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attend.

        Args:
            x: (B, T, dim).
            key_padding_mask: (B, T) bool, True = takes part.
            positions: (B, T) or (T,) rotary positions; default: counted on from the state.
            state: What was returned for the tokens before.
            return_state: Also return the state: a pair of :class:`LinearAttentionState` and the number of tokens.

        Returns:
            (B, T, dim), with ``return_state`` a pair of it and the state.

        Raises:
            TypeError: ``x`` is not floating.
            ValueError: ``x`` has another shape.
        """
        check_float("x", x, 3)
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have width {self.dim}; got shape {tuple(x.shape)}")
        before, seen = (None, 0) if state is None else state
        b, t = x.shape[:2]
        q, k, v = (
            f(x).view(b, t, h, self.head_dim).transpose(1, 2)
            for f, h in ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads))
        )
        if positions is None:
            positions = torch.arange(seen, seen + t, device=x.device)
        at = positions[:, None] if positions.dim() == 2 else positions  # (B, 1, T) or (T,)
        if self.rope == "before":
            q, k = rotate(q, self.rope_base, at), rotate(k, self.rope_base, at)
        after: LinearAttentionState | None
        if self.rope == "after_numerator":
            o, after = self._rotated_numerator(q, k, v, at, key_padding_mask, before)
        else:
            o = linear_attention(
                q, k, v, self.features, causal=self.causal, key_padding_mask=key_padding_mask, initial_state=before,
                return_state=return_state,
            )  # fmt: skip
            o, after = o if return_state else (o, before)
        y = self.o_proj(o.transpose(1, 2).reshape(b, t, self.dim))
        return (y, (after, seen + t)) if return_state else y

    def _rotated_numerator(
        self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, mask: Tensor | None, before: LinearAttentionState | None
    ) -> tuple[Tensor, LinearAttentionState]:
        dtype, out_dtype = compute_dtype(q), v.dtype
        phi_q, phi_k, v = self.features.query(q.to(dtype)), self.features.key(k.to(dtype)), v.to(dtype)
        options: dict[str, Any] = {
            "feature_map": _Given(), "causal": self.causal, "key_padding_mask": mask, "normalize": False,
            "return_state": True,
        }  # fmt: skip
        sums = counts = None
        if before is not None:  # S of the rotated keys, z of the unrotated ones
            sums = (before.s, torch.zeros_like(before.z))
            counts = (before.z.unsqueeze(-1), torch.zeros_like(before.z))
        turned = (rotate(phi_q, self.rope_base, at), rotate(phi_k, self.rope_base, at))
        o, state = linear_attention(*turned, v, initial_state=sums, **options)
        ones = v.new_ones(*v.shape[:-1], 1)
        den, total = linear_attention(phi_q, phi_k, ones, initial_state=counts, **options)
        seen = den > torch.finfo(den.dtype).tiny
        o = torch.where(seen, o / torch.where(seen, den, 1.0), 0.0)
        return o.to(out_dtype), LinearAttentionState(state.s, total.s.squeeze(-1))
