"""Products with 16-bit tables of 1 to 4 bits, looked up by byte permutation. NVIDIA only.

The path of some dozens of tokens, and of few where `sketchconv.kernels.gpu.fragments` does not fit:
the values of a tile of rows go to the tensor cores, which
leave only the lookup itself to the other pipes. Few tokens cut the columns into splits, so that
there are programs enough for all multiprocessors; the splits are added in a fixed order.

Columns that pad the last tile of a group multiply zero by the first entry of the table, so a table
whose first entry is infinite gives NaN there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels.gpu import support
from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import on, tuned
from sketchconv.kernels.gpu.permute_tables import table, values
from sketchconv.kernels.gpu.rounding import put


@jit
def permute(
    x: tl.tensor,
    words: tl.tensor,
    lut: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    splits: tl.tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEST: tl.constexpr,
    TOKENS: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One split of `y[token, row] = sum of x[token, column] * value`, for a tile of both.

    Args:
        x: 16-bit floats ``[tokens, >= columns]``, `stride` apart.
        words: int32 view of the packed index, in device order.
        lut: int32 view of the tables ``[rows, GROUPS, 2**BITS]``, of the type of `x`.
        y: ``[splits, tokens, rows]``; float32 if there are several splits.
        tokens, rows, stride, splits: the shapes.
        BITS, GROUPS, GROUP: of the sketch; GROUP is the columns of a group.
        WIDEST: the first power of two that no group exceeds.
        ASM: see `sketchconv.kernels.gpu.permute_tables`.
        ROWS, COLUMNS, TOKENS: of a tile; one of columns never crosses the end of a group.
    """
    SPAN: tl.constexpr = 32 if BITS == 3 else 32 // BITS  # columns of a word, or of three words
    SPANS: tl.constexpr = (COLUMNS if COLUMNS < WIDEST else WIDEST) // SPAN
    PER: tl.constexpr = GROUP // SPAN
    CHUNKS: tl.constexpr = (PER + SPANS - 1) // SPANS
    TAIL: tl.constexpr = CHUNKS * SPANS != PER
    WORDS: tl.constexpr = GROUP * BITS // 32
    PAIRS: tl.constexpr = (1 << BITS) // 2
    top = tl.program_id(0) * ROWS
    r = tl.arange(0, ROWS)
    # Rows beyond the last one repeat it, and are not stored.
    r = tl.where(top + r < rows, r, rows - 1 - top)[:, None]
    words += top.to(tl.int64) * (GROUPS * WORDS)
    lut += top.to(tl.int64) * (GROUPS * PAIRS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    x += m[:, None].to(tl.int64) * stride
    span = tl.arange(0, SPANS)
    column = tl.arange(0, SPANS * SPAN)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    share = (GROUPS * CHUNKS + splits - 1) // splits
    begin = tl.program_id(2) * share
    entries = table(lut, r * (GROUPS * PAIRS), BITS, ASM)
    for chunk in range(begin, tl.minimum(begin + share, GROUPS * CHUNKS)):
        group = chunk // CHUNKS
        first = chunk % CHUNKS * SPANS
        if GROUPS > 1:
            entries = table(lut, (r * GROUPS + group) * PAIRS, BITS, ASM)
        place = words + ((r * GROUPS + group) * WORDS + first + span[None, :])
        inside = (first + span < PER)[None, :]
        value = values(place, inside, entries, BITS, PER, TAIL, x.dtype.element_ty, ASM)
        mask = m[:, None] < tokens
        if TAIL:
            mask &= (column < GROUP - first * SPAN)[None, :]
        part = tl.load(x + (group * GROUP + first * SPAN + column[None, :]), mask=mask, other=0.0)
        if not ASM:  # the interpreter's bfloat16 has no arithmetic
            value, part = value.to(tl.float32), part.to(tl.float32)
        total = tl.dot(value, tl.trans(part), total)
    out = top + tl.arange(0, ROWS)[:, None]
    token = tl.program_id(2).to(tl.int64) * tokens + m[None, :]
    put(y + (token * rows + out), total, (out < rows) & (m[None, :] < tokens), not ASM)


@jit
def fold(
    parts: tl.tensor,
    y: tl.tensor,
    size: tl.tensor,
    splits: tl.tensor,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`y[i] = sum of parts[split, i]`, in the order of the splits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    place = parts + i
    for _ in range(splits):
        total += tl.load(place, mask=i < size, other=0.0)
        place += size
    put(y + i, total, i < size, WIDE)


def _config(rows: int, columns: int, warps: int, stages: int = 3) -> Any:
    return triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=stages)


_KEY = ("rows", "splits", "BITS", "GROUPS", "GROUP", "TOKENS")
_few = tuned((_config(32, 256, 2), _config(64, 256, 4)), _KEY)(permute)
# With several groups the tables are in the loop too: a third stage or fewer threads spill.
_few_groups = tuned((_config(64, 256, 4, 2), _config(64, 128, 4, 2)), _KEY)(permute)
_many = tuned((_config(64, 128, 4), _config(128, 64, 8), _config(64, 64, 4)), _KEY)(permute)


def fits(x: Tensor, index: Tensor, lut: Tensor, layout: str) -> bool:
    """Whether this kernel can take the sketch at all; the device is not asked for."""
    bits = lut.shape[-1].bit_length() - 1
    group = x.shape[-1] // lut.shape[1]
    if bits > 4 or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    # Whole words for every group, and 16 columns at least for the tensor cores.
    whole = group % 32 == 0 and layout == "device" if bits == 3 else group * bits % 32 == 0
    return whole and group >= 16 and index.data_ptr() % 4 == 0 and index.is_contiguous()


def run(x: Tensor, index: Tensor, lut: Tensor, y: Tensor) -> None:
    """`y = x @ W.T` into `y` ``[tokens, rows]``, for `x` ``[tokens, columns]`` that `fits`.

    Tables of another type are first rounded to that of `x`.
    """
    (tokens, columns), (rows, groups, entries) = x.shape, lut.shape
    bits, group = entries.bit_length() - 1, columns // groups
    tile = 8 if tokens <= 8 else 16 if tokens <= 16 else 64
    splits = _splits(rows, columns, tokens, tile, x.device)
    shape = (splits, tokens, rows)
    out = torch.empty(shape, dtype=torch.float32, device=x.device) if splits > 1 else y
    words = index.view(torch.int32)
    pairs = lut.to(x.dtype).contiguous().view(torch.int32)
    asm = not support.interpreting()
    kernel = _many if tile == 64 else _few if groups == 1 else _few_groups
    with on(x.device):
        kernel[
            lambda meta: (triton.cdiv(rows, meta["ROWS"]), triton.cdiv(tokens, tile), splits)
        ](
            x, words, pairs, out, tokens, rows, x.stride(0), splits, bits, groups, group,
            max(16, triton.next_power_of_2(group)), tile, asm,
        )  # fmt: skip
        if splits > 1:
            fold[(triton.cdiv(y.numel(), 256),)](out, y, y.numel(), splits, not asm, 256)


def _splits(rows: int, columns: int, tokens: int, tile: int, device: torch.device) -> int:
    """Parts of the columns, 1024 at least, so that there are programs enough.

    Two for each multiprocessor where a program has 64 rows by 64 tokens, else four of 32 rows: on
    an H100, 64 tokens and 4096 x 4096 weights take 14.2 us so, and 24.6 without parts.
    """
    if device.type == "cpu":
        return 1 + (columns >= 256)  # the interpreter: both ways
    height, each = (64, 2) if tile == 64 else (32, 4)
    programs = triton.cdiv(rows, height) * triton.cdiv(tokens, tile)
    wanted = round(each * _multiprocessors(device) / int(programs))
    return max(1, min(wanted, columns // 1024))


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def variants() -> tuple[Variant, ...]:
    """What a 7B model meets: one token and many, one group and several."""
    return (
        _variant("permute-4bit-1tok", 4, 1, 4096, 8, (32, 256, 2), {"80": 4.5}),
        _variant("permute-4bit-8groups", 4, 8, 1376, 8, (64, 256, 4), {"80": 5.5}, "bf16"),
        _variant("permute-3bit-1tok", 3, 1, 4096, 8, (32, 256, 2), {"80": 3.4}),
        _variant("permute-3bit-4groups", 3, 4, 1024, 8, (64, 256, 4), {"80": 3.4}),
        _variant("permute-2bit-1tok", 2, 1, 4096, 8, (32, 256, 2), {"80": 3.4}),
        _variant("permute-1bit-1tok", 1, 1, 4096, 8, (32, 256, 2), {"80": 3.4}),
        _variant("permute-4bit-64tok", 4, 1, 4096, 64, (64, 128, 4), {"80": 10.0}),
        _variant("permute-3bit-64tok", 3, 1, 4096, 64, (64, 128, 4), {"80": 10.0}, "bf16"),
        Variant(
            name="permute-fold",
            kernel=fold,
            signature={"parts": "*fp32", "y": "*fp16", "size": "i32", "splits": "i32"},
            constants={"WIDE": False, "BLOCK": 256},
            backends=("cuda",),
        ),
    )


def _variant(
    name: str, bits: int, groups: int, group: int, tokens: int, tile: tuple[int, int, int],
    most: dict[str, float], dtype: str = "fp16",
) -> Variant:  # fmt: skip
    rows, columns, warps = tile
    return Variant(
        name=name,
        kernel=permute,
        signature={
            "x": f"*{dtype}", "words": "*i32", "lut": "*i32",
            "y": "*fp32" if tokens == 8 else f"*{dtype}",
            "tokens": "i32", "rows": "i32", "stride": "i32", "splits": "i32",
        },
        constants={
            "BITS": bits, "GROUPS": groups, "GROUP": group,
            "WIDEST": triton.next_power_of_2(group), "TOKENS": tokens, "ASM": True,
            "ROWS": rows, "COLUMNS": columns,
        },
        warps=warps,
        stages=3 if groups == 1 else 2,
        weights=rows * columns,
        most=most,
        aligned=("stride",),
        backends=("cuda",),
    )  # fmt: skip
