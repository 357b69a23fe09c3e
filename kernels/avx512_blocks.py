"""Blocks of columns in AVX-512 registers: how packed codes become vectors of 16 weights.

A block is read as it lies on disk, and its weights leave in whatever order costs least; `order`
says which column each of them belongs to, and the activations are brought into that order once
per call (`avx512_order.py`). The kinds, by what the LUT allows:

- words: 16 lanes of 32 bits, a shift and a look-up among float32 entries for each 16 weights;
- windows (1 and 2 bits): the same, but a look-up reads 4 bits, so one shift serves several;
- nibbles (3 bits): 256 columns, whose two planes are merged for 16 look-ups at once: 1.4 times as
  fast as merging for each look-up;
- woven (3 bits, in the order `woven`): 512 or 64 columns, nothing to merge (`avx512_woven.py`);
- bytes (6 to 8 bits, 16-bit LUTs, AVX512-VBMI): 64 codes at once are looked up in the LUT's low
  bytes and in its high bytes (`avx512_bytes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from sketchconv.kernels.avx512_ir import (
    I8,
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
)
from sketchconv.kernels.planes import fields

Weights = Callable[[Any, Any, list[Any], Any], Iterator[Any]]
BYTES = 64  # of a register


@dataclass(frozen=True, slots=True)
class Block:
    """`weights(builder, tables, planes, left)` yields vectors of 16 float32 weights.

    `planes` are the addresses of the block's bits in each plane; `left` is the number of columns
    in a last, short block, None in a full one. Weight `j` belongs to column ``order[j]``. The block
    reads the bits of the `beyond` columns that follow it as well, and `lines` cache lines of each
    plane.
    """

    order: tuple[int, ...]
    weights: Weights
    beyond: int = 0
    lines: int = 1

    @property
    def columns(self) -> int:
        """Columns of a full block."""
        return len(self.order)


def read_plane(b: Any, address: Any, count: int, columns: Any | None, width: int) -> Any:
    """`count` bytes of one plane; in a short block only those of its columns."""
    if columns is None:
        return load(b, address, ir.VectorType(I8, count))
    return load_bytes(b, address, count, field_bytes(b, columns, width))


def as_lanes(b: Any, raw: Any, lanes: int, bits: int) -> Any:
    """Bytes as `lanes` little-endian words, zero-extended to `bits` bits."""
    kind = ir.VectorType(ir.IntType(8 * raw.type.count // lanes), lanes)
    words = b.bitcast(raw, kind)
    return words if 8 * raw.type.count == bits * lanes else b.zext(words, vector(bits, lanes))


def vector(bits: int, lanes: int) -> Any:
    """The type of `lanes` words of `bits` bits."""
    return ir.VectorType(ir.IntType(bits), lanes)


def word_block(bits: int) -> Block:
    """Lane l, slot t is column `slots * l + t`."""
    deep = slots(bits)

    def weights(b: Any, tables: list[Any], planes: list[Any], left: Any | None) -> Iterator[Any]:
        parts, first = [], 0
        for width, address in zip(fields(bits), planes, strict=True):
            raw = read_plane(b, address, 2 * width * deep, left, width)
            parts.append((as_lanes(b, raw, LANES, 32), first))
            first += width
        for slot in range(deep):
            code = merge(b, parts, [slot * width for width in fields(bits)])
            yield lookup(b, tables if bits > 3 else tables[:1], code)

    return Block(_word_order(deep), weights)


def rereading_block() -> Block:
    """4 bits, never short: `word_block(4)`, with whole bytes skipped by reading from there again.

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


def window_block(bits: int) -> Block:
    """1 or 2 bits: one shift serves all codes in the 4 bits of a look-up, by a table for each."""
    deep, each = slots(bits), 4 // bits

    def weights(b: Any, tables: list[Any], planes: list[Any], left: Any | None) -> Iterator[Any]:
        raw = as_lanes(b, read_plane(b, planes[0], 2 * bits * deep, left, bits), LANES, 32)
        for first in range(0, deep, each):
            shifted = b.lshr(raw, splat(first * bits)) if first else raw
            for table in tables:
                yield lookup(b, [table], shifted)

    return Block(_word_order(deep), weights)


def select(b: Any, mask: int, yes: Any, no: Any) -> Any:
    """Bits of `yes` where the 32-bit `mask` has ones, else of `no`: one `vpternlog`."""
    keep, drop = splat(mask), splat(~mask)
    return b.or_(b.and_(yes, keep), b.and_(no, drop))


def nibble_block(vbmi: bool) -> Block:
    """3 bits: 256 columns, the codes of the even ones as nibbles of a register, then the odd ones.

    A nibble holds the high bits of a pair of columns, then the two low bits of one of them; the
    tables follow suit, so that both registers take the same high bits.
    """

    def weights(b: Any, tables: list[Any], planes: list[Any], left: Any | None) -> Iterator[Any]:
        low = as_lanes(b, read_plane(b, planes[0], BYTES, left, 2), LANES, 32)
        high = read_plane(b, planes[1], BYTES // 2, left, 1)
        if vbmi:
            high = b.bitcast(to_bytes(b, high, 4), VI32)
        else:
            high = as_lanes(b, high, LANES, 32)
            high = select(b, 0x000000FF, high, b.shl(high, splat(8)))
            high = select(b, 0x00FF00FF, high, b.shl(high, splat(4)))
        pairs = select(b, 0x0F0F0F0F, high, b.shl(high, splat(2)))
        even = select(b, 0x33333333, pairs, b.shl(low, splat(2)))
        odd = select(b, 0x33333333, pairs, low)
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


def to_bytes(b: Any, raw: Any, step: int) -> Any:
    """64 bytes; each starts with the bits of `raw` that begin at `step` times its number."""
    wide = b.bitcast(as_lanes(b, raw, 8, 64), V8)
    control = ir.Constant(V8, [step * (i % 8) for i in range(BYTES)])
    return call(b, "llvm.x86.avx512.pmultishift.qb.512", V8, [control, wide])
