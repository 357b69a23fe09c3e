"""Dense rows of a sketch, for CUDA and ROCm: all of them, or those that are looked up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels import plain
from sketchconv.kernels.gpu import expand
from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.codes import codes
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import geometry, on, on_disk
from sketchconv.kernels.gpu.rounding import put
from sketchconv.kernels.gpu.support import DTYPES, nvidia

TILE = 2048  # weights of a program: 16 a thread


@jit
def _rows_kernel(
    index: tl.tensor,
    lut: tl.tensor,
    ids: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    size: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    REPACKED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A tile of `out`: ROWS rows, all or under CHOSEN those in `ids`, by columns of one group.

    `out` has columns `begin` to `end` of the sketch. An id that is no row gives NaN: nothing
    outside of the sketch is read.
    """
    TILES: tl.constexpr = (GROUP + COLUMNS - 1) // COLUMNS
    group = begin // GROUP + tl.program_id(1) // TILES
    column = tl.program_id(1) % TILES * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    of_row = group * GROUP + column
    wanted = (place < count) & (column < GROUP) & (of_row >= begin) & (of_row < end)
    row = tl.load(ids + place, mask=place < count, other=0) if CHOSEN else place
    known = (row >= 0) & (row < rows)
    at = row * groups + group
    code = codes(index + at * size, column, wanted & known, GROUP, BITS, REPACKED)
    value = tl.load(lut + (at << BITS) + code, mask=wanted & known, other=0.0)
    value = tl.where(known, value.to(tl.float32), float("nan"))
    put(out + (place * (end - begin) + (of_row - begin)), value, wanted, WIDE)


def decode(
    index: Tensor, lut: Tensor, columns: int, dtype: torch.dtype, layout: str = "planes-le"
) -> Tensor:
    """Dense rows ``[rows, columns]``, each entry of the LUT rounded once to `dtype`.

    Dtypes that the kernel does not know (float64) go through plain torch operations.

    Args:
        index: uint8 ``[rows, groups, bytes]``.
        lut: ``[rows, groups, 2**bits]``.
        columns: of a row.
        dtype: of the result.
        layout: order of the index, "planes-le" or "device".

    Raises:
        ValueError: another layout.
    """
    if dtype not in DTYPES or lut.dtype not in DTYPES:
        return plain.decode(on_disk(index, lut, columns, layout), lut, columns, dtype)
    out = torch.empty((lut.shape[0], columns), dtype=dtype, device=lut.device)
    tile(index.contiguous(), lut.contiguous(), out, columns, layout)
    return out


def tile(
    index: Tensor,
    lut: Tensor,
    out: Tensor,
    columns: int,
    layout: str,
    begin: int = 0,
    ids: Tensor | None = None,
) -> None:
    """Columns `begin` and up of all rows, or of rows `ids` (int64), into `out`.

    Args:
        index: uint8 ``[rows, groups, bytes]``, contiguous.
        lut: ``[rows, groups, 2**bits]``, contiguous.
        out: ``[rows or ids, width]``, contiguous, of a dtype that the kernels know.
        columns: of a row of the sketch.
        layout: order of the index.
        begin: first column, a multiple of 8.

    Raises:
        ValueError: another layout.
    """
    rounded = lut.to(out.dtype) if ids is None else lut
    whole = begin % 8 == 0 and out.shape[1] % 8 == 0
    if whole and nvidia(out.device) and expand.fits(index, rounded, columns, out.dtype, layout):
        expand.run(index, rounded, out, columns, begin, ids)
    else:
        _rows(index, lut, out, columns, layout, begin, ids)


def gather(
    ids: Tensor,
    index: Tensor,
    lut: Tensor,
    columns: int,
    dtype: torch.dtype,
    layout: str = "planes-le",
) -> Tensor:
    """Rows `ids` (any integer tensor) as ``[*ids.shape, columns]``; the rest as in `decode`.

    An id that is no row gives a row of NaN. The CPU raises there, but here the host would have to
    wait for the GPU to know. (Dtypes that the kernel does not know: as torch indexes.)
    """
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    if dtype not in DTYPES or lut.dtype not in DTYPES:
        rows = plain.decode(on_disk(index[flat], lut, columns, layout), lut[flat], columns, dtype)
    else:
        rows = torch.empty((flat.shape[0], columns), dtype=dtype, device=lut.device)
        tile(index.contiguous(), lut.contiguous(), rows, columns, layout, 0, flat)
    return rows.view(*ids.shape, columns)


def _rows(
    index: Tensor,
    lut: Tensor,
    out: Tensor,
    columns: int,
    layout: str,
    begin: int,
    ids: Tensor | None,
) -> None:
    rows, groups, entries = lut.shape
    count, given = out.shape
    width = columns // groups
    high, wide = _tile(count, width)
    touched = triton.cdiv(begin + given, width) - begin // width
    if not out.numel():
        return
    with on(lut.device):
        _rows_kernel[(triton.cdiv(count, high), touched * triton.cdiv(width, wide))](
            index,
            lut,
            index if ids is None else ids,
            out,
            count,
            rows,
            groups,
            index.shape[-1],
            begin,
            begin + given,
            **geometry(width, entries.bit_length() - 1, layout, out.dtype),
            CHOSEN=ids is not None,
            ROWS=high,
            COLUMNS=wide,
        )


def _tile(count: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two: few rows where few are wanted."""
    wide = min(triton.next_power_of_2(width), 256)
    return int(min(triton.next_power_of_2(max(count, 1)), TILE // wide)), int(wide)


def variants() -> tuple[Variant, ...]:
    """What is compiled ahead of time."""
    cases = (
        (1, 4096, "bf16", False),
        (3, 1376, "bf16", False),
        (3, 1376, "bf16", True),
        (4, 4096, "bf16", False),
        (4, 4096, "fp32", True),
        (7, 45, "bf16", True),
        (8, 4096, "fp32", False),
    )
    return tuple(_variant(*case) for case in cases)


def _variant(bits: int, group: int, element: str, chosen: bool) -> Variant:
    high, wide = _tile(4096, group)
    dtype = torch.bfloat16 if element == "bf16" else torch.float32
    ids = "*i64" if chosen else "*u8"
    pointers = {"index": "*u8", "lut": "*fp16", "ids": ids, "out": f"*{element}"}
    numbers = dict.fromkeys(("count", "rows", "groups", "size", "begin", "end"), "i32")
    return Variant(
        name=f"{'gather' if chosen else 'decode'}-{bits}bit-{group}-{element}",
        kernel=_rows_kernel,
        signature={**pointers, **numbers},
        constants={
            **geometry(group, bits, "device", dtype),
            "CHOSEN": chosen,
            "ROWS": high,
            "COLUMNS": wide,
        },
        aligned=("rows",),
    )
