"""Linear attention (线性注意力): attention whose cost grows with the length, not with its square.

Source: 科学空间 7546 (线性Attention的探索:Attention必须有个Softmax吗?), 8338; Katharopoulos et al. 2020,
"Transformers are RNNs".

    o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j) = phi(q_i) S / (phi(q_i).z),
    S = sum_j phi(k_j) v_j^T,  z = sum_j phi(k_j);  causal: sums over j <= i.

What we do differently, and why:

- The causal form runs over chunks with a backward of its own (``_causal_kernel``): neither T x T scores nor T x M x E
  outer products exist at any time.
- Exponential maps subtract a running maximum, kept in the state: streaming works, and later keys do not change
  earlier outputs (subtracting the maximum over the whole sequence, as others do, leaks through rounding and eps).
- Padded keys are zeroed after the map, since phi(0) is not 0; nothing is added to features; a query that sees no key
  gets 0.

Shapes: B batch, T time (tokens), H heads, D width, M features, E width of v.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kexue._checks import check_choice, check_real
from kexue._tensors import check_float, compute_dtype
from kexue.attention import _contraction as plain
from kexue.attention._causal_operator import causal_linear_attention
from kexue.attention._contraction import State
from kexue.attention._exponential_kernel import exponential_attention
from kexue.attention._exponential_parts import lowest
from kexue.attention._series_kernel import series_attention
from kexue.attention.feature_maps import FEATURE_MAPS, FeatureMap, feature_map_of
from kexue.attention.series import PolynomialFeatures

__all__ = ["LinearAttentionState", "linear_attention"]

BACKENDS = ("auto", "operator", "plain")


class LinearAttentionState(NamedTuple):
    """Everything that a linear attention remembers of the keys and values seen so far; it does not grow.

    For maps in log space (``"exp"``, ``"softmax_exp"``, ``FavorFeatures``), whose sums would overflow, it holds for
    each feature the logarithm of z and the mean s / z.

    Args:
        s: (B, H, M, E), S = sum of phi(k) v^T; in log space the mean of v weighted by the feature, 0 without any key.
        z: (B, H, M), sum of phi(k); in log space its logarithm, -inf without any key.

    Example:
        >>> q = k = v = torch.randn(1, 2, 5, 4)
        >>> whole = linear_attention(q, k, v, causal=True)
        >>> _, state = linear_attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], causal=True, return_state=True)
        >>> last = linear_attention(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], causal=True, initial_state=state)
        >>> torch.allclose(last, whole[:, :, 4:], atol=1e-6)
        True
    """

    s: Tensor
    z: Tensor

    @classmethod
    def for_model(cls, model: Any) -> Any:
        """A cache of constant size for ``model.generate(past_key_values=...)``.

        Args:
            model: A transformers decoder whose attention is ``"kexue_linear"`` or ``"kexue_performer"``.

        Returns:
            A transformers ``Cache`` with one state per layer; it serves one batch, ``reset()`` empties it.

        Raises:
            TypeError: The model is not a transformers model.
            ValueError: Its attention is not one of those two.
        """
        from kexue.attention._hf_linear import state_cache

        return state_cache(model)


def _check_inputs(q: Any, k: Any, v: Any, causal: bool, mask: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float(name, x, 4)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same width; got {q.shape[-1]} and {k.shape[-1]}")
    if q.shape[-1] == 0:
        raise ValueError("q and k must have a width of at least 1; got 0")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in batch, heads and time; got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have the same batch size; got {q.shape[0]} and {k.shape[0]}")
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ValueError(f"the heads of q must be a multiple of those of k and v; got {q.shape[1]} and {k.shape[1]}")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(
            f"causal attention of {q.shape[2]} queries needs at least as many keys (the last ones are their own); "
            f"got {k.shape[2]}"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"key_padding_mask must be a bool tensor, True = takes part; got {got}")
        if tuple(mask.shape) != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"key_padding_mask must have shape (batch, keys) = {(k.shape[0], k.shape[2])}; got {tuple(mask.shape)}"
            )


def _check_map(phi: FeatureMap, q: Tensor, k: Tensor, causal: bool, normalize: bool, stateful: bool) -> None:
    if not phi.causal and (causal or stateful):
        raise ValueError(
            f"{_name(phi)} normalises keys over the whole sequence: causal, or continued from a state, it would look "
            'into the future; use "softmax_exp" or "exp", whose keys are exp(k)'
        )
    if normalize and not phi.positive and not phi.positive_for(q, k):
        raise ValueError(
            f"the similarity of {_name(phi)} can be negative on these inputs: its weights cannot be normalised; "
            f"use normalize=False or a positive map; got {phi!r}"
        )


def _name(phi: FeatureMap) -> str:
    named = [repr(name) for name, known in FEATURE_MAPS.items() if known is phi]
    return f"feature_map {named[0] if named else type(phi).__name__}"


def _open_state(state: Any, shape: tuple[int, int, int, int], dtype: torch.dtype, log_space: bool) -> State:
    """A checked state as the contraction wants it: sums, in log space with the logarithms they were divided by."""
    if not isinstance(state, tuple) or len(state) != 2 or not all(isinstance(x, Tensor) for x in state):
        raise TypeError(
            f"initial_state must be a LinearAttentionState or a pair (S, z) of tensors; got {type(state).__name__}"
        )
    for name, x, expected in (("S", state[0], shape), ("z", state[1], shape[:3])):
        check_float(f"{name} of initial_state", x)
        if tuple(x.shape) != expected:
            raise ValueError(f"{name} of initial_state must have shape {expected}; got {tuple(x.shape)}")
    s, z = (x.to(dtype) for x in state)
    if not log_space:
        return State(s, z, None)
    level = z.detach().clamp(min=lowest(z))
    z = (z - level).exp()  # 1, or 0 without any key; the gradient goes through it
    return State(s * z.unsqueeze(-1), z, level)


def _no_state(like: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype, log_space: bool) -> State:
    zero = like.new_zeros((), dtype=dtype)
    level = like.new_full(shape[:3], lowest(zero), dtype=dtype) if log_space else None
    return State(zero.expand(shape), zero.expand(shape[:3]), level)


def _close_state(state: State) -> LinearAttentionState:
    if state.shift is None:
        return LinearAttentionState(state.s, state.z)
    seen = state.z > torch.finfo(state.z.dtype).tiny
    z = torch.where(seen, state.z, 1.0)
    mean = torch.where(seen.unsqueeze(-1), state.s / z.unsqueeze(-1), 0.0)
    return LinearAttentionState(mean, torch.where(seen, z.log() + state.shift, -torch.inf))


def _map_keys(phi: FeatureMap, k: Tensor, live: Tensor | None) -> Tensor:
    """Features of keys, or their logarithms; those of masked keys are 0, or -inf."""
    if live is not None:  # before the map too, so that nothing that padding holds reaches a gradient
        k = torch.where(live, k, 0.0 if phi.causal else -torch.inf)
    features = phi.key(k)
    if live is None:
        return features
    return torch.where(live, features, -torch.inf if phi.log_space else 0.0)


def _absorb(phi: FeatureMap, k: Tensor, live: Tensor | None, before: State) -> tuple[Tensor, State]:
    """Features of keys (each feature on a scale of its own in log space), and the state before on the same scale."""
    features = _map_keys(phi, k, live)
    if before.shift is None:
        return features, before
    level = before.shift
    if k.shape[2]:
        level = torch.maximum(features.detach().amax(-2), level)
    fall = (before.shift - level).clamp(max=0).exp()
    before = State(before.s * fall.unsqueeze(-1), before.z * fall, level)
    return (features - level.unsqueeze(-2)).exp(), before


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str | FeatureMap = "elu1",
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    initial_state: LinearAttentionState | tuple[Tensor, ...] | None = None,
    return_state: bool = False,
    scale: float | None = None,
    eps: float = 0.0,
    normalize: bool = True,
    backend: str = "auto",
) -> Any:
    """Attention with similarity phi(q).phi(k): time linear in the length, memory too, and a state of constant size.

    The weights form a matrix of rank at most M (the number of features): the price for linear cost is that attention
    cannot concentrate as softmax does. Peak memory beside the inputs and the output: the features of bidirectional
    attention; of causal ``elu1`` only a (M, E) state per 64 tokens.

    Args:
        q: (B, H, T, D) queries.
        k: (B, H, S, D) keys; fewer heads are shared by groups of query heads.
        v: (B, H, S, E) values, one per key.
        feature_map: ``"elu1"`` (elu + 1), ``"exp"``, ``"softmax_qk"`` (softmax over D on q, over time on k;
            bidirectional only), ``"softmax_d"``, ``"softmax_exp"``, ``"relu"``, ``"relu2"`` (each + 1e-3),
            ``"cosine1"`` (1 + cos(q, k)), or a :class:`FeatureMap` such as ``FavorFeatures`` and ``TaylorFeatures``.
        causal: Query i sees no key after its own. With fewer queries than keys the queries are the last ones.
        key_padding_mask: (B, S) bool, True = takes part. A query that sees no key gets 0.
        initial_state: What was returned for earlier tokens, or a pair (S, z).
        return_state: Also return the state after the last key.
        scale: Replaces q.k by scale * q.k: both sides are multiplied by its root before the map. Maps that are Modules
            have a scale of their own. Default 1.
        eps: Added to the denominators, on their own scale; 0 is safe, as nothing is divided by 0.
        normalize: Divide by the sum of the weights. ``"softmax_qk"`` is normalised as it is.
        backend: ``"operator"`` runs the causal form as one node for torch.compile and torch.export, with a backward of
            its own that cannot be differentiated again; ``"plain"`` uses torch's own operations, all chunks at once;
            ``"auto"`` takes the operator on the CPU.

    Returns:
        (B, H, T, E) in the dtype of v, computed in float32 for lower precision; with ``return_state`` a pair of it and
        a :class:`LinearAttentionState`.

    Raises:
        TypeError: A tensor is not floating, the dtypes differ, the mask is not bool.
        ValueError: Shapes disagree, causal with more queries than keys, a map that cannot do what is asked for.

    Reference:
        科学空间 7546; Katharopoulos et al. 2020, https://arxiv.org/abs/2006.16236.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> q, k, v = (torch.randn(2, 4, 100, 16, generator=g) for _ in range(3))
        >>> linear_attention(q, k, v, causal=True).shape
        torch.Size([2, 4, 100, 16])
        >>> o, state = linear_attention(q, k, v, feature_map="exp", causal=True, return_state=True)
        >>> step = linear_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], "exp", causal=True, initial_state=state)
        >>> step.shape, state.s.shape
        (torch.Size([2, 4, 1, 16]), torch.Size([2, 4, 16, 16]))
    """
    for name, flag in (("causal", causal), ("return_state", return_state), ("normalize", normalize)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False; got {flag!r}")
    _check_inputs(q, k, v, causal, key_padding_mask)
    phi = feature_map_of(feature_map)
    _check_map(phi, q, k, causal, normalize, initial_state is not None or return_state)
    if not torch.compiler.is_compiling():  # numbers may be symbols there
        check_real("eps", eps, minimum=0.0)
    check_choice("backend", backend, BACKENDS)
    if backend == "auto":  # elsewhere a loop over small chunks would wait for launches
        backend = "operator" if q.device.type == "cpu" else "plain"
    if scale is not None:
        check_real("scale", scale, above=0.0)
        if isinstance(feature_map, FeatureMap):
            raise ValueError(f"scale belongs to the feature map: give it to {type(feature_map).__name__}; got {scale}")
        q, k = q * scale**0.5, k * scale**0.5
    if initial_state is None:  # a state belongs to the map as it was
        phi.start(q, k, key_padding_mask)
    lowered = torch.is_autocast_enabled(q.device.type)  # sums over time stay in float32
    with torch.autocast(q.device.type, enabled=False) if lowered else contextlib.nullcontext():
        o, state = _attend(q, k, v, phi, causal, key_padding_mask, initial_state, eps, normalize, backend, return_state)
    return (o, _close_state(state)) if return_state else o


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: FeatureMap,
    causal: bool,
    mask: Tensor | None,
    initial_state: Any,
    eps: float,
    normalize: bool,
    backend: str,
    wanted: bool,
) -> tuple[Tensor, State]:
    # A single token and a state: there is nothing to save, its features are needed anyway.
    decoding = q.shape[2] == 1 and k.shape[2] == 1 and (wanted or initial_state is not None)
    if isinstance(phi, PolynomialFeatures) and backend != "plain" and not decoding:
        return _polynomial(q, k, v, phi, causal, mask, initial_state, eps, normalize, wanted)
    (b, heads, t, dim), (h, keys), e = q.shape, k.shape[1:3], v.shape[-1]
    g = heads // h if h else 0
    dtype, out_dtype = compute_dtype(q), v.dtype
    normalize = normalize and phi.causal  # a map that normalises over time has done so
    live = None if mask is None else mask[:, None, :, None]
    # Only the causal operator maps its own chunks, so that no features of the whole sequence exist.
    inside = getattr(phi, "activation", None) if causal and t > 1 and backend != "plain" else None
    features = dim if inside else phi.num_features(dim)
    shape = (b, h, features, e)
    if initial_state is None:
        before = _no_state(v, shape, dtype, phi.log_space)
    else:
        before = _open_state(initial_state, shape, dtype, phi.log_space)

    exponent = phi.exponent(dim, dtype, q.device) if normalize and not eps and backend != "plain" else None
    if exponent is not None and before.shift is not None and (t > 1 or not causal):
        grouped = q.to(dtype).reshape(b, h, g, t, dim)
        o, s, z, shift = exponential_attention(
            grouped, k.to(dtype), v.to(dtype), live, exponent, before.s, before.z, before.shift, causal
        )
        return o.reshape(b, heads, t, e).to(out_dtype), State(s, z, shift)

    if causal and t > 1:
        early = keys - t  # keys before the first query: they go into the state
        if early:
            part = None if live is None else live[:, :, :early]
            phi_k, before = _absorb(phi, k[:, :, :early].to(dtype), part, before)
            v_early = v[:, :, :early].to(dtype)
            v_early = v_early if part is None else torch.where(part, v_early, 0.0)
            before = State(before.s + phi_k.mT @ v_early, before.z + phi_k.sum(-2), before.shift)
            k, v, live = k[:, :, early:], v[:, :, early:], None if live is None else live[:, :, early:]
        return _causal(q, k, v, phi, live, before, eps, normalize, backend, inside, g)

    phi_k, before = _absorb(phi, k.to(dtype), live, before)
    values = v.to(dtype)
    values = values if live is None else torch.where(live, values, 0.0)
    phi_q, top = _map_queries(phi, q.to(dtype), before.shift, normalize)
    m = phi_q.shape[-1]
    o, s, z = plain.bidirectional(phi_q.reshape(b, h, g * t, m), phi_k, values, before, eps, normalize)
    o = o.view(b, heads, t, e)
    if top is not None and not normalize:
        o = o * top.exp()
    return o.to(out_dtype), State(s, z, before.shift)


def _polynomial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: PolynomialFeatures,
    causal: bool,
    mask: Tensor | None,
    initial_state: Any,
    eps: float,
    normalize: bool,
    wanted: bool,
) -> tuple[Tensor, State]:
    """A polynomial of the score has an operator of its own, which mostly does without features."""
    (b, heads, t, dim), h, e = q.shape, k.shape[1], v.shape[-1]
    dtype = compute_dtype(q)
    if phi.normalize_inputs:
        q, k = phi.prepared(q.to(dtype)), phi.prepared(k.to(dtype))
    before = None
    if initial_state is not None:
        before = _open_state(initial_state, (b, h, phi.num_features(dim), e), dtype, False)
    g = heads // h if h else 0
    o, s, z = series_attention(
        q.reshape(b, h, g, t, dim), k, v, None if mask is None else mask[:, None, :, None],
        None if before is None else before.s, None if before is None else before.z,
        kind=phi.kind, degree=phi.degree, scale=phi.scale_of(dim), causal=causal, eps=eps, normalize=normalize,
        wanted=wanted,
    )  # fmt: skip
    return o.view(b, heads, t, e), State(s, z, None)


def _map_queries(phi: FeatureMap, q: Tensor, level: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Features of queries; in log space times exp(level) of the keys, and the logarithm of what they are divided by."""
    features = phi.query(q)
    if level is None:
        return features, None
    features = features + level.repeat_interleave(q.shape[1] // max(level.shape[1], 1), 1).unsqueeze(-2)
    top = features.detach().amax(-1, keepdim=True)
    shared = None if normalize else phi.query_factor(q)
    return (features - top).exp(), top if shared is None else top + shared


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi: FeatureMap,
    live: Tensor | None,
    before: State,
    eps: float,
    normalize: bool,
    backend: str,
    inside: str | None,
    g: int,
) -> tuple[Tensor, State]:
    b, heads, t, _ = q.shape
    h, e = v.shape[1], v.shape[-1]
    dtype = before.s.dtype
    scale = top = base = None
    phi_q, phi_k = q, k
    if inside is None:
        phi_k = _map_keys(phi, k.to(dtype), live)
        if before.shift is not None:
            # Each feature is on the level that the state or else the first key has (later keys must not matter); what
            # exceeds it is taken up by a running maximum over features.
            base = _first_level(phi_k.detach(), live, before)
            phi_k = phi_k - base.unsqueeze(-2)
            scale = phi_k.detach().amax(-1).cummax(-1).values.clamp(min=0)
            phi_k = (phi_k - scale.unsqueeze(-1)).exp()
        phi_q, top = _map_queries(phi, q.to(dtype), base, normalize)
    phi_q = phi_q.reshape(b, h, g, t, phi_q.shape[-1])
    if backend == "plain":
        values = v.to(dtype)
        values = values if live is None else torch.where(live, values, 0.0)
        o, s, z = plain.causal(phi_q, phi_k, values, scale, before._replace(shift=None), eps, normalize)
    else:
        o, s, z = causal_linear_attention(
            phi_q, phi_k, v, live, scale, before.s, before.z, before.z.new_zeros(b, h),
            activation=inside or "none", eps=eps, normalize=normalize,
        )  # fmt: skip
    o = o.reshape(b, heads, t, e)
    if scale is None or top is None or base is None:
        return o.to(v.dtype), State(s, z, None)
    if not normalize:
        o = o.to(dtype) * (top + scale.repeat_interleave(g, 1).unsqueeze(-1)).exp()
    return o.to(v.dtype), State(s, z, base + scale[..., -1:])


def _first_level(logs: Tensor, live: Tensor | None, before: State) -> Tensor:
    """(B, H, M): the level of the state, or that of the first key that takes part where nothing was seen before."""
    first = logs[:, :, 0]
    if live is not None:
        at = live.long().argmax(-2).unsqueeze(-1).expand(*logs.shape[:2], 1, logs.shape[-1])
        first = logs.gather(-2, at).squeeze(-2)
    first = first.clamp(min=lowest(logs))
    return first if before.shift is None else torch.where(before.z > 0, before.shift, first)
