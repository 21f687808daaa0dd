"""Products with int8 matrices in integers: the inputs of a token become int16 with one scale, sums are exact in int32.

    x ~ scale_x q_x,  |q_x| <= Q = min(2^15 - 1, (2^31 - 1) / (127 K))        out = scale_x (q_x . w)

Q keeps a sum of K products below 2^31. The rounding of the inputs is that of 15 bits at K <= 516, of 14 at 1024, of 10
at 10240; that of the matrix, of 7 bits, outweighs it. Integer sums do not depend on the order of summation, so a token
gets the same numbers in every batch.

x86 has an instruction that multiplies 32 (AVX-512) or 16 (AVX2) pairs of int16 and adds neighbours, twice what floats
get; the compiler does not find it in a loop over tiles, so the tile asks for it by name. On other machines the tile is
a plain loop with the same result.

Shapes: N tokens, K inputs, M outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["prefetch", "products_int8"]

_TOKENS_AT_ONCE = 64  # whose inputs stay near the core while the matrix passes by


def _find_lanes() -> int:
    """Pairs that one instruction multiplies and adds; 0: none that is known."""
    if getattr(config, "CPU_NAME", None):  # code for another machine than this one
        return 0
    try:
        features = binding.get_host_cpu_features()
    except RuntimeError:
        return 0
    return 32 if features.get("avx512bw") else 16 if features.get("avx2") else 0


_LANES = _find_lanes()
_INSTRUCTION = {32: "llvm.x86.avx512.pmaddw.d.512", 16: "llvm.x86.avx2.pmadd.wd"}


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of a number of a flat array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, number(0), number(3), number(1)])  # to read, keep, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def _vector_tile(typing_context: Any, w: Any, i: Any, x: Any, c: Any, stop: Any, sums: Any) -> Any:
    """sums[4 a + b] = x[c + a, :stop] . w[i + b, :stop] for a, b < 4; stop is a multiple of the lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = {n: context.make_array(signature.args[n])(context, builder, arguments[n]) for n in (0, 2, 5)}
        index, lanes = ir.IntType(64), _LANES
        bytes_, shorts = ir.VectorType(ir.IntType(8), lanes), ir.VectorType(ir.IntType(16), lanes)
        total = ir.VectorType(ir.IntType(32), lanes // 2)
        multiply = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(total, [shorts, shorts]), _INSTRUCTION[lanes]
        )
        add_up = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.IntType(32), [total]), f"llvm.vector.reduce.add.v{lanes // 2}i32"
        )

        def rows(array: Any, first: Any) -> list[Any]:
            width = builder.extract_value(array.shape, 1)
            starts = [builder.mul(builder.add(first, index(r)), width) for r in range(4)]
            return [builder.gep(array.data, [start]) for start in starts]

        def load(row: Any, place: Any, kind: Any, align: int) -> Any:
            pointer = builder.bitcast(builder.gep(row, [place]), kind.as_pointer())
            return builder.load(pointer, align=align, typ=kind)

        w_rows, x_rows = rows(arrays[0], arguments[1]), rows(arrays[2], arguments[3])
        zero = ir.Constant(total, [0] * (lanes // 2))
        held = [cgutils.alloca_once_value(builder, zero) for _ in range(16)]  # registers, after optimization
        with cgutils.for_range_slice(builder, index(0), arguments[4], index(lanes)) as (place, _):
            weights = [builder.sext(load(row, place, bytes_, 1), shorts) for row in w_rows]
            for a in range(4):
                values = load(x_rows[a], place, shorts, 2)
                for b in range(4):
                    product = builder.call(multiply, [weights[b], values])
                    builder.store(builder.add(builder.load(held[4 * a + b]), product), held[4 * a + b])
        for n in range(16):
            builder.store(builder.call(add_up, [builder.load(held[n])]), builder.gep(arrays[5].data, [index(n)]))
        return context.get_dummy_value()

    return types.void(w, types.intp, x, types.intp, types.intp, sums), generate


@njit(nogil=True, error_model="numpy")
def _plain_tile(w, i, x, c, stop, sums):  # type: ignore[no-untyped-def]
    for a in range(4):
        for b in range(4):
            total = np.int32(0)
            for j in range(stop):
                total = np.int32(total + np.int32(x[c + a, j]) * np.int32(w[i + b, j]))
            sums[4 * a + b] = total


_tile = _vector_tile if _LANES else _plain_tile
_STEP = max(_LANES, 1)


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"})
def _round_tokens(x, integers, scales):  # type: ignore[no-untyped-def]
    """Rows of x (N, K) as int16 and scales; a row that is not finite gets the scale NaN."""
    n, width = x.shape
    most = np.float32(min(32767, 2147483647 // (127 * width)))
    for c in range(n):
        row = x[c]
        top = total = np.float32(0.0)
        for j in range(width):
            size = abs(row[j])
            top = size if size > top else top
            total += size
        if not total <= np.float32(3e38):  # an isfinite would be optimized away
            integers[c] = 0
            scales[c] = np.float32(np.nan)
            continue
        factor = most / top if top > np.float32(1e-33) else np.float32(0.0)  # or it would be infinite
        scales[c] = top / most
        for j in range(width):
            integers[c, j] = np.int16(np.rint(row[j] * factor))


@njit(cache=True, nogil=True, error_model="numpy")
def products_int8(x, w, out):  # type: ignore[no-untyped-def]
    """The product x w^T. x (N, K) float32, w (M, K) int8, out (N, M) float32."""
    rows, width = w.shape
    n = len(x)
    q, scales = np.empty((n, width), np.int16), np.empty(n, np.float32)
    _round_tokens(x, q, scales)
    sums = np.empty(16, np.int32)
    flat = w.reshape(-1)
    whole, last = width - width % _STEP, rows - rows % 4
    for start in range(0, n, _TOKENS_AT_ONCE):
        stop = min(start + _TOKENS_AT_ONCE, n)
        tiled = start + (stop - start) // 4 * 4
        for i in range(0, last, 4):
            ahead = (i + 4) * width  # the next four rows come while these are used
            share = 16 * width // (tiled - start) if start == 0 and i + 8 <= rows and tiled > start else 0
            for c in range(start, tiled, 4):
                for j in range(ahead, ahead + share, 64):
                    prefetch(flat, j)
                ahead += share
                _tile(w, i, q, c, whole, sums)
                if whole < width:
                    for a in range(4):
                        for b in range(4):
                            for j in range(whole, width):
                                sums[4 * a + b] += np.int32(q[c + a, j]) * np.int32(w[i + b, j])
                for a in range(4):
                    for b in range(4):
                        out[c + a, i + b] = np.float32(sums[4 * a + b]) * scales[c + a]
        for i in range(rows):
            row = w[i]
            for c in range(tiled if i < last else start, stop):
                total, values = np.int32(0), q[c]
                for j in range(width):
                    total = np.int32(total + np.int32(row[j]) * np.int32(values[j]))
                out[c, i] = np.float32(total) * scales[c]
