"""Compiled pieces of attention: scores with cached keys, their softmax, and the weighed values."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sketchconv.kernels.decoder.ir import (
    F32,
    I64,
    LANES,
    SIZES,
    VECTOR,
    VF32,
    accumulate,
    at,
    exponential,
    fold,
    load,
    load_wide,
    local,
    loop,
    multiply_add,
    same,
    spread,
    store,
    zeros,
)

TABLE = 4  # vectors of one position's values that are summed at once


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

            def add(i: Any, total: Any) -> None:
                value = spread(b, load(b, at(b, query, i, 4), F32))
                key = load_wide(b, at(b, base, i, size), name)
                b.store(multiply_add(b, key, value, b.load(total)), total)

            store(b, accumulate(b, dim, add), at(b, target, number, VECTOR))

        loop(b, blocks, block)
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
            value = load(b, at(b, scores, number, VECTOR), VF32)
            more = b.fcmp_ordered(">", value, b.load(most))
            b.store(b.select(more, value, b.load(most)), most)

        loop(b, blocks, largest)
        top = fold(b, b.load(most), lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
        top, factor = spread(b, top), spread(b, scale)
        (total,) = zeros(b, 1)

        def power(number: Any) -> None:
            place = at(b, scores, number, VECTOR)
            value = exponential(b, b.fmul(b.fsub(load(b, place, VF32), top), factor))
            store(b, value, place)
            b.store(b.fadd(b.load(total), value), total)

        loop(b, blocks, power)
        return fold(b, b.load(total), b.fadd)

    return types.float32(types.int64, types.int64, types.float32), codegen


def _emit_part(b: Any, name: str, args: Any, first: Any, vectors: int) -> None:
    """Sum `vectors` vectors of every position, from vector `first` on; see `mix`."""
    _, values, weights, target, width, count = args
    size = SIZES[name]
    start = at(b, values, first, LANES * size)
    row = b.mul(width, I64(size))
    sums = zeros(b, 2 * vectors)

    def add(position: Any, mine: list[Any]) -> None:
        weight = spread(b, load(b, at(b, weights, position, 4), F32))
        place = b.add(start, b.mul(position, row))
        for i, total in enumerate(mine):
            value = load_wide(b, b.add(place, I64(i * LANES * size)), name)
            b.store(multiply_add(b, value, weight, b.load(total)), total)

    def two(number: Any) -> None:
        add(b.mul(number, I64(2)), sums[:vectors])
        add(b.add(b.mul(number, I64(2)), I64(1)), sums[vectors:])

    loop(b, b.udiv(count, I64(2)), two)
    with b.if_then(b.trunc(count, ir.IntType(1))):
        add(b.sub(count, I64(1)), sums[:vectors])
    for i in range(vectors):
        value = b.fadd(b.load(sums[i]), b.load(sums[vectors + i]))
        store(b, value, at(b, target, b.add(first, I64(i)), VECTOR))


def _mix(
    typing: Any, kind: Any, values: Any, weights: Any, target: Any, width: Any, count: Any
) -> Any:
    """`target[:] = sum of weights[t] * values[t, :]` over `count` positions.

    A position of `values` takes `width` entries of `kind`, a multiple of 16.
    """
    name = kind.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        wide = b.udiv(args[4], I64(LANES))
        tables = b.udiv(wide, I64(TABLE))
        done = b.mul(tables, I64(TABLE))
        loop(b, tables, lambda i: _emit_part(b, name, args, b.mul(i, I64(TABLE)), TABLE))
        loop(b, b.sub(wide, done), lambda i: _emit_part(b, name, args, b.add(done, i), 1))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 5), codegen


literal: Any = intrinsic(prefer_literal=True)
scores: Any = literal(_scores)
softmax: Any = intrinsic(_softmax)
mix: Any = literal(_mix)
