"""Sixteen codes out of the bytes of a block, as float32 weights: the loop of every decoder.

Explicit vectors, as the compiler cannot know that bytes and weights do not overlap: loops over
single codes took 2 to 8 times as long.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from sketchconv.kernels import vectors as v
from sketchconv.kernels.ggml.kinds import CODEBOOK
from sketchconv.kernels.ggml.lanes import BYTES, FLOATS, LANES, WORDS

I64, F32 = v.types.int64, v.types.float32


def _fields(builder: Any, data: Any, at: Any, shift: Any, mask: Any) -> Any:
    """``(data[at + i] >> shift) & mask`` for 16 bytes."""
    wide = builder.zext(v.load(builder, data, BYTES, at), WORDS)
    count, kept = (v.splat(builder, builder.trunc(a, v.I32), LANES) for a in (shift, mask))
    return builder.and_(builder.lshr(wide, count), kept)


def _store(builder: Any, codes: Any, rest: list[Any]) -> None:
    """``out[to + i] = step * (code - offset) - fall``."""
    offset, step, fall, out, to = rest
    codes = builder.sub(codes, v.splat(builder, builder.trunc(offset, v.I32), LANES))
    value = builder.fmul(v.splat(builder, step, LANES), builder.sitofp(codes, FLOATS))
    v.store(builder, builder.fsub(value, v.splat(builder, fall, LANES)), out, to)


@v.intrinsic
def lift(
    _typing: Any,
    data: Any,
    at: Any,
    shift: Any,
    mask: Any,
    offset: Any,
    step: Any,
    fall: Any,
    out: Any,
    to: Any,
) -> tuple[Any, Any]:
    """``out[to + i] = step * (((data[at + i] >> shift) & mask) - offset) - fall``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = v.data_of(context, builder, signature, args)
        _store(builder, _fields(builder, *given[:4]), given[4:])
        return context.get_dummy_value()

    return v.types.void(data, I64, I64, I64, I64, F32, F32, out, I64), codegen


@v.intrinsic
def lift_split(
    _typing: Any,
    data: Any,
    at: Any,
    shift: Any,
    high: Any,
    bit: Any,
    mask: Any,
    left: Any,
    offset: Any,
    step: Any,
    fall: Any,
    out: Any,
    to: Any,
) -> tuple[Any, Any]:
    """The same for codes whose upper bits are elsewhere.

    The lower `left` bits are those of ``data[at + i] >> shift``, the upper ones
    ``(data[high + i] >> bit) & mask``.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, at, shift, high, bit, mask, left, *rest = v.data_of(context, builder, signature, args)
        one = builder.shl(v.I64(1), left)
        low = _fields(builder, data, at, shift, builder.sub(one, v.I64(1)))
        upper = _fields(builder, data, high, bit, mask)
        count = v.splat(builder, builder.trunc(left, v.I32), LANES)
        _store(builder, builder.or_(low, builder.shl(upper, count)), rest)
        return context.get_dummy_value()

    ints = [I64] * 7
    return v.types.void(data, *ints, F32, F32, out, I64), codegen


@v.intrinsic
def lift_five(
    _typing: Any,
    data: Any,
    at: Any,
    shift: Any,
    high: Any,
    bit: Any,
    offset: Any,
    step: Any,
    fall: Any,
    out: Any,
    to: Any,
) -> tuple[Any, Any]:
    """The same for codes of 5 bits whose fifth are bits `bit` to `bit + 15` of a word at `high`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, at, shift, high, bit, *rest = v.data_of(context, builder, signature, args)
        low = _fields(builder, data, at, shift, v.I64(15))
        word = v.load(builder, builder.gep(data, [high]), v.I32, v.I64(0))
        word = v.splat(builder, builder.lshr(word, builder.trunc(bit, v.I32)), LANES)
        word = builder.lshr(word, ir.Constant(WORDS, list(range(LANES))))
        fifth = builder.and_(word, v.constant(WORDS, 1))
        _store(builder, builder.or_(low, builder.shl(fifth, v.constant(WORDS, 4))), rest)
        return context.get_dummy_value()

    return v.types.void(data, I64, I64, I64, I64, I64, F32, F32, out, I64), codegen


@v.intrinsic
def lift_signed(_typing: Any, data: Any, at: Any, step: Any, out: Any, to: Any) -> tuple[Any, Any]:
    """``out[to + i] = step * data[at + i]`` for 16 bytes read as signed numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, start, factor, target, place = v.data_of(context, builder, signature, args)
        codes = builder.sext(v.load(builder, source, BYTES, start), WORDS)
        value = builder.fmul(v.splat(builder, factor, LANES), builder.sitofp(codes, FLOATS))
        v.store(builder, value, target, place)
        return context.get_dummy_value()

    return v.types.void(data, I64, F32, out, I64), codegen


@v.intrinsic
def lift_levels(
    _typing: Any, data: Any, at: Any, shift: Any, step: Any, out: Any, to: Any
) -> tuple[Any, Any]:
    """``out[to + i] = step * level`` for the codes ``(data[at + i] >> shift) & 15`` of `CODEBOOK`.

    Each bit of the code halves the levels that are left.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, start, count, factor, target, place = v.data_of(context, builder, signature, args)
        codes = _fields(builder, source, start, count, v.I64(15))
        left = [v.constant(FLOATS, float(level)) for level in CODEBOOK]
        bit = 1
        while len(left) > 1:
            some = builder.and_(codes, v.constant(WORDS, bit))
            upper = builder.icmp_unsigned("!=", some, v.constant(WORDS, 0))
            pairs = zip(left[::2], left[1::2], strict=True)
            left = [builder.select(upper, high, low) for low, high in pairs]
            bit *= 2
        value = builder.fmul(v.splat(builder, factor, LANES), left[0])
        v.store(builder, value, target, place)
        return context.get_dummy_value()

    return v.types.void(data, I64, I64, F32, out, I64), codegen
