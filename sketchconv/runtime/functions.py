"""Sketched products and look-ups with gradients of the input and of the LUT, on every device.

The first half chooses the kernels: those of the CPU, those of the GPU, or plain torch. The second
half are the two autograd functions that use them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sketchconv.kernels import dequantize, gemv, gradients, plain
from sketchconv.kernels.orders import WOVEN
from sketchconv.kernels.packed import LUT_DTYPES, Packed
from sketchconv.runtime.devices import DISK, gpu_kernels, reads_woven, restored
from sketchconv.runtime.modes import exact

KERNEL_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def packed_of(index: Tensor, lut: Tensor, columns: int, layout: str) -> Packed | None:
    """The form that the CPU kernels take; None for what they do not know."""
    if not (index.is_cpu and lut.is_cpu and lut.dtype in LUT_DTYPES):
        return None
    if layout == WOVEN and not reads_woven():  # in a program traced on another machine
        index, layout = on_disk(index, lut, columns, layout), DISK
    return Packed.of(index.contiguous(), lut.contiguous(), columns, layout)


def on_disk(index: Tensor, lut: Tensor, columns: int, layout: str) -> Tensor:
    """The index in the order of the disk, for plain torch operations."""
    return restored(index, lut.shape[2].bit_length() - 1, columns // lut.shape[1], layout)


def multiply(
    x: Tensor, index: Tensor, lut: Tensor, packed: Packed | None, layout: str = DISK
) -> Tensor:
    """`x @ W.T`; `packed` is the checked form of the same tensors, in CPU memory."""
    with exact(x.device.type):
        if packed is not None and x.dtype in KERNEL_DTYPES:
            return gemv.multiply(packed, x)
        gpu = gpu_kernels(x)
        if gpu is not None:
            return gpu.multiply(x, index, lut, layout=layout)  # type: ignore[no-any-return]
        return plain.multiply(x, on_disk(index, lut, x.shape[-1], layout), lut)


def grad_input(
    grad: Tensor, index: Tensor, lut: Tensor, columns: int, layout: str = DISK
) -> Tensor:
    """`grad @ W`: the gradient of the input."""
    with exact(grad.device.type):
        packed = packed_of(index, lut, columns, layout)
        if packed is not None and grad.dtype in KERNEL_DTYPES:
            return gradients.grad_input(packed, grad)
        gpu = gpu_kernels(grad)
        if gpu is not None:
            return gpu.grad_input(grad, index, lut, columns, layout=layout)  # type: ignore[no-any-return]
        return plain.grad_input(grad, on_disk(index, lut, columns, layout), lut, columns)


def grad_lut(grad: Tensor, x: Tensor, index: Tensor, lut: Tensor, layout: str = DISK) -> Tensor:
    """The gradient of the LUT, in its dtype."""
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    with exact(grad.device.type):
        packed = packed_of(index, lut, x.shape[-1], layout)
        if packed is not None and {grad.dtype, x.dtype} <= KERNEL_DTYPES:
            return gradients.grad_lut(packed, grad, x).to(lut.dtype)
        gpu = gpu_kernels(grad)
        if gpu is not None:
            return gpu.grad_lut(grad, x, index, lut, layout=layout).to(lut.dtype)  # type: ignore[no-any-return]
        index = on_disk(index, lut, x.shape[-1], layout)
        return plain.grad_lut(grad, x, index, lut).to(lut.dtype)


def gather(
    ids: Tensor,
    index: Tensor,
    lut: Tensor,
    columns: int,
    dtype: torch.dtype,
    packed: Packed | None,
    layout: str = DISK,
) -> Tensor:
    """Rows `ids` of a sketch as ``[*ids.shape, columns]`` of `dtype`."""
    if packed is not None:
        return dequantize.gather(packed, ids, dtype)
    gpu = gpu_kernels(ids)
    if gpu is not None:
        return gpu.gather(ids, index, lut, columns, dtype, layout=layout)  # type: ignore[no-any-return]
    return plain.gather(ids, on_disk(index, lut, columns, layout), lut, columns, dtype)


def grad_rows(
    grad: Tensor, ids: Tensor, index: Tensor, lut: Tensor, padding: int | None, layout: str = DISK
) -> Tensor:
    """Gradient of the LUT of a look-up: only rows that were looked up are touched."""
    gpu = gpu_kernels(grad)
    if gpu is not None and grad.dtype in KERNEL_DTYPES:
        return gpu.grad_gather(grad, ids, index, lut, padding, layout=layout).to(lut.dtype)  # type: ignore[no-any-return]
    columns = grad.shape[-1]
    packed = packed_of(index, lut, columns, layout)
    if packed is None or grad.dtype is torch.float64:
        index = on_disk(index, lut, columns, layout)
        return plain.grad_gather(grad, ids, index, lut, padding).to(lut.dtype)
    rows, dense = plain.summed_rows(grad, ids, padding)
    if rows.numel() and not (int(rows[0]) >= 0 and int(rows[-1]) < packed.rows):
        raise IndexError(f"ids reach from {rows[0]} to {rows[-1]}, of {packed.rows} rows")
    total = torch.zeros_like(lut)
    total[rows] = gradients.sum_by_code(packed, rows, dense).to(lut.dtype)
    return total


class SketchMatmul(torch.autograd.Function):
    """`x @ W.T` with gradients of `x` and of the LUT, by tiles, never with a dense `W`.

    Gradients of LUTs are float32 sums (float64 for float64), whatever the dtype of `x`, and are
    rounded once, at the end. Only `x` itself is kept for them, so that q, k and v keep one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, lut: Tensor, packed: Packed | None, layout: str
    ) -> Tensor:
        """Run the product; `packed` is the checked form of the same tensors, on the CPU."""
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, index, lut)
        ctx.columns, ctx.layout = x.shape[-1], layout
        return multiply(x, index, lut, packed, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x` and of the LUT."""
        x, index, lut = ctx.saved_tensors
        grad_x = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_input(grad, index, lut, ctx.columns, ctx.layout)
        if ctx.needs_input_grad[2]:
            grad_table = grad_lut(grad, x, index, lut, ctx.layout)
        return grad_x, None, grad_table, None, None


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
        layout: str,
    ) -> Tensor:
        """Look up `ids`; the row `padding` gets no gradient."""
        ctx.save_for_backward(lut, ids, index)
        ctx.padding, ctx.layout = padding, layout
        return gather(ids, index, lut, columns, dtype, packed, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the LUT."""
        lut, ids, index = ctx.saved_tensors
        total = grad_rows(grad, ids, index, lut, ctx.padding, ctx.layout)
        return total, None, None, None, None, None, None, None
