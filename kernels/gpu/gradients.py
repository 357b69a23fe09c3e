"""Gradients of a product with a sketch, for CUDA and ROCm: of `W` and its gradient, tiles at most.

The references are `grad_input` and `grad_lut` of `sketchconv.kernels.plain`.
"""

from __future__ import annotations

from torch import Tensor, promote_types

from sketchconv.kernels import plain
from sketchconv.kernels.gpu import input_gradient, lut_gradient, lut_sums, tiles
from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.launch import on_disk
from sketchconv.kernels.gpu.support import nvidia, why_dense

CASES = (  # bits, columns of a group, element
    (3, 1376, "bf16"),
    (1, 4096, "bf16"),
    (7, 1376, "bf16"),
    (4, 4096, "bf16"),
    (8, 4096, "bf16"),
    (3, 4096, "fp32"),
    (4, 4096, "fp32"),
)


def grad_input(
    grad: Tensor, index: Tensor, lut: Tensor, columns: int, layout: str = "planes-le"
) -> Tensor:
    """`grad @ W`: ``[..., rows]`` to ``[..., columns]`` of the same dtype, summed in float32.

    Weights are rounded to the dtype of `grad` first, like in the product that `grad` comes from.
    On NVIDIA, tiles of columns are decoded and go to the vendor's BLAS, whose settings in torch
    hold. Where `support.why_dense` gives a reason, tiles of rows are decoded by plain torch.

    Args:
        grad: ``[..., rows]``.
        index: uint8 ``[rows, groups, bytes]``.
        lut: ``[rows, groups, 2**bits]``.
        columns: of a row.
        layout: order of the index, "planes-le" or "device".

    Raises:
        ValueError: another layout.
    """
    if why_dense(grad.device, grad.dtype, lut.dtype) is not None:
        return plain.grad_input(grad, on_disk(index, lut, columns, layout), lut, columns)
    flat = grad.reshape(-1, grad.shape[-1])
    if nvidia(grad.device) and flat.shape[0]:
        out = grad.new_empty(flat.shape[0], columns)
        tiles.grad_input(flat.contiguous(), index.contiguous(), lut.contiguous(), out, layout)
        return out.view(*grad.shape[:-1], columns)
    return input_gradient.run(grad, index.contiguous(), lut.contiguous(), columns, layout)


def grad_lut(
    grad: Tensor, x: Tensor, index: Tensor, lut: Tensor, layout: str = "planes-le"
) -> Tensor:
    """Gradient of a LUT: `grad.T @ x` summed over the columns of each entry.

    The same bits in every run on GPUs of one architecture, as far as those of the BLAS are: on
    NVIDIA it makes tiles of `grad.T @ x`. Where `support.why_dense` gives a reason, as in
    `grad_input`.

    Args:
        grad: gradient of the output, ``[tokens, rows]``.
        x: input, ``[tokens, columns]``.
        index: uint8 ``[rows, groups, bytes]``.
        lut: ``[rows, groups, 2**bits]``, of which only the shape matters.
        layout: order of the index, "planes-le" or "device".

    Returns:
        float32 (float64 for float64 input) of the LUT's shape, from sums of that dtype.

    Raises:
        ValueError: another layout.
    """
    if why_dense(x.device, promote_types(grad.dtype, x.dtype)) is not None:
        return plain.grad_lut(grad, x, on_disk(index, lut, x.shape[-1], layout), lut)
    if nvidia(x.device) and x.shape[0]:
        return lut_sums.run(grad, x, index.contiguous(), lut, layout)
    return lut_gradient.run(grad.contiguous(), x.contiguous(), index.contiguous(), lut, layout)


def variants() -> tuple[Variant, ...]:
    """What is compiled ahead of time: wide groups, and narrow ones that are no whole tiles."""
    found: list[Variant] = []
    for case in CASES:
        found += input_gradient.variants(*case)
        found.append(lut_gradient.variant(*case))
    found += [lut_sums.variant(bits, group) for bits, group in ((3, 1376), (4, 4096), (8, 4096))]
    return tuple(found)
