"""Look-ups in a sketched embedding and the gradient of its LUT, for CUDA and ROCm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.codes import codes
from sketchconv.kernels.gpu.decode import gather
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import geometry, on

__all__ = ["gather", "grad_gather", "variants"]

REPEATS = 16  # look-ups of one row that are added at a time
SUMS = 16  # entries summed at a time


@jit
def _sums_kernel(
    grad: tl.tensor,
    order: tl.tensor,
    rows_sorted: tl.tensor,
    ends: tl.tensor,
    index: tl.tensor,
    out: tl.tensor,
    groups: tl.tensor,
    rows: tl.tensor,
    size: tl.tensor,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    REPACKED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    REPEATS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """Sums by entry of COLUMNS columns of one row, over all look-ups of it, in their order.

    Look-ups are sorted by row; the program of the first one of a row does the work.
    """
    TILES: tl.constexpr = (GROUP + COLUMNS - 1) // COLUMNS
    first = tl.program_id(0)
    group = tl.program_id(1) // TILES
    row = tl.load(rows_sorted + first)
    before = tl.load(rows_sorted + first - 1, mask=first > 0, other=-1)
    if (row != before) & (row >= 0) & (row < rows):
        end = tl.load(ends + first)
        column = tl.program_id(1) % TILES * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = column < GROUP
        repeat = tl.arange(0, REPEATS)[:, None]
        dense = tl.zeros((COLUMNS,), tl.float32)
        for begin in range(first, end, REPEATS):
            taken = begin + repeat < end
            token = tl.load(order + begin + repeat, mask=taken, other=0)
            part = grad + token * groups * GROUP + group * GROUP + column
            dense += tl.sum(tl.load(part, mask=taken & inside, other=0.0).to(tl.float32), 0)
        start = index + (row * groups + group) * size
        code = codes(start, column, inside, GROUP, BITS, REPACKED)
        code = tl.where(inside, code, 1 << BITS)
        out += (first.to(tl.int64) * groups * TILES + tl.program_id(1)) << BITS
        for low in range(0, 1 << BITS, SUMS):
            entry = low + tl.arange(0, SUMS)
            sums = tl.sum(tl.where(code == entry[:, None], dense[None, :], 0.0), 1)
            tl.store(out + entry, sums)


def grad_gather(
    grad: Tensor,
    ids: Tensor,
    index: Tensor,
    lut: Tensor,
    padding: int | None = None,
    layout: str = "planes-le",
) -> Tensor:
    """Gradient of the LUT of `gather`, the same bits in every run.

    Args:
        grad: float16, bfloat16 or float32 ``[*ids.shape, columns]``.
        ids: rows that were looked up, any integer tensor; those outside of the LUT are left out.
        index: uint8 ``[rows, groups, bytes]``.
        lut: ``[rows, groups, 2**bits]``, of which only the shape matters.
        padding: a row that gets no gradient.
        layout: order of the index, "planes-le" or "device".

    Returns:
        float32 ``[rows, groups, 2**bits]``, zero in rows that were not looked up.

    Raises:
        ValueError: another layout.
    """
    rows, groups, entries = lut.shape
    columns = grad.shape[-1]
    width = columns // groups
    chosen = ids.reshape(-1).to(torch.int64)
    if padding is not None:
        chosen = torch.where(chosen == padding, rows, chosen)
    sorted_ids, order = chosen.sort(stable=True)
    ends = torch.searchsorted(sorted_ids, sorted_ids, right=True)
    wide = _columns(width)
    tiles = triton.cdiv(width, wide)
    shape = (chosen.shape[0], groups, tiles, entries)
    parts = torch.empty(shape, dtype=torch.float32, device=lut.device)
    with on(lut.device):
        _sums_kernel[(chosen.shape[0], groups * tiles)](
            grad.reshape(-1, columns).contiguous(),
            order,
            sorted_ids,
            ends,
            index,
            parts,
            groups,
            rows,
            index.shape[-1],
            **geometry(width, entries.bit_length() - 1, layout, torch.float32),
            REPEATS=REPEATS,
            COLUMNS=wide,
            SUMS=min(entries, SUMS),
        )
    return _placed(parts.sum(2), sorted_ids, rows)


def _placed(sums: Tensor, ids: Tensor, rows: int) -> Tensor:
    """The sums of the first look-up of each row in its row; `ids` are sorted.

    The others hold nothing, and go to one more row that is cut off: no size depends on data, so the
    host does not wait for it.
    """
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    kept = first & (ids >= 0) & (ids < rows)
    total = sums.new_zeros((rows + 1, *sums.shape[1:]))
    total.index_copy_(0, torch.where(kept, ids, rows), sums)
    return total[:rows]


def _columns(width: int) -> int:
    return int(min(triton.next_power_of_2(width), 256))


def variants() -> tuple[Variant, ...]:
    """What is compiled ahead of time; the look-up itself is in `sketchconv.kernels.gpu.decode`."""
    cases = ((3, 1376, "bf16"), (4, 4096, "bf16"), (7, 45, "bf16"), (8, 4096, "fp32"))
    return tuple(_variant(*case) for case in cases)


def _variant(bits: int, group: int, element: str) -> Variant:
    longs = dict.fromkeys(("order", "rows_sorted", "ends"), "*i64")
    return Variant(
        name=f"grad-gather-{bits}bit-{group}-{element}",
        kernel=_sums_kernel,
        signature={
            "grad": f"*{element}",
            **longs,
            "index": "*u8",
            "out": "*fp32",
            **dict.fromkeys(("groups", "rows", "size"), "i32"),
        },
        constants={
            **geometry(group, bits, "device", torch.float32),
            "REPEATS": REPEATS,
            "COLUMNS": _columns(group),
            "SUMS": min(1 << bits, SUMS),
        },
        aligned=("rows",),
    )
