"""Compiled pieces of a decoding step, on addresses of float32 buffers, 16 lanes at a time.

Buffers are padded to whole vectors, and the padding of an input holds zeros.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sketchconv.kernels.decoder.ir import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    SIZES,
    VECTOR,
    VF32,
    accumulate,
    at,
    call,
    exponential,
    fold,
    load,
    load_wide,
    local,
    loop,
    multiply_add,
    pointer,
    same,
    spread,
    store,
    vectors,
)

PREFETCH_BYTES = 4096  # ahead of the reads, as in the kernels of sketches


def _scalar(b: Any, address: Any, kind: str) -> Any:
    return b.extract_element(load_wide(b, address, kind, 1), I32(0))


def _dense_dot(typing: Any, kind: Any, weights: Any, x: Any, columns: Any) -> Any:
    """Dot product of a dense row ("F16", "BF16" or "F32") and float32 `x`, both `columns` long."""
    name = kind.literal_value
    size = SIZES[name]

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _, row, x, columns = args

        def add(number: Any, total: Any) -> None:
            value = load_wide(b, at(b, row, number, LANES * size), name)
            other = load(b, at(b, x, number, VECTOR), VF32)
            b.store(multiply_add(b, value, other, b.load(total)), total)

        def ahead(first: Any) -> None:
            start = b.add(at(b, row, first, LANES * size), I64(PREFETCH_BYTES))
            for line in range(0, 4 * LANES * size, 64):
                hint = [pointer(b, b.add(start, I64(line)), I8), I32(0), I32(3), I32(1)]
                call(b, "llvm.prefetch.p0", ir.VoidType(), hint)

        whole = b.udiv(columns, I64(LANES))
        result = local(b, F32)
        b.store(fold(b, accumulate(b, whole, add, ahead), b.fadd), result)
        done = b.mul(whole, I64(LANES))

        def one(number: Any) -> None:
            place = b.add(done, number)
            value = _scalar(b, at(b, row, place, size), name)
            product = b.fmul(value, load(b, at(b, x, place, 4), F32))
            b.store(b.fadd(b.load(result), product), result)

        loop(b, b.sub(columns, done), one)
        return b.load(result)

    return types.float32(kind, types.int64, types.int64, types.int64), codegen


def _dense_row(typing: Any, kind: Any, source: Any, target: Any, columns: Any) -> Any:
    """Convert a dense row to float32."""
    name = kind.literal_value
    size = SIZES[name]

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _, source, target, columns = args

        def one(number: Any) -> None:
            store(b, _scalar(b, at(b, source, number, size), name), at(b, target, number, 4))

        loop(b, columns, one)
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64, types.int64), codegen


def _normalise(typing: Any, x: Any, weight: Any, target: Any, columns: Any, eps: Any) -> Any:
    """`target = x / sqrt(mean(x * x) + eps) * weight` over `columns` values."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, weight, target, columns, eps = args
        count = vectors(b, columns)

        def square(number: Any, total: Any) -> None:
            value = load(b, at(b, x, number, VECTOR), VF32)
            b.store(multiply_add(b, value, value, b.load(total)), total)

        total = fold(b, accumulate(b, count, square), b.fadd)
        mean = b.fdiv(total, b.uitofp(columns, F32))
        root = call(b, "llvm.sqrt.f32", F32, [b.fadd(mean, eps)])
        factor = spread(b, b.fdiv(F32(1.0), root))

        def scale(number: Any) -> None:
            value = b.fmul(load(b, at(b, x, number, VECTOR), VF32), factor)
            value = b.fmul(value, load(b, at(b, weight, number, VECTOR), VF32))
            store(b, value, at(b, target, number, VECTOR))

        loop(b, count, scale)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, types.float32), codegen


def _gate(typing: Any, gate: Any, up: Any, target: Any, columns: Any) -> Any:
    """`target = gate / (1 + exp(-gate)) * up`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        gate, up, target, columns = args

        def one(number: Any) -> None:
            value = load(b, at(b, gate, number, VECTOR), VF32)
            below = b.fadd(exponential(b, b.fneg(value)), same(1.0))
            value = b.fmul(b.fdiv(value, below), load(b, at(b, up, number, VECTOR), VF32))
            store(b, value, at(b, target, number, VECTOR))

        loop(b, vectors(b, columns), one)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _add_to(typing: Any, source: Any, target: Any, count: Any) -> Any:
    """`target += source` for `count` float32, and nothing beyond."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target, count = args
        whole = b.udiv(count, I64(LANES))
        done = b.mul(whole, I64(LANES))

        def add(first: Any, number: Any, size: int, kind: Any) -> None:
            place = b.add(first, b.mul(number, I64(size)))
            to = at(b, target, place, 4)
            store(b, b.fadd(load(b, to, kind), load(b, at(b, source, place, 4), kind)), to)

        loop(b, whole, lambda i: add(I64(0), i, LANES, VF32))
        loop(b, b.sub(count, done), lambda i: add(done, i, 1, F32))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def _get(typing: Any, address: Any, number: Any) -> Any:
    """Entry `number` of the float32 at `address`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return load(b, at(b, args[0], args[1], 4), F32)

    return types.float32(types.int64, types.int64), codegen


def _put(typing: Any, address: Any, number: Any, value: Any) -> Any:
    """Set entry `number` of the float32, or of the 16-bit integers, at `address`."""
    kind = types.float32 if isinstance(value, types.Float) else types.uint16
    size = 4 if kind is types.float32 else 2

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        store(b, args[2], at(b, args[0], args[1], size))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, kind), codegen


literal: Any = intrinsic(prefer_literal=True)
dense_dot: Any = literal(_dense_dot)
dense_row: Any = literal(_dense_row)
normalise: Any = intrinsic(_normalise)
gate: Any = intrinsic(_gate)
add_to: Any = intrinsic(_add_to)
get: Any = intrinsic(_get)
put: Any = intrinsic(_put)
