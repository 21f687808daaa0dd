"""Vector operations for numba kernels whose lanes are eight matrices: sums of columns, and the sweeps of QL.

All work on one flat float64 array. A place is the number of an entry of it; steps and counts are in vectors of eight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

W = 8  # lanes
EPS = 2.0**-52

_VECTOR = ir.VectorType(ir.DoubleType(), W)
_I64 = ir.IntType(64)


class _Emitter:
    """Vector instructions on a flat float64 array, addressed by the number of an entry."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        self.builder = builder
        self.data = context.make_array(kind)(context, builder, array).data

    def pointer(self, index: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.data, [index]), _VECTOR.as_pointer())

    def load(self, index: Any) -> Any:
        value = self.builder.load(self.pointer(index))
        value.align = 8
        return value

    def store(self, value: Any, index: Any) -> None:
        self.builder.store(value, self.pointer(index)).align = 8

    def madd(self, a: Any, b: Any, c: Any) -> Any:
        """A b + c."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    def spread(self, number: Any) -> Any:
        """A vector of one integer, as floats."""
        i32 = ir.IntType(32)
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        first = self.builder.insert_element(undefined, self.builder.sitofp(number, ir.DoubleType()), i32(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(i32, W), [0] * W))

    def function(self, name: str) -> Any:
        """An operation of LLVM on one vector."""
        name = f"llvm.{name}.v{W}f64"
        found = self.builder.module.globals.get(name)
        return found or ir.Function(self.builder.module, ir.FunctionType(_VECTOR, [_VECTOR]), name=name)

    def constant(self, x: float) -> Any:
        return ir.Constant(_VECTOR, [x] * W)

    def loop(self, count: Any, body: Callable[..., Any], *start: Any) -> list[Any]:
        """``values = body(k, *values)`` for k < ``count``, which is at least 1; starts from and returns vectors."""
        builder = self.builder
        head = builder.block
        loop, done = builder.append_basic_block("lanes"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(_I64)
        k.add_incoming(_I64(0), head)
        values = [builder.phi(_VECTOR) for _ in start]
        for value, first in zip(values, start, strict=True):
            value.add_incoming(first, head)
        new = body(k, *values) or []
        following = builder.add(k, _I64(1))
        for value, x in zip([k, *values], [following, *new], strict=True):
            value.add_incoming(x, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
        builder.position_at_end(done)
        return list(new)

    def at(self, start: Any, k: Any, step: Any = None) -> Any:
        """The place of the k-th vector, or of the k-th in steps of so many vectors."""
        wide = self.builder.mul(k, _I64(W)) if step is None else self.builder.mul(k, self.builder.mul(step, _I64(W)))
        return self.builder.add(start, wide)


def _adder(terms: int) -> Any:
    """``y[k] += sum over t < terms of a[t] x_t[k]`` for k < count; steps and counts are in vectors."""

    @intrinsic
    def add(typing, w, y, x, step_x, a, step_a, count):  # type: ignore[no-untyped-def]
        i64 = types.int64

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = _Emitter(context, builder, signature.args[0], args[0])
            _, y, x, step_x, a, step_a, count = args
            factors = [emit.load(emit.at(a, _I64(t), step_a)) for t in range(terms)]
            starts = [emit.at(x, _I64(t), step_x) for t in range(terms)]

            def body(k: Any) -> None:
                place = emit.at(y, k)
                total = emit.load(place)
                for factor, start in zip(factors, starts, strict=True):
                    total = emit.madd(factor, emit.load(emit.at(start, k)), total)
                emit.store(total, place)

            emit.loop(count, body)
            return context.get_dummy_value()

        return types.void(w, i64, i64, i64, i64, i64, i64), generate

    return add


add1, add2, add4 = _adder(1), _adder(2), _adder(4)


@intrinsic
def scale(typing, w, y, x, a, count):  # type: ignore[no-untyped-def]
    """``y[k] = a x[k]``."""
    i64 = types.int64

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emitter(context, builder, signature.args[0], args[0])
        _, y, x, a, count = args
        factor = emit.load(a)

        def body(k: Any) -> None:
            emit.store(builder.fmul(factor, emit.load(emit.at(x, k))), emit.at(y, k))

        emit.loop(count, body)
        return context.get_dummy_value()

    return types.void(w, i64, i64, i64, i64), generate


@intrinsic
def dot(typing, w, out, x, y, count):  # type: ignore[no-untyped-def]
    """``out = sum over k of x[k] y[k]``."""
    i64 = types.int64

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emitter(context, builder, signature.args[0], args[0])
        _, out, x, y, count = args

        def body(k: Any, total: Any) -> list[Any]:
            return [emit.madd(emit.load(emit.at(x, k)), emit.load(emit.at(y, k)), total)]

        emit.store(emit.loop(count, body, emit.constant(0.0))[0], out)
        return context.get_dummy_value()

    return types.void(w, i64, i64, i64, i64), generate


@intrinsic
def ends(typing, w, d, e, out, low, last):  # type: ignore[no-untyped-def]
    """The first i from ``low`` with a negligible e[i] in each lane, or ``last``, as a number; low < last."""
    i64 = types.int64

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emitter(context, builder, signature.args[0], args[0])
        _, d, e, out, low, last = args

        def size(place: Any) -> Any:
            return builder.call(emit.function("fabs"), [emit.load(place)])

        def body(k: Any, found: Any) -> list[Any]:
            i = builder.sub(builder.sub(last, _I64(1)), k)
            around = builder.fadd(size(emit.at(d, i)), size(emit.at(d, builder.add(i, _I64(1)))))
            small = builder.fcmp_ordered("<=", size(emit.at(e, i)), builder.fmul(around, emit.constant(EPS)))
            return [builder.select(small, emit.spread(i), found)]

        emit.store(emit.loop(builder.sub(last, low), body, emit.spread(last))[0], out)
        return context.get_dummy_value()

    return types.void(w, i64, i64, i64, i64, i64), generate


@intrinsic
def sweep(typing, w, d, e, turns, state, low, reach):  # type: ignore[no-untyped-def]
    """One sweep of QL from i = reach - 1 down to low, in the lanes whose block reaches beyond i.

    ``state`` holds g, p and the end of the block; ``turns`` gets c and s of each i, 1 and 0 in the other lanes.
    """
    i64 = types.int64

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = _Emitter(context, builder, signature.args[0], args[0])
        _, d, e, turns, state, low, reach = args
        places = [emit.at(state, _I64(k)) for k in range(3)]
        end = emit.load(places[2])
        one, zero = emit.constant(1.0), emit.constant(0.0)

        def body(k: Any, c: Any, s: Any, g: Any, p: Any) -> list[Any]:
            i = builder.sub(builder.sub(reach, _I64(1)), k)
            after = builder.add(i, _I64(1))
            d0, d1, e0, e1 = (emit.load(emit.at(x, y)) for x in (d, e) for y in (i, after))
            active = builder.fcmp_ordered("<", emit.spread(i), end)
            f, b = builder.fmul(s, e0), builder.fmul(c, e0)
            r = builder.call(emit.function("sqrt"), [emit.madd(f, f, builder.fmul(g, g))])
            still = builder.fcmp_ordered("==", r, zero)
            inverse = builder.fdiv(one, builder.select(still, one, r))
            new_s = builder.fmul(f, inverse)
            new_c = builder.select(still, one, builder.fmul(g, inverse))
            q = builder.fsub(d1, p)
            t = emit.madd(builder.fsub(d0, q), new_s, builder.fmul(builder.fmul(emit.constant(2.0), new_c), b))
            new_p = builder.fmul(new_s, t)
            new_g = builder.fsub(builder.fmul(new_c, t), b)

            def choose(new: Any, old: Any) -> Any:
                return builder.select(active, new, old)

            emit.store(choose(r, e1), emit.at(e, after))
            emit.store(choose(builder.fadd(q, new_p), d1), emit.at(d, after))
            turn = emit.at(turns, i, _I64(2))
            emit.store(choose(new_c, one), turn)
            emit.store(choose(new_s, zero), builder.add(turn, _I64(W)))
            return [choose(new_c, c), choose(new_s, s), choose(new_g, g), choose(new_p, p)]

        _, _, g, p = emit.loop(builder.sub(reach, low), body, one, one, emit.load(places[0]), emit.load(places[1]))
        emit.store(g, places[0])
        emit.store(p, places[1])
        return context.get_dummy_value()

    return types.void(w, i64, i64, i64, i64, i64, i64), generate


def _rotator(rows: int) -> Any:
    """Apply the turns of one sweep to so many rows of eigenvectors, each of which passes through registers once."""

    @intrinsic
    def rotate(typing, w, q, step, turns, low, reach):  # type: ignore[no-untyped-def]
        i64 = types.int64

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = _Emitter(context, builder, signature.args[0], args[0])
            _, q, step, turns, low, reach = args
            starts = [emit.at(q, _I64(r), step) for r in range(rows)]

            def body(k: Any, *carried: Any) -> list[Any]:
                i = builder.sub(builder.sub(reach, _I64(1)), k)
                turn = emit.at(turns, i, _I64(2))
                c, s = emit.load(turn), emit.load(builder.add(turn, _I64(W)))
                minus = builder.fneg(s)
                following = []
                for start, x in zip(starts, carried, strict=True):
                    y = emit.load(emit.at(start, i))
                    emit.store(emit.madd(c, x, builder.fmul(s, y)), emit.at(start, builder.add(i, _I64(1))))
                    following.append(emit.madd(minus, x, builder.fmul(c, y)))
                return following

            last = emit.loop(builder.sub(reach, low), body, *(emit.load(emit.at(x, reach)) for x in starts))
            for start, x in zip(starts, last, strict=True):
                emit.store(x, emit.at(start, low))
            return context.get_dummy_value()

        return types.void(w, i64, i64, i64, i64, i64), generate

    return rotate


rotate1, rotate4 = _rotator(1), _rotator(4)
