"""Gradients of sketched products and look-ups: with respect to the input and to the LUT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sketchconv.kernels import dequantize, gemv, plain
from sketchconv.kernels.packed import Packed

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def multiply(x: Tensor, index: Tensor, lut: Tensor, packed: Packed | None) -> Tensor:
    """`x @ W.T`: by the CPU kernels where `packed` is given and they know the dtype of `x`."""
    if packed is not None and x.dtype in _KERNEL_DTYPES and not torch.compiler.is_compiling():
        return gemv.multiply(packed, x)
    return plain.multiply(x, index, lut)


def gather(
    ids: Tensor, index: Tensor, lut: Tensor, columns: int, dtype: torch.dtype, packed: Packed | None
) -> Tensor:
    """Rows `ids` of a sketch as ``[*ids.shape, columns]`` of `dtype`."""
    if packed is not None and not torch.compiler.is_compiling():
        return dequantize.gather(packed, ids, dtype)
    flat = ids.reshape(-1)
    return plain.decode(index[flat], lut[flat], columns, dtype).view(*ids.shape, columns)


class SketchMatmul(torch.autograd.Function):
    """`x @ W.T` with gradients of `x` and of the LUT, by tiles, never with a dense `W`.

    Gradients are products and sums in float32 (float64 for float64), whatever the dtype of `x`,
    and are rounded once, at the end.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, lut: Tensor, packed: Packed | None) -> Tensor:
        """Run the product; `packed` is the checked form of the same tensors, on the CPU."""
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else x.new_empty(0), index, lut)
        ctx.columns = x.shape[-1]
        return multiply(x, index, lut, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x` and of the LUT."""
        x, index, lut = ctx.saved_tensors
        grad_x = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_x = plain.grad_input(grad, index, lut, ctx.columns)
        if ctx.needs_input_grad[2]:
            flat = grad.reshape(-1, grad.shape[-1])
            grad_table = plain.grad_lut(flat, x.reshape(-1, ctx.columns), index, lut).to(lut.dtype)
        return grad_x, None, grad_table, None


class SketchGather(torch.autograd.Function):
    """Embedding look-up with the gradient of the LUT."""

    @staticmethod
    def forward(
        ctx: Any,
        lut: Tensor,
        ids: Tensor,
        index: Tensor,
        columns: int,
        dtype: torch.dtype,
        padding: int | None,
        packed: Packed | None,
    ) -> Tensor:
        """Look up `ids`; the row `padding` gets no gradient."""
        ctx.save_for_backward(lut, ids, index)
        ctx.padding = padding
        return gather(ids, index, lut, columns, dtype, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the LUT: only rows that were looked up are touched."""
        lut, ids, index = ctx.saved_tensors
        rows, places = ids.reshape(-1).unique(return_inverse=True)
        dtype = torch.float64 if grad.dtype is torch.float64 else torch.float32
        dense = torch.zeros((rows.numel(), grad.shape[-1]), dtype=dtype, device=grad.device)
        dense.index_add_(0, places, grad.reshape(-1, grad.shape[-1]).to(dtype))
        if ctx.padding is not None:
            dense[rows == ctx.padding] = 0
        part = torch.zeros((rows.numel(), *lut.shape[1:]), dtype=dtype, device=lut.device)
        plain.add_by_code(part, index[rows], dense)
        total = torch.zeros_like(lut)
        total[rows] = part.to(lut.dtype)
        return total, None, None, None, None, None, None
