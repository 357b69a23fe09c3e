"""Sweeps over a group's values as explicit vectors: sums in a fixed order, and coding."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from sketchconv.kernels import vectors as v

LANES = 16
TOGETHER = 8

BYTES = v.vector(v.I8, LANES)
FLOATS = v.vector(v.F32, LANES)
DOUBLES = v.vector(v.F64, LANES)

STEP = 8
EIGHT = v.vector(v.F64, STEP)
SMALL = v.vector(v.F32, STEP)
COUNTS = v.vector(v.I64, STEP)


@v.intrinsic
def deviation_sum(_typing: Any, x: Any, mass: Any, size: Any, centre: Any) -> tuple[Any, Any]:
    """Sum of ``mass * |x - centre|`` over the whole blocks of 16 in `size`; all float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, masses, count, middle = v.data_of(context, builder, signature, args)
        origin = v.splat(builder, middle, LANES)
        zero = v.constant(FLOATS, 0.0)

        def body(offset: Any, sums: list[Any]) -> list[Any]:
            d = builder.fsub(v.load(builder, values, FLOATS, offset), origin)
            negative = builder.fcmp_ordered("<", d, zero)
            d = builder.select(negative, builder.fsub(zero, d), d)
            m = v.load(builder, masses, FLOATS, offset)
            return [builder.fadd(sums[0], builder.fmul(d, m))]

        (sums,) = v.blocks(builder, count, LANES, [zero], body)
        return v.lane_sum(builder, sums)

    return v.types.float32(x, mass, v.types.int64, v.types.float32), codegen


@v.intrinsic
def square_sums(_typing: Any, x: Any, gap: Any, size: Any) -> tuple[Any, Any]:
    """Float64 sums of ``gap**2`` and ``x**2`` over the whole blocks of 16 in `size`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, gaps, count = v.data_of(context, builder, signature, args)

        def body(offset: Any, sums: list[Any]) -> list[Any]:
            wide = [
                builder.fpext(v.load(builder, data, FLOATS, offset), DOUBLES)
                for data in (gaps, values)
            ]
            return [builder.fadd(s, builder.fmul(w, w)) for s, w in zip(sums, wide, strict=True)]

        sums = v.blocks(builder, count, LANES, [v.constant(DOUBLES, 0.0)] * 2, body)
        totals = [v.lane_sum(builder, s) for s in sums]
        return context.make_tuple(builder, signature.return_type, totals)

    return v.types.UniTuple(v.types.float64, 2)(x, gap, v.types.int64), codegen


@v.intrinsic
def moment_sums(
    _typing: Any, mass: Any, first: Any, size: Any, inverse: Any, p0: Any, p1: Any, p2: Any
) -> tuple[Any, Any]:
    """Running sums of mass, first * inverse and the second moment of the bins' means; float64.

    Eight bins at a time, up to `size`; clears `mass` and `first` and returns how many had mass.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        masses, firsts, count, unit, *sums = v.data_of(context, builder, signature, args)
        scale = v.splat(builder, unit, STEP)
        zero, floor = v.constant(EIGHT, 0.0), v.constant(SMALL, 1e-30)

        def body(offset: Any, carried: list[Any]) -> list[Any]:
            m = v.load(builder, masses, EIGHT, offset)
            d = builder.fmul(v.load(builder, firsts, EIGHT, offset), scale)
            v.store(builder, zero, masses, offset)
            v.store(builder, zero, firsts, offset)
            low = builder.fptrunc(m, SMALL)
            low = builder.select(builder.fcmp_ordered(">", low, floor), low, floor)
            mean = builder.fpext(builder.fdiv(builder.fptrunc(d, SMALL), low), EIGHT)
            after = []
            for values, total, out in zip(
                (m, d, builder.fmul(d, mean)), carried, sums, strict=False
            ):
                run = v.running_sum(builder, values)
                run = builder.fadd(run, v.splat(builder, total, STEP))
                v.store(builder, run, out, offset)
                after.append(builder.extract_element(run, v.I32(STEP - 1)))
            some = builder.zext(builder.fcmp_ordered(">", m, zero), COUNTS)
            return [*after, builder.add(carried[3], some)]

        start = [ir.Constant(v.F64, 0.0)] * 3 + [v.constant(COUNTS, 0)]
        used = v.blocks(builder, count, STEP, start, body)[3]
        total = builder.extract_element(used, v.I32(0))
        for lane in range(1, STEP):
            total = builder.add(total, builder.extract_element(used, v.I32(lane)))
        return total

    return v.types.int64(mass, first, v.types.int64, v.types.float64, p0, p1, p2), codegen


def _tree(builder: Any, value: Any, levels: list[Any]) -> Any:
    """Codes (as bytes) by a binary search whose every level picks its threshold by the last."""
    size = len(levels)
    code = v.constant(BYTES, 0)
    masks: list[Any] = []
    half = (size + 1) // 2
    while half:
        choices = levels[half - 1 :: 2 * half]
        for mask in reversed(masks):
            choices = [
                builder.select(mask, high, low)
                for low, high in zip(choices[::2], choices[1::2], strict=True)
            ]
        above = builder.fcmp_ordered(">", value, choices[0])
        step = builder.select(above, v.constant(BYTES, half), v.constant(BYTES, 0))
        code = builder.add(code, step)
        masks.append(above)
        half //= 2
    return code


@v.intrinsic
def search_fifteen(_typing: Any, x: Any, thresholds: Any, codes: Any, size: Any) -> tuple[Any, Any]:
    """``codes[i]`` = how many of fifteen ascending thresholds are below ``x[i]``, 16 at a time."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, levels, out, count = v.data_of(context, builder, signature, args)
        lows = [
            v.splat(builder, v.load(builder, levels, v.F32, v.I64(i)), LANES) for i in range(15)
        ]

        def body(offset: Any, _none: list[Any]) -> list[Any]:
            code = _tree(builder, v.load(builder, values, FLOATS, offset), lows)
            v.store(builder, code, out, offset)
            return []

        v.blocks(builder, count, LANES, [], body)
        return context.get_dummy_value()

    return v.types.void(x, thresholds, codes, v.types.int64), codegen


@v.intrinsic
def count_eight(_typing: Any, x: Any, thresholds: Any, codes: Any, size: Any) -> tuple[Any, Any]:
    """``codes[i] +=`` how many of eight thresholds are below ``x[i]``, in whole blocks of 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, levels, out, count = v.data_of(context, builder, signature, args)
        lows = [
            v.splat(builder, v.load(builder, levels, v.F32, v.I64(i)), LANES)
            for i in range(TOGETHER)
        ]

        def body(offset: Any, _none: list[Any]) -> list[Any]:
            value = v.load(builder, values, FLOATS, offset)
            total = v.load(builder, out, BYTES, offset)
            for low in lows:
                above = builder.fcmp_ordered(">", value, low)
                total = builder.add(total, builder.zext(above, BYTES))
            v.store(builder, total, out, offset)
            return []

        v.blocks(builder, count, LANES, [], body)
        return context.get_dummy_value()

    return v.types.void(x, thresholds, codes, v.types.int64), codegen
