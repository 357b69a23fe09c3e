"""Blocks of columns in AVX-512 registers: how packed codes become vectors of 16 weights.

A block is read as it lies on disk, and its weights leave in whatever order costs least; `order`
says which column each of them belongs to, and the activations are brought into that order once
per call (`avx512_order.py`). The kinds, by what the LUT allows:

- words: 16 lanes of 32 bits, a shift and a look-up among float32 entries for each 16 weights;
- windows (1 and 2 bits): the same, but a look-up reads 4 bits, so one shift serves several;
- nibbles (3 bits): 256 columns, whose two planes are merged for 16 look-ups at once: 1.4 times as
  fast as merging for each look-up;
- bytes (6 to 8 bits, 16-bit LUTs, AVX512-VBMI): 64 codes at once are looked up in the LUT's low
  bytes and in its high bytes: 2.6 times as fast at 8 bits as float32 entries in 16 registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir

from sketchconv.kernels.avx512_ir import (
    I8,
    I32,
    I64,
    LANES,
    V8,
    VI32,
    call,
    field_bytes,
    load,
    load_bytes,
    lookup,
    merge,
    slots,
    splat,
    to_float32,
)
from sketchconv.kernels.planes import fields

Weights = Callable[[Any, Any, list[Any], Any], Iterator[Any]]
BYTES = 64  # of a register


@dataclass(frozen=True, slots=True)
class Block:
    """`weights(builder, tables, planes, left)` yields vectors of 16 float32 weights.

    `planes` are the addresses of the block's bits in each plane; `left` is the number of columns
    in a last, short block, None in a full one. Weight `j` belongs to column ``order[j]``. The block
    reads the bits of the `beyond` columns that follow it as well.
    """

    order: tuple[int, ...]
    weights: Weights
    beyond: int = 0

    @property
    def columns(self) -> int:
        """Columns of a full block."""
        return len(self.order)


def by_bytes(bits: int, lut: str, vbmi: bool) -> bool:
    """Whether LUTs are looked up as low and high bytes."""
    return vbmi and bits >= 6 and lut != "F32"


@cache
def blocks(bits: int, lut: str, vbmi: bool) -> tuple[Block, ...]:
    """The blocks of a group: as many of the first kind as fit, then those of the last kind."""
    if by_bytes(bits, lut, vbmi):
        return (_byte_block(bits, lut),)
    if bits == 3:
        return (_nibble_block(vbmi), _word_block(bits))
    if bits == 4:
        return (_rereading_block(), _word_block(bits))
    return (_window_block(bits) if bits < 3 else _word_block(bits),)


def _read(b: Any, address: Any, count: int, columns: Any | None, width: int) -> Any:
    """`count` bytes of one plane; in a short block only those of its columns."""
    if columns is None:
        return load(b, address, ir.VectorType(I8, count))
    return load_bytes(b, address, count, field_bytes(b, columns, width))


def _lanes(b: Any, raw: Any, lanes: int, bits: int) -> Any:
    """Bytes as `lanes` little-endian words, zero-extended to `bits` bits."""
    kind = ir.VectorType(ir.IntType(8 * raw.type.count // lanes), lanes)
    words = b.bitcast(raw, kind)
    return words if 8 * raw.type.count == bits * lanes else b.zext(words, _vector(bits, lanes))


def _vector(bits: int, lanes: int) -> Any:
    return ir.VectorType(ir.IntType(bits), lanes)


def _word_block(bits: int) -> Block:
    """Lane l, slot t is column `slots * l + t`."""
    deep = slots(bits)

    def weights(b: Any, tables: list[Any], planes: list[Any], left: Any | None) -> Iterator[Any]:
        parts, first = [], 0
        for width, address in zip(fields(bits), planes, strict=True):
            raw = _read(b, address, 2 * width * deep, left, width)
            parts.append((_lanes(b, raw, LANES, 32), first))
            first += width
        for slot in range(deep):
            code = merge(b, parts, [slot * width for width in fields(bits)])
            yield lookup(b, tables if bits > 3 else tables[:1], code)

    return Block(_word_order(deep), weights)


def _rereading_block() -> Block:
    """4 bits, never short: `_word_block(4)`, with whole bytes skipped by reading from there again.

    The units that shift are those that are short: out of a cache 7 to 12 % faster than 7 shifts.
    """

    def weights(b: Any, tables: list[Any], planes: list[Any], left: Any | None) -> Iterator[Any]:
        for byte in range(4):
            words = load(b, b.add(planes[0], I64(byte)), VI32)
            yield lookup(b, tables, words)
            yield lookup(b, tables, b.lshr(words, splat(4)))

    return Block(_word_order(8), weights, beyond=3 * 8 // 4)


def _word_order(deep: int) -> tuple[int, ...]:
    return tuple(deep * lane + slot for slot in range(deep) for lane in range(LANES))


def _window_block(bits: int) -> Block:
    """1 or 2 bits: one shift serves all codes in the 4 bits of a look-up, by a table for each."""
    deep, each = slots(bits), 4 // bits

    def weights(b: Any, tables: list[Any], planes: list[Any], left: Any | None) -> Iterator[Any]:
        raw = _lanes(b, _read(b, planes[0], 2 * bits * deep, left, bits), LANES, 32)
        for first in range(0, deep, each):
            shifted = b.lshr(raw, splat(first * bits)) if first else raw
            for table in tables:
                yield lookup(b, [table], shifted)

    return Block(_word_order(deep), weights)


def _select(b: Any, mask: int, yes: Any, no: Any) -> Any:
    """Bits of `yes` where the 32-bit `mask` has ones, else of `no`: one `vpternlog`."""
    keep, drop = splat(mask), splat(~mask)
    return b.or_(b.and_(yes, keep), b.and_(no, drop))


def _nibble_block(vbmi: bool) -> Block:
    """3 bits: 256 columns, the codes of the even ones as nibbles of a register, then the odd ones.

    A nibble holds the high bits of a pair of columns, then the two low bits of one of them; the
    tables follow suit, so that both registers take the same high bits.
    """

    def weights(b: Any, tables: list[Any], planes: list[Any], left: Any | None) -> Iterator[Any]:
        low = _lanes(b, _read(b, planes[0], BYTES, left, 2), LANES, 32)
        high = _read(b, planes[1], BYTES // 2, left, 1)
        if vbmi:
            high = b.bitcast(_to_bytes(b, high, 4), VI32)
        else:
            high = _lanes(b, high, LANES, 32)
            high = _select(b, 0x000000FF, high, b.shl(high, splat(8)))
            high = _select(b, 0x00FF00FF, high, b.shl(high, splat(4)))
        pairs = _select(b, 0x0F0F0F0F, high, b.shl(high, splat(2)))
        even = _select(b, 0x33333333, pairs, b.shl(low, splat(2)))
        odd = _select(b, 0x33333333, pairs, low)
        for codes, table in ((even, tables[1]), (odd, tables[2])):
            for nibble in range(8):
                shifted = b.lshr(codes, splat(4 * nibble)) if nibble else codes
                yield lookup(b, [table], shifted)

    order = [
        16 * lane + 2 * nibble + odd
        for odd in range(2)
        for nibble in range(8)
        for lane in range(LANES)
    ]
    return Block(tuple(order), weights)


def _to_bytes(b: Any, raw: Any, step: int) -> Any:
    """64 bytes; each starts with the bits of `raw` that begin at `step` times its number."""
    wide = b.bitcast(_lanes(b, raw, 8, 64), V8)
    control = ir.Constant(V8, [step * (i % 8) for i in range(BYTES)])
    return call(b, "llvm.x86.avx512.pmultishift.qb.512", V8, [control, wide])


def _byte_codes(b: Any, bits: int, planes: list[Any], left: Any | None) -> list[Any]:
    """Codes in 64 bytes: of 64 columns at 8 bits, else of the even and the odd ones of 128.

    Above the code, a byte may hold anything.
    """
    base = _read(b, planes[0], BYTES, left, fields(bits)[0])
    if bits == 8:
        return [base]
    word = b.bitcast(base, VI32)
    codes, first = [word, b.lshr(word, splat(4))], 4
    for width, address in zip(fields(bits)[1:], planes[1:], strict=True):
        raw = _read(b, address, 16 * width, left, width)
        pairs = b.bitcast(_to_bytes(b, raw, 2 * width), VI32)
        mask = (2**first - 1) * 0x01010101
        for odd in range(2):
            moved = b.shl(pairs, splat(first - odd * width))
            codes[odd] = _select(b, mask, codes[odd], moved)
        first += width
    return [b.bitcast(code, V8) for code in codes]


def _byte_lookup(b: Any, tables: list[Any], code: Any) -> Any:
    """One byte of each entry, for 64 codes."""
    if len(tables) == 1:
        return call(b, "llvm.x86.avx512.permvar.qi.512", V8, [tables[0], code])
    if len(tables) == 2:
        args = [tables[0], code, tables[1]]
        return call(b, "llvm.x86.avx512.vpermi2var.qi.512", V8, args)
    low, high = _byte_lookup(b, tables[:2], code), _byte_lookup(b, tables[2:], code)
    return b.select(b.icmp_signed("<", code, ir.Constant(V8, None)), high, low)


def _interleave(b: Any, low: Any, high: Any, upper: int) -> Any:
    """Words out of 8 low and 8 high bytes of every 16: the first 8, or the `upper` 8."""
    order = [
        piece + 8 * upper + i + side
        for piece in range(0, BYTES, 16)
        for i in range(8)
        for side in (0, BYTES)
    ]
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, BYTES), order))


def _halves(b: Any, words: Any) -> list[Any]:
    return [
        b.shuffle_vector(
            words, words, ir.Constant(ir.VectorType(I32, LANES), list(range(i, i + 16)))
        )
        for i in (0, LANES)
    ]


def _byte_block(bits: int, lut: str) -> Block:
    """`tables` are the LUT's low bytes, then its high bytes, 64 entries each."""

    def weights(b: Any, tables: list[Any], planes: list[Any], left: Any | None) -> Iterator[Any]:
        half = len(tables) // 2
        for code in _byte_codes(b, bits, planes, left):
            low = _byte_lookup(b, tables[:half], code)
            high = _byte_lookup(b, tables[half:], code)
            for upper in range(2):
                words = b.bitcast(_interleave(b, low, high, upper), _vector(16, 32))
                for piece in _halves(b, words):
                    yield to_float32(b, piece, lut)

    step = 1 if bits == 8 else 2
    order = [
        step * (16 * (2 * half + i // 8) + 8 * upper + i % 8) + odd
        for odd in range(step)
        for upper in range(2)
        for half in range(2)
        for i in range(LANES)
    ]
    return Block(tuple(order), weights)
