"""Blocks of 64 columns in AVX2 registers: how packed codes become vectors of 8 weights.

As in `avx512_blocks.py`, weights leave in the order that costs least. Three kinds:

- words (1 to 3 bits): 8 lanes of 32 bits; a shift and a `vpermps` for each 8 weights;
- bytes (4 to 6 bits): `vpshufb` looks 32 codes up in one byte of 16 float32 entries; the bytes are
  then interleaved. Float32 entries of 16-bit LUTs have only 2 or 3 bytes that are not zero;
- memory (7 and 8 bits): float32 entries are loaded one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from sketchconv.kernels.avx512_ir import F32, I8, I32, I64, call, load, local, pointer, to_float32
from sketchconv.kernels.planes import fields

LANES = 8
COLUMNS = 64  # of a block
VF32 = ir.VectorType(F32, LANES)
VI32 = ir.VectorType(I32, LANES)
V8 = ir.VectorType(I8, 32)
_BYTES_USED = {"F16": (1, 2, 3), "BF16": (2, 3), "F32": (0, 1, 2, 3)}


def splat(value: int) -> ir.Constant:
    """The same 32-bit integer in all 8 lanes."""
    return ir.Constant(VI32, [value & 0xFFFFFFFF] * LANES)


def order(bits: int) -> tuple[int, ...]:
    """Column of each weight that `weights` yields for a block."""
    if bits == 8:
        return tuple(range(COLUMNS))
    if bits in (4, 5, 6):
        return tuple(
            2 * (16 * half + 8 * upper + 4 * word + i) + odd
            for odd in range(2)
            for upper in range(2)
            for word in range(2)
            for half in range(2)
            for i in range(4)
        )
    return tuple(8 * lane + slot for slot in range(8) for lane in range(LANES))


def _picks(lanes: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(lanes)), lanes)


def load_tables(b: Any, address: Any, bits: int, lut: str) -> Any:
    """The LUT of one group, as `weights` wants it: registers, or an address of float32."""
    size = 4 if lut == "F32" else 2
    lanes = min(2**bits, 16)
    kind = ir.VectorType(ir.IntType(8 * size), lanes)
    starts = [b.add(address, I64(first * size)) for first in range(0, 2**bits, lanes)]
    parts = [to_float32(b, load(b, start, kind), lut) for start in starts]
    if bits <= 3:
        order = _picks([i % lanes for i in range(LANES)])
        return b.shuffle_vector(parts[0], parts[0], order)
    if bits >= 7:
        room = local(b, ir.ArrayType(parts[0].type, len(parts)))
        at = b.ptrtoint(room, I64)
        for number, part in enumerate(parts):
            b.store(part, pointer(b, b.add(at, I64(64 * number)), part.type), align=4)
        return at
    raw = [b.bitcast(part, ir.VectorType(I8, 64)) for part in parts]
    return {
        byte: [b.shuffle_vector(r, r, _picks([4 * i + byte for i in range(16)] * 2)) for r in raw]
        for byte in _BYTES_USED[lut]
    }


def _word_codes(b: Any, bits: int, planes: list[Any]) -> Iterator[Any]:
    """Codes in 32-bit lanes; above the code a lane may hold anything."""
    parts, first = [], 0
    for width, address in zip(fields(bits), planes, strict=True):
        raw = load(b, address, ir.VectorType(ir.IntType(8 * width), LANES))
        parts.append((width, first, raw if width == 4 else b.zext(raw, VI32)))
        first += width
    for slot in range(8):
        code: Any = None
        for width, first, raw in parts:
            amount = slot * width - first
            moved = b.lshr(raw, splat(amount)) if amount >= 0 else b.shl(raw, splat(-amount))
            if code is None:
                code = moved
            else:
                keep = 2**first - 1
                code = b.or_(b.and_(code, splat(keep)), b.and_(moved, splat(~keep)))
        yield code


def _nibble_codes(b: Any, planes: list[Any]) -> Iterator[Any]:
    """3 bits: both planes are spread to nibbles once, instead of merging for each look-up."""
    low = b.zext(load(b, planes[0], ir.VectorType(ir.IntType(16), LANES)), VI32)
    high = b.zext(load(b, planes[1], ir.VectorType(I8, LANES)), VI32)
    for distance, keep in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)):
        low = b.and_(b.or_(low, b.shl(low, splat(distance))), splat(keep))
    for distance, keep in ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)):
        high = b.and_(b.or_(high, b.shl(high, splat(distance))), splat(keep))
    codes = b.or_(low, b.shl(high, splat(2)))
    for slot in range(8):
        yield b.lshr(codes, splat(4 * slot)) if slot else codes


def _pairs(b: Any, address: Any, width: int) -> Any:
    """A plane of 1 or 2 bits: the fields of 2 columns at the start of each of 32 bytes."""
    raw = load(b, address, ir.VectorType(ir.IntType(8 * width), LANES))
    word = b.zext(raw, VI32)
    spread = b.and_(word, splat(4**width - 1))
    for byte in range(1, 4):
        moved = b.shl(word, splat(byte * (8 - 2 * width)))
        spread = b.or_(spread, b.and_(moved, splat((4**width - 1) << 8 * byte)))
    return spread


def _byte_codes(b: Any, bits: int, planes: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Low 4 bits of the codes of the even columns, then of the odd ones, in 32 bytes.

    Each comes with masks whose top bits are the code's higher bits.
    """
    word = load(b, planes[0], VI32)
    pairs = _pairs(b, planes[1], bits - 4) if bits > 4 else None
    for odd in range(2):
        low = b.and_(b.lshr(word, splat(4 * odd)), splat(0x0F0F0F0F))
        masks = [
            b.bitcast(b.shl(pairs, splat(7 - odd * (bits - 4) - bit)), V8)
            for bit in range(bits - 4)
        ]
        yield b.bitcast(low, V8), masks


def _byte_lookup(b: Any, tables: list[Any], code: Any, masks: list[Any]) -> Any:
    """One byte of the entries of 32 codes."""
    if not masks:
        return call(b, "llvm.x86.avx2.pshuf.b", V8, [tables[0], code])
    half = len(tables) // 2
    low = _byte_lookup(b, tables[:half], code, masks[:-1])
    high = _byte_lookup(b, tables[half:], code, masks[:-1])
    return b.select(b.icmp_signed("<", masks[-1], ir.Constant(V8, None)), high, low)


def _interleave(b: Any, low: Any, high: Any, upper: int) -> Any:
    """Elements of `low` and `high` in turn, of the first or `upper` halves of 128-bit lanes."""
    count = low.type.count
    half = count // 4
    picks = [
        lane + half * upper + i + side
        for lane in (0, count // 2)
        for i in range(half)
        for side in (0, count)
    ]
    return b.shuffle_vector(low, high, _picks(picks))


def _byte_weights(b: Any, bits: int, tables: dict[int, list[Any]], planes: list[Any]) -> Any:
    zero = ir.Constant(V8, None)
    words = ir.VectorType(ir.IntType(16), 16)
    for code, masks in _byte_codes(b, bits, planes):
        found = [
            _byte_lookup(b, tables[byte], code, masks) if byte in tables else zero
            for byte in range(4)
        ]
        for upper in range(2):
            low = b.bitcast(_interleave(b, found[0], found[1], upper), words)
            high = b.bitcast(_interleave(b, found[2], found[3], upper), words)
            for word in range(2):
                yield b.bitcast(_interleave(b, low, high, word), VF32)


def _entries(b: Any, table: Any, codes: list[Any]) -> Any:
    """Float32 entries at 8 codes of 64 bits."""
    value = ir.Constant(VF32, ir.Undefined)
    for lane, code in enumerate(codes):
        entry = load(b, b.add(table, b.shl(code, I64(2))), F32)
        value = b.insert_element(value, entry, I32(lane))
    return value


def _memory_weights(b: Any, bits: int, table: Any, planes: list[Any]) -> Iterator[Any]:
    if bits == 8:
        for first in range(0, COLUMNS, LANES):
            at = [b.add(planes[0], I64(first + lane)) for lane in range(LANES)]
            yield _entries(b, table, [b.zext(load(b, one, I8), I64) for one in at])
        return
    for code in _word_codes(b, bits, planes):
        clean = b.and_(code, splat(2**bits - 1))
        lanes = [b.extract_element(clean, I32(lane)) for lane in range(LANES)]
        yield _entries(b, table, [b.zext(lane, I64) for lane in lanes])


def weights(b: Any, bits: int, tables: Any, planes: list[Any]) -> Iterator[Any]:
    """Vectors of 8 float32 weights of a block, in the order `order`.

    `planes` are the addresses of the block's bits in each plane.
    """
    if bits >= 7:
        yield from _memory_weights(b, bits, tables, planes)
    elif bits >= 4:
        yield from _byte_weights(b, bits, tables, planes)
    else:
        codes = _nibble_codes(b, planes) if bits == 3 else _word_codes(b, bits, planes)
        for code in codes:
            yield call(b, "llvm.x86.avx2.permps", VF32, [tables, code])
