"""Compiled pieces of a decoding step, on addresses of float32 buffers, 16 lanes at a time.

Buffers are padded to whole vectors, and the padding of an input holds zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sketchconv.kernels.decoder.ir import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    SIZES,
    VF32,
    call,
    exponential,
    fold,
    load,
    load_wide,
    local,
    multiply_add,
    pointer,
    same,
    spread,
    store,
    sum_all,
    vector,
    zeros,
)

VECTOR = 4 * LANES  # bytes of 16 floats
PREFETCH_BYTES = 4096
TABLE = 4  # vectors of one value row that are summed at once


def _loop(b: Any, count: Any, body: Callable[[Any], None]) -> None:
    with cgutils.for_range(b, count) as loop:
        body(loop.index)


def _vectors(b: Any, columns: Any) -> Any:
    return b.udiv(b.add(columns, I64(LANES - 1)), I64(LANES))


def _at(b: Any, address: Any, number: Any, size: int) -> Any:
    return b.add(address, b.mul(number, I64(size)))


def _dense_dot(typing: Any, kind: Any, weights: Any, x: Any, columns: Any) -> Any:
    """Dot product of a dense row ("F16", "BF16" or "F32") and float32 `x`, both `columns` long."""
    name = kind.literal_value
    size = SIZES[name]

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _, row, x, columns = args
        sums = zeros(b, 4)

        def add(number: Any, total: Any) -> None:
            value = load_wide(b, _at(b, row, number, LANES * size), name)
            other = load(b, _at(b, x, number, VECTOR), VF32)
            b.store(multiply_add(b, value, other, b.load(total)), total)

        def four(number: Any) -> None:
            first = b.mul(number, I64(4))
            ahead = b.add(_at(b, row, first, LANES * size), I64(PREFETCH_BYTES))
            for line in range(0, 4 * LANES * size, 64):
                hint = [pointer(b, b.add(ahead, I64(line)), I8), I32(0), I32(3), I32(1)]
                call(b, "llvm.prefetch.p0", ir.VoidType(), hint)
            for i, total in enumerate(sums):
                add(b.add(first, I64(i)), total)

        whole = b.udiv(columns, I64(LANES))
        _loop(b, b.udiv(whole, I64(4)), four)
        done = b.mul(b.udiv(whole, I64(4)), I64(4))
        _loop(b, b.sub(whole, done), lambda i: add(b.add(done, i), sums[0]))
        result = local(b, F32)
        b.store(sum_all(b, sums), result)
        done = b.mul(whole, I64(LANES))

        def one(number: Any) -> None:
            at = b.add(done, number)
            value = b.extract_element(load_wide(b, _at(b, row, at, size), name, 1), I32(0))
            product = b.fmul(value, load(b, _at(b, x, at, 4), F32))
            b.store(b.fadd(b.load(result), product), result)

        _loop(b, b.sub(columns, done), one)
        return b.load(result)

    return types.float32(kind, types.int64, types.int64, types.int64), codegen


def _dense_row(typing: Any, kind: Any, source: Any, target: Any, columns: Any) -> Any:
    """Convert a dense row to float32."""
    name = kind.literal_value
    size = SIZES[name]

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _, source, target, columns = args

        def one(at: Any) -> None:
            value = b.extract_element(load_wide(b, _at(b, source, at, size), name, 1), I32(0))
            store(b, value, _at(b, target, at, 4))

        _loop(b, columns, one)
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64, types.int64), codegen


def _normalise(typing: Any, x: Any, weight: Any, target: Any, columns: Any, eps: Any) -> Any:
    """`target = x / sqrt(mean(x * x) + eps) * weight` over `columns` values."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, weight, target, columns, eps = args
        count = _vectors(b, columns)
        sums = zeros(b, 4)

        def square(number: Any, total: Any) -> None:
            value = load(b, _at(b, x, number, VECTOR), VF32)
            b.store(multiply_add(b, value, value, b.load(total)), total)

        def four(number: Any) -> None:
            for i, total in enumerate(sums):
                square(b.add(b.mul(number, I64(4)), I64(i)), total)

        _loop(b, b.udiv(count, I64(4)), four)
        done = b.mul(b.udiv(count, I64(4)), I64(4))
        _loop(b, b.sub(count, done), lambda i: square(b.add(done, i), sums[0]))
        mean = b.fdiv(sum_all(b, sums), b.uitofp(columns, F32))
        root = call(b, "llvm.sqrt.f32", F32, [b.fadd(mean, eps)])
        factor = spread(b, b.fdiv(F32(1.0), root))

        def scale(number: Any) -> None:
            value = b.fmul(load(b, _at(b, x, number, VECTOR), VF32), factor)
            value = b.fmul(value, load(b, _at(b, weight, number, VECTOR), VF32))
            store(b, value, _at(b, target, number, VECTOR))

        _loop(b, count, scale)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32), codegen


def _gate(typing: Any, gate: Any, up: Any, target: Any, columns: Any) -> Any:
    """`target = gate / (1 + exp(-gate)) * up`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        gate, up, target, columns = args

        def one(number: Any) -> None:
            value = load(b, _at(b, gate, number, VECTOR), VF32)
            below = b.fadd(exponential(b, b.fneg(value)), same(1.0))
            value = b.fmul(b.fdiv(value, below), load(b, _at(b, up, number, VECTOR), VF32))
            store(b, value, _at(b, target, number, VECTOR))

        _loop(b, _vectors(b, columns), one)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _scores(
    typing: Any, kind: Any, keys: Any, query: Any, target: Any, dim: Any, blocks: Any
) -> Any:
    """Dot products of `query` with the keys of one head, 16 positions per block.

    A block of keys is ``[dim, 16]``, in `kind`; `query` holds `dim` float32.
    """
    name = kind.literal_value
    size = SIZES[name] * LANES

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _, keys, query, target, dim, blocks = args

        def block(number: Any) -> None:
            base = b.add(keys, b.mul(number, b.mul(dim, I64(size))))
            sums = zeros(b, 4)

            def add(i: Any, total: Any) -> None:
                value = spread(b, load(b, _at(b, query, i, 4), F32))
                key = load_wide(b, _at(b, base, i, size), name)
                b.store(multiply_add(b, key, value, b.load(total)), total)

            def four(i: Any) -> None:
                for part, total in enumerate(sums):
                    add(b.add(b.mul(i, I64(4)), I64(part)), total)

            _loop(b, b.udiv(dim, I64(4)), four)
            done = b.mul(b.udiv(dim, I64(4)), I64(4))
            _loop(b, b.sub(dim, done), lambda i: add(b.add(done, i), sums[0]))
            one, two, three, last = (b.load(total) for total in sums)
            value = b.fadd(b.fadd(one, two), b.fadd(three, last))
            store(b, value, _at(b, target, number, VECTOR))

        _loop(b, blocks, block)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 5), codegen


def _softmax(typing: Any, scores: Any, blocks: Any, scale: Any) -> Any:
    """Replace 16 `blocks` of scores by exp(scale * (score - largest)); returns the sum of all.

    `scale` is positive. Scores of minus infinity become zero.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        scores, blocks, scale = args
        most = local(b, VF32)
        b.store(same(float("-inf")), most)

        def largest(number: Any) -> None:
            value = load(b, _at(b, scores, number, VECTOR), VF32)
            more = b.fcmp_ordered(">", value, b.load(most))
            b.store(b.select(more, value, b.load(most)), most)

        _loop(b, blocks, largest)
        top = fold(b, b.load(most), lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
        top, factor = spread(b, top), spread(b, scale)
        (total,) = zeros(b, 1)

        def power(number: Any) -> None:
            at = _at(b, scores, number, VECTOR)
            value = exponential(b, b.fmul(b.fsub(load(b, at, VF32), top), factor))
            store(b, value, at)
            b.store(b.fadd(b.load(total), value), total)

        _loop(b, blocks, power)
        return sum_all(b, [total])

    return types.float32(types.int64, types.int64, types.float32), codegen


def _mix(
    typing: Any, kind: Any, values: Any, weights: Any, target: Any, width: Any, count: Any
) -> Any:
    """`target[:] = sum of weights[t] * values[t, :]` over `count` positions.

    A position of `values` takes `width` entries of `kind`, a multiple of 16.
    """
    name = kind.literal_value
    size = SIZES[name]

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _, values, weights, target, width, count = args
        row = b.mul(width, I64(size))
        halves = b.udiv(count, I64(2))

        def part(first: Any, vectors: int) -> None:
            """Sum `vectors` vectors of every position, from vector `first` on."""
            start = _at(b, values, first, LANES * size)
            sums = zeros(b, 2 * vectors)

            def add(t: Any, mine: list[Any]) -> None:
                weight = spread(b, load(b, _at(b, weights, t, 4), F32))
                at = b.add(start, b.mul(t, row))
                for i, total in enumerate(mine):
                    value = load_wide(b, b.add(at, I64(i * LANES * size)), name)
                    b.store(multiply_add(b, value, weight, b.load(total)), total)

            def two(i: Any) -> None:
                add(b.mul(i, I64(2)), sums[:vectors])
                add(b.add(b.mul(i, I64(2)), I64(1)), sums[vectors:])

            _loop(b, halves, two)
            with b.if_then(b.trunc(count, ir.IntType(1))):
                add(b.sub(count, I64(1)), sums[:vectors])
            for i in range(vectors):
                value = b.fadd(b.load(sums[i]), b.load(sums[vectors + i]))
                store(b, value, _at(b, target, b.add(first, I64(i)), VECTOR))

        wide = b.udiv(width, I64(LANES))
        _loop(b, b.udiv(wide, I64(TABLE)), lambda i: part(b.mul(i, I64(TABLE)), TABLE))
        done = b.mul(b.udiv(wide, I64(TABLE)), I64(TABLE))
        _loop(b, b.sub(wide, done), lambda i: part(b.add(done, i), 1))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 5), codegen


def _add_to(typing: Any, source: Any, target: Any, count: Any) -> Any:
    """`target += source` for `count` float32, and nothing beyond."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target, count = args
        whole = b.udiv(count, I64(LANES))
        done = b.mul(whole, I64(LANES))

        def add(first: Any, number: Any, size: int, kind: Any) -> None:
            at = b.add(first, b.mul(number, I64(size)))
            to = _at(b, target, at, 4)
            store(b, b.fadd(load(b, to, kind), load(b, _at(b, source, at, 4), kind)), to)

        _loop(b, whole, lambda i: add(I64(0), i, LANES, VF32))
        _loop(b, b.sub(count, done), lambda i: add(done, i, 1, F32))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def _get(typing: Any, address: Any, number: Any) -> Any:
    """Entry `number` of the float32 at `address`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return load(b, _at(b, *args, 4), F32)

    return types.float32(types.int64, types.int64), codegen


def _put(typing: Any, address: Any, number: Any, value: Any) -> Any:
    """Set entry `number` of the float32, or 16-bit integers, at `address`."""
    kind = types.float32 if isinstance(value, types.Float) else types.uint16
    size = 4 if kind is types.float32 else 2

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        store(b, args[2], _at(b, *args[:2], size))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, kind), codegen


literal: Any = intrinsic(prefer_literal=True)
dense_dot: Any = literal(_dense_dot)
dense_row: Any = literal(_dense_row)
normalise: Any = intrinsic(_normalise)
gate: Any = intrinsic(_gate)
scores: Any = literal(_scores)
softmax: Any = intrinsic(_softmax)
mix: Any = literal(_mix)
add_to: Any = intrinsic(_add_to)
get: Any = intrinsic(_get)
put: Any = intrinsic(_put)
