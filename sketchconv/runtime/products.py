"""Products with shaped sketches: tiles of decoded rows, multiplied in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from sketchconv.formats import grids
from sketchconv.kernels.ggml.expand import expand_rows
from sketchconv.kernels.ggml.packed import PackedShaped, multiply
from sketchconv.kernels.plain import unpack
from sketchconv.runtime.modes import exact

# Weights that are decoded at a time: they stay in the caches where few tokens read them once.
SMALL_TILE = 1 << 18
TILE = 1 << 22
FEW_TOKENS = 16
# Up to so many tokens codes are multiplied without decoding rows to memory.
FUSED_TOKENS = 8
PLAIN_ROWS = 256
_CODEBOOK = grids.levels("iq4_nl", 4).tolist()


def dense_plain(index: Tensor, scale: Tensor, grid: str, bits: int, dtype: torch.dtype) -> Tensor:
    """The weight ``[rows, columns]`` in `dtype` by plain torch operations, on any device.

    Differentiable in `scale`.
    """
    rows, groups, fields = scale.shape
    columns = index.shape[2] * 8 // bits
    codes = unpack(index, bits, columns).long()
    wide = scale.to(torch.promote_types(dtype, torch.float32))
    values = _levels(grid, bits, wide)[codes] * wide[..., :1]
    if fields > 1:
        values = values + wide[..., 1:]
    return values.reshape(rows, groups * columns).to(dtype)


def _levels(grid: str, bits: int, like: Tensor) -> Tensor:
    """The levels in the dtype and on the device of `like`; tracers can read how they are made."""
    if grid == "iq4_nl":
        return torch.tensor(_CODEBOOK, dtype=like.dtype, device=like.device)
    first = 0 if grid == "affine" else -(1 << (bits - 1))
    return torch.arange(first, first + (1 << bits), dtype=like.dtype, device=like.device)


def dense(index: Tensor, scale: Tensor, grid: str, bits: int) -> Tensor:
    """The weight, float32 ``[rows, columns]``, bit for bit that of the file."""
    if not index.is_cpu:
        form = grid, bits, torch.float32
        return torch.cat([dense_plain(i, s.detach(), *form) for i, s in _pairs(index, scale)])
    columns = index.shape[1] * index.shape[2] * 8 // bits
    out = torch.empty(index.shape[0], columns)
    table = scale.detach().float().contiguous().numpy()
    threads = torch.get_num_threads() if out.numel() >= TILE else 1
    expand_rows(index.contiguous().numpy(), table, grid, bits, out.numpy(), threads)
    return out


def multiply_few(x: Tensor, index: Tensor, scale: Tensor, grid: str, bits: int) -> Tensor:
    """`x @ W.T` in CPU memory for few tokens: `kernels.ggml.packed.multiply` of loose tensors."""
    columns = index.shape[1] * index.shape[2] * 8 // bits
    matrix = PackedShaped.of(index.contiguous(), scale.contiguous(), columns, grid, bits)
    return multiply(matrix, x.detach())


def multiply_plain(x: Tensor, index: Tensor, scale: Tensor, grid: str, bits: int) -> Tensor:
    """`x @ W.T` for tracers, transforms, other dtypes and devices, by tiles of decoded rows."""
    form = grid, bits, x.dtype
    return torch.cat([linear(x, dense_plain(i, s, *form)) for i, s in _pairs(index, scale)], -1)


def _pairs(index: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    starts = range(0, index.shape[0], PLAIN_ROWS)
    return [(index[b : b + PLAIN_ROWS], scale[b : b + PLAIN_ROWS]) for b in starts]


def _tiles(index: Tensor, tokens: int) -> Iterator[slice]:
    rows, columns = index.shape[0], max(1, index[0].numel() * 2)
    step = max(1, (SMALL_TILE if tokens <= FEW_TOKENS else TILE) // columns)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


class ShapedMatmul(torch.autograd.Function):
    """`x @ W.T` with gradients of `x` and of scales and minima; never with a whole dense `W`.

    Sums are float32, results in the dtype of `x`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, scale: Tensor, grid: str, bits: int) -> Tensor:
        """The product of ``[..., columns]``, in its dtype."""
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, index, scale)
        ctx.form, ctx.tokens = (grid, bits), x.numel() // x.shape[-1]
        if x.is_cpu and ctx.tokens <= FUSED_TOKENS and scale.dtype is torch.float16:
            return multiply_few(x, index, scale, grid, bits)
        wide = x.float()
        with exact(x.device.type):
            parts = [
                linear(wide, dense(index[tile], scale[tile], grid, bits))
                for tile in _tiles(index, ctx.tokens)
            ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x` and of the scales."""
        x, index, scale = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1]).float()
        grad_x, parts = None, []
        for tile in _tiles(index, ctx.tokens):
            if ctx.needs_input_grad[0]:
                part = flat[:, tile] @ dense(index[tile], scale[tile], *ctx.form)
                grad_x = part if grad_x is None else grad_x + part
            if ctx.needs_input_grad[2]:
                outer = flat[:, tile].T @ x.reshape(-1, x.shape[-1]).float()
                parts.append(grad_scale(outer, index[tile], *ctx.form))
        if grad_x is not None:
            grad_x = grad_x.view(*grad.shape[:-1], -1).to(grad.dtype)
        return grad_x, None, torch.cat(parts).to(scale.dtype) if parts else None, None, None


def grad_scale(outer: Tensor, index: Tensor, grid: str, bits: int) -> Tensor:
    """Gradient of scales (and minima) from that of the weight: float32 ``[rows, groups, fields]``.

    Args:
        outer: ``[rows, columns]``.
        index: packed codes of the same rows.
        grid, bits: of the sketch.
    """
    rows, groups = index.shape[:2]
    codes = unpack(index, bits, outer.shape[1] // groups).long()
    parts = outer.view(rows, groups, -1)
    sums = [(parts * _levels(grid, bits, outer)[codes]).sum(-1)]
    return torch.stack([*sums, parts.sum(-1)] if grids.GRIDS[grid].has_minimum else sums, -1)
