"""Gradient of a product with a sketch with respect to the LUT, for CUDA and ROCm.

The gradient of the weight exists one tile at a time, in registers.
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
from sketchconv.kernels.gpu.rounding import rounded

PROGRAMS = 512  # enough to fill a GPU of 132 processors with several programs each
SUMS = 16  # entries summed between two writes
# Not tuned: another tile would add in another order. 64x64 on four warps spills on sm_90.
_HALF_SUMS = {"TOKENS": 32, "ROWS": 64, "COLUMNS": 64, "num_warps": 8, "num_stages": 3}
_SINGLE_SUMS = {"TOKENS": 16, "ROWS": 32, "COLUMNS": 32, "num_warps": 4, "num_stages": 3}


@jit
def _lut_kernel(
    grad: tl.tensor,
    x: tl.tensor,
    index: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    parts: tl.tensor,
    span: tl.tensor,
    size: tl.tensor,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    REPACKED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """Sums of one tile of rows over `span` columns of one group, tile by tile of `grad.T @ x`.

    No other program writes these sums, and a program adds its tiles in their order.
    """
    group = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    first_row = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)[:, None]
    slot = tl.arange(0, SUMS)[None, :]
    mine = first_row + row < rows
    columns = groups * GROUP
    # Four at a time: else each comparison also gets a counter of its own.
    UNROLL: tl.constexpr = 4 if SUMS > 2 else SUMS
    place = first_row.to(tl.int64) * groups + group
    grad += first_row
    x += group * GROUP
    start = index + place * size + row[:, None] * (groups * size)
    out += (place * parts + part) * (1 << BITS) + row[:, None] * (groups * parts * (1 << BITS))
    end = tl.minimum(part * span + span, GROUP)
    for begin in range(part * span, end, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)[None, :]
        inside = column < end
        dense = tl.zeros((ROWS, COLUMNS), tl.float32)
        for at in range(0, tokens, TOKENS):
            present = at + token < tokens
            left = tl.load(
                grad + tl.cast(at, tl.int64) * rows + (token * rows + row[None, :]),
                mask=present & mine[None, :],
                other=0.0,
            )
            right = tl.load(
                x + tl.cast(at, tl.int64) * columns + (token * columns + column),
                mask=present & inside,
                other=0.0,
            )
            left = tl.trans(rounded(left, DTYPE, WIDE))
            dense = tl.dot(left, rounded(right, DTYPE, WIDE), dense, input_precision="ieee")
        mask = mine[:, None] & inside
        code = codes(start, column, mask, GROUP, BITS, REPACKED)
        # Columns beyond the end take part in no sum, even where the gradient is not finite.
        code = tl.where(inside, code, 1 << BITS)
        # Both as one number: else the compiler keeps the codes where they were loaded, and moves
        # every mask through shared memory (297 instead of 166 instructions in the loop below).
        both = (dense.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | code.to(tl.uint64)
        code = both.to(tl.uint32)
        dense = (both >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
        for low in range(0, 1 << BITS, SUMS):
            sums = tl.zeros((ROWS, SUMS), tl.float32)
            for four in range(0, SUMS, UNROLL):
                for one in tl.static_range(UNROLL):
                    of_entry = tl.sum(tl.where(code == low + four + one, dense, 0.0), 1)
                    sums = tl.where(slot == four + one, of_entry[:, None], sums)
            before = tl.load(out + low + slot, mask=mine[:, None], other=0.0)
            tl.store(out + low + slot, before + sums, mask=mine[:, None])
        tl.debug_barrier()  # what a thread has stored may be read by another in the next turn


def grad_lut(
    grad: Tensor, x: Tensor, index: Tensor, lut: Tensor, layout: str = "planes-le"
) -> Tensor:
    """Gradient of a LUT: `grad.T @ x` summed over the columns of each entry, in float32.

    The same bits in every run and on every GPU of one architecture: nothing is tuned or atomic. The
    sums cost about five instructions per weight and entry, however many tokens there are: little
    beside the product up to 5 bits, and more than the product of a thousand tokens at 8.

    Args:
        grad: float16, bfloat16 or float32 ``[tokens, rows]``.
        x: float16, bfloat16 or float32 ``[tokens, columns]``.
        index: uint8 ``[rows, groups, bytes]``.
        lut: ``[rows, groups, 2**bits]``, of which only the shape matters.
        layout: order of the index, "planes-le" or "device".

    Returns:
        float32 ``[rows, groups, 2**bits]``.

    Raises:
        ValueError: another layout.
    """
    rows, groups, entries = lut.shape
    tokens, columns = x.shape
    width = columns // groups
    dtype = torch.promote_types(grad.dtype, x.dtype)
    tile = _SINGLE_SUMS if dtype is torch.float32 else _HALF_SUMS
    span = _span(triton.cdiv(rows, tile["ROWS"]) * groups, width, entries, tile["COLUMNS"])
    parts = triton.cdiv(width, span)
    out = torch.zeros((rows, groups, parts, entries), dtype=torch.float32, device=x.device)
    with on(x.device):
        _lut_kernel[(triton.cdiv(rows, tile["ROWS"]), groups * parts)](
            grad.contiguous(),
            x.contiguous(),
            index,
            out,
            tokens,
            rows,
            groups,
            parts,
            span,
            index.shape[-1],
            **geometry(width, entries.bit_length() - 1, layout, dtype),
            SUMS=min(entries, SUMS),
            **tile,
        )
    return out.sum(2) if parts > 1 else out[:, :, 0]


def _span(programs: int, width: int, entries: int, tile: int) -> int:
    """Columns of a group for one program, whole tiles: so few that the GPU is full.

    But so many that the partial sums stay below a quarter of the gradient that is not stored.
    """
    parts = min(triton.cdiv(PROGRAMS, programs), max(width // (4 * entries), 1))
    return int(triton.cdiv(triton.cdiv(width, parts), tile) * tile)


def variant(bits: int, group: int, element: str) -> Variant:
    """The kernel for gradients and inputs of `element` ("bf16" or "fp32")."""
    dtype = torch.bfloat16 if element == "bf16" else torch.float32
    tile = dict(_HALF_SUMS if element == "bf16" else _SINGLE_SUMS)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    numbers = ("tokens", "rows", "groups", "parts", "span", "size")
    pointers = {"grad": f"*{element}", "x": f"*{element}", "index": "*u8", "out": "*fp32"}
    return Variant(
        name=f"grad-lut-{bits}bit-{group}-{element}",
        kernel=_lut_kernel,
        signature={**pointers, **dict.fromkeys(numbers, "i32")},
        constants={
            **geometry(group, bits, "device", dtype),
            **tile,
            "SUMS": min(SUMS, 1 << bits),
        },
        warps=warps,
        stages=stages,
        aligned=("rows", "span"),
    )
