"""Gradients of products with sketched matrices on the CPU, by tiles: never a dense W or dW.

The plain forms of the same functions are in `plain`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sketchconv.kernels.buckets import bucket_sums
from sketchconv.kernels.crew import share
from sketchconv.kernels.dequantize import decode_into
from sketchconv.kernels.gemv import _fast_bf16
from sketchconv.kernels.orders import WOVEN
from sketchconv.kernels.packed import Packed
from sketchconv.kernels.transpose import transpose16

TILE_WEIGHTS = 1 << 20  # decoded at a time, but at least FEWEST_ROWS rows
FEWEST_ROWS = 256
PARALLEL_VALUES = 1 << 17  # bucket sums of a tile below this stay on one thread
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grad_input(matrix: Packed, grad: Tensor) -> Tensor:
    """Gradient of the input: `grad @ W`.

    Args:
        matrix: the sketch, `[rows, columns]`.
        grad: float32, bfloat16 or float16 ``[..., rows]`` in CPU memory.

    Returns:
        ``[..., columns]`` in the dtype of `grad`. The sum over tiles is float32; where the CPU
        multiplies bfloat16 in hardware, the product of each tile is rounded to bfloat16 as torch
        rounds its products. With one tile, as layers of up to `TILE_WEIGHTS` weights have it, that
        is the only rounding.

    Raises:
        ValueError: `grad` has another width, dtype or device.
    """
    flat = _flat(grad, matrix.rows, "grad")
    narrow = flat.dtype is torch.bfloat16 and _fast_bf16()
    flat = flat if narrow else flat.float()
    step = _tile_rows(matrix)
    tile = flat.new_empty((min(step, matrix.rows), matrix.columns))
    total: Tensor | None = None
    for begin in range(0, matrix.rows, step):
        end = min(begin + step, matrix.rows)
        weight = tile[: end - begin]
        decode_into(matrix, weight, begin)
        part = flat[:, begin:end] @ weight
        if end - begin == matrix.rows:
            total = part
        elif total is None:
            total = part.float()
        else:
            total += part
    result = flat.new_zeros((flat.shape[0], matrix.columns)) if total is None else total
    return result.to(grad.dtype).view(*grad.shape[:-1], matrix.columns)


def grad_lut(matrix: Packed, grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the LUT: `grad.T @ x` summed over the columns of each entry.

    Args:
        matrix: the sketch, `[rows, columns]`.
        grad: gradient of the output, float32, bfloat16 or float16 ``[..., rows]``.
        x: the input ``[..., columns]`` with as many tokens, of the same dtypes.

    Returns:
        float32 ``[rows, groups, 2**bits]``. All sums are float32. Where the CPU multiplies bfloat16
        in hardware and both arguments are bfloat16, torch can give the products only in bfloat16:
        so each tile is multiplied twice, for the rounded product and for what the rounding took
        away, which together carry 16 bits. On one core of a Xeon with AMX, 1024 tokens: 400 GFLOP/s
        with a relative error of 2.5e-6; float32 products 100 GFLOP/s and 1.3e-7; one bfloat16
        product 850 GFLOP/s and 1.7e-3.

    Raises:
        ValueError: widths, tokens, dtypes or devices do not fit.
    """
    flat, wide = _flat(grad, matrix.rows, "grad"), _flat(x, matrix.columns, "x")
    if flat.shape[0] != wide.shape[0]:
        raise ValueError(f"grad has {flat.shape[0]} tokens, x has {wide.shape[0]}")
    narrow = flat.dtype is wide.dtype is torch.bfloat16 and _fast_bf16()
    if not narrow:
        flat, wide = flat.float(), wide.float()
    step = _tile_rows(matrix)
    tile = wide.new_empty((1 + narrow, min(step, matrix.rows), matrix.columns))
    result = torch.empty(matrix.lut.shape, dtype=torch.float32, device="cpu")
    for begin in range(0, matrix.rows, step):
        end = min(begin + step, matrix.rows)
        across = _across(flat[:, begin:end]) if narrow else flat[:, begin:end].t()
        parts = tile[:, : end - begin]
        torch.mm(across, wide, out=parts[0])
        if narrow:
            torch.addmm(parts[0], across, wide, beta=-1, out=parts[1])
        _sum_rows(matrix, parts[0], parts[1] if narrow else None, result[begin:end], begin)
    return result


def sum_by_code(matrix: Packed, rows: Tensor, dense: Tensor) -> Tensor:
    """`dense`, float32 ``[n, columns]``, summed by the codes of the rows `rows` (int64, in range).

    Returns:
        float32 ``[n, groups, 2**bits]``.
    """
    out = torch.empty((rows.numel(), *matrix.lut.shape[1:]), dtype=torch.float32, device="cpu")
    _sum_rows(matrix, dense.contiguous(), None, out, 0, rows.contiguous())
    return out


def _across(grad: Tensor) -> Tensor:
    """`grad.t()`, bfloat16, in rows: it is multiplied twice, and torch would copy it each time."""
    out = grad.new_empty((grad.shape[1], grad.shape[0]))
    args = (grad.data_ptr(), *grad.stride(), out.data_ptr(), grad.shape[0], grad.shape[0])
    threads = torch.get_num_threads() if grad.numel() >= PARALLEL_VALUES else 1
    share(transpose16, grad.shape[1], args, threads)
    return out


def _sum_rows(
    matrix: Packed,
    values: Tensor,
    rest: Tensor | None,
    out: Tensor,
    begin: int,
    ids: Tensor | None = None,
) -> None:
    size = matrix.index.shape[2]
    args = (
        matrix.bits,
        matrix.index_pointer + begin * matrix.groups * size,
        0 if ids is None else ids.data_ptr(),
        values.data_ptr(),
        0 if rest is None else rest.data_ptr(),
        out.data_ptr(),
        matrix.groups,
        matrix.group_columns,
        int(matrix.order == WOVEN),
    )
    threads = torch.get_num_threads() if values.numel() >= PARALLEL_VALUES else 1
    share(bucket_sums, values.shape[0], args, threads)


def _tile_rows(matrix: Packed) -> int:
    return max(FEWEST_ROWS, TILE_WEIGHTS // matrix.columns)


def _flat(tensor: Tensor, width: int, name: str) -> Tensor:
    if tensor.dtype not in _DTYPES or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be float in CPU memory, got {tensor.dtype} on {tensor.device}"
        )
    if tensor.shape[-1] != width:
        raise ValueError(f"{name} has {tensor.shape[-1]} columns, expected {width}")
    return tensor.detach().reshape(-1, width)
