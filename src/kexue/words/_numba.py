"""Numba kernels: how they are compiled, and the two machine operations that numba does not offer.

``kernel`` compiles on first use and keeps the machine code on disk, so that a second process starts at once.
``prefetch`` asks for a cache line before it is needed; ``gram_tile`` adds a small outer product with the sums held in
registers. Both are emitted as portable LLVM code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

TILE_ROWS = 4
TILE_COLUMNS = 16  # the width of a tile

_LANES = 8


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function without the interpreter lock, cached on disk where a folder for that can be written."""
    # No "nnan" and "ninf": the kernels test for values that are not finite.
    return compiled(nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})(function)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``njit`` with these options, cached on disk where a folder for that can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no writable folder for the cache
            return njit(**options)(function)

    return decorate


def _operation(function: Callable[..., Any]) -> Callable[..., Any]:
    return intrinsic(function)  # numba passes the typing context itself: callers see one argument less


@_operation
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Load the cache line of ``array[index]`` (one-dimensional, C-contiguous) without waiting for it."""
    signature = types.void(array, types.int64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_helper(builder, signature.args[0], args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        name = "llvm.prefetch.p0i8"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(
                builder.module, ir.FunctionType(ir.VoidType(), [pointer.type, i32, i32, i32]), name=name
            )
        builder.call(function, [pointer, i32(0), i32(3), i32(1)])  # read, keep, data
        return context.get_dummy_value()

    return signature, generate


@_operation
def gram_tile(typing: Any, left: Any, row: Any, right: Any, column: Any, out: Any, count: Any) -> Any:
    """Add ``left[:count, row:row+4].T @ right[:count, column:column+16]`` to ``out[row:row+4, column:column+16]``.

    All three arrays are C-contiguous matrices of one floating type; their widths may differ. ``count`` is at least 1.
    The tile must lie inside ``out``, and what it reads inside ``left`` and ``right``. Nothing is checked.
    """
    i64 = types.int64
    signature = types.void(left, i64, right, i64, out, i64)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = [context.make_array(signature.args[k])(context, builder, args[k]) for k in (0, 2, 4)]
        i, j, n = args[1], args[3], args[5]
        element = context.get_value_type(signature.args[0].dtype)
        vector = ir.VectorType(element, _LANES)
        index = ir.IntType(64)
        i32 = ir.IntType(32)
        size = context.get_abi_sizeof(element)
        widths = [builder.extract_value(array.shape, 1) for array in arrays]

        def at(pointer: Any, *offsets: Any) -> Any:
            total = offsets[0]
            for offset in offsets[1:]:
                total = builder.add(total, offset)
            return builder.gep(pointer, [total])

        def load(pointer: Any) -> Any:
            value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
            value.align = size
            return value

        pieces = TILE_COLUMNS // _LANES
        head = builder.block
        loop = builder.append_basic_block("rows")
        done = builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(index)
        k.add_incoming(index(0), head)
        sums = []
        for _ in range(TILE_ROWS * pieces):
            value = builder.phi(vector)
            value.add_incoming(ir.Constant(vector, [0.0] * _LANES), head)
            sums.append(value)
        wide = [load(at(arrays[1].data, builder.mul(k, widths[1]), j, index(_LANES * p))) for p in range(pieces)]
        new = []
        undefined = ir.Constant(vector, ir.Undefined)
        for r in range(TILE_ROWS):
            scalar = builder.load(at(arrays[0].data, builder.mul(k, widths[0]), i, index(r)))
            spread = builder.insert_element(undefined, scalar, i32(0))
            spread = builder.shuffle_vector(spread, undefined, ir.Constant(ir.VectorType(i32, _LANES), [0] * _LANES))
            for p in range(pieces):
                product = builder.fmul(spread, wide[p], flags=("contract",))
                new.append(builder.fadd(product, sums[r * pieces + p], flags=("contract",)))
        following = builder.add(k, index(1))
        k.add_incoming(following, loop)
        for old, value in zip(sums, new, strict=True):
            old.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, n), loop, done)
        builder.position_at_end(done)
        for r in range(TILE_ROWS):
            for p in range(pieces):
                place = at(arrays[2].data, builder.mul(builder.add(i, index(r)), widths[2]), j, index(_LANES * p))
                store = builder.store(
                    builder.fadd(load(place), new[r * pieces + p]), builder.bitcast(place, vector.as_pointer())
                )
                store.align = size
        return context.get_dummy_value()

    return signature, generate
