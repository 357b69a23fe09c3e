"""Rows of shaped sketches to weights: packed codes (`planes-le`) times scales, without any LUT.

A float16 scale times a whole level is exact in float32, so that a weight is rounded once at most,
where the minimum is added: the values of the blocks of ggml, fused or not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.ggml.lift import lift
from sketchconv.kernels.ggml.pairs import lift_pairs, lift_pairs_levels
from sketchconv.kernels.ggml.shaped import GRIDS, key_of
from sketchconv.kernels.jit import jit
from sketchconv.kernels.planes import packed_size
from sketchconv.kernels.threads import for_spans

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@jit
def _whole_span(
    index: Any, table: Any, first: Any, out: Any, begin: int, end: int, bits: int
) -> None:
    """Groups from `begin` to `end`, whose levels are the codes plus `first`."""
    width = out.shape[1]
    for group in range(begin, end):
        data, target = index[group], out[group]
        step = table[group, 0]
        # Without a minimum -0.0 is added, which changes nothing, not even the sign of a zero.
        minimum = table[group, 1] if table.shape[1] > 1 else np.float32(-0.0)
        for block in range(width // 32):
            at, to = 16 * block, 32 * block
            if bits == 8:
                for part in range(to, to + 32, 16):
                    lift(data, part, 0, 255, 128, step, -minimum, target, part)
            else:
                high = width // 2 + 4 * block if bits == 5 else -1
                lift_pairs(data, at, high, first, step, minimum, target, to)


@jit
def _levels_span(index: Any, table: Any, out: Any, begin: int, end: int) -> None:
    """The same for the levels of IQ4_NL."""
    width = out.shape[1]
    for group in range(begin, end):
        data, target, step = index[group], out[group], table[group, 0]
        for block in range(width // 32):
            lift_pairs_levels(data, 16 * block, step, target, 32 * block)


def expand_rows(
    index: U8, table: F32, grid: str, bits: int, out: F32, threads: int | None = None
) -> None:
    """Decode rows of a shaped sketch.

    Args:
        index: uint8 ``[rows, groups, bytes]``, packed, contiguous.
        table: float32 ``[rows, groups, fields]``, the stored float16 scales (and minima), widened.
        grid: name of the shape.
        bits: of the codes.
        out: float32 ``[rows, columns]``, contiguous; filled.
        threads: None means every core that the process may use.

    Raises:
        ValueError: no such grid, or shapes that do not fit together.
    """
    known = GRIDS[key_of(grid, bits)]
    rows, columns = out.shape
    groups, fields = table.shape[1:]
    width = columns // groups
    shape = (rows, groups, packed_size(width, bits))
    fits = index.shape == shape and table.shape[0] == rows and fields == 1 + known.has_minimum
    if not fits or columns % groups or width % 32:
        raise ValueError(f"index {index.shape}, scales {table.shape} and rows {out.shape} differ")
    if not (index.flags.c_contiguous and out.flags.c_contiguous):
        raise ValueError("index and rows must be contiguous")
    data, target = index.reshape(rows * groups, -1), out.reshape(rows * groups, width)
    scales, first = np.ascontiguousarray(table).reshape(-1, fields), np.float32(known.levels[0])
    if grid == "iq4_nl":
        for_spans(
            lambda b, e: _levels_span(data, scales, target, b, e),
            *(rows * groups, out.size, threads),
        )
    else:
        for_spans(
            lambda b, e: _whole_span(data, scales, first, target, b, e, bits),
            *(rows * groups, out.size, threads),
        )


def expand_plain(index: U8, table: F32, grid: str, bits: int, columns: int) -> F32:
    """The same by NumPy alone, float32 ``[rows, columns]``: the reference of `expand_rows`."""
    rows, groups = table.shape[:2]
    levels = np.array(GRIDS[key_of(grid, bits)].levels, np.float32)
    whole = np.unpackbits(index, axis=2, bitorder="little")
    width = columns // groups
    planes, at, codes = (8,) if bits == 8 else (4, 1)[: bits - 3], 0, 0
    for shift, plane in enumerate(planes):
        part = whole[:, :, at : at + plane * width].reshape(rows, groups, width, plane)
        value = (part.astype(np.int64) << np.arange(plane)).sum(axis=3)
        codes, at = codes + (value << (4 * shift)), at + plane * width
    product: F32 = levels[codes] * table[:, :, :1]
    return (product + table[:, :, 1:] if table.shape[2] > 1 else product).reshape(rows, columns)
