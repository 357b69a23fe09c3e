"""The reference of calibration: plain loops, slow and obviously right."""

from __future__ import annotations

import torch
from torch import Tensor


def decode(codes: Tensor, lut: Tensor, groups: Tensor) -> Tensor:
    """``lut[r, groups[c], codes[r, c]]``: ``[rows, columns]`` in the LUT's dtype."""
    rows = torch.arange(codes.shape[0])[:, None]
    return lut[rows, groups[None, :], codes.long()]


def objective(weight: Tensor, decoded: Tensor, hessian: Tensor) -> Tensor:
    """``(w - q) H (w - q)'`` of each row: float64 ``[rows]``."""
    gap = weight.double() - decoded.double()
    return ((gap @ hessian.double()) * gap).sum(1)


def nearest(values: Tensor, entries: Tensor) -> Tensor:
    """Codes of the nearest of `entries` ``[rows, k]`` to ``[rows]`` values, ties to the lower."""
    gap = (values.double()[:, None] - entries.double()).abs()
    return gap.argmin(1)


def compensate(weight: Tensor, upper: Tensor, lut: Tensor, groups: Tensor, block: int) -> Tensor:
    """Rounding with error compensation (GPTQ), a column at a time, in float32.

    Args:
        weight: float32 ``[rows, columns]``.
        upper: float32 ``[columns, columns]``, upper Cholesky factor of the inverse Hessian.
        lut: float32 ``[rows, groups, k]``.
        groups: int64 ``[columns]``.
        block: columns after which the later ones are brought up to date; only the order of the
            sums depends on it.

    Returns:
        Codes, uint8 ``[rows, columns]``.
    """
    work = weight.clone()
    codes = torch.empty(work.shape, dtype=torch.uint8)
    for begin in range(0, work.shape[1], block):
        end = min(begin + block, work.shape[1])
        errors = torch.zeros_like(work[:, begin:end])
        for j in range(begin, end):
            entries = lut[:, groups[j]]
            code = nearest(work[:, j], entries)
            value = entries.gather(1, code[:, None])[:, 0]
            error = (work[:, j] - value) / upper[j, j]
            work[:, j + 1 : end] -= error[:, None] * upper[j, j + 1 : end]
            codes[:, j], errors[:, j - begin] = code.to(torch.uint8), error
        work[:, end:] -= errors @ upper[begin:end, end:]
    return codes


def descend(weight: Tensor, codes: Tensor, hessian: Tensor, lut: Tensor, groups: Tensor) -> Tensor:
    """One sweep of coordinate descent, in float64: every entry is tried in every column."""
    codes, goal, matrix = codes.clone(), weight.double(), hessian.double()
    decoded = decode(codes, lut.double(), groups)
    for j in range(codes.shape[1]):
        entries = lut[:, groups[j]].double()
        trials = decoded[:, None, :].repeat(1, entries.shape[1], 1)
        trials[:, :, j] = entries
        gap = goal[:, None, :] - trials
        cost = ((gap @ matrix) * gap).sum(2)
        code = cost.argmin(1)
        codes[:, j] = code.to(torch.uint8)
        decoded[:, j] = entries.gather(1, code[:, None])[:, 0]
    return codes


def refit(weight: Tensor, codes: Tensor, hessian: Tensor, lut: Tensor, groups: Tensor) -> Tensor:
    """The entries that fit the codes best, all groups of a row together: float64, not sorted.

    Entries that no column uses stay as they are.
    """
    result, matrix = lut.double().clone(), hessian.double()
    k = lut.shape[2]
    for row in range(codes.shape[0]):
        place = groups * k + codes[row].long()
        member = torch.zeros(codes.shape[1], result[row].numel(), dtype=torch.float64)
        member[torch.arange(codes.shape[1]), place] = 1.0
        used = member.any(0)
        basis = member[:, used]
        normal = basis.T @ matrix @ basis
        right = basis.T @ matrix @ weight[row].double()
        best = torch.linalg.lstsq(normal, right[:, None], driver="gelsd").solution[:, 0]
        result[row].view(-1)[used] = best
    return result
