"""Rows of packed sketches as float32, in plain Numba and target-independent vectors.

Addresses stand for arrays: `index` for uint8 ``[rows, groups, bytes]``, `tables` for the LUT's
carrier ``[rows, groups, 2**bits]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from sketchconv.kernels import vectors
from sketchconv.kernels.entries import BF16, F32
from sketchconv.kernels.jit import inner
from sketchconv.kernels.pointers import carray, pointer_to


@inner
def _half_bits(half: Any) -> Any:
    """Float32 bits of a float16 given by its bits."""
    sign = np.uint32(half & 0x8000) << np.uint32(16)
    magnitude = np.uint32(half & 0x7FFF)
    if magnitude >= 0x7C00:  # infinity or NaN, which becomes quiet as in every CPU's conversion
        quiet = np.uint32(0x00400000) if magnitude > 0x7C00 else np.uint32(0)
        return np.uint32(sign | np.uint32(0x7F800000) | (magnitude << np.uint32(13)) | quiet)
    if magnitude < 0x0400:  # zero or subnormal: a multiple of 2**-24
        value = np.float32(magnitude) * np.float32(2.0**-24)
        return np.uint32(sign | np.float32(value).view(np.uint32))
    return np.uint32(sign | ((magnitude << np.uint32(13)) + np.uint32(112 << 23)))


@inner
def _load_table(kind: int, tables: int, first: int, table: Any) -> None:
    """Convert `table.size` LUT entries from entry `first` on to float32."""
    words = table.view(np.uint32)
    if kind == F32:
        raw32 = carray(pointer_to(tables + 4 * first, np.uint32), (table.size,))
        words[:] = raw32
        return
    raw16 = carray(pointer_to(tables + 2 * first, np.uint16), (table.size,))
    for i in range(table.size):
        words[i] = np.uint32(raw16[i]) << np.uint32(16) if kind == BF16 else _half_bits(raw16[i])


PLANE_BYTES = 16  # of a plane that are spread at a time


def _spread_fields(b: Any, raw: Any, width: int) -> Any:
    """The fields of `width` bits in a vector of bytes, one to a byte, in order."""
    step = 8
    while step > width:
        step //= 2
        low = b.and_(raw, vectors.constant(raw.type, (1 << step) - 1))
        high = b.lshr(raw, vectors.constant(raw.type, step))
        count = raw.type.count
        order = [side + i for i in range(count) for side in (0, count)]
        picks = ir.Constant(vectors.vector(vectors.I32, 2 * count), order)
        raw = b.shuffle_vector(low, high, picks)
    return raw


def _take_blocks(typing: Any, width: Any, plane: Any, codes: Any, size: Any, shift: Any) -> Any:
    """Put the fields of whole blocks of a plane at bit `shift` of the bytes at `codes`.

    `plane` and `codes` are addresses, `size` the bytes of the plane. Lower bits of the codes stay,
    higher ones become zero.
    """
    field = width.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target = (b.inttoptr(a, vectors.I8.as_pointer()) for a in args[1:3])
        first = b.trunc(args[4], vectors.I8)
        keep = b.sub(b.shl(vectors.I8(1), first), vectors.I8(1))

        def take(offset: Any, _: list[Any]) -> list[Any]:
            raw = vectors.load(b, source, vectors.vector(vectors.I8, PLANE_BYTES), offset)
            found = _spread_fields(b, raw, field)
            lanes = found.type.count
            at = b.mul(offset, vectors.I64(8 // field))
            old = vectors.load(b, target, found.type, at)
            old = b.and_(old, vectors.splat(b, keep, lanes))
            found = b.or_(old, b.shl(found, vectors.splat(b, first, lanes)))
            vectors.store(b, found, target, at)
            return []

        vectors.blocks(b, args[3], PLANE_BYTES, [], take)
        return context.get_dummy_value()

    i64 = vectors.types.int64
    return vectors.types.void(width, i64, i64, i64, i64), codegen


take_blocks: Any = intrinsic(prefer_literal=True)(_take_blocks)


@inner
def _take_rest(plane: int, codes: Any, size: int, width: int, shift: int) -> None:
    """`take_blocks` for the bytes of a last, short block."""
    per_byte = 8 // width
    mask = np.uint8((1 << width) - 1)
    keep = np.uint8((1 << shift) - 1)
    raw = carray(pointer_to(plane, np.uint8), (size,))
    for i in range(size // PLANE_BYTES * PLANE_BYTES, size):
        for slot in range(per_byte):
            field = np.uint8(((raw[i] >> np.uint8(slot * width)) & mask) << np.uint8(shift))
            codes[i * per_byte + slot] = (codes[i * per_byte + slot] & keep) | field


@inner
def _unpack(bits: int, index: int, codes: Any, columns: int) -> int:
    """Unpack one group at the address `index` into `codes`; returns its bytes."""
    target = np.int64(codes.ctypes.data)
    at = index
    shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            size = (columns * width + 7) // 8
            if width == 8:
                take_blocks(8, at, target, size, shift)
            elif width == 4:
                take_blocks(4, at, target, size, shift)
            elif width == 2:
                take_blocks(2, at, target, size, shift)
            else:
                take_blocks(1, at, target, size, shift)
            _take_rest(at, codes, size, width, shift)
            at += size
            shift += width
    return at - index


@inner
def decode_row(
    bits: int,
    kind: int,
    index: int,
    tables: int,
    row: int,
    groups: int,
    columns: int,
    table: Any,
    codes: Any,
    out: Any,
) -> None:
    """Decode one row into float32 `out`.

    `table` has room for a LUT in float32, `codes` for a group and 8 more; `kind` is one of
    `entries.KINDS`.
    """
    at = index
    for width in (8, 4, 2, 1):
        if bits & width:
            at += row * groups * ((columns * width + 7) // 8)
    for group in range(groups):
        _load_table(kind, tables, (row * groups + group) << bits, table)
        at += _unpack(bits, at, codes, columns)
        for column in range(columns):
            out[group * columns + column] = table[codes[column]]
