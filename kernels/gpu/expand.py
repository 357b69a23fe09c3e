"""Dense tiles of a sketch of 3 or 4 bits by byte permutation, in 16-bit floats. NVIDIA only.

A thread holds the table of a row in registers and turns eight codes at a time into 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels.gpu import support
from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import on
from sketchconv.kernels.gpu.permute_tables import pairs, picks, table

WARPS = 4


@jit
def expand(
    words: tl.tensor,
    lut: tl.tensor,
    ids: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHOSEN: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
) -> None:
    """ROWS rows of `out` by 8 * UNITS columns of a group.

    Args:
        words: int32 view of the packed index, in device order.
        lut: int32 view of the tables ``[rows, GROUPS, 2**BITS]``, of the type of `out`.
        ids: int64 ``[count]``, the rows under CHOSEN; an id that is no row gives NaN.
        out: int32 view of ``[count, end - begin]``.
        count, rows: of `out` and of the sketch.
        begin, end: columns, multiples of 8.
        BITS, GROUPS, GROUP: of the sketch; GROUP is the columns of a group.
        ASM: see `sketchconv.kernels.gpu.permute_tables`.
    """
    SIZE: tl.constexpr = GROUP * BITS // 32
    TILES: tl.constexpr = (GROUP + 8 * UNITS - 1) // (8 * UNITS)
    # Groups before the first column are not even launched.
    group = begin // GROUP + tl.program_id(1) // TILES
    unit = tl.program_id(1) % TILES * UNITS + tl.arange(0, UNITS)[None, :]
    column = group * GROUP + unit * 8
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row = tl.load(ids + place, mask=place < count, other=0) if CHOSEN else place
    known = (row >= 0) & (row < rows)
    at = tl.where(known, row, 0) * GROUPS + group
    wanted = (place < count) & (unit < GROUP // 8) & (column >= begin) & (column < end)
    entries = table(lut, at << (BITS - 1), BITS, ASM)
    code, pick = _codes(words + at * SIZE, unit, wanted, GROUP, BITS, ASM)
    a, b = pairs(code, pick, entries, BITS, ASM)
    c, d = pairs(code >> 16, pick >> 16, entries, BITS, ASM)
    four = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, UNITS, 4))
    four = four.to(tl.int32, bitcast=True)
    if CHOSEN:
        four = tl.where(known[:, :, None], four, 0x7FFF7FFF)  # two NaN in either type
    half = (column - begin) // 2
    half = half[:, :, None] + tl.arange(0, 4)[None, None, :]
    out += place * ((end - begin) // 2)
    tl.store(out[:, :, None] + half, four, mask=wanted[:, :, None])


@jit
def _codes(
    start: tl.tensor, unit: tl.tensor, wanted: tl.tensor, GROUP: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Eight codes in the nibbles of a word, and at 4 bits the selectors by their fourth bits."""
    if BITS == 4:
        word = tl.load(start + unit, mask=wanted, other=0).to(tl.uint32, bitcast=True)
        code, pick = word & 0x77777777, picks(word, ASM)
    else:
        PER: tl.constexpr = GROUP // 32
        # Four neighbours read the same three words: one line of the cache.
        first = tl.load(start + unit // 4, mask=wanted, other=0).to(tl.uint32, bitcast=True)
        second = tl.load(start + PER + unit // 4, mask=wanted, other=0).to(tl.uint32, bitcast=True)
        third = tl.load(start + 2 * PER + unit // 4, mask=wanted, other=0)
        third = third.to(tl.uint32, bitcast=True)
        last = (first >> 3 & 0x11111111) | (second >> 2 & 0x22222222) | (third >> 1 & 0x44444444)
        part = unit % 4
        code = tl.where(part == 0, first, tl.where(part == 1, second, third)) & 0x77777777
        code = tl.where(part == 3, last, code)
        pick = code
    return code, pick


def fits(index: Tensor, lut: Tensor, columns: int, dtype: torch.dtype, layout: str) -> bool:
    """Whether this kernel decodes the sketch; the device is not asked for."""
    bits, group = lut.shape[-1].bit_length() - 1, columns // lut.shape[1]
    if bits not in (3, 4) or dtype not in (torch.float16, torch.bfloat16) or lut.dtype != dtype:
        return False
    whole = group % 32 == 0 and layout == "device" if bits == 3 else group % 8 == 0
    aligned = index.data_ptr() % 4 == 0 and lut.data_ptr() % 4 == 0
    return whole and aligned and index.is_contiguous() and lut.is_contiguous()


def run(
    index: Tensor, lut: Tensor, out: Tensor, columns: int, begin: int = 0, ids: Tensor | None = None
) -> None:
    """Columns `begin` and up of all rows, or of rows `ids` (int64), of a sketch that `fits`.

    Args:
        index: uint8 ``[rows, groups, bytes]``.
        lut: ``[rows, groups, 2**bits]``.
        out: contiguous ``[rows or ids, width]``, of the dtype of `lut`; `width` and `begin` are
            multiples of 8.
        columns: of a row of the sketch.
    """
    rows, groups, entries = lut.shape
    group, (count, width) = columns // groups, out.shape
    touched = triton.cdiv(begin + width, group) - begin // group
    high, wide = _tile(group)
    grid = triton.cdiv(count, high), touched * triton.cdiv(group, 8 * wide)
    with on(out.device):
        expand[grid](
            index.view(torch.int32), lut.view(torch.int32), out if ids is None else ids,
            out.view(torch.int32), count, rows, begin, begin + width, entries.bit_length() - 1,
            groups, group, ids is not None, not support.interpreting(), high, wide,
            num_warps=WARPS,
        )  # fmt: skip


def _tile(group: int) -> tuple[int, int]:
    """Rows and units of eight columns of a program: four units a thread."""
    wide = min(triton.next_power_of_2(triton.cdiv(group, 8)), 256)
    return int(512 // wide), int(wide)


def variants() -> tuple[Variant, ...]:
    """What is compiled ahead of time."""
    return tuple(
        Variant(
            name=f"expand-{bits}bit-{groups}groups" + ("-ids" if chosen else ""),
            kernel=expand,
            signature={
                "words": "*i32", "lut": "*i32", "ids": "*i64" if chosen else "*fp16",
                "out": "*i32", "count": "i32", "rows": "i32", "begin": "i32", "end": "i32",
            },
            constants={
                "BITS": bits, "GROUPS": groups, "GROUP": 4096 // groups, "CHOSEN": chosen,
                "ASM": True, "ROWS": _tile(4096 // groups)[0],
                "UNITS": _tile(4096 // groups)[1],
            },
            warps=WARPS,
            aligned=("begin", "end"),
            backends=("cuda",),
        )
        for bits, groups, chosen in ((4, 1, False), (3, 1, True), (3, 4, False))
    )  # fmt: skip
