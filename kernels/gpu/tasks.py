"""Batches whose tokens use the LUTs of different tasks over the same codes, for CUDA and ROCm.

For few tokens, as in decoding, `sketchconv.kernels.gpu.fragments` takes the tokens of one task at
a time where it can; elsewhere a tile of codes is unpacked once and looked up for each token. For
many, tokens are sorted by task and multiplied with tiles decoded for one task.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels.gpu import fragments, task_tiles
from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.codes import codes
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import geometry, on
from sketchconv.kernels.gpu.rounding import put
from sketchconv.kernels.gpu.support import nvidia, why_dense

FEW = 16  # tokens up to which codes are shared instead of tiles
AT_ONCE = 8  # tokens that share the codes: a sum of each is in registers
ROWS = 4


@jit
def _few_kernel(
    x: tl.tensor,
    index: tl.tensor,
    luts: tl.tensor,
    tasks: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    count: tl.tensor,
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
    """ROWS rows of the product for TOKENS tokens; a task that is none of `count` gives NaN."""
    TILES: tl.constexpr = (GROUP + COLUMNS - 1) // COLUMNS
    top = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    mine = top + row < rows
    index += top * groups * size
    luts += (top * groups) << BITS
    first = tl.program_id(1) * TOKENS
    sums: tl.tensor = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)  # noqa: RUF005
    for tile in range(groups * TILES):
        group = tile // TILES
        column = tile % TILES * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = mine & (column < GROUP)
        place = row * groups + group
        code = codes(index + place * size, column, mask, GROUP, BITS, REPACKED)
        entry = (place << BITS) + code
        added: tl.tensor = ()
        for one in tl.static_range(TOKENS):
            token = tl.minimum(first + one, tokens - 1).to(tl.int64)
            task = tl.load(tasks + token)
            task = tl.where((task >= 0) & (task < count), task, 0)
            table = luts + ((task * rows * groups) << BITS)
            value = tl.load(table + entry, mask=mask, other=0.0).to(tl.float32)
            part = x + token * groups * GROUP + group * GROUP + column
            part = tl.load(part, mask=column < GROUP, other=0.0).to(tl.float32)
            added = added + (sums[one] + value * part,)  # noqa: RUF005
        sums = added
    row = tl.arange(0, ROWS)
    for one in tl.static_range(TOKENS):
        token = tl.minimum(first + one, tokens - 1).to(tl.int64)
        task = tl.load(tasks + token)
        known = (task >= 0) & (task < count)
        total = tl.where(known, tl.sum(sums[one], 1), float("nan"))
        stored = top + row < tl.where(first + one < tokens, rows, 0)
        put(out + token * rows + top + row, total, stored, WIDE)


def multiply_tasks(
    x: Tensor, index: Tensor, luts: Tensor, tasks: Tensor, layout: str = "planes-le"
) -> Tensor:
    """`x[t] @ W.T` with the LUT of `tasks[t]`: ``[tokens, columns]`` to ``[tokens, rows]``.

    Summed in float32. For more than 16 tokens, and by permuted bytes on NVIDIA, the weights are
    rounded to the dtype of `x` first. The host does not wait for the tasks to be sorted; but where
    `support.why_dense` gives a reason against tiles, there are as many products of few tokens.

    Args:
        x: float16, bfloat16 or float32 ``[tokens, columns]``.
        index: uint8 ``[rows, groups, bytes]``, the same for every task.
        luts: float16, bfloat16 or float32 ``[tasks, rows, groups, 2**bits]``.
        tasks: int64 ``[tokens]``; a token of a task that is not in `luts` gets NaN.
        layout: order of the index, "planes-le" or "device".

    Raises:
        ValueError: another layout, or another dtype of `x`.
    """
    tokens = x.shape[0]
    if 0 < tokens <= FEW and nvidia(x.device) and fragments.fits(x, index, luts, layout):
        out = x.new_full((tokens, luts.shape[1]), torch.nan)
        fragments.run(x, index, luts, out, tasks.to(torch.int64).contiguous())
        return out
    x, luts, index = x.contiguous(), luts.contiguous(), index.contiguous()
    tasks = tasks.to(torch.int64).contiguous()
    if tokens > FEW and luts.shape[0] and why_dense(x.device, x.dtype) is None:
        return task_tiles.multiply(x, index, luts, tasks, layout)
    count, rows, groups, entries = luts.shape
    width = x.shape[1] // groups
    out = x.new_full((tokens, rows), torch.nan)
    if not out.numel() or not count:
        return out
    together = min(triton.next_power_of_2(tokens), AT_ONCE)
    with on(x.device):
        _few_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(tokens, together))](
            x,
            index,
            luts,
            tasks,
            out,
            tokens,
            count,
            rows,
            groups,
            index.shape[-1],
            **geometry(width, entries.bit_length() - 1, layout, x.dtype),
            TOKENS=together,
            ROWS=ROWS,
            COLUMNS=_columns(width),
        )
    return out


def _columns(width: int) -> int:
    return int(min(triton.next_power_of_2(width), 128))


def variants() -> tuple[Variant, ...]:
    """What is compiled ahead of time: one token, eight, and tiles of many."""
    found: list[Variant] = []
    cases = ((3, 1376, "bf16"), (4, 4096, "bf16"), (7, 1376, "bf16"), (4, 4096, "fp32"))
    for bits, group, element in cases:
        found += [_variant(bits, group, element, tokens) for tokens in (1, AT_ONCE)]
        found += task_tiles.variants(bits, group, element)
    return tuple(found)


def _variant(bits: int, group: int, element: str, tokens: int) -> Variant:
    pointers = {"x": f"*{element}", "index": "*u8", "luts": "*fp16", "out": f"*{element}"}
    numbers = ("tokens", "count", "rows", "groups", "size")
    columns = _columns(group)
    return Variant(
        name=f"tasks-{bits}bit-{group}-{element}-{tokens}tok",
        kernel=_few_kernel,
        signature={**pointers, "tasks": "*i64", **dict.fromkeys(numbers, "i32")},
        constants={
            **geometry(group, bits, "device", torch.float32),
            "TOKENS": tokens,
            "ROWS": ROWS,
            "COLUMNS": columns,
        },
        weights=ROWS * columns,
        aligned=("rows",),
    )
