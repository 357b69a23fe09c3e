"""Dot products of one row of a shaped sketch with activations, as a Numba intrinsic.

A group's codes become whole levels, which are multiplied with the activations as they are; the
scale comes in once per group. Nothing of a LUT or of a row is ever written to memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from llvmlite import ir
from numba.extending import intrinsic

from sketchconv.kernels import vectors as v
from sketchconv.kernels.avx512_ir import call, load, local, prefetch, sum_lanes
from sketchconv.kernels.ggml.kinds import CODEBOOK
from sketchconv.kernels.ggml.lanes import BYTES, FLOATS, LANES, WORDS
from sketchconv.kernels.ggml.pairs import _codebook

BLOCK: Final = 32
PREFETCH_BYTES: Final = 4096  # ahead of the reads, as for free LUTs
CODEBOOK_GRID, FROM_ZERO, SIGNED = 0, 1, 2
"""Levels: those of IQ4_NL; the codes themselves; the codes less half their range."""


@dataclass(frozen=True, slots=True)
class Way:
    """What the compiled code is made for.

    Attributes:
        grid: one of the numbers above.
        bits: 4, 5 or 8.
        fast: the CPU has SSSE3's look-up of bytes, fused products and float16.
        narrow: groups have 32 columns, a single block.
        fields: values per group, the scale and perhaps a minimum.
    """

    grid: int
    bits: int
    fast: bool
    narrow: bool
    fields: int


def _levels(b: Any, way: Way, raw: Any, fifth: Any) -> Any:
    """Levels as float32 of 16 codes: the bytes `raw` below 16, and `fifth`, 16 or 0 in words."""
    if way.grid == CODEBOOK_GRID and not way.fast:
        return _codebook(b, b.zext(raw, WORDS))
    if way.grid == CODEBOOK_GRID:
        raw = call(b, "llvm.x86.ssse3.pshuf.b.128", BYTES, [ir.Constant(BYTES, CODEBOOK), raw])
        return b.sitofp(b.sext(raw, WORDS), FLOATS)
    codes = b.zext(raw, WORDS)
    if fifth is not None:
        codes = b.or_(codes, fifth)
    if way.grid == SIGNED:
        codes = b.sub(codes, v.constant(WORDS, 1 << (way.bits - 1)))
    return b.sitofp(codes, FLOATS)


def _block(b: Any, way: Way, at: Any, high: Any) -> tuple[Any, Any]:
    """The levels of 32 columns: even and odd ones, or those of the first and last 16 bytes."""
    raw = load(b, at, BYTES)
    if way.bits == 8:
        both = raw, load(b, b.add(at, v.I64(LANES)), BYTES)
        return _levels(b, way, both[0], None), _levels(b, way, both[1], None)
    halves = b.and_(raw, v.constant(BYTES, 15)), b.lshr(raw, v.constant(BYTES, 4))
    fifths: list[Any] = [None, None]
    if way.bits == 5:
        word = v.splat(b, load(b, high, v.I32), LANES)
        for side in (0, 1):
            places = ir.Constant(WORDS, list(range(side, BLOCK, 2)))
            bit = b.and_(b.lshr(word, places), v.constant(WORDS, 1))
            fifths[side] = b.shl(bit, v.constant(WORDS, 4))
    return _levels(b, way, halves[0], fifths[0]), _levels(b, way, halves[1], fifths[1])


def _add(b: Any, way: Way, left: Any, right: Any, total: Any) -> Any:
    if way.fast:
        return call(b, "llvm.fma.v16f32", FLOATS, [left, right, total])
    return b.fadd(total, b.fmul(left, right))


def _scale(b: Any, way: Way, scales: Any, group: Any, field: int) -> Any:
    """A scale or minimum as float32: float16 in memory, or widened before."""
    size = 2 if way.fast else 4
    place = b.add(b.mul(group, v.I64(size * way.fields)), v.I64(size * field))
    value = load(b, b.add(scales, place), ir.HalfType() if way.fast else v.F32)
    return b.fpext(value, v.F32) if way.fast else value


def _block_sums(b: Any, way: Way, at: Any, high: Any, xs: list[Any], sums: list[Any]) -> list[Any]:
    """`sums` and the products of a block with the activations at `xs`; none are zeros."""
    low, upper = _block(b, way, at, high)
    found = []
    for x, total in zip(xs, sums, strict=True):
        first = load(b, x, FLOATS)
        value = b.fmul(low, first) if total is None else _add(b, way, low, first, total)
        more = load(b, b.add(x, v.I64(4 * LANES)), FLOATS)
        found.append(_add(b, way, upper, more, value))
    return found


def _group_sums(
    b: Any, way: Way, start: Any, low_bytes: Any, xs: list[Any], blocks: Any
) -> list[Any]:
    """Products of the group whose codes begin at `start` with the activations at `xs`."""
    if way.narrow:
        return _block_sums(b, way, start, b.add(start, low_bytes), xs, [None] * len(xs))
    sums = [local(b, FLOATS) for _ in xs]
    for total in sums:
        b.store(v.constant(FLOATS, 0.0), total)
    with v.cgutils.for_range(b, blocks) as block:
        at = b.add(start, b.mul(block.index, v.I64(BLOCK if way.bits == 8 else BLOCK // 2)))
        high = b.add(b.add(start, low_bytes), b.mul(block.index, v.I64(4)))
        here = [b.add(x, b.mul(block.index, v.I64(4 * BLOCK))) for x in xs]
        found = _block_sums(b, way, at, high, here, [b.load(total) for total in sums])
        for value, total in zip(found, sums, strict=True):
            b.store(value, total)
    return [b.load(total) for total in sums]


def _add_minimum(
    b: Any, minimum: Any, group_sums: Any, group: Any, groups: Any, falls: list[Any]
) -> None:
    """Add to `falls` what the minimum of a group gives with the sums of the activations."""
    for token, fall in enumerate(falls):
        place = b.mul(b.add(group, b.mul(groups, v.I64(token))), v.I64(4))
        value = load(b, b.add(group_sums, place), v.F32)
        b.store(b.fadd(b.load(fall), b.fmul(minimum, value)), fall)


def _emit(b: Any, way: Way, count: int, given: list[Any]) -> list[Any]:
    """Sums of one row; see `_row_dots` for the arguments."""
    index, scales, x, group_sums, groups, width = given
    if way.narrow:
        width = v.I64(BLOCK)
    totals, falls = (
        [local(b, FLOATS) for _ in range(count)],
        [local(b, v.F32) for _ in range(count)],
    )
    for total, fall in zip(totals, falls, strict=True):
        b.store(v.constant(FLOATS, 0.0), total)
        b.store(v.F32(0.0), fall)
    low_bytes = b.udiv(b.mul(width, v.I64(8 if way.bits == 8 else 4)), v.I64(8))
    high_bytes = b.udiv(width, v.I64(8)) if way.bits == 5 else v.I64(0)
    size, blocks = b.add(low_bytes, high_bytes), b.udiv(width, v.I64(BLOCK))
    stride = b.mul(b.mul(groups, width), v.I64(4))
    with v.cgutils.for_range(b, groups) as loop:
        group = loop.index
        first = b.add(x, b.mul(group, b.mul(width, v.I64(4))))
        xs = [b.add(first, b.mul(stride, v.I64(token))) for token in range(count)]
        start = b.add(index, b.mul(group, size))
        prefetch(b, b.add(start, v.I64(PREFETCH_BYTES)))
        parts = _group_sums(b, way, start, low_bytes, xs, blocks)
        step = v.splat(b, _scale(b, way, scales, group, 0), LANES)
        for total, part in zip(totals, parts, strict=True):
            b.store(_add(b, way, step, part, b.load(total)), total)
        if way.fields > 1:
            _add_minimum(b, _scale(b, way, scales, group, 1), group_sums, group, groups, falls)
    sums = [sum_lanes(b, [b.load(total)]) for total in totals]
    if way.fields > 1:
        sums = [b.fadd(total, b.load(fall)) for total, fall in zip(sums, falls, strict=True)]
    return sums


def _row_dots(
    typing: Any,
    grid: Any,
    bits: Any,
    fast: Any,
    narrow: Any,
    fields: Any,
    count: Any,
    index: Any,
    scales: Any,
    x: Any,
    group_sums: Any,
    groups: Any,
    width: Any,
) -> Any:
    """Dot products of a row for `count` activations, one after the other: a tuple of float32.

    Addresses: `index` of the row's codes, `scales` of its scales and minima (float16 if `fast`,
    else float32), `x` of activations as `gemv.arranged` makes them, `group_sums` of their sums
    ``[count, groups]``. `width` is that of a group. No result depends on its companions.
    """
    given = (grid, bits, fast, narrow, fields, count)
    levels, size, quick, single, values, many = (value.literal_value for value in given)
    way = Way(levels, size, bool(quick), bool(single), values)
    result = v.types.UniTuple(v.types.float32, many)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums = _emit(builder, way, many, list(args[len(given) :]))
        return context.make_tuple(builder, result, sums)

    return result(*given, *[v.types.int64] * 6), codegen


row_dots: Any = intrinsic(prefer_literal=True)(_row_dots)
