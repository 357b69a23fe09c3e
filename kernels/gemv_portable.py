"""Plain Numba kernels on packed sketches, for every CPU: a row is decoded into a buffer, then used.

Sums run over 32 lanes of target-independent vectors (`vectors.py`), in an order that no machine
changes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from sketchconv.kernels import vectors
from sketchconv.kernels.entries import KINDS, round_bf16
from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.pointers import carray, pointer_to
from sketchconv.kernels.portable_rows import decode_row

LANES = 8
SUMS = 4
STEP = LANES * SUMS  # columns of one round of a sum; rows are padded to whole rounds with zeros


@inner
def _load_x(x: int, half: int, tokens: int, total: int, room: int) -> Any:
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
    kind = KINDS[lut]  # closures hold plain constants: any other would miss the cache on disk

    @jit
    def multiply(
        begin: int,
        end: int,
        index: int,
        tables: int,
        x: int,
        y: int,
        half: int,
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
            decode_row(bits, kind, index, tables, row, groups, columns, table, codes, weights)
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
    kind = KINDS[lut]
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
                decode_row(bits, kind, index, tables, row, groups, columns, table, codes, weights)
                short = carray(pointer_to(target + 2 * number * width, np.uint16), (width,))
                for column in range(width):
                    short[column] = round_bf16(weights[column])
            else:
                full = carray(pointer_to(target + 4 * number * width, np.float32), (width,))
                decode_row(bits, kind, index, tables, row, groups, columns, table, codes, full)

    return decode
