"""Products of many tokens on any GPU and for every type: tiles are decoded on the way to `tl.dot`.

The path on AMD. (On NVIDIA tiles of the weight and a BLAS are faster.) No dense weight is ever in
memory, only a tile of it in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.codes import codes
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import bucket, on, tuned
from sketchconv.kernels.gpu.layout import repacked
from sketchconv.kernels.gpu.rounding import put, rounded
from sketchconv.kernels.gpu.support import interpreting
from sketchconv.kernels.planes import packed_size


@jit
def matmul(
    x: tl.tensor,
    index: tl.tensor,
    lut: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    REPACKED: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    BUCKET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """`y[token, row] = sum of x[token, column] * value`, for a tile of both.

    Args:
        x: ``[tokens, >= columns]``, `stride` apart. Values are rounded to its type.
        index: uint8 ``[rows, GROUPS, SIZE]``.
        lut: ``[rows, GROUPS, 2**BITS]``.
        y: ``[tokens, rows]``.
        tokens, rows, stride: the shapes.
        BITS, GROUPS, GROUP, REPACKED: of the sketch, as in `sketchconv.kernels.gpu.codes`.
        SIZE: bytes of a group.
        WIDE: as in `sketchconv.kernels.gpu.rounding`.
        BUCKET: of the tokens, so that few and many are tuned apart.
        ROWS, COLUMNS, TOKENS: of a tile; the columns of one never cross the end of a group.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    CHUNKS: tl.constexpr = (GROUP + COLUMNS - 1) // COLUMNS
    top = tl.program_id(0) * ROWS
    r = tl.arange(0, ROWS)
    # Rows beyond the last one repeat it, and are not stored.
    r = tl.where(top + r < rows, r, rows - 1 - top)[:, None]
    index += top.to(tl.int64) * (GROUPS * SIZE)
    lut += top.to(tl.int64) * (GROUPS << BITS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    x += m[:, None].to(tl.int64) * stride
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for chunk in range(GROUPS * CHUNKS):
        group = chunk // CHUNKS
        column = chunk % CHUNKS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        inside = column < GROUP
        start = index + (r * GROUPS + group) * SIZE
        code = codes(start, column, inside, GROUP, BITS, REPACKED)
        value = tl.load((lut + ((r * GROUPS + group) << BITS)) + code, mask=inside, other=0.0)
        mask = (m[:, None] < tokens) & inside
        part = tl.load(x + (group * GROUP + column), mask=mask, other=0.0)
        part = rounded(part, DTYPE, WIDE)
        value = rounded(value, DTYPE, WIDE)
        # Not TF32: float32 was asked for. Sixteen-bit inputs ignore the setting.
        total = tl.dot(part, tl.trans(value), total, input_precision="ieee")
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    place = y + (m[:, None].to(tl.int64) * rows + out)
    put(place, total, (out < rows) & (m[:, None] < tokens), WIDE)


def _config(rows: int, columns: int, tokens: int, stages: int = 1) -> Any:
    # One stage: the loads are chains, and copies of them cost registers and three instructions
    # per index; other warps hide the latency.
    meta = {"ROWS": rows, "COLUMNS": columns, "TOKENS": tokens}
    return triton.Config(meta, num_warps=4, num_stages=stages)


_KEY = ("rows", "BUCKET", "BITS", "GROUPS", "GROUP")
_half = tuned(
    (_config(64, 64, 64), _config(64, 64, 64, 2), _config(32, 64, 16), _config(64, 32, 64, 2)),
    _KEY,
)(matmul)
# In float32 a tile is multiplied without tensor cores: 64 x 64 x 64 spills 600 bytes.
_single = tuned((_config(32, 32, 32), _config(32, 32, 16)), _KEY)(matmul)


def run(x: Tensor, index: Tensor, lut: Tensor, y: Tensor, layout: str) -> None:
    """`y = x @ W.T` into `y` ``[tokens, rows]``, for `x` ``[tokens, columns]``."""
    (tokens, columns), (rows, groups, entries) = x.shape, lut.shape
    bits, group = entries.bit_length() - 1, columns // groups

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(rows, meta["ROWS"]), triton.cdiv(tokens, meta["TOKENS"])

    with on(x.device):
        (_single if x.dtype is torch.float32 else _half)[grid](
            x, index, lut, y, tokens, rows, x.stride(0), bits, groups, group,
            layout == "device" and repacked(bits, group), index.shape[-1], interpreting(),
            min(bucket(tokens), 4096),
        )  # fmt: skip


def variants() -> tuple[Variant, ...]:
    """4 and 8 bits with the gate, and what else takes this path: odd groups, float32."""
    return (
        _variant("matmul-4bit", 4, 1, 4096, (64, 64, 64), {"80": 15.0}),
        _variant("matmul-8bit", 8, 1, 4096, (64, 64, 64), {"80": 15.0}),
        _variant("matmul-3bit-4groups", 3, 4, 1024, (64, 64, 64), dtype="bf16"),
        _variant("matmul-5bit-odd", 5, 16, 45, (32, 64, 16)),
        _variant("matmul-4bit-fp32", 4, 1, 4096, (32, 32, 32), dtype="fp32"),
    )


def _variant(
    name: str, bits: int, groups: int, group: int, tile: tuple[int, int, int],
    most: dict[str, float] | None = None, dtype: str = "fp16",
) -> Variant:  # fmt: skip
    rows, columns, tokens = tile
    return Variant(
        name=name,
        kernel=matmul,
        signature={
            "x": f"*{dtype}", "index": "*u8", "lut": f"*{dtype}", "y": f"*{dtype}",
            "tokens": "i32", "rows": "i32", "stride": "i32",
        },
        constants={
            "BITS": bits, "GROUPS": groups, "GROUP": group, "REPACKED": False,
            "SIZE": packed_size(group, bits), "WIDE": False, "BUCKET": 64, "ROWS": rows,
            "COLUMNS": columns, "TOKENS": tokens,
        },
        stages=1,
        weights=rows * columns,
        most=most or {},
        aligned=("stride",),
    )  # fmt: skip
