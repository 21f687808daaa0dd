"""Exponential noise in float32 on the CPU: bits and logarithm in one loop that the compiler turns into vector code.

The bits are those of sfc32 (Doty-Humphrey's small fast counter generator), sixteen independent lanes side by side,
which is one vector register; a lane's period is at least 2^32 outputs because of its counter, 2^127 on average. With r
a 32-bit output, u = (r + .5) 2^-32 and y = 1 - u = (~r + .5) 2^-32, both to full relative precision, E = -log y is
taken from u where y is near 1 and from y elsewhere, so that E keeps its relative precision from 2^-33 to 33 log 2. The
logarithm is the polynomial of the C library musl (and of FreeBSD before it), good to 1e-7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from kexue.words._numba import compiled

LANES = 16
_f32, _i32, _u32, _u64 = np.float32, np.int32, np.uint32, np.uint64

# "numpy": a division by zero does not branch to an exception, which would keep the loop from being vectorised.
_vectorised = compiled(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})


def _bitcast(source: Any, target: Any) -> Any:
    def bits(typing: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), generate

    return intrinsic(bits)


_as_int = _bitcast(types.float32, types.int32)  # numba's own ``view`` of a scalar goes through memory
_as_float = _bitcast(types.int32, types.float32)


@_vectorised
def _minus_log(r):  # type: ignore[no-untyped-def]
    """-log((~r + .5) 2^-32)."""
    u = (_f32(r) + _f32(0.5)) * _f32(2.0**-32)
    y = (_f32(_u32(~r)) + _f32(0.5)) * _f32(2.0**-32)
    shifted = _i32(_as_int(_f32(y)) - _i32(0x3F3504F3))  # y = 2^k m with m from sqrt(1/2) to sqrt 2
    k = _i32(shifted >> _i32(23))
    m = _as_float(_i32(_i32(shifted & _i32(0x7FFFFF)) + _i32(0x3F3504F3)))
    f = -u if k == 0 else m - _f32(1.0)
    s = f / (_f32(2.0) + f)
    z = s * s
    w = z * z
    tail = z * (_f32(0.66666662693) + w * _f32(0.28498786688)) + w * (_f32(0.40000972152) + w * _f32(0.24279078841))
    half = _f32(0.5) * f * f
    return half - s * (half + tail) - f - _f32(k) * _f32(0.69314718056)


@_vectorised
def _next(state, lane):  # type: ignore[no-untyped-def]
    """The next 32 bits of a lane."""
    a, b, c, counter = state[0, lane], state[1, lane], state[2, lane], state[3, lane]
    r = _u32(_u32(a + b) + counter)
    state[3, lane] = _u32(counter + _u32(1))
    state[0, lane] = b ^ (b >> _u32(9))
    state[1, lane] = _u32(c + _u32(c << _u32(3)))
    state[2, lane] = _u32(_u32((c << _u32(21)) | (c >> _u32(11))) + r)
    return r


@_vectorised
def fill(state, out):  # type: ignore[no-untyped-def]
    """Fill a flat float32 array with Exp(1) noise and advance the state."""
    full = out.shape[0] // LANES
    for j in range(full + 1):
        at = j * LANES
        count = min(LANES, out.shape[0] - at)
        if count == LANES:
            for lane in range(LANES):
                out[at + lane] = _minus_log(_next(state, lane))
        else:
            for lane in range(count):
                out[at + lane] = _minus_log(_next(state, lane))


@_vectorised
def start(seed):  # type: ignore[no-untyped-def]
    """State (4, LANES) from a 64-bit seed: splitmix64 for the words, then some rounds to mix them."""
    state = np.empty((4, LANES), np.uint32)
    x = _u64(seed)
    for lane in range(LANES):
        for i in range(3):
            x += _u64(0x9E3779B97F4A7C15)
            z = x
            z = (z ^ (z >> _u64(30))) * _u64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> _u64(27))) * _u64(0x94D049BB133111EB)
            state[i, lane] = _u32(z ^ (z >> _u64(31)))
        state[3, lane] = _u32(1)
    waste = np.empty(15 * LANES, np.float32)
    fill(state, waste)
    return state


@_vectorised
def fill_from(seed, out):  # type: ignore[no-untyped-def]
    """Fill a flat float32 array from a 64-bit seed, in one call."""
    fill(start(seed), out)
