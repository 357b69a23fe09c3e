"""Coordinate descent on the codes: each to the entry that is best while all others stay.

For ``f(Q) = (W - Q) H (W - Q)'`` per row and ``g = (W - Q) H``, the best value of coordinate j is
``q_j + g_j / H_jj``, so the best entry is the nearest to it. ``g`` then loses ``move * H[j]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sketchconv.kernels import tiles
from sketchconv.kernels.compensation import BLOCK
from sketchconv.kernels.gpu.support import why_not
from sketchconv.kernels.tables import Tables, decode


def descend(
    codes: Tensor, gradient: Tensor, hessian: Tensor, tables: Tables, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """One sweep over all columns; the objective never rises but by rounding.

    Args:
        codes: uint8 ``[rows, columns]``.
        gradient: float32 ``[rows, columns]``, ``(W - Q) H``.
        hessian: float32 ``[columns, columns]``, symmetric, with a positive diagonal.
        tables: LUTs of the rows; `groups` in the order of the columns.
        block: columns between two products with all.

    Returns:
        New codes and their gradient.
    """
    codes, gradient = codes.clone(), gradient.clone()
    inside = _inside(codes.device)
    for begin in range(0, codes.shape[1], block):
        end = min(begin + block, codes.shape[1])
        part = Tables(tables.lut, tables.thresholds, tables.groups[begin:end])
        before = decode(codes[:, begin:end].contiguous(), part.lut, part.groups)
        diagonal = hessian[begin:end, begin:end].contiguous()
        local = gradient[:, begin:end].clone(memory_format=torch.contiguous_format)
        codes[:, begin:end], moves = inside(local, diagonal, part, before)
        gradient.addmm_(moves, hessian[begin:end], alpha=-1)
    return codes, gradient


def _inside(
    device: torch.device,
) -> Callable[[Tensor, Tensor, Tables, Tensor], tuple[Tensor, Tensor]]:
    """Compiled for the CPU and for GPUs that Triton knows; else a column at a time in torch."""
    if device.type == "cpu":
        return _block_cpu
    if why_not(device) is not None:
        return _block_torch
    from sketchconv.kernels.gpu.columns import descend_block

    return descend_block


def _block_cpu(
    gradient: Tensor, hessian: Tensor, tables: Tables, before: Tensor
) -> tuple[Tensor, Tensor]:
    codes = torch.empty(gradient.shape, dtype=torch.uint8)
    tiles.descend_block(
        gradient.numpy(), hessian.numpy(), tables.lut.numpy(), tables.thresholds.numpy(),
        tables.groups.numpy(), codes.numpy(), before.numpy(),
    )  # fmt: skip
    return codes, before


def _block_torch(
    gradient: Tensor, hessian: Tensor, tables: Tables, before: Tensor
) -> tuple[Tensor, Tensor]:
    """The same on any device, a column at a time for all rows."""
    codes, moves = torch.empty_like(gradient, dtype=torch.uint8), torch.empty_like(gradient)
    for j in range(gradient.shape[1]):
        group = tables.groups[j]
        goal = before[:, j : j + 1] + gradient[:, j : j + 1] / hessian[j, j]
        code = (goal > tables.thresholds[:, group]).sum(1, keepdim=True)
        move = tables.lut[:, group].gather(1, code) - before[:, j : j + 1]
        gradient[:, j + 1 :] -= move * hessian[j, j + 1 :]
        codes[:, j], moves[:, j] = code[:, 0].to(torch.uint8), move[:, 0]
    return codes, moves
