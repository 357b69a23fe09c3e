"""Rounding with error compensation: column by column, in blocks (GPTQ, Frantar et al. 2022).

For ``min ||(W - Q) X||^2`` with ``H = X X'`` and U the upper Cholesky factor of ``H^-1``: round
column j to its nearest entry, divide the error by ``U[j, j]`` and take it times ``U[j, j+1:]`` from
the columns that follow. Within a block that is done column by column, and once per block, as one
product, for all later columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sketchconv.kernels import tiles
from sketchconv.kernels.gpu.support import why_not
from sketchconv.kernels.tables import Tables

BLOCK = 128


def compensate(weight: Tensor, upper: Tensor, tables: Tables, block: int = BLOCK) -> Tensor:
    """Codes of `weight`, rounded column by column with the error compensated.

    Args:
        weight: float32 ``[rows, columns]``.
        upper: float32 ``[columns, columns]``, upper Cholesky factor of the inverse Hessian.
        tables: LUTs of the rows; `groups` in the order of the columns.
        block: columns between two products with the rest.

    Returns:
        uint8 ``[rows, columns]``.
    """
    work = weight.clone()
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    inside = _inside(work.device)
    for begin in range(0, work.shape[1], block):
        end = min(begin + block, work.shape[1])
        part = Tables(tables.lut, tables.thresholds, tables.groups[begin:end])
        diagonal = upper[begin:end, begin:end].contiguous()
        codes[:, begin:end], errors = inside(work[:, begin:end].contiguous(), diagonal, part)
        if end < work.shape[1]:
            work[:, end:].addmm_(errors, upper[begin:end, end:], alpha=-1)
    return codes


def _inside(device: torch.device) -> Callable[[Tensor, Tensor, Tables], tuple[Tensor, Tensor]]:
    """Compiled for the CPU and for GPUs that Triton knows; else a column at a time in torch."""
    if device.type == "cpu":
        return _block_cpu
    if why_not(device) is not None:
        return _block_torch
    from sketchconv.kernels.gpu.columns import round_block

    return round_block


def _block_cpu(work: Tensor, upper: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    codes, errors = torch.empty(work.shape, dtype=torch.uint8), torch.empty_like(work)
    tiles.round_block(
        work.numpy(), upper.numpy(), tables.lut.numpy(), tables.thresholds.numpy(),
        tables.groups.numpy(), codes.numpy(), errors.numpy(),
    )  # fmt: skip
    return codes, errors


def _block_torch(work: Tensor, upper: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    """The same on any device, a column at a time for all rows."""
    codes, errors = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    for j in range(work.shape[1]):
        group = tables.groups[j]
        limits, entries = tables.thresholds[:, group], tables.lut[:, group]
        code = (work[:, j : j + 1] > limits).sum(1, keepdim=True)
        error = (work[:, j : j + 1] - entries.gather(1, code)) / upper[j, j]
        work[:, j + 1 :] -= error * upper[j, j + 1 :]
        codes[:, j], errors[:, j] = code[:, 0].to(torch.uint8), error[:, 0]
    return codes, errors
