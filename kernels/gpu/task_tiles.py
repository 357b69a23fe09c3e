"""Many tokens of several tasks: tiles of tokens of one task, against weights decoded for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.codes import codes
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import geometry, on
from sketchconv.kernels.gpu.rounding import put, rounded

_HALF = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4, "num_stages": 3}
_SINGLE = {"ROWS": 32, "COLUMNS": 16, "num_warps": 4, "num_stages": 3}


@jit
def _tiles_kernel(
    x: tl.tensor,
    index: tl.tensor,
    luts: tl.tensor,
    order: tl.tensor,
    tile_task: tl.tensor,
    tile_begin: tl.tensor,
    tile_end: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    size: tl.tensor,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    REPACKED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """TOKENS tokens of one task by ROWS rows; `order` lists the tokens task by task."""
    TILES: tl.constexpr = (GROUP + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0)
    begin = tl.load(tile_begin + tile)
    end = tl.load(tile_end + tile)
    if begin < end:
        place = begin + tl.arange(0, TOKENS)[:, None]
        present = place < end
        token = tl.load(order + place, mask=present, other=0)
        top = tl.program_id(1).to(tl.int64) * ROWS
        row = tl.arange(0, ROWS)
        mine = (top + row < rows)[:, None]
        task = tl.load(tile_task + tile)
        luts += ((task * rows + top) * groups) << BITS
        index += top * groups * size
        source = x + token * groups * GROUP
        total = tl.zeros((TOKENS, ROWS), tl.float32)
        for step in range(groups * TILES):
            group = step // TILES
            column = step % TILES * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            mask = mine & (column < GROUP)
            part = source + group * GROUP + column
            part = tl.load(part, mask=present & (column < GROUP), other=0.0)
            at = row[:, None] * groups + group
            code = codes(index + at * size, column, mask, GROUP, BITS, REPACKED)
            weight = tl.load(luts + ((at << BITS) + code), mask=mask, other=0.0)
            weight = tl.trans(rounded(weight, DTYPE, WIDE))
            total = tl.dot(rounded(part, DTYPE, WIDE), weight, total, input_precision="ieee")
        stored = present & (top + row < rows)[None, :]
        put(out + (token * rows + top + row[None, :]), total, stored, WIDE)


def multiply(x: Tensor, index: Tensor, luts: Tensor, tasks: Tensor, layout: str) -> Tensor:
    """`multiply_tasks` of `sketchconv.kernels.gpu.tasks` for many tokens, contiguous tensors."""
    count, rows, groups, entries = luts.shape
    width = x.shape[1] // groups
    chosen = _SINGLE if x.dtype is torch.float32 else _HALF
    tokens = 64 if x.dtype is not torch.float32 and x.shape[0] >= 64 * count else 16
    sorted_tasks, order = tasks.sort(stable=True)
    tiles = _tiles(sorted_tasks, count, tokens)
    # What no tile covers has a task that does not exist.
    out = x.new_full((x.shape[0], rows), torch.nan)
    with on(x.device):
        _tiles_kernel[(tiles[0].shape[0], triton.cdiv(rows, chosen["ROWS"]))](
            x,
            index,
            luts,
            order,
            *tiles,
            out,
            rows,
            groups,
            index.shape[-1],
            **geometry(width, entries.bit_length() - 1, layout, x.dtype),
            TOKENS=tokens,
            **chosen,
        )
    return out


def _tiles(tasks: Tensor, count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of at most `size` equal values in sorted `tasks`: task, first place, and end of it.

    As many tiles as there may be, the last ones empty: their number does not depend on data.
    """
    starts = torch.searchsorted(tasks, torch.arange(count + 1, device=tasks.device))
    needed = (starts.diff() + size - 1) // size
    last = needed.cumsum(0)
    most = tasks.shape[0] // size + min(count, tasks.shape[0])
    tile = torch.arange(most, device=tasks.device)
    task = torch.searchsorted(last, tile, right=True)
    used = task < count
    task = task.clamp(max=count - 1)
    begin = starts[task] + (tile - (last - needed)[task]) * size
    end = torch.where(used, torch.minimum(begin + size, starts[task + 1]), begin)
    return task, begin, end


def variants(bits: int, group: int, element: str) -> list[Variant]:
    """What is compiled ahead of time for activations of `element` ("bf16" or "fp32")."""
    tile = dict(_HALF if element == "bf16" else _SINGLE)
    warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
    pointers = {"x": f"*{element}", "index": "*u8", "luts": "*fp16", "out": f"*{element}"}
    longs = dict.fromkeys(("order", "tile_task", "tile_begin", "tile_end"), "*i64")
    numbers = dict.fromkeys(("rows", "groups", "size"), "i32")
    dtype = torch.bfloat16 if element == "bf16" else torch.float32
    return [
        Variant(
            name=f"tasks-{bits}bit-{group}-{element}-tiles-{tokens}",
            kernel=_tiles_kernel,
            signature={**pointers, **longs, **numbers},
            constants={**geometry(group, bits, "device", dtype), "TOKENS": tokens, **tile},
            warps=warps,
            stages=stages,
            weights=tile["ROWS"] * tile["COLUMNS"],
            aligned=("rows",),
        )
        for tokens in ((16, 64) if element == "bf16" else (16,))
    ]
