"""Pieces of LLVM IR for AVX-512: tables in registers, look-ups, codes out of bit planes.

A LUT of at most 16 float32 entries fills one 512-bit register, and one `vpermps` looks up 16
weights; 32 entries take `vpermi2ps`, 64 to 256 entries several of them and blends.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from sketchconv.kernels.planes import fields

LANES = 16
F32 = ir.FloatType()
I8 = ir.IntType(8)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
VF32 = ir.VectorType(F32, LANES)
VI32 = ir.VectorType(I32, LANES)
V8 = ir.VectorType(I8, 64)


def slots(bits: int) -> int:
    """Weights of one lane in one block: a block holds `16 * slots(bits)` columns."""
    return 4 if bits == 8 else 8


def splat(value: int) -> ir.Constant:
    """The same 32-bit integer in all 16 lanes."""
    return ir.Constant(VI32, [value & 0xFFFFFFFF] * LANES)


def pointer(b: Any, address: Any, kind: ir.Type) -> Any:
    """Turn a 64-bit address into a pointer to `kind`."""
    return b.inttoptr(address, kind.as_pointer())


def call(b: Any, name: str, result: ir.Type, args: list[Any]) -> Any:
    """Call the LLVM intrinsic `name`; its overload follows from the types of `args`."""
    kind = ir.FunctionType(result, [a.type for a in args])
    declare: Any = cgutils.get_or_insert_function
    return b.call(declare(b.module, kind, name), args)


def local(b: Any, kind: ir.Type) -> Any:
    """A variable of the function; LLVM keeps it in a register."""
    allocate: Any = cgutils.alloca_once
    return allocate(b, kind)


def load(b: Any, address: Any, kind: ir.Type) -> Any:
    """Load `kind` from an address of any alignment."""
    return b.load(pointer(b, address, kind), align=1)


def to_float32(b: Any, raw: Any, lut: str) -> Any:
    """Lanes of a LUT's 16-bit or 32-bit carrier as float32 lanes."""
    lanes = raw.type.count
    floats = ir.VectorType(F32, lanes)
    if lut == "F32":
        return b.bitcast(raw, floats)
    if lut == "F16":
        return b.fpext(b.bitcast(raw, ir.VectorType(ir.HalfType(), lanes)), floats)
    wide = ir.VectorType(I32, lanes)
    shift = ir.Constant(wide, [16] * lanes)
    return b.bitcast(b.shl(b.zext(raw, wide), shift), floats)


def prefetch(b: Any, address: Any) -> None:
    """Bring the line of `address` into the cache; it need not be in any array."""
    args = [pointer(b, address, I8), I32(0), I32(3), I32(1)]
    call(b, "llvm.prefetch.p0", ir.VoidType(), args)


def load_byte_tables(b: Any, address: Any, bits: int) -> list[Any]:
    """The low bytes of a LUT of 64 or more 16-bit entries, then the high ones, 64 a register."""
    pairs = [
        [load(b, b.add(address, I64(first + half)), V8) for half in (0, 64)]
        for first in range(0, 2 << bits, 128)
    ]
    orders = [ir.Constant(ir.VectorType(I32, 64), list(range(side, 128, 2))) for side in (0, 1)]
    return [b.shuffle_vector(*pair, order) for order in orders for pair in pairs]


def load_tables(b: Any, address: Any, bits: int, lut: str) -> list[Any]:
    """The LUT of one group in registers of 16 float32; short LUTs are repeated to 16 entries.

    1 to 3 bits: the first register is the LUT again and again, the others serve `blocks`.
    """
    size = 4 if lut == "F32" else 2
    entries = 2**bits
    lanes = min(entries, LANES)
    raw_type = ir.VectorType(ir.IntType(8 * size), lanes)
    tables = []
    for first in range(0, entries, LANES):
        raw = load(b, b.add(address, I64(first * size)), raw_type)
        tables.append(to_float32(b, raw, lut))
    if lanes == LANES:
        return tables
    empty = ir.Constant(tables[0].type, ir.Undefined)
    return [b.shuffle_vector(tables[0], empty, ir.Constant(VI32, order)) for order in _SHORT[bits]]


_SHORT = {  # entry of the LUT in each lane of each table: `avx512_blocks.py`, `avx512_woven.py`
    1: [[i >> code & 1 for i in range(LANES)] for code in range(4)],
    2: [[i >> code & 3 for i in range(LANES)] for code in (0, 2)],
    3: [
        [i % 8 for i in range(LANES)],
        [i >> 2 | (i & 1) << 2 for i in range(LANES)],
        [i >> 2 | (i >> 1 & 1) << 2 for i in range(LANES)],
        [i >> 1 for i in range(LANES)],
        [i & 1 | i >> 2 << 1 for i in range(LANES)],
        [i & 3 | i >> 3 << 2 for i in range(LANES)],
    ],
}


def lookup(b: Any, tables: list[Any], code: Any) -> Any:
    """`lut[code]` in every lane; bits of `code` above the LUT's size may hold anything."""
    if len(tables) == 1:
        return call(b, "llvm.x86.avx512.permvar.sf.512", VF32, [tables[0], code])
    if len(tables) == 2:
        args = [tables[0], code, tables[1]]
        return call(b, "llvm.x86.avx512.vpermi2var.ps.512", VF32, args)
    half = len(tables) // 2
    low = lookup(b, tables[:half], code)
    high = lookup(b, tables[half:], code)
    bit = b.and_(code, splat(half * LANES))
    return b.select(b.icmp_unsigned("!=", bit, splat(0)), high, low)


def merge(b: Any, parts: list[tuple[Any, int]], shifts: list[int]) -> Any:
    """Codes from the words of several planes; `parts` holds (words, first bit of the plane)."""
    code = None
    for (words, first), shift in zip(parts, shifts, strict=True):
        amount = shift - first
        moved = b.lshr(words, splat(amount)) if amount >= 0 else b.shl(words, splat(-amount))
        if code is None:
            code = moved
        else:
            keep = 2**first - 1
            code = b.or_(b.and_(code, splat(keep)), b.and_(moved, splat(~keep)))
    return code


def keep_bytes(b: Any, left: Any, count: int) -> Any:
    """Mask of `count` flags, the first `left` (1 to `count`) of them set."""
    ones = b.lshr(I64(-1), b.sub(I64(64), left))
    if count < 64:
        ones = b.trunc(ones, ir.IntType(count))
    return b.bitcast(ones, ir.VectorType(ir.IntType(1), count))


def load_bytes(b: Any, address: Any, count: int, left: Any) -> Any:
    """`count` bytes of which only the first `left` are read; the others are zero."""
    kind = ir.VectorType(ir.IntType(8), count)
    args = [pointer(b, address, kind), I32(1), keep_bytes(b, left, count), ir.Constant(kind, None)]
    return call(b, f"llvm.masked.load.v{count}i8.p0", kind, args)


def field_bytes(b: Any, columns: Any, width: int) -> Any:
    """Bytes of `columns` fields of `width` bits, rounded up."""
    return b.lshr(b.add(b.mul(columns, I64(width)), I64(7)), I64(3))


def plane_bytes(b: Any, bits: int, columns: Any) -> list[Any]:
    """Bytes of each plane of one group of `columns` columns."""
    return [field_bytes(b, columns, width) for width in fields(bits)]


def plane_starts(b: Any, index: Any, sizes: list[Any]) -> list[Any]:
    """Addresses of the planes of the group that starts at `index`."""
    starts = [index]
    for size in sizes[:-1]:
        starts.append(b.add(starts[-1], size))
    return starts


def sum_lanes(b: Any, sums: list[Any]) -> Any:
    """Sum of the accumulators' lanes, halves onto halves: one order, whatever the machine."""
    while len(sums) > 1:
        sums = [b.fadd(low, high) for low, high in zip(sums[::2], sums[1::2], strict=True)]
    value, lanes = sums[0], LANES
    while lanes > 1:
        lanes //= 2
        halves = [
            b.shuffle_vector(value, value, ir.Constant(ir.VectorType(I32, lanes), order))
            for order in (list(range(lanes)), list(range(lanes, 2 * lanes)))
        ]
        value = b.fadd(*halves)
    return b.extract_element(value, I32(0))
