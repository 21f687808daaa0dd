"""One decoding step of the whole stack as one compiled function, for float32 on the CPU.

A step takes N tokens, each with the row of the cache it belongs to and its position in that row: one token a row while
decoding, all tokens of all prompts before. Nothing is padded, no mask exists, and a row never sees another one. A step
of a small model costs less than the hundred calls it takes to dispatch it, so there is one call.

Weights stay where they are: the kernel gets their addresses. Matrices are float32, or int8 with one scale a row
(:mod:`kexue.generation._int8_kernel`). Tiles of 4 rows by 4 tokens keep 16 sums in registers.

Shapes: N tokens, D width, F inner width, H heads, d width of a head, L layers, V vocabulary, T room of the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic, overload

from kexue.generation._int8_kernel import prefetch, products_int8

__all__ = ["ACTIVATIONS", "LAYER_FIELDS", "MODEL_FIELDS", "step"]

# NaN and infinity keep their meaning: weights that have become NaN must be seen.
_FAST = {"reassoc", "contract", "arcp", "nsz"}
_TOKENS_AT_ONCE = 64  # whose inputs stay near the core while the matrix passes by

# Columns of the tables of addresses; 0 is the address of what a model does not have.
LAYER_FIELDS = (
    "norm1", "norm1_bias", "qkv", "qkv_scale", "qkv_bias", "out", "out_scale", "out_bias",
    "norm2", "norm2_bias", "up", "up_scale", "up_bias", "gate", "gate_scale", "gate_bias",
    "down", "down_scale", "down_bias",
)  # fmt: skip
MODEL_FIELDS = (
    "token", "position", "segment", "embedding_norm", "embedding_norm_bias", "final_norm", "final_norm_bias",
    "head", "head_scale", "head_bias",
)  # fmt: skip
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "swiglu")


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@njit(inline="always")
def _vector(address, size):  # type: ignore[no-untyped-def]
    """(size,) float32 at the address; empty without one."""
    return carray(_pointer(address), (size if address != 0 else 0,), np.float32)


@njit(inline="always")
def _exp(x):  # type: ignore[no-untyped-def]
    """Exp to 2 ulp; unlike the library's it is computed for 16 numbers at once."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(0.5)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _activate(x, kind):  # type: ignore[no-untyped-def]
    """The activation, in place, on a vector."""
    one, half = np.float32(1.0), np.float32(0.5)
    if kind == 0:  # gelu: erf after Abramowitz and Stegun 7.1.26, to 2e-7
        for i in range(len(x)):
            z = abs(x[i]) * np.float32(0.70710678)
            t = one / (one + np.float32(0.3275911) * z)
            p = np.float32(1.061405429) * t - np.float32(1.453152027)
            p = p * t + np.float32(1.421413741)
            p = p * t - np.float32(0.284496736)
            p = (p * t + np.float32(0.254829592)) * t
            tail = half * p * _exp(-z * z)  # the mass beyond |x|
            x[i] = x[i] * (one - tail if x[i] > 0 else tail)
    elif kind == 1:  # 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u))
        for i in range(len(x)):
            u = np.float32(1.59576912) * (x[i] + np.float32(0.044715) * x[i] * x[i] * x[i])
            x[i] = x[i] / (one + _exp(-u))
    elif kind == 2:
        for i in range(len(x)):
            x[i] = x[i] if not x[i] < 0 else np.float32(0.0)
    else:
        for i in range(len(x)):
            x[i] = x[i] / (one + _exp(-x[i]))


@njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _norm(x, weight, bias, eps, rms, out):  # type: ignore[no-untyped-def]
    """LayerNorm or RMSNorm of each row; out may be x."""
    n, width = x.shape
    for i in range(n):
        mean = np.float32(0.0)
        if not rms:
            for j in range(width):
                mean += x[i, j]
            mean /= np.float32(width)
        square = np.float32(0.0)
        for j in range(width):
            centred = x[i, j] - mean
            square += centred * centred
        factor = np.float32(1.0) / np.sqrt(square / np.float32(width) + eps)
        if len(bias):
            for j in range(width):
                out[i, j] = (x[i, j] - mean) * factor * weight[j] + bias[j]
        else:
            for j in range(width):
                out[i, j] = (x[i, j] - mean) * factor * weight[j]


@njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _products_float(x, w, out):  # type: ignore[no-untyped-def]
    """The product x w^T. x (N, K), w (M, K), out (N, M)."""
    rows, width = w.shape
    zero = np.float32(0.0)
    last = rows - rows % 4
    flat = w.reshape(-1)
    for start in range(0, x.shape[0], _TOKENS_AT_ONCE):
        stop = min(start + _TOKENS_AT_ONCE, x.shape[0])
        tiled = start + (stop - start) // 4 * 4
        if stop - start < 8:  # memory is the limit; one stream is twice as fast as four
            tiled = start
        for i in range(0, last if tiled > start else 0, 4):
            w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
            ahead = (i + 4) * width  # the next four rows come while these are used
            share = 16 * width // (tiled - start) if start == 0 and i + 8 <= rows else 0
            for c in range(start, tiled, 4):
                for j in range(ahead, ahead + share, 16):
                    prefetch(flat, j)
                ahead += share
                x0, x1, x2, x3 = x[c], x[c + 1], x[c + 2], x[c + 3]
                s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zero
                s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = zero
                for j in range(width):
                    a, b, e, f = w0[j], w1[j], w2[j], w3[j]
                    p, q, r, s = x0[j], x1[j], x2[j], x3[j]
                    s00 += a * p
                    s01 += b * p
                    s02 += e * p
                    s03 += f * p
                    s10 += a * q
                    s11 += b * q
                    s12 += e * q
                    s13 += f * q
                    s20 += a * r
                    s21 += b * r
                    s22 += e * r
                    s23 += f * r
                    s30 += a * s
                    s31 += b * s
                    s32 += e * s
                    s33 += f * s
                out[c, i], out[c, i + 1], out[c, i + 2], out[c, i + 3] = s00, s01, s02, s03
                out[c + 1, i], out[c + 1, i + 1], out[c + 1, i + 2], out[c + 1, i + 3] = s10, s11, s12, s13
                out[c + 2, i], out[c + 2, i + 1], out[c + 2, i + 2], out[c + 2, i + 3] = s20, s21, s22, s23
                out[c + 3, i], out[c + 3, i + 1], out[c + 3, i + 2], out[c + 3, i + 3] = s30, s31, s32, s33
        for i in range(rows):
            row = w[i]
            for c in range(tiled if i < last else start, stop):
                total, x0 = zero, x[c]
                for j in range(width):
                    total += row[j] * x0[j]
                out[c, i] = total


def _products(x, w, out):  # type: ignore[no-untyped-def]
    """The product x w^T. x (N, K) float32, w (M, K) float32 or int8, out (N, M) float32."""
    raise NotImplementedError("to be called by compiled functions")


@overload(_products)
def _choose_products(x, w, out):  # type: ignore[no-untyped-def]
    if w.dtype == types.int8:
        return lambda x, w, out: products_int8(x, w, out)
    return lambda x, w, out: _products_float(x, w, out)


@njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _linear(x, w, scale, bias, out):  # type: ignore[no-untyped-def]
    """The product x w^T, scaled, with bias. x (N, K), w (M, K), out (N, M)."""
    _products(x, w, out)
    for c in range(len(out)):
        row = out[c]
        if len(scale):
            for i in range(len(row)):
                row[i] *= scale[i]
        if len(bias):
            for i in range(len(row)):
                row[i] += bias[i]


@njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _rotate(x, heads, cos, sin, scratch):  # type: ignore[no-untyped-def]
    """Turn the pairs (2i, 2i + 1) of each head of a vector; put out as halves."""
    half = len(cos)
    for h in range(heads):
        for i in range(half):
            even, odd = x[2 * (h * half + i)], x[2 * (h * half + i) + 1]
            scratch[i] = even * cos[i] - odd * sin[i]
            scratch[half + i] = even * sin[i] + odd * cos[i]
        for i in range(2 * half):
            x[2 * h * half + i] = scratch[i]


@njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _attend(qkv, slots, positions, keys, values, out, scores):  # type: ignore[no-untyped-def]
    """Attention of each token to what its row of the cache holds up to its position. qkv (N, 3D), out (N, D)."""
    heads, room, width = keys.shape[1:]
    flat_keys, flat_values = keys.reshape(-1), values.reshape(-1)
    scale, zero = np.float32(1.0 / np.sqrt(width)), np.float32(0.0)
    for n in range(len(slots)):
        length = positions[n] + 1
        fours = length - length % 4
        for h in range(heads):
            q = qkv[n, h * width : (h + 1) * width]
            k, v = keys[slots[n], h], values[slots[n], h]
            after = n + 1 if h + 1 == heads and n + 1 < len(slots) else n
            ahead = (
                (slots[after] * heads + (h + 1) % heads) * room * width
            )  # the next head comes while this one is used
            for t in range(0, fours, 4):
                for i in range(ahead + t * width, ahead + (t + 4) * width, 16):
                    prefetch(flat_keys, i)
                a = b = c = d = zero
                k0, k1, k2, k3 = k[t], k[t + 1], k[t + 2], k[t + 3]
                for i in range(width):
                    a += q[i] * k0[i]
                    b += q[i] * k1[i]
                    c += q[i] * k2[i]
                    d += q[i] * k3[i]
                scores[t], scores[t + 1], scores[t + 2], scores[t + 3] = a, b, c, d
            for t in range(fours, length):
                a = zero
                for i in range(width):
                    a += q[i] * k[t, i]
                scores[t] = a
            mass = _softmax(scores[:length], scale)
            target = out[n, h * width : (h + 1) * width]
            target[:] = zero
            for t in range(0, fours, 4):
                for i in range(ahead + t * width, ahead + (t + 4) * width, 16):
                    prefetch(flat_values, i)
                v0, v1, v2, v3 = v[t], v[t + 1], v[t + 2], v[t + 3]
                a, b, c, d = scores[t], scores[t + 1], scores[t + 2], scores[t + 3]
                for i in range(width):
                    target[i] += a * v0[i] + b * v1[i] + c * v2[i] + d * v3[i]
            for t in range(fours, length):
                for i in range(width):
                    target[i] += scores[t] * v[t, i]
            for i in range(width):
                target[i] /= mass


@njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _softmax(scores, scale):  # type: ignore[no-untyped-def]
    """exp(scale (scores - maximum)) in place; the sum."""
    top, mass = scores[0], np.float32(0.0)
    for t in range(len(scores)):
        top = scores[t] if scores[t] > top else top
    _exponentials(scores, top, scale)
    for t in range(len(scores)):
        mass += scores[t]
    return mass


@njit(cache=True, nogil=True, fastmath={"contract"}, error_model="numpy")
def _exponentials(scores, top, scale):  # type: ignore[no-untyped-def]
    for t in range(len(scores)):  # not in the loops around it: they let the compiler reorder sums
        scores[t] = _exp(scale * (scores[t] - top))


@njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def _matrix(address, rows, columns, kind):  # type: ignore[no-untyped-def]
    """(rows, columns) at the address, of the dtype of ``kind``."""
    return carray(_pointer(address), (rows, columns), kind.dtype)


@njit(cache=True, nogil=True, fastmath=_FAST, error_model="numpy")
def step(tokens, slots, positions, wanted, cache, layers, model, sizes, eps, kind, rotation, logits):  # type: ignore[no-untyped-def]
    """Advance by N tokens.

    Args:
        tokens: (N,) ids.
        slots: (N,) rows of the cache.
        positions: (N,) positions in these rows; all earlier ones are in the cache or among the tokens.
        wanted: (M,) indices of the tokens after which the next one is asked for.
        cache: (L, 2, B, H, T, d) keys and values; the tokens' own are added.
        layers: (L, len(LAYER_FIELDS)) addresses.
        model: (len(MODEL_FIELDS),) addresses.
        sizes: (D, H, F, V, P, activation, rms, post_norm) where P is the length of the table of positions.
        eps: Of the norms.
        kind: Any array of the dtype of the matrices.
        rotation: (2, T, d / 2) cosines and sines of rotary positions; empty for learned ones.
        logits: (M, V) is filled.
    """
    n, room = len(tokens), cache.shape[4]
    width, heads, inner, vocabulary, table = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    act, rms, post = sizes[5], sizes[6] != 0, sizes[7] != 0
    head = width // heads
    x, h = np.empty((n, width), np.float32), np.empty((n, width), np.float32)
    mixed, qkv = np.empty((n, width), np.float32), np.empty((n, 3 * width), np.float32)
    ff = np.empty((n, inner), np.float32)
    gate = np.empty((n if act == 4 else 0, inner), np.float32)
    scores = np.empty(room, np.float32)
    words = carray(_pointer(model[0]), (vocabulary, width), np.float32)
    places = carray(_pointer(model[1]), (table, width), np.float32)
    segment = _vector(model[2], width)
    for i in range(n):
        x[i] = words[tokens[i]]
        if table:
            x[i] += places[positions[i]]
        if len(segment):
            x[i] += segment
    if model[3] != 0:
        _norm(x, _vector(model[3], width), _vector(model[4], width), eps, rms, x)
    for layer in range(len(layers)):
        a = layers[layer]
        norm1, norm1_bias = _vector(a[0], width), _vector(a[1], width)
        norm2, norm2_bias = _vector(a[8], width), _vector(a[9], width)
        source = x
        if not post:
            _norm(x, norm1, norm1_bias, eps, rms, h)
            source = h
        w = _matrix(a[2], 3 * width, width, kind)
        _linear(source, w, _vector(a[3], 3 * width), _vector(a[4], 3 * width), qkv)
        keys, values = cache[layer, 0], cache[layer, 1]
        for i in range(n):
            place = positions[i]
            if rotation.shape[1]:
                _rotate(qkv[i, :width], heads, rotation[0, place], rotation[1, place], h[i])
                _rotate(qkv[i, width : 2 * width], heads, rotation[0, place], rotation[1, place], h[i])
            for j in range(heads):
                keys[slots[i], j, place] = qkv[i, width + j * head : width + (j + 1) * head]
                values[slots[i], j, place] = qkv[i, 2 * width + j * head : 2 * width + (j + 1) * head]
        _attend(qkv, slots, positions, keys, values, mixed, scores)
        _linear(mixed, _matrix(a[5], width, width, kind), _vector(a[6], width), _vector(a[7], width), h)
        for i in range(n):
            x[i] += h[i]
        source = x
        if post:
            _norm(x, norm1, norm1_bias, eps, rms, x)
        else:
            _norm(x, norm2, norm2_bias, eps, rms, h)
            source = h
        w = _matrix(a[10], inner, width, kind)
        _linear(source, w, _vector(a[11], inner), _vector(a[12], inner), ff)
        if act == 4:
            w = _matrix(a[13], inner, width, kind)
            _linear(source, w, _vector(a[14], inner), _vector(a[15], inner), gate)
            _activate(gate.reshape(-1), act)
            for i in range(n):
                for j in range(inner):
                    ff[i, j] *= gate[i, j]
        else:
            _activate(ff.reshape(-1), act)
        _linear(ff, _matrix(a[16], width, inner, kind), _vector(a[17], width), _vector(a[18], width), h)
        for i in range(n):
            x[i] += h[i]
        if post:
            _norm(x, norm2, norm2_bias, eps, rms, x)
    last = np.empty((len(wanted), width), np.float32)
    for i in range(len(wanted)):
        last[i] = x[wanted[i]]
    if model[5] != 0:
        _norm(last, _vector(model[5], width), _vector(model[6], width), eps, rms, last)
    w = _matrix(model[7], vocabulary, width, kind)
    _linear(last, w, _vector(model[8], vocabulary), _vector(model[9], vocabulary), logits)
