"""Products of few tokens on any GPU and for every type: gathers from the table, sums in float32.

The path wherever bytes cannot be permuted: AMD, 5 to 8 bits, float32, groups
that do not start at whole words. It is bound by its arithmetic: 8.7 instructions per weight where
an A100's memory allows 4.8.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.gemv_units import code_at, hold
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import on, tuned
from sketchconv.kernels.gpu.layout import repacked
from sketchconv.kernels.gpu.rounding import put
from sketchconv.kernels.gpu.support import interpreting
from sketchconv.kernels.planes import fields


@jit
def gemv(
    x: tl.tensor,
    index: tl.tensor,
    lut: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    REPACKED: tl.constexpr,
    SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
) -> None:
    """`y[token, row] = sum of x[token, column] * value` for a tile of rows and TOKENS tokens.

    Args:
        x: ``[tokens, >= columns]``, `stride` apart.
        index: pointer to units of UNIT bits: 32 where every plane is whole words, else 8.
        lut: ``[rows, GROUPS, 2**BITS]``.
        y: ``[tokens, rows]``.
        rows, stride: the shapes.
        BITS, GROUPS, GROUP, REPACKED: of the sketch, as in `sketchconv.kernels.gpu.codes`.
        SIZE: units of a group.
        TOKENS: how many; program (i, j) takes tokens TOKENS * j and up.
        WIDE: as in `sketchconv.kernels.gpu.rounding`.
        ROWS, SPANS: of a tile; a span is the columns of one unit of the narrowest plane.
    """
    SPAN: tl.constexpr = 32 if REPACKED else UNIT // (BITS & -BITS)
    PER: tl.constexpr = (GROUP + SPAN - 1) // SPAN
    EDGE: tl.constexpr = PER * GROUPS % SPANS != 0 or GROUP % SPAN != 0
    top = tl.program_id(0) * ROWS
    r = tl.arange(0, ROWS)
    # Rows beyond the last one repeat it, and are not stored.
    r = tl.where(top + r < rows, r, rows - 1 - top)[:, None]
    index += top.to(tl.int64) * (GROUPS * SIZE)
    lut += top.to(tl.int64) * (GROUPS << BITS)
    x += (tl.program_id(1) * TOKENS).to(tl.int64) * stride
    sums: tl.tensor = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros((ROWS, SPANS), tl.float32),)  # noqa: RUF005
    for first in range(0, PER * GROUPS, SPANS):
        span = first + tl.arange(0, SPANS)
        inside = span < PER * GROUPS
        group = span // PER
        place = span - group * PER
        units = index + (r * GROUPS + group[None, :]) * SIZE
        entries = (r * GROUPS + group[None, :]) << BITS
        column = group * GROUP + place * SPAN
        held = (r, r, r, r)
        for slot in tl.static_range(SPAN):
            held = hold(held, units, place, inside, slot, GROUP, BITS, REPACKED, UNIT, EDGE)
            code = code_at(held, slot, BITS, REPACKED, UNIT)
            mask = inside & (place * SPAN + slot < GROUP)
            if EDGE:
                value = tl.load((lut + entries) + code, mask=mask[None, :], other=0.0)
            else:
                value = tl.load((lut + entries) + code)
            sums = _add(sums, value.to(tl.float32), x, column + slot, stride, mask, TOKENS, EDGE)
    y += (tl.program_id(1) * TOKENS).to(tl.int64) * rows + top
    out = tl.arange(0, ROWS)
    for token in tl.static_range(TOKENS):
        put(y + token * rows + out, tl.sum(sums[token], 1), top + out < rows, WIDE)


@jit
def _add(
    sums: tl.tensor,
    value: tl.tensor,
    x: tl.tensor,
    column: tl.tensor,
    stride: tl.tensor,
    mask: tl.tensor,
    TOKENS: tl.constexpr,
    EDGE: tl.constexpr,
) -> tl.tensor:
    """The sums of each token with one column of each span added."""
    added: tl.tensor = ()
    for token in tl.static_range(TOKENS):
        place = x + (column + token * stride)
        part = tl.load(place, mask=mask, other=0.0) if EDGE else tl.load(place)
        part = part.to(tl.float32)[None, :]
        added = added + (sums[token] + value * part,)  # noqa: RUF005
    return added


def _config(rows: int, spans: int, warps: int) -> Any:
    return triton.Config({"ROWS": rows, "SPANS": spans}, num_warps=warps)


_tuned = tuned(
    (_config(16, 64, 4), _config(16, 32, 4)),
    ("rows", "BITS", "GROUPS", "GROUP", "UNIT", "TOKENS"),
)(gemv)


def run(x: Tensor, index: Tensor, lut: Tensor, y: Tensor, layout: str) -> None:
    """`y = x @ W.T` into `y` ``[tokens, rows]``, ``x`` ``[tokens, columns]``, few tokens."""
    (tokens, columns), (rows, groups, entries) = x.shape, lut.shape
    bits, group = entries.bit_length() - 1, columns // groups
    moved = layout == "device" and repacked(bits, group)
    if moved and index.data_ptr() % 4:
        index = index.clone()  # the device's order is read by words
    whole = all(group * width % 32 == 0 for width in fields(bits)) and index.data_ptr() % 4 == 0
    units = index.view(torch.int32) if whole else index
    with on(x.device):
        # One token at a time but for powers of two: a tile of eight reads each code once.
        tile = tokens if tokens in (2, 4, 8) else 1
        _tuned[lambda meta: (triton.cdiv(rows, meta["ROWS"]), tokens // tile)](
            x, units, lut, y, rows, x.stride(0), bits, groups, group,
            moved, units.shape[-1], 32 if whole else 8,
            tile, interpreting(),
        )  # fmt: skip


def variants() -> tuple[Variant, ...]:
    """4 bits with its gate, and what else takes this path: odd groups, wide codes, float32."""
    return (
        _variant("gemv-4bit", 4, 1, 4096, most={"80": 8.7, "89": 8.7}),
        _variant("gemv-4bit-8groups", 4, 8, 1376, dtype="bf16"),
        _variant("gemv-4bit-4tok", 4, 1, 4096, tokens=4),
        _variant("gemv-3bit", 3, 4, 1024),
        _variant("gemv-6bit-fp32", 6, 1, 4096, dtype="fp32", spans=32),
        _variant("gemv-8bit", 8, 1, 4096, most={"80": 8.7, "89": 8.7}),
        _variant("gemv-5bit-odd", 5, 16, 45, unit=8, spans=32),
    )


def _variant(
    name: str, bits: int, groups: int, group: int, dtype: str = "fp16", unit: int = 32,
    tokens: int = 1, spans: int = 64, most: dict[str, float] | None = None,
) -> Variant:  # fmt: skip
    size = sum(-(-group * width // 8) for width in fields(bits)) * 8 // unit
    return Variant(
        name=name,
        kernel=gemv,
        signature={
            "x": f"*{dtype}", "index": "*i32" if unit == 32 else "*u8", "lut": f"*{dtype}",
            "y": f"*{dtype}", "rows": "i32", "stride": "i32",
        },
        constants={
            "BITS": bits, "GROUPS": groups, "GROUP": group, "REPACKED": False, "SIZE": size,
            "UNIT": unit, "TOKENS": tokens, "WIDE": False, "ROWS": 16, "SPANS": spans,
        },
        weights=16 * spans * unit // (bits & -bits),
        most=most or {},
        aligned=("stride",),
    )  # fmt: skip
