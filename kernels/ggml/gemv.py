"""Products with shaped sketches for few tokens: `y = x @ W.T`, without decoding a row to memory.

`y[t, r] = sum_g scale[r, g] * sum_c x[t, c] * level[r, c] + minimum[r, g] * sum_c x[t, c]`
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.dispatch import AVX2_FEATURES, choose, why_not
from sketchconv.kernels.entries import round_bf16
from sketchconv.kernels.gemv_portable import dot
from sketchconv.kernels.ggml.dots import BLOCK, CODEBOOK_GRID, FROM_ZERO, SIGNED, row_dots
from sketchconv.kernels.ggml.expand import expand_plain
from sketchconv.kernels.ggml.shaped import GRIDS, key_of
from sketchconv.kernels.jit import inner, jit
from sketchconv.kernels.pointers import carray, pointer_to

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
TILE_ROWS = 16  # rows that pass by four activations while these stay in the first cache
_LEVELS: Final = {"iq4_nl": CODEBOOK_GRID, "affine": FROM_ZERO, "symmetric": SIGNED}


@inner
def _float(word: Any) -> Any:
    """A float16's bits as float32, without a branch, so that loops of it become vectors."""
    sign, size = (word & np.uint32(0x8000)) << np.uint32(16), word & np.uint32(0x7FFF)
    more = np.uint32(112 << 23) if size >= np.uint32(0x7C00) else np.uint32(0)
    normal = (size << np.uint32(13)) + np.uint32(112 << 23) + more
    small = np.float32(np.float32(size) * np.float32(2.0**-24)).view(np.uint32)
    return np.uint32((small if size < np.uint32(0x400) else normal) | sign).view(np.float32)


@inner
def arranged(bits: int, half: int, x: int, tokens: int, columns: int) -> Any:
    """Activations as float32 ``[tokens, columns]`` in the order of the codes.

    Of each 32 columns of 4 or 5 bits the even ones come first: two of them share a byte.
    """
    values = np.empty((tokens, columns), np.float32)
    words = values.view(np.uint32)
    full = carray(pointer_to(x, np.uint32), (tokens, columns))
    short = carray(pointer_to(x, np.uint16), (tokens, columns))
    for token in range(tokens):
        for block in range(0, columns, 32):
            for k in range(32):
                source = block + k if bits == 8 else block + 2 * (k % 16) + k // 16
                words[token, block + k] = (
                    np.uint32(short[token, source]) << np.uint32(16)
                    if half
                    else full[token, source]
                )
    return values


@inner
def _group_sums(values: Any, tokens: int, groups: int, columns: int) -> Any:
    """Sums of the activations of each group, float32 ``[tokens, groups]``."""
    sums, ones = np.empty((tokens, groups), np.float32), np.ones(columns, np.float32)
    for token in range(tokens):
        for group in range(groups):
            at = np.int64(values.ctypes.data) + 4 * columns * (token * groups + group)
            sums[token, group] = dot(np.int64(ones.ctypes.data), at, columns)
    return sums


@inner
def _put(y: int, at: int, value: Any, half: int) -> None:
    if half:
        carray(pointer_to(y + 2 * at, np.uint16), (1,))[0] = round_bf16(value)
    else:
        carray(pointer_to(y + 4 * at, np.float32), (1,))[0] = value


@cache
def multiply_kernel(grid: str, bits: int, fast: bool, narrow: bool) -> Any:
    """Kernel of `y = x @ W.T`; its arguments are those of `dispatch.Multiply`.

    `tables` are the stored scales (and minima), float16 ``[rows, groups, fields]``. Sums are
    float32, in an order that depends on neither `begin`, `end` nor `tokens`.

    Args:
        grid: name of the shape; groups have a multiple of 32 columns.
        bits: of the codes.
        fast: use AVX2's instructions; without, the same code runs on every CPU.
        narrow: groups have exactly 32 columns.

    Raises:
        ValueError: there is no such grid.
    """
    fields = 1 + GRIDS[key_of(grid, bits)].has_minimum
    levels, quick, single = _LEVELS[grid], int(fast), int(narrow)

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
        if tokens == 0:
            return
        values = arranged(bits, half, x, tokens, groups * columns)
        sums = _group_sums(values, tokens if fields > 1 else 0, groups, columns)
        count, row_bytes = groups * fields, groups * columns * bits // 8
        wide = np.empty((TILE_ROWS, 0 if quick else count), np.float32)
        for tile in range(begin, end, TILE_ROWS):
            last = min(tile + TILE_ROWS, end)
            scales, scale_bytes = np.int64(tables + 2 * tile * count), 2 * count
            if not quick:
                stored = carray(pointer_to(scales, np.uint16), (TILE_ROWS, count))
                for row in range(last - tile):
                    for i in range(count):
                        wide[row, i] = _float(np.uint32(stored[row, i]))
                scales, scale_bytes = np.int64(wide.ctypes.data), 4 * count
            token = 0
            while token < tokens:
                many = 4 if token + 4 <= tokens else 1
                # Addresses are taken here, in the loops: Numba frees an array after its last use.
                at = np.int64(values.ctypes.data) + 4 * token * groups * columns
                totals = np.int64(sums.ctypes.data) + 4 * token * groups
                if not quick:
                    scales = np.int64(wide.ctypes.data)
                for row in range(tile, last):
                    codes = index + row * row_bytes
                    own = scales + (row - tile) * scale_bytes
                    to = token * rows + row
                    if many == 1:
                        one = row_dots(
                            levels, bits, quick, single, fields, 1,
                            codes, own, at, totals, groups, columns,
                        )  # fmt: skip
                        _put(y, to, one[0], half)
                    else:
                        four = row_dots(
                            levels, bits, quick, single, fields, 4,
                            codes, own, at, totals, groups, columns,
                        )  # fmt: skip
                        for part in range(4):
                            _put(y, to + part * rows, four[part], half)
                token += many

    return multiply


@cache
def chosen_kernel(grid: str, bits: int, columns: int, name: str | None = None) -> Any:
    """The kernel for this CPU and groups of so many columns.

    `name` is that of the kernels of free sketches (`dispatch.choose`): with ``"portable"`` these
    use no instructions of the CPU's own either.

    Raises:
        ValueError: there is no such grid, or no kernels named `name` that can run here.
    """
    fast = why_not(AVX2_FEATURES) is None and choose(name).name != "portable"
    return multiply_kernel(grid, bits, fast, columns == BLOCK)


def multiply_plain(x: F32, index: U8, table: NDArray[np.float16], grid: str, bits: int) -> F32:
    """The same by NumPy in float64, rounded to float32 ``[tokens, rows]``: the reference."""
    wide = expand_plain(index, table.astype(np.float32), grid, bits, x.shape[1])
    product: F32 = (x.astype(np.float64) @ wide.astype(np.float64).T).astype(np.float32)
    return product
