"""Gradient of the LUT where a BLAS makes tiles of the gradient of the weight: their sums by code.

Tiles of rows stay in the cache of the GPU; no more than one exists at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.codes import codes
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import geometry, on

SUMS = 64  # entries that one program sums, in registers
WARPS = 8
TILE_ROWS = 1024  # 16 MB at 4096 columns; fewer leave the BLAS with too little


@jit
def _sums_kernel(
    dense: tl.tensor,
    index: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    size: tl.tensor,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    REPACKED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """`out[row, group, code]`: sums of float32 `dense` ``[rows, groups * GROUP]`` by code.

    Program (i, j, k) takes ROWS rows, group j, and SUMS entries.
    """
    group = tl.program_id(1)
    top = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    mine = (top + row < rows)[:, None]
    place = top * groups + group
    dense += place * GROUP + row[:, None] * (groups * GROUP)
    start = index + place * size + row[:, None] * (groups * size)
    sums: tl.tensor = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)  # noqa: RUF005
    low = tl.program_id(2) * SUMS
    value, code = _taken(dense, start, mine, 0, GROUP, BITS, REPACKED, COLUMNS)
    for begin in range(COLUMNS, GROUP + COLUMNS, COLUMNS):
        # The next tile comes while this one is added.
        later, next_code = _taken(dense, start, mine, begin, GROUP, BITS, REPACKED, COLUMNS)
        added: tl.tensor = ()
        for entry in tl.static_range(SUMS):
            # Two instructions: a comparison, and an addition under its result.
            one = tl.where(code == low + entry, sums[entry] + value, sums[entry])
            added = added + (one,)  # noqa: RUF005
        sums = added
        value, code = later, next_code
    out += (place << BITS) + row * (groups << BITS) + low
    for entry in tl.static_range(SUMS):
        tl.store(out + entry, tl.sum(sums[entry], 1), mask=top + row < rows)


@jit
def _taken(
    dense: tl.tensor, start: tl.tensor, mine: tl.tensor, begin: tl.tensor, GROUP: tl.constexpr,
    BITS: tl.constexpr, REPACKED: tl.constexpr, COLUMNS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Values and codes of one tile; where there is none, a code that no entry has."""
    column = begin + tl.arange(0, COLUMNS)[None, :]
    mask = mine & (column < GROUP)
    value = tl.load(dense + column, mask=mask, other=0.0)
    code = codes(start, column, mask, GROUP, BITS, REPACKED)
    return value, tl.where(mask, code, 1 << BITS)


def run(grad: Tensor, x: Tensor, index: Tensor, lut: Tensor, layout: str) -> Tensor:
    """`grad_lut` of `sketchconv.kernels.gpu.gradients`.

    Nothing is tuned or atomic: the sums have the same bits in every run, if the BLAS' have.
    """
    rows, groups, entries = lut.shape
    bits, width = entries.bit_length() - 1, x.shape[1] // groups
    high, wide = _tile(bits, width)
    out = torch.empty((rows, groups, entries), dtype=torch.float32, device=x.device)
    for begin in range(0, rows, TILE_ROWS):
        end = min(begin + TILE_ROWS, rows)
        dense = _product(grad[:, begin:end], x)
        with on(x.device):
            _sums_kernel[(triton.cdiv(end - begin, high), groups, triton.cdiv(entries, SUMS))](
                dense, index[begin:end], out[begin:end], end - begin, groups, index.shape[-1],
                **geometry(width, bits, layout, torch.float32), ROWS=high, COLUMNS=wide,
                SUMS=min(entries, SUMS), num_warps=WARPS,
            )  # fmt: skip
    return out


def _product(grad: Tensor, x: Tensor) -> Tensor:
    """`grad.T @ x` in float32, of dtypes that may differ."""
    dtype = torch.promote_types(grad.dtype, x.dtype)
    left, right = grad.T.to(dtype), x.to(dtype)
    if dtype is torch.float32:
        return torch.mm(left, right)
    if x.device.type == "cpu":  # the interpreter
        return torch.mm(left.float(), right.float())
    return torch.mm(left, right, out_dtype=torch.float32)


def _tile(bits: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tile: at most 64 sums for each thread."""
    elements = 32 * WARPS * max(min(SUMS >> bits, 4), 1)
    wide = min(triton.next_power_of_2(width), 256, elements)
    return int(elements // wide), int(wide)


def variant(bits: int, group: int) -> Variant:
    """The kernel for one width."""
    high, wide = _tile(bits, group)
    return Variant(
        name=f"lut-sums-{bits}bit-{group}",
        kernel=_sums_kernel,
        signature={
            "dense": "*fp32", "index": "*u8", "out": "*fp32", "rows": "i32", "groups": "i32",
            "size": "i32",
        },
        constants={
            **geometry(group, bits, "device", torch.float32), "ROWS": high, "COLUMNS": wide,
            "SUMS": min(1 << bits, SUMS),
        },
        warps=WARPS,
        weights=high * wide,
    )  # fmt: skip
