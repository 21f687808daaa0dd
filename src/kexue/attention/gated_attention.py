"""Gated attention unit (门控注意力单元): one layer of gated single-head attention in place of attention and FFN.

Source: 科学空间 9019 (听说Attention与Softmax更配哦~), 8934 (FLASH), 8990 (initial magnitude), 9052 (GAU-α),
8823 and 9034 (entropy-invariant scale); Hua et al., https://arxiv.org/abs/2202.10447.

    [U, V, Z] = silu(X W_i)     Q = Z * gamma_q + beta_q     K = Z * gamma_k + beta_k     RoPE on Q and K
    O = (U * (A V)) W_o         A = norm(Q K^T / sqrt(s)), X (T, D), U and V (T, E), Z (T, s)

    relu2_n       relu(.)^2 / n              n: unpadded keys that the row sees; i in row i of causal attention
    relu2_const   relu(.)^2 / n0             a fixed length instead
    relu2_sum     relu(.)^2 / sum of the row
    softmax
    softmax_plus  softmax of the scores times log n / log 512, at least log 16 / log 512: entropy-invariant

The article's point: what divides by the length does not carry over to other lengths, softmax does, and only the
exponential has a temperature with which to keep the entropy of the weights.

What differs from the published code: scores exist in tiles only (``_gated_kernel.py``), dropout of the weights
included; padded keys are excluded exactly (adding -1e4 or -1e12 and then multiplying by log n, as the ports do, lets
them back in for short rows); n never counts padding; the factors of a row are multiplied into q. Gammas start at 1:
near 0, as in some ports, q . k vanishes and so does its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.attention._flash import chunked_attention
from kexue.attention._gated_kernel import attend
from kexue.attention._rotary import rotate
from kexue.attention.entropy import Options, factor_rows, factor_shared

__all__ = ["NORMALIZATIONS", "GatedAttentionUnit", "gated_attention", "gated_attention_weights"]

NORMALIZATIONS = ("relu2_n", "relu2_const", "relu2_sum", "softmax", "softmax_plus")
_KINDS = {"relu2_n": "relu2", "relu2_const": "relu2", "relu2_sum": "relu2_sum"}


def check_padding_mask(name: str, mask: Any, shape: tuple[int, int]) -> Tensor:
    """The mask as bool, True = takes part. Numbers are accepted as they come from tokenizers, if all are 0 or 1."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(mask).__name__}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    taken = mask != 0
    if not torch.compiler.is_compiling() and mask.numel() and not bool(torch.eq(mask, taken).all()):
        low, high = (float(x) for x in torch.aminmax(mask))
        raise ValueError(f"{name} must hold 1 (takes part) and 0 only; got values from {low:g} to {high:g}")
    return taken


def _check_options(normalization: Any, base: Any, min_length: Any, norm_length: Any, dropout: Any) -> None:
    check_choice("normalization", normalization, NORMALIZATIONS)
    if torch.compiler.is_compiling():  # numbers may be symbols there
        return
    check_real("base", base, above=1.0)
    check_int("min_length", min_length, 2)
    check_real("norm_length", norm_length, above=0.0)
    check_dropout("dropout", dropout)


def check_dropout(name: str, dropout: Any) -> None:
    """Raise unless ``dropout`` is a probability below 1."""
    check_real(name, dropout, minimum=0.0)
    if dropout >= 1:
        raise ValueError(f"{name} must be below 1; got {dropout!r}")


def _visible(mask: Tensor | None, causal: bool, length: int, device: torch.device) -> Tensor | int:
    """How many keys a row sees: an int, (T,), (B, 1) or (B, T)."""
    if mask is not None:
        return mask.cumsum(1) if causal else mask.sum(1, keepdim=True)
    return torch.arange(1, length + 1, device=device) if causal else length


def _row_factor(
    n: Tensor | int, normalization: str, like: Tensor, base: float, min_length: int, norm_length: float
) -> Tensor | float:
    """What q is multiplied by beside 1 / sqrt(s); relu2 forms square it. Of the dtype and device of ``like``."""
    if normalization == "relu2_const":
        return norm_length**-0.5
    if normalization in ("softmax", "relu2_sum"):
        return 1.0
    options = Options(base, min_length)
    if isinstance(n, Tensor):
        if normalization == "relu2_n":
            return n.clamp(min=1).to(like.dtype).rsqrt()[..., None]
        return factor_rows(n, 1, options, like.dtype)[..., None]
    return max(n, 1) ** -0.5 if normalization == "relu2_n" else factor_shared(n, 1, options, like)


def _prepare(
    q: Tensor, k: Tensor, mask: Any, causal: bool, normalization: str, base: float, min_length: int, norm_length: float
) -> tuple[Tensor, Tensor | None]:
    """The scaled q in the dtype of the computation, and the mask as bool."""
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"k must be ({q.shape[0]}, S, {q.shape[2]}) as q is {tuple(q.shape)}; got {tuple(k.shape)}")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"causal attention needs as many keys as queries, {q.shape[1]}; got {k.shape[1]}")
    if mask is not None:
        mask = check_padding_mask("key_padding_mask", mask, (k.shape[0], k.shape[1]))
    dtype = compute_dtype(q, k)
    n = _visible(mask, causal, k.shape[1], k.device)
    width, q = q.shape[2], q.to(dtype)
    factor = _row_factor(n, normalization, q, base, min_length, norm_length)
    return q * width**-0.5 * factor, mask


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    normalization: str = "softmax_plus",
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    base: float = 512.0,
    min_length: int = 16,
    norm_length: float = 512.0,
    dropout: float = 0.0,
) -> Tensor:
    """Gate * (norm(q k^T / sqrt(s)) v) for one head with wide values, in memory O(T E).

    Computed in float32 (float64 stays). Differentiable once.

    Args:
        q: (B, T, s) queries.
        k: (B, S, s) keys.
        v: (B, S, E) values.
        gate: (B, T, E) multiplied onto the result, or None.
        normalization: One of "relu2_n", "relu2_const", "relu2_sum", "softmax", "softmax_plus"; see the module.
        causal: Query i sees the keys j <= i; S = T.
        key_padding_mask: (B, S), True (or 1) = takes part. A row that sees no key gives 0.
        base: Length at which softmax_plus is softmax, above 1.
        min_length: softmax_plus counts at least this many keys, from 2.
        norm_length: n0 of relu2_const, positive.
        dropout: Probability that a weight is dropped, the others growing by 1 / (1 - dropout); drawn from torch's
            global generator.

    Returns:
        (B, T, E) in the dtype of v (of v and gate together).

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, a value out of range, an unknown normalization.

    Reference:
        https://spaces.ac.cn/archives/9019

    Example:
        >>> q = k = torch.zeros(1, 4, 2)
        >>> v = torch.arange(4.0).reshape(1, 4, 1)
        >>> gated_attention(q, k, v, causal=True)[0, :, 0]
        tensor([0.0000, 0.5000, 1.0000, 1.5000])
    """
    _check_options(normalization, base, min_length, norm_length, dropout)
    check_float("q", q, 3)
    check_float("k", k, 3)
    check_float("v", v, 3)
    q, mask = _prepare(q, k, key_padding_mask, causal, normalization, base, min_length, norm_length)
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v must be ({k.shape[0]}, {k.shape[1]}, E) as k is {tuple(k.shape)}; got {tuple(v.shape)}")
    if gate is not None:
        check_float("gate", gate, 3)
        expected = (q.shape[0], q.shape[1], v.shape[2])
        if tuple(gate.shape) != expected:
            raise ValueError(f"gate must have shape {expected}; got {tuple(gate.shape)}")
    seed = torch.randint(2**62, ()) if dropout > 0 else None
    out = attend(q, k, v, mask, seed, _KINDS.get(normalization, "softmax"), causal, float(dropout))
    return out if gate is None else gate * out


def gated_attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    normalization: str = "softmax_plus",
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    base: float = 512.0,
    min_length: int = 16,
    norm_length: float = 512.0,
) -> Tensor:
    """The matrix of weights that :func:`gated_attention` never builds, to be looked at; memory O(T S).

    Args:
        q: (B, T, s) queries.
        k: (B, S, s) keys.
        normalization: As in :func:`gated_attention`.
        causal: As in :func:`gated_attention`.
        key_padding_mask: As in :func:`gated_attention`.
        base: As in :func:`gated_attention`.
        min_length: As in :func:`gated_attention`.
        norm_length: As in :func:`gated_attention`.

    Returns:
        (B, T, S), in float32 (float64 for float64 inputs); hidden keys have weight 0.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: As in :func:`gated_attention`.

    Example:
        >>> q = torch.zeros(1, 2, 2)
        >>> gated_attention_weights(q, q, causal=True)[0]
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])
    """
    _check_options(normalization, base, min_length, norm_length, 0.0)
    check_float("q", q, 3)
    check_float("k", k, 3)
    q, mask = _prepare(q, k, key_padding_mask, causal, normalization, base, min_length, norm_length)
    scores = q @ k.to(q.dtype).mT
    shown = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
    shown = shown.tril() if causal else shown
    shown = shown if mask is None else shown & mask[:, None]
    if normalization in ("softmax", "softmax_plus"):
        scores = scores.masked_fill(~shown, -torch.inf)
        none = ~shown.any(-1, keepdim=True)
        return scores.masked_fill(none, 0.0).softmax(-1).masked_fill(none, 0.0)
    positive = scores.relu().masked_fill(~shown, 0.0)
    if normalization == "relu2_sum" and positive.shape[-1]:
        top = positive.detach().amax(-1, keepdim=True)
        weights = (positive / torch.where(top > 0, top, 1.0)).square()
        return weights / torch.where(top > 0, weights.sum(-1, keepdim=True), 1.0)
    return positive.square()


class ScaleOffset(nn.Module):
    """x * weight + bias for each coordinate; weight starts at 1, bias (unless left out) at 0."""

    def __init__(self, dim: int, offset: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if offset else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        x = x * self.weight
        return x if self.bias is None else x + self.bias


class GatedAttentionUnit(nn.Module):
    """A gated attention unit on (B, T, D), without residual and norm. Two of them replace attention and FFN.

    Weights start as LeCun normal (variance 1 / inputs). Memory is O(T E) in both passes, with dropout too.

    Args:
        dim: D, width of the input and output.
        expansion: E / D; E must come out whole.
        key_size: s, width of queries and keys; even with ``rope``.
        normalization: One of "relu2_n", "relu2_const", "relu2_sum", "softmax", "softmax_plus"; see the module.
        causal: Token i sees the tokens j <= i.
        rope: Rotary positions on queries and keys.
        bias: Biases of the linear maps. The offsets beta of queries and keys are another matter: ``offset``.
        offset: Whether queries and keys have offsets beta beside their scales gamma.
        self_attention: False: gate and queries come from ``x``, keys and values from ``context``, without scale and
            offset. Not causal.
        context_dim: Width of ``context``; None: ``dim``.
        attention_dropout: Probability that a weight is dropped in training.
        base: Length at which softmax_plus is softmax.
        min_length: softmax_plus counts at least this many keys.
        norm_length: n0 of relu2_const.
        rope_base: Base of the rotary angles.
        chunk_size: FLASH: quadratic attention (relu2, divided by this number) inside chunks of so many tokens, linear
            attention between them, with scales and offsets of its own; cost O(T). Needs normalization="relu2_n", no
            attention dropout (there is no matrix to drop from) and self-attention. None: plain attention.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range, an odd ``key_size`` with ``rope``, an unknown normalization.

    Reference:
        https://spaces.ac.cn/archives/9019, https://arxiv.org/abs/2202.10447

    Example:
        >>> unit = GatedAttentionUnit(32, key_size=16)
        >>> x, mask = torch.randn(2, 5, 32), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
        >>> unit(x, mask).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        expansion: float = 2,
        key_size: int = 128,
        normalization: str = "softmax_plus",
        causal: bool = False,
        rope: bool = True,
        bias: bool = False,
        *,
        offset: bool = True,
        self_attention: bool = True,
        context_dim: int | None = None,
        attention_dropout: float = 0.0,
        base: float = 512.0,
        min_length: int = 16,
        norm_length: float = 512.0,
        rope_base: float = 10000.0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_int("dim", dim, 1)
        check_real("expansion", expansion, above=0.0)
        check_int("key_size", key_size, 1)
        _check_options(normalization, base, min_length, norm_length, attention_dropout)
        check_real("rope_base", rope_base, above=0.0)
        if rope and key_size % 2:
            raise ValueError(f"key_size must be even with rope=True, whose rotations act on pairs; got {key_size}")
        width = round(expansion * dim)
        if width < 1 or abs(width - expansion * dim) > 1e-6 * width:
            raise ValueError(f"expansion * dim must be a whole number; got {expansion} * {dim} = {expansion * dim:g}")
        if self_attention and context_dim is not None:
            raise ValueError(f"context_dim needs self_attention=False; got {context_dim}")
        if not self_attention and causal:
            raise ValueError("causal needs self_attention=True; got causal=True with self_attention=False")
        if chunk_size is not None:
            check_int("chunk_size", chunk_size, 1)
            if normalization != "relu2_n" or attention_dropout > 0 or not self_attention:
                raise ValueError(
                    "chunk_size needs normalization='relu2_n', attention_dropout=0 and self_attention=True; got "
                    f"{normalization!r}, {attention_dropout} and {self_attention}"
                )
        self.chunk_size = chunk_size
        self.dim, self.width, self.key_size = int(dim), width, int(key_size)
        self.normalization, self.causal, self.rope, self.self_attention = normalization, causal, rope, self_attention
        self.attention_dropout, self.base, self.min_length = float(attention_dropout), float(base), int(min_length)
        self.norm_length, self.rope_base = float(norm_length), float(rope_base)
        if self_attention:
            self.i_dense = nn.Linear(dim, 2 * width + key_size, bias=bias)
            self.q_scaleoffset = ScaleOffset(key_size, offset)
            self.k_scaleoffset = ScaleOffset(key_size, offset)
            if chunk_size is not None:
                self.far_q_scaleoffset = ScaleOffset(key_size, offset)
                self.far_k_scaleoffset = ScaleOffset(key_size, offset)
        else:
            self.context_dim = dim if context_dim is None else context_dim
            check_int("context_dim", self.context_dim, 1)
            self.uq_dense = nn.Linear(dim, width + key_size, bias=bias)
            self.kv_dense = nn.Linear(self.context_dim, width + key_size, bias=bias)
        self.o_dense = nn.Linear(width, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the linear maps anew; scales become 1, offsets and biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, ScaleOffset):
                nn.init.ones_(module.weight)
            if isinstance(module, nn.Linear | ScaleOffset) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def extra_repr(self) -> str:
        """What print shows."""
        return (
            f"dim={self.dim}, width={self.width}, key_size={self.key_size}, normalization={self.normalization!r}, "
            f"causal={self.causal}, rope={self.rope}"
        )

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gate (B, T, E), v (B, S, E), [q (B, T, s), k (B, S, s), and those of the linear part of FLASH]."""
        sizes = [self.width, self.key_size]
        if self.self_attention:
            u, v, z = F.silu(self.i_dense(x)).split([self.width, *sizes], -1)
            z = z.to(compute_dtype(z))  # the dtype of the scores
            keys = [self.q_scaleoffset(z), self.k_scaleoffset(z)]
            if self.chunk_size is not None:
                keys += [self.far_q_scaleoffset(z), self.far_k_scaleoffset(z)]
        else:
            u, q = F.silu(self.uq_dense(x)).split(sizes, -1)
            v, k = F.silu(self.kv_dense(context)).split(sizes, -1)
            keys = [q.to(compute_dtype(q)), k.to(compute_dtype(k))]
        return u, v, [rotate(y, self.rope_base) for y in keys] if self.rope else keys

    def _check_inputs(self, x: Any, attention_mask: Any, context: Any) -> Tensor | None:
        check_float("x", x, 3)
        if x.shape[2] != self.dim:
            raise ValueError(f"x must be (B, T, {self.dim}); got {tuple(x.shape)}")
        if self.self_attention:
            if context is not None:
                raise ValueError(
                    "context needs a unit built with self_attention=False; got one with self_attention=True"
                )
            keys = x
        else:
            check_float("context", context, 3)
            if context.shape[0] != x.shape[0] or context.shape[2] != self.context_dim:
                raise ValueError(
                    f"context must be ({x.shape[0]}, S, {self.context_dim}) as x is {tuple(x.shape)}; "
                    f"got {tuple(context.shape)}"
                )
            keys = context
        if attention_mask is None:
            return None
        return check_padding_mask("attention_mask", attention_mask, (keys.shape[0], keys.shape[1]))

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """The unit's output.

        Args:
            x: (B, T, D).
            attention_mask: (B, T), True (or 1) = takes part; (B, S) of the context without self-attention. Tokens
                that see no key give 0.
            context: (B, S, context_dim), without self-attention only.

        Returns:
            (B, T, D).

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: Shapes that do not fit.
        """
        return self._attend(x, attention_mask, context, False)[0]

    def attend(self, x: Tensor, attention_mask: Tensor | None = None, context: Tensor | None = None) -> tuple[Any, ...]:
        """:meth:`forward` with the matrix of weights beside its output, in memory O(T S).

        Args:
            x: As in :meth:`forward`.
            attention_mask: As in :meth:`forward`.
            context: As in :meth:`forward`.

        Returns:
            (B, T, D) and the weights (B, T, S) that were used, after dropout.

        Raises:
            TypeError: Wrong kind of argument.
            ValueError: Shapes that do not fit.
        """
        return self._attend(x, attention_mask, context, True)

    def _attend(
        self, x: Tensor, attention_mask: Any, context: Tensor | None, matrix: bool
    ) -> tuple[Tensor, Tensor | None]:
        mask = self._check_inputs(x, attention_mask, context)
        u, v, keys = self._project(x, context)
        options: dict[str, Any] = {
            "normalization": self.normalization, "causal": self.causal, "key_padding_mask": mask, "base": self.base,
            "min_length": self.min_length, "norm_length": self.norm_length,
        }  # fmt: skip
        dropout = self.attention_dropout if self.training else 0.0
        weights = None
        if self.chunk_size is not None:
            if matrix:
                raise ValueError(f"with chunk_size={self.chunk_size} there is no matrix of weights to be returned")
            q, k, far_q, far_k = keys
            out = u * chunked_attention(q, k, far_q, far_k, v, mask, self.causal, self.chunk_size)
        elif matrix:
            weights = F.dropout(gated_attention_weights(keys[0], keys[1], **options), dropout)
            out = u * (weights @ v.to(weights.dtype)).to(v.dtype)
        else:
            out = gated_attention(keys[0], keys[1], v, u, dropout=dropout, **options)
        out = self.o_dense(out)
        if mask is not None and self.o_dense.bias is not None:  # without a bias 0 stays 0
            seen = mask.cumsum(1) > 0 if self.causal else mask.any(1, keepdim=True)
            out = torch.where(seen[..., None], out, 0.0)
        return out, weights
