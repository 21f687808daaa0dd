"""Entropy-invariant softmax scale (熵不变性 Softmax): attention that stays as focused on long texts as on short ones.

Source: 科学空间 9034 (熵不变性Softmax的一个快速推导) and 8823 (从熵不变性看Attention的Scale操作).

    softmax(lambda(n) Q K^T) V,   n = number of keys that the row sees

    log512         lambda = log(n) / log(512) / sqrt(d)        the usual scale at n = base = 512
    kappa          lambda = kappa log(n) / d                   kappa = 2 / log(golden ratio) = 1 / 0.2406 by default
    sphere_exact   lambda = t / (1 - t^2), t = sqrt(1 - n^(-2/d))   entropy 0 to first order, q and k on spheres

The article's 1 / 0.24 is that kappa; sphere_exact is the form without its linearisation (derivations on the method's
page). What differs from the ports in use: q is multiplied, not the masked scores, so that every fused kernel works and
a mask stays a mask; n counts the keys that each row really sees, also under left padding and in decoding; where all
rows share n the factor is part of ``scale=`` and costs nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue._checks import check_choice, check_int, check_real
from kexue._tensors import check_float, compute_dtype

__all__ = ["entropy_invariant_attention", "entropy_invariant_scale"]

MODES = ("train", "inference")
SCALES = ("log512", "kappa", "sphere_exact")
FLAT = 2 / math.log((1 + math.sqrt(5)) / 2)  # kappa at which the entropy of random vectors does not grow


class Options(NamedTuple):
    """Which factor a row gets; shared by the function and the transformers plug-in."""

    base: float = 512
    min_length: int = 16
    mode: str = "train"
    per_row: bool = True
    scale_mode: str = "log512"
    kappa: float | None = None

    def check(self) -> None:
        """Raise unless every option is in range."""
        check_real("base", self.base, above=1.0)
        check_int("min_length", self.min_length, 2)
        check_choice("mode", self.mode, MODES)
        if not isinstance(self.per_row, bool):
            raise TypeError(f"per_row must be True or False; got {self.per_row!r}")
        _check_scale_mode("scale_mode", self.scale_mode, self.kappa)


def _check_scale_mode(name: str, mode: Any, kappa: Any) -> None:
    check_choice(name, mode, SCALES)
    if kappa is not None:
        check_real("kappa", kappa, above=0.0)
        if mode != "kappa":
            raise ValueError(f"kappa needs {name}='kappa'; got kappa={kappa!r} with {name}={mode!r}")


def _relative_number(n: float, d: int, options: Options) -> float:
    """lambda(n) sqrt(d) before the clamps, 1 where the ordinary scale is meant."""
    if options.scale_mode == "log512":
        return math.log(n) / math.log(options.base)
    if options.scale_mode == "kappa":
        return (FLAT if options.kappa is None else float(options.kappa)) * math.log(n) / math.sqrt(d)
    x = 2 * math.log(n) / d  # t^2 = 1 - exp(-x) without cancellation
    return math.sqrt(-math.expm1(-x)) * math.exp(x) * math.sqrt(d)


def _relative_tensor(n: Tensor, d: int, options: Options) -> Tensor:
    """The same for a tensor, which is overwritten."""
    if options.scale_mode == "sphere_exact":
        x = n.log_().mul_(2 / d)
        return torch.sqrt(-torch.expm1(-x)) * torch.exp(x) * math.sqrt(d)
    return n.log_().mul_(_relative_number(math.e, d, options))  # both others are proportional to log(n)


def factor_number(n: int, d: int, options: Options) -> float:
    """What the ordinary scale is multiplied by when all rows see ``n`` keys."""
    if options.mode == "inference":
        if n <= options.base:
            return 1.0
        return max(1.0, _relative_number(n, d, options) / _relative_number(options.base, d, options))
    return _relative_number(max(n, options.min_length), d, options)


def factor_rows(n: Tensor, d: int, options: Options, dtype: torch.dtype) -> Tensor:
    """The same for a tensor of numbers of keys, in ``dtype``."""
    n = n.detach().to(dtype)  # a count has no gradient
    if options.mode == "inference":
        grown = _relative_tensor(n.clamp(min=float(options.base)), d, options)
        return grown.div_(_relative_number(options.base, d, options)).clamp_(min=1.0)
    return _relative_tensor(n.clamp(min=float(options.min_length)), d, options)


def factor_shared(n: int, d: int, options: Options, like: Tensor) -> float | Tensor:
    """The same where all rows see ``n`` keys: a number, or while a graph is traced a tensor with one element.

    Under torch.compile and torch.export ``n`` may stand for any length, and a number made of it would fix it.
    """
    if not torch.compiler.is_compiling():
        return factor_number(n, d, options)
    dtype = compute_dtype(like)
    return factor_rows(torch.full((1,), n, dtype=dtype, device=like.device), d, options, dtype)


def entropy_invariant_scale(
    n: int | Tensor,
    d: int,
    base: float = 512,
    min_length: int = 16,
    mode: str = "log512",
    kappa: float | None = None,
) -> Any:
    """The factor on q·k that keeps the entropy of attention independent of the number of keys.

    It replaces 1/sqrt(d): pass it as ``scale=`` to ``F.scaled_dot_product_attention``, or multiply q by it.

    Args:
        n: Number of keys that a row sees, at least 0: an integer, or a tensor of them (any shape, integer or floating).
        d: Width of q and k.
        base: n at which "log512" is the ordinary 1/sqrt(d), above 1. The author keeps 512 whatever the training length.
        min_length: A smaller n counts as this one, at least 2; very short rows would become uniform.
        mode: "log512": log(n) / log(base) / sqrt(d). "kappa": kappa log(n) / d. "sphere_exact": the factor that makes
            the entropy of random q, k on spheres of radius sqrt(d) independent of n.
        kappa: Constant of "kappa", positive; None is 2 / log(golden ratio) = 4.156. Only with ``mode="kappa"``.

    Returns:
        A float for an integer ``n``; for a tensor one of its shape, float64 if ``n`` is float64, else float32.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: A value out of range or an unknown mode; negative numbers or NaN in a tensor ``n`` (not looked for
            under torch.compile).

    Reference:
        https://spaces.ac.cn/archives/9034

    Example:
        >>> round(entropy_invariant_scale(512, 64), 4), round(entropy_invariant_scale(2048, 64), 4)  # 1/8, 11/9 of it
        (0.125, 0.1528)
        >>> entropy_invariant_scale(torch.tensor([1, 512]), 64)  # n = 1 counts as 16
        tensor([0.0556, 0.1250])
    """
    check_int("d", d, 1)
    check_real("base", base, above=1.0)
    check_int("min_length", min_length, 2)
    _check_scale_mode("mode", mode, kappa)
    options = Options(base, min_length, scale_mode=mode, kappa=kappa)
    if isinstance(n, Tensor):
        if n.dtype == torch.bool or n.is_complex():
            raise TypeError(f"n must be a tensor of numbers of keys; got dtype {n.dtype}")
        if not (torch.compiler.is_compiling() or n.is_meta or bool((n >= 0).all())):  # False for NaN, too
            wrong = n[~(n >= 0)].flatten()[0].item()
            raise ValueError(f"n must be a tensor of numbers of at least 0; got {wrong} among them")
        return factor_rows(n, d, options, compute_dtype(n)) / math.sqrt(d)
    check_int("n", n, 0)
    return factor_number(n, d, options) / math.sqrt(d)


def _equal_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros appended to the narrower side: scores stay as they are, and the fused kernel needs one width."""
    more = v.shape[-1] - q.shape[-1]
    if more > 0:
        q, k = F.pad(q, (0, more)), F.pad(k, (0, more))
    elif more < 0:
        v = F.pad(v, (0, -more))
    return q, k, v


def _may_look(x: Tensor) -> bool:
    """Whether reading a value costs nothing: it decides about passes over the inputs that are rarely needed."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _without_padding(k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros in place of padded keys and values, where these could reach the output: NaN or infinity times weight 0."""
    if _may_look(k) and math.isfinite(float(k.detach().sum() + v.detach().sum())):
        return k, v
    pad = ~keep[:, None, :, None]
    return k.masked_fill(pad, 0.0), v.masked_fill(pad, 0.0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    seen: Tensor | None,
    causal: bool,
    factor: float | Tensor,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """softmax(scale · factor · q k^T) v by the fused kernel, 0 for rows that see no key.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D), G divides H.
        v: (B, G, S, E).
        mask: Bool, broadcastable to (B, H, T, S), True = takes part; excludes ``causal``.
        seen: Which rows see any key, bool, broadcastable to (B, H, T, 1); goes with ``mask``.
        causal: Row i sees the keys up to i (upper left).
        factor: A number, or a tensor broadcastable to (B, H, T, 1).
        scale: The scale that the factor multiplies.
        dropout_p: Probability of dropping an attention weight.
    """
    width = v.shape[-1]
    kernel: dict[str, bool] = {"is_causal": causal}
    if q.shape[1] != k.shape[1]:  # a branch, not the comparison: with symbolic shapes that is no bool
        kernel["enable_gqa"] = True
    if isinstance(factor, Tensor):
        q = (q * factor).to(q.dtype)  # the factor is float32 or wider: one rounding
    else:
        scale = scale * factor
    if mask is not None and seen is not None:
        if _may_look(seen) and bool(seen.all()):
            seen = None
        else:  # a row without keys may look at all of them and is set to 0 afterwards: no kernel divides by 0
            mask = mask | ~seen
    q, k, v = _equal_widths(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale, **kernel)
    if out.shape[-1] != width:
        out = out[..., :width]
    return out if seen is None else out.masked_fill(~seen, 0.0)


def _check_shapes(q: Any, k: Any, v: Any, mask: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(name, x, 4)
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype; got {q.dtype} and {x.dtype} for {name}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q and k must have equal batch and width; got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in batch, heads and length; got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(f"the {k.shape[1]} heads of k must divide the {q.shape[1]} heads of q")
    if q.shape[3] == 0:
        raise ValueError(f"q must have a width of at least 1; got shape {tuple(q.shape)}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"key_padding_mask must be a bool tensor (True = takes part); got {got}")
    if tuple(mask.shape) != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_padding_mask must have shape {(k.shape[0], k.shape[2])}; got {tuple(mask.shape)}")


def causal_factor(first: int, rows: int, q: Tensor, options: Options) -> float | Tensor:
    """Factor of ``rows`` rows that see ``first``, ``first + 1``, ... keys; a number where they all have the same."""
    last, d = first + rows - 1, q.shape[-1]
    if not options.per_row or rows == 1:
        return factor_shared(last, d, options, q)
    floor = options.base if options.mode == "inference" else options.min_length
    if not torch.compiler.is_compiling() and last <= floor:  # a comparison would be a condition on the lengths
        return factor_number(last, d, options)
    n = torch.arange(first, first + rows, dtype=compute_dtype(q), device=q.device)
    return factor_rows(n, d, options, n.dtype)[:, None]


def entropy_invariant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    base: float = 512,
    min_length: int = 16,
    mode: str = "train",
    per_row: bool = True,
    *,
    scale_mode: str = "log512",
    kappa: float | None = None,
    scale: float | None = None,
    offset: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention whose scale grows with the logarithm of the number of keys that a row sees.

    Runs on ``F.scaled_dot_product_attention``; memory is that of its kernel (a mask of (B, 1, T, S) bools is built for
    causal attention with padding, or with 1 < T < S).

    Args:
        q: (B, H, T, D) queries.
        k: (B, G, S, D) keys; G divides H (grouped-query attention).
        v: (B, G, S, E) values.
        causal: Row i sees the keys up to ``offset + i``. Without causality all T rows see all S keys.
        key_padding_mask: (B, S) bool, True = takes part. Padding may stand on any side and hold any values.
        base: As in :func:`entropy_invariant_scale`; for ``mode="inference"`` the length that the model was trained at.
        min_length: As in :func:`entropy_invariant_scale`.
        mode: "train": the factor of ``scale_mode`` at every length, for models that are trained with it. "inference":
            for models trained without: the ordinary scale up to ``base`` keys and growing like ``scale_mode`` beyond
            (for "log512" and "kappa" times log(n) / log(base)).
        per_row: Each causal row counts its own keys. False: one factor for all rows of a sample, that of its last row
            (all its keys); decoding step by step then differs from a whole pass.
        scale_mode: "log512", "kappa" or "sphere_exact", the ``mode`` of :func:`entropy_invariant_scale`.
        kappa: As in :func:`entropy_invariant_scale`.
        scale: The ordinary scale, where it is not 1/sqrt(D); the factor on q·k becomes
            ``entropy_invariant_scale(n, D, ...) * sqrt(D) * scale``.
        offset: Index of the key that stands at the place of the first query; None is S - T, the queries are the last
            rows. Only with ``causal=True``.
        dropout_p: Probability of dropping an attention weight (always applied: pass 0 in evaluation).

    Returns:
        (B, H, T, E); rows that see no key are 0.

    Raises:
        TypeError: Wrong kind of argument.
        ValueError: Shapes that do not fit, more causal queries than keys, a value out of range.

    Reference:
        https://spaces.ac.cn/archives/9034

    Example:
        >>> q, k, v = torch.ones(3, 1, 2, 1024, 16).unbind(0)
        >>> entropy_invariant_attention(q, k, v, causal=True).shape
        torch.Size([1, 2, 1024, 16])
        >>> step = entropy_invariant_attention(q[:, :, -1:], k, v, causal=True)  # a decoding step: n = 1024
        >>> step.shape
        torch.Size([1, 2, 1, 16])
    """
    options = Options(base, min_length, mode, per_row, scale_mode, kappa)
    options.check()
    _check_shapes(q, k, v, key_padding_mask)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False; got {causal!r}")
    if dropout_p != 0.0:
        check_real("dropout_p", dropout_p, minimum=0.0)
    if dropout_p >= 1:
        raise ValueError(f"dropout_p must be below 1; got {dropout_p!r}")
    rows, keys, d = q.shape[2], k.shape[2], q.shape[3]
    if scale is None:
        scale = 1 / math.sqrt(d)
    else:
        check_real("scale", scale, above=0.0)
    start = _first_key(rows, keys, causal, offset)

    factor: float | Tensor
    mask = seen = None
    if key_padding_mask is None:
        if causal:
            factor = causal_factor(start + 1, rows, q, options)
        else:
            factor = factor_shared(keys, d, options, q)
    else:
        k, v = _without_padding(k, v, key_padding_mask)
        mask = key_padding_mask[:, None, None, :]
        if causal:
            n = key_padding_mask.cumsum(-1)[:, None, start : start + rows, None]
        else:
            n = key_padding_mask.sum(-1)[:, None, None, None]
        seen = n > 0
        n = n if per_row else n[:, :, -1:]
        factor = factor_rows(n, d, options, compute_dtype(q))
    if causal and rows == 1 and start == keys - 1:
        causal = False  # the last row sees all keys
    if causal and (mask is not None or rows != keys):
        visible = torch.arange(keys, device=q.device) <= torch.arange(start, start + rows, device=q.device)[:, None]
        mask = visible if mask is None else mask & visible
        causal = False
    return attend(q, k, v, mask=mask, seen=seen, causal=causal, factor=factor, scale=scale, dropout_p=dropout_p)


def _first_key(rows: int, keys: int, causal: bool, offset: int | None) -> int:
    """Checked index of the key at the place of the first query."""
    if not causal:
        if offset is not None:
            raise ValueError(f"offset needs causal=True; got offset={offset!r} with causal=False")
        return 0
    if rows > keys:
        raise ValueError(f"causal attention needs at least as many keys as queries; got {keys} keys, {rows} queries")
    if offset is None:
        return keys - rows
    check_int("offset", offset, 0)
    if offset + rows > keys:
        raise ValueError(f"offset + queries must be at most {keys}, the number of keys; got {offset} + {rows}")
    return int(offset)
