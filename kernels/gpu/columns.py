"""The column loops of calibration on a GPU: a program takes some rows through a block of columns.

Rows are independent, and each goes through its columns one by one, so a tile of rows stays in
registers from the first column of a block to the last, in one launch; in plain torch every column
is a dozen of them. On an H100 the 1,920 sweeps of descent over the weights of SmolLM2-135M that a
calibration makes took 5.9 s, products between the blocks included (with four times the rows in a
program; fewer have not been timed).

The references are `_block_torch` of `sketchconv.kernels.compensation` and `.descent`. The compiler
fuses products and differences, so a value within a rounding of a threshold may fall to its other
side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import on
from sketchconv.kernels.tables import Tables

ROWS = 4  # of a program, a warp for each: no reduction crosses warps, and nothing spills


@jit
def _nearest(
    x: tl.tensor, tables: tl.tensor, thresholds: tl.tensor, lut: tl.tensor, ENTRIES: tl.constexpr
) -> tl.tensor:
    """Codes and entries ``[ROWS]`` nearest to `x`; `tables` are the rows' LUTs by number."""
    slot = tl.arange(0, ENTRIES)[None, :]
    place = tables[:, None] * (ENTRIES - 1) + slot
    known = slot < ENTRIES - 1
    limit = tl.load(thresholds + place, mask=known, other=float("inf"))
    code = tl.sum((x[:, None] > limit).to(tl.int32), 1)
    return code, tl.load(lut + tables * ENTRIES + code)


@jit
def _columns(
    tile_in: tl.tensor,
    before: tl.tensor,
    matrix: tl.tensor,
    lut: tl.tensor,
    thresholds: tl.tensor,
    groups: tl.tensor,
    codes: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    tables: tl.tensor,
    DESCENT: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One block of columns of ROWS rows.

    Args:
        tile_in: float32 ``[rows, count]``: the weight, or under DESCENT the gradient.
        before: float32 ``[rows, count]``: under DESCENT the present values.
        matrix: float32 ``[count, count]``: U, or under DESCENT the Hessian.
        lut, thresholds: float32 ``[rows, tables, ENTRIES]`` and ``[.., ENTRIES - 1]``.
        groups: int64 ``[count]``, table of each column.
        codes: uint8 ``[rows, count]``, written.
        out: float32 ``[rows, count]``, written: the errors, or under DESCENT the moves.
        rows, count, tables: the shapes.
        WIDTH: a power of two, `count` at least.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Rows beyond the last one repeat it, and are not stored.
    near = tl.minimum(row, rows - 1)
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < count
    tile = tl.load(tile_in + near[:, None] * count + column, mask=inside, other=0.0)
    result = tl.zeros((ROWS, WIDTH), tl.float32)
    found = tl.zeros((ROWS, WIDTH), tl.int32)
    for j in range(count):
        here = column == j
        x = tl.sum(tl.where(here, tile, 0.0), 1)
        diagonal = tl.load(matrix + j * count + j)
        table = near * tables + tl.load(groups + j)
        later = tl.load(matrix + j * count + column, mask=inside & (column > j), other=0.0)
        if DESCENT:
            old = tl.load(before + near * count + j)
            code, value = _nearest(old + tl.div_rn(x, diagonal), table, thresholds, lut, ENTRIES)
            change = value - old
        else:
            code, value = _nearest(x, table, thresholds, lut, ENTRIES)
            change = tl.div_rn(x - value, diagonal)
        tile -= change[:, None] * later
        result = tl.where(here, change[:, None], result)
        found = tl.where(here, code[:, None], found)
    kept = inside & (row < rows)[:, None]
    place = row[:, None] * count + column
    tl.store(out + place, result, mask=kept)
    tl.store(codes + place, found.to(tl.uint8), mask=kept)


def round_block(work: Tensor, upper: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """Round a block of columns one by one with the error compensated within the block.

    Args:
        work: float32 ``[rows, columns]``, contiguous.
        upper: float32 ``[columns, columns]``, the block's square of U.
        tables: LUTs of the rows; `groups` of these columns.

    Returns:
        uint8 codes and float32 errors over the diagonal of U, ``[rows, columns]``.
    """
    return _run(work, work, upper, tables, descent=False)


def descend_block(
    gradient: Tensor, hessian: Tensor, tables: Tables, before: Tensor
) -> tuple[Tensor, Tensor]:
    """One sweep of coordinate descent over a block of columns.

    Args:
        gradient: float32 ``[rows, columns]``, contiguous: ``(W - Q) H`` of these columns.
        hessian: float32 ``[columns, columns]``, the block's square.
        tables: LUTs of the rows; `groups` of these columns.
        before: float32 ``[rows, columns]``, the present values.

    Returns:
        uint8 codes and float32 moves, ``[rows, columns]``.
    """
    return _run(gradient, before, hessian, tables, descent=True)


def _run(
    tile: Tensor, before: Tensor, matrix: Tensor, tables: Tables, *, descent: bool
) -> tuple[Tensor, Tensor]:
    (rows, count), (_, groups, entries) = tile.shape, tables.lut.shape
    codes = torch.empty(tile.shape, dtype=torch.uint8, device=tile.device)
    out = torch.empty_like(tile)
    with on(tile.device):
        _columns[(triton.cdiv(rows, ROWS),)](
            tile,
            before.contiguous(),
            matrix.contiguous(),
            tables.lut.contiguous(),
            tables.thresholds.contiguous(),
            tables.groups.contiguous(),
            codes,
            out,
            rows,
            count,
            groups,
            DESCENT=descent,
            ENTRIES=entries,
            WIDTH=triton.next_power_of_2(count),
            ROWS=ROWS,
        )
    return codes, out


def variants() -> tuple[Variant, ...]:
    """What is compiled ahead of time: both loops, few entries and many."""
    floats = ("tile_in", "before", "matrix", "lut", "thresholds", "out")
    pointers = {**dict.fromkeys(floats, "*fp32"), "groups": "*i64", "codes": "*u8"}
    numbers = dict.fromkeys(("rows", "count", "tables"), "i32")
    return tuple(
        Variant(
            name=f"{'descend' if descent else 'round'}-{bits}bit",
            kernel=_columns,
            signature={**pointers, **numbers},
            constants={"DESCENT": descent, "ENTRIES": 1 << bits, "WIDTH": 128, "ROWS": ROWS},
        )
        for descent in (False, True)
        for bits in (2, 4, 8)
    )
