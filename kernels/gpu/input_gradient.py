"""Gradient of a product with a sketch with respect to its input, for CUDA and ROCm."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.codes import codes
from sketchconv.kernels.gpu.jit import jit
from sketchconv.kernels.gpu.launch import bucket, geometry, on, tuned
from sketchconv.kernels.gpu.rounding import put, rounded


def _input_config(tokens: int, rows: int, columns: int, warps: int, stages: int = 3) -> Any:
    constants = {"TOKENS": tokens, "ROWS": rows, "COLUMNS": columns}
    return triton.Config(constants, num_warps=warps, num_stages=stages)


# The first is what the interpreter takes. float32 has tiles of its own: without tensor cores a
# product of 64x64 tiles needs more registers than there are.
_HALF = (
    _input_config(64, 32, 64, 4),
    _input_config(16, 32, 64, 4),
    _input_config(16, 64, 64, 8),
    _input_config(128, 32, 64, 8),
)
_SINGLE = (_input_config(32, 16, 32, 4), _input_config(16, 16, 64, 4))


@jit
def _input_kernel(
    grad: tl.tensor,
    index: tl.tensor,
    lut: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    size: tl.tensor,
    tokens_bucket: tl.tensor,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    REPACKED: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One tile of `grad @ W`: TOKENS tokens, COLUMNS columns of one group, over all rows."""
    first = tl.program_id(0) * TOKENS
    tiles: tl.constexpr = (GROUP + COLUMNS - 1) // COLUMNS
    group = tl.program_id(1) // tiles
    column = (tl.program_id(1) % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    token = tl.arange(0, TOKENS)[:, None]
    row = tl.arange(0, ROWS)
    inside = column < GROUP
    present = first + token < tokens
    # Offsets within a tile fit 32 bits, those of tiles may not.
    grad += first.to(tl.int64) * rows
    index += group.to(tl.int64) * size
    lut += group.to(tl.int64) * (1 << BITS)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for begin in range(0, rows, ROWS):
        left = tl.load(
            grad + (token * rows + (begin + row)[None, :]),
            mask=present & ((begin + row)[None, :] < rows),
            other=0.0,
        )
        mask = ((begin + row)[:, None] < rows) & inside
        place = tl.cast(begin, tl.int64) * groups
        start = index + place * size + row[:, None] * (groups * size)
        code = codes(start, column, mask, GROUP, BITS, REPACKED)
        entry = row[:, None] * (groups * (1 << BITS)) + code
        weight = tl.load(lut + place * (1 << BITS) + entry, mask=mask, other=0.0)
        total = tl.dot(
            rounded(left, DTYPE, WIDE), rounded(weight, DTYPE, WIDE), total, input_precision="ieee"
        )
    out += first.to(tl.int64) * groups * GROUP + group * GROUP
    put(out + (token * (groups * GROUP) + column), total, present & inside, WIDE)


_INPUT_KEY = ("tokens_bucket", "rows", "groups", "GROUP", "BITS")
_input_half = tuned(_HALF, _INPUT_KEY)(_input_kernel)
_input_single = tuned(_SINGLE, _INPUT_KEY)(_input_kernel)


def grad_input(
    grad: Tensor, index: Tensor, lut: Tensor, columns: int, layout: str = "planes-le"
) -> Tensor:
    """`grad @ W`: ``[..., rows]`` to ``[..., columns]`` of the same dtype, summed in float32.

    Weights are rounded to the dtype of `grad` first, like in the product that `grad` comes from.

    Args:
        grad: float16, bfloat16 or float32 ``[..., rows]``.
        index: uint8 ``[rows, groups, bytes]``.
        lut: float16, bfloat16 or float32 ``[rows, groups, 2**bits]``.
        columns: of a row.
        layout: order of the index, "planes-le" or "device".

    Raises:
        ValueError: another layout.
    """
    rows, groups, entries = lut.shape
    flat = grad.reshape(-1, rows).contiguous()
    out = grad.new_empty((flat.shape[0], columns))
    width = columns // groups
    run = _input_single if grad.dtype is torch.float32 else _input_half
    tokens = flat.shape[0]

    def grid(chosen: dict[str, Any]) -> tuple[int, int]:
        tiles = triton.cdiv(width, chosen["COLUMNS"])
        return triton.cdiv(tokens, chosen["TOKENS"]), groups * tiles

    with on(grad.device):
        run[grid](
            flat,
            index,
            lut,
            out,
            tokens,
            rows,
            groups,
            index.shape[-1],
            bucket(tokens),
            **geometry(width, entries.bit_length() - 1, layout, grad.dtype),
        )
    return out.view(*grad.shape[:-1], columns)


def variants(bits: int, group: int, element: str) -> list[Variant]:
    """Every tile for gradients of `element` ("bf16" or "fp32")."""
    numbers = ("tokens", "rows", "groups", "size", "tokens_bucket")
    pointers = {"grad": f"*{element}", "index": "*u8", "lut": "*fp16", "out": f"*{element}"}
    dtype = torch.bfloat16 if element == "bf16" else torch.float32
    return [
        Variant(
            name=f"grad-input-{bits}bit-{group}-{element}-{tile}",
            kernel=_input_kernel,
            signature={**pointers, **dict.fromkeys(numbers, "i32")},
            constants={**geometry(group, bits, "device", dtype), **config.kwargs},
            warps=config.num_warps,
            stages=config.num_stages,
            weights=config.kwargs["ROWS"] * config.kwargs["COLUMNS"],
            aligned=("rows",),
        )
        for config in (_HALF if element == "bf16" else _SINGLE)
        for tile in ["x".join(map(str, config.kwargs.values()))]
    ]
