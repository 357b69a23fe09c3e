"""Plain Numba kernels on packed sketches, for every CPU: a row is decoded into a buffer, then used.

Addresses stand for arrays: `index` for uint8 ``[rows, groups, bytes]``, `tables` for the LUT's
carrier ``[rows, groups, 2**bits]``. Sums run over 32 lanes of target-independent vectors
(`vectors.py`), in an order that no machine changes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba.extending import intrinsic

from sketchconv.kernels import vectors
from sketchconv.kernels.entries import BF16, F32, KINDS, round_bf16
from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.planes import fields
from sketchconv.kernels.pointers import carray, pointer_to

LANES = 8
SUMS = 4
STEP = LANES * SUMS  # columns of one round of a sum; rows are padded to whole rounds with zeros


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
        picks = vectors.ir.Constant(vectors.vector(vectors.I32, 2 * count), order)
        raw = b.shuffle_vector(low, high, picks)
    return raw


def _take_blocks(typing: Any, width: Any, shift: Any, plane: Any, codes: Any, size: Any) -> Any:
    """Put the fields of whole blocks of a plane at bit `shift` of the bytes at `codes`.

    `plane` and `codes` are addresses, `size` the bytes of the plane.
    """
    field, first = width.literal_value, shift.literal_value

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        source, target = (b.inttoptr(a, vectors.I8.as_pointer()) for a in args[2:4])

        def take(offset: Any, _: list[Any]) -> list[Any]:
            raw = vectors.load(b, source, vectors.vector(vectors.I8, PLANE_BYTES), offset)
            found = _spread_fields(b, raw, field)
            at = b.mul(offset, vectors.I64(8 // field))
            if first:
                found = b.shl(found, vectors.constant(found.type, first))
                found = b.or_(found, vectors.load(b, target, found.type, at))
            vectors.store(b, found, target, at)
            return []

        vectors.blocks(b, args[4], PLANE_BYTES, [], take)
        return context.get_dummy_value()

    i64 = vectors.types.int64
    return vectors.types.void(width, shift, i64, i64, i64), codegen


take_blocks: Any = intrinsic(prefer_literal=True)(_take_blocks)


@inner
def _take_rest(plane: int, codes: Any, size: int, width: int, shift: Any) -> None:
    """`take_blocks` for the bytes of a last, short block."""
    per_byte = 8 // width
    mask = np.uint8((1 << width) - 1)
    raw = carray(pointer_to(plane, np.uint8), (size,))
    for i in range(size // PLANE_BYTES * PLANE_BYTES, size):
        for slot in range(per_byte):
            field = np.uint8(((raw[i] >> np.uint8(slot * width)) & mask) << np.uint8(shift))
            at = i * per_byte + slot
            codes[at] = field if shift == 0 else codes[at] | field


@cache
def _plane_taker(width: int, shift: int) -> Any:
    """Function that puts one plane at bit `shift` of `codes` and returns the bytes of the plane."""

    @inner
    def take(plane: int, codes: Any, columns: int) -> int:
        size = (columns * width + 7) // 8
        take_blocks(width, shift, plane, np.int64(codes.ctypes.data), size)
        _take_rest(plane, codes, size, width, shift)
        return size

    return take


@cache
def _unpacker(bits: int) -> Any:
    """Function that unpacks one group into `codes` and returns the bytes of the group."""
    first, *more = (
        _plane_taker(width, sum(w for w in fields(bits) if w > width)) for width in fields(bits)
    )
    if not more:
        return first
    second, *more = more
    third = more[0] if more else None

    @inner
    def two(index: int, codes: Any, columns: int) -> int:
        size = first(index, codes, columns)
        return size + second(index + size, codes, columns)

    if third is None:
        return two

    @inner
    def three(index: int, codes: Any, columns: int) -> int:
        size = two(index, codes, columns)
        return size + third(index + size, codes, columns)

    return three


@cache
def _row_decoder(bits: int, lut: str) -> Any:
    """Function that decodes one row into float32 `out`."""
    kind, widths = KINDS[lut], fields(bits)
    unpack = _unpacker(bits)

    @inner
    def decode_row(
        index: int,
        tables: int,
        row: int,
        groups: int,
        columns: int,
        table: Any,
        codes: Any,
        out: Any,
    ) -> None:
        at = index
        for width in widths:
            at += row * groups * ((columns * width + 7) // 8)
        for group in range(groups):
            _load_table(kind, tables, (row * groups + group) << bits, table)
            at += unpack(at, codes, columns)
            for column in range(columns):
                out[group * columns + column] = table[codes[column]]

    return decode_row


@inner
def _load_x(x: int, half: bool, tokens: int, total: int, room: int) -> Any:
    """Activations as float32 ``[tokens, room]``, from float32 or bfloat16, zeros at the end."""
    values = np.zeros((tokens, room), np.float32)
    words = values.view(np.uint32)
    full = carray(pointer_to(x, np.uint32), (tokens, total))
    short = carray(pointer_to(x, np.uint16), (tokens, total))
    for token in range(tokens):
        if half:
            for i in range(total):
                words[token, i] = np.uint32(short[token, i]) << np.uint32(16)
        else:
            for i in range(total):
                words[token, i] = full[token, i]
    return values


def _dot(typing: Any, weights: Any, x: Any, size: Any) -> Any:
    """Dot product of two float32 arrays at addresses; `size` is a multiple of `STEP`."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        kind = vectors.vector(vectors.F32, LANES)
        left, right = (b.inttoptr(a, vectors.I8.as_pointer()) for a in args[:2])

        def add(offset: Any, sums: list[Any]) -> list[Any]:
            new = []
            for number, total in enumerate(sums):
                at = b.add(offset, vectors.I64(LANES * number))
                product = b.fmul(*(vectors.load(b, p, kind, at) for p in (left, right)))
                new.append(b.fadd(total, product))
            return new

        zero = vectors.constant(kind, 0.0)
        sums = vectors.blocks(b, args[2], STEP, [zero] * SUMS, add)
        halves = [b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3])]
        return vectors.lane_sum(b, b.fadd(*halves))

    i64 = vectors.types.int64
    return vectors.types.float32(i64, i64, i64), codegen


dot: Any = vectors.intrinsic(_dot)


@cache
def multiply_kernel(bits: int, lut: str) -> Any:
    """Kernel of `y = x @ W.T`; its arguments are listed at `dispatch.Multiply`."""
    decode_row = _row_decoder(bits, lut)

    @jit
    def multiply(
        begin: int,
        end: int,
        index: int,
        tables: int,
        x: int,
        y: int,
        half: bool,
        tokens: int,
        rows: int,
        groups: int,
        columns: int,
    ) -> None:
        room = (groups * columns + STEP - 1) // STEP * STEP
        values = _load_x(x, half, tokens, groups * columns, room)
        weights = np.zeros(room, np.float32)
        codes = np.empty(columns + 8, np.uint8)
        table = np.empty(1 << bits, np.float32)
        full = carray(pointer_to(y, np.float32), (tokens * rows,))
        short = carray(pointer_to(y, np.uint16), (tokens * rows,))
        for row in range(begin, end):
            decode_row(index, tables, row, groups, columns, table, codes, weights)
            for token in range(tokens):
                at = np.int64(values.ctypes.data) + 4 * token * room
                total = dot(np.int64(weights.ctypes.data), at, room)
                if half:
                    short[token * rows + row] = round_bf16(total)
                else:
                    full[token * rows + row] = total

    return multiply


@cache
def decode_kernel(bits: int, lut: str, out: str) -> Any:
    """Kernel that writes rows of W as `out` ("F32" or "BF16"); see `dispatch.Decode`."""
    decode_row = _row_decoder(bits, lut)
    half = out == "BF16"

    @jit
    def decode(
        begin: int,
        end: int,
        index: int,
        tables: int,
        ids: int,
        target: int,
        groups: int,
        columns: int,
    ) -> None:
        width = groups * columns
        weights = np.empty(width, np.float32)
        codes = np.empty(columns + 8, np.uint8)
        table = np.empty(1 << bits, np.float32)
        for number in range(begin, end):
            row = carray(pointer_to(ids, np.int64), (end,))[number] if ids else number
            if half:
                decode_row(index, tables, row, groups, columns, table, codes, weights)
                short = carray(pointer_to(target + 2 * number * width, np.uint16), (width,))
                for column in range(width):
                    short[column] = round_bf16(weights[column])
            else:
                full = carray(pointer_to(target + 4 * number * width, np.float32), (width,))
                decode_row(index, tables, row, groups, columns, table, codes, full)

    return decode
