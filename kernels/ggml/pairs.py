"""Sixteen bytes of the packing `planes-le` as 32 weights of a shaped sketch.

As `lift`, which reads the bytes of blocks: there the low fields are the first sixteen columns and
the high ones the others, here they take turns.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from sketchconv.kernels import vectors as v
from sketchconv.kernels.ggml.kinds import CODEBOOK
from sketchconv.kernels.ggml.lanes import BYTES, FLOATS, LANES, WORDS

I64, F32 = v.types.int64, v.types.float32


def _nibbles(builder: Any, data: Any, at: Any) -> tuple[Any, Any]:
    """Codes of columns 0 to 15 and 16 to 31: the low and high fields of 16 bytes by turns."""
    raw = v.load(builder, data, BYTES, at)
    low = builder.and_(raw, v.constant(BYTES, 15))
    high = builder.lshr(raw, v.constant(BYTES, 4))
    half, parts = LANES // 2, []
    for first in (0, half):
        order = [i for k in range(first, first + half) for i in (k, k + LANES)]
        mixed = builder.shuffle_vector(low, high, ir.Constant(v.vector(v.I32, LANES), order))
        parts.append(builder.zext(mixed, WORDS))
    return parts[0], parts[1]


def _fifth(builder: Any, data: Any, at: Any, first: int) -> Any:
    """Bits `first` to `first + 15` of the word at byte `at`, as 16 or 0 in each lane."""
    word = v.splat(builder, v.load(builder, builder.gep(data, [at]), v.I32, v.I64(0)), LANES)
    places = ir.Constant(WORDS, list(range(first, first + LANES)))
    bit = builder.and_(builder.lshr(word, places), v.constant(WORDS, 1))
    return builder.shl(bit, v.constant(WORDS, 4))


def _store(builder: Any, levels: Any, step: Any, minimum: Any, out: Any, to: Any) -> None:
    value = builder.fmul(v.splat(builder, step, LANES), levels)
    if minimum is not None:
        value = builder.fadd(value, v.splat(builder, minimum, LANES))
    v.store(builder, value, out, to)


def _codebook(builder: Any, codes: Any) -> Any:
    """Levels of `CODEBOOK`: each bit of the code halves those that are left."""
    left = [v.constant(FLOATS, float(level)) for level in CODEBOOK]
    bit = 1
    while len(left) > 1:
        some = builder.and_(codes, v.constant(WORDS, bit))
        upper = builder.icmp_unsigned("!=", some, v.constant(WORDS, 0))
        pairs = zip(left[::2], left[1::2], strict=True)
        left = [builder.select(upper, high, low) for low, high in pairs]
        bit *= 2
    return left[0]


@v.intrinsic
def lift_pairs_levels(_typing: Any, data: Any, at: Any, step: Any, out: Any, to: Any) -> Any:
    """``out[to + c] = step * CODEBOOK[code c]`` for the 32 codes in 16 bytes from `at`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, start, factor, target, place = v.data_of(context, builder, signature, args)
        for k, codes in enumerate(_nibbles(builder, source, start)):
            levels = _codebook(builder, codes)
            _store(builder, levels, factor, None, target, builder.add(place, v.I64(k * LANES)))
        return context.get_dummy_value()

    return v.types.void(data, I64, F32, out, I64), codegen


@v.intrinsic
def lift_pairs(
    _typing: Any,
    data: Any,
    at: Any,
    high: Any,
    first: Any,
    step: Any,
    minimum: Any,
    out: Any,
    to: Any,
) -> Any:
    """``out[to + c] = step * (code c + first) + minimum`` for the 32 codes in 16 bytes from `at`.

    Codes of 5 bits have their fifth in the 4 bytes from `high`; where that is below 0 they have 4.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, start, upper, lowest, *rest = v.data_of(context, builder, signature, args)
        factor, base, target, place = rest
        five = builder.icmp_signed(">=", upper, v.I64(0))
        there = builder.select(five, upper, v.I64(0))
        for k, codes in enumerate(_nibbles(builder, source, start)):
            wide = builder.or_(codes, _fifth(builder, source, there, k * LANES))
            whole = builder.sitofp(builder.select(five, wide, codes), FLOATS)
            levels = builder.fadd(whole, v.splat(builder, lowest, LANES))
            _store(builder, levels, factor, base, target, builder.add(place, v.I64(k * LANES)))
        return context.get_dummy_value()

    return v.types.void(data, I64, I64, F32, F32, F32, out, I64), codegen
