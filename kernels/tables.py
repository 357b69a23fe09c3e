"""LUTs as calibration works on them: thresholds, and the group that each column belongs to.

Columns may be in any order: `groups` says which LUT of its row a column uses. On the CPU the sums
and look-ups run in compiled code, elsewhere in torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sketchconv.kernels.table_rows import add_rows, look_up_rows


@dataclass(frozen=True, slots=True)
class Tables:
    """One LUT per row and group.

    Attributes:
        lut: float32 ``[rows, groups, k]``, ascending along the last axis.
        thresholds: float32 ``[rows, groups, k - 1]``, the largest float32 that is not above the
            midpoint of two neighbours: a value belongs above it exactly if it is greater.
        groups: int64 ``[columns]``, the group of each column.
    """

    lut: Tensor
    thresholds: Tensor
    groups: Tensor

    @property
    def entries(self) -> int:
        """Entries per LUT."""
        return self.lut.shape[2]


def make_tables(lut: Tensor, groups: Tensor) -> Tables:
    """Tables of an ascending float32 `lut`, with its thresholds."""
    middle = (lut[..., :-1].double() + lut[..., 1:].double()) * 0.5
    low = middle.float()
    below = torch.nextafter(low, torch.full_like(low, -torch.inf))
    thresholds = torch.where(low.double() > middle, below, low)
    return Tables(lut.contiguous(), thresholds.contiguous(), groups)


def decode(codes: Tensor, lut: Tensor, groups: Tensor) -> Tensor:
    """``lut[r, groups[c], codes[r, c]]``: float32 ``[rows, columns]``."""
    if codes.is_cpu:
        out = torch.empty(codes.shape, dtype=torch.float32)
        look_up_rows(codes.numpy(), lut.contiguous().numpy(), groups.numpy(), out.numpy())
        return out
    return _decode_torch(codes, lut, groups)


def _decode_torch(codes: Tensor, lut: Tensor, groups: Tensor) -> Tensor:
    return lut.flatten(1).gather(1, groups * lut.shape[2] + codes.long())


def encode(values: Tensor, tables: Tables) -> Tensor:
    """Codes of the nearest entries, ties to the lower: uint8 ``[rows, columns]``."""
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for entry in range(tables.entries - 1):
        codes += values > tables.thresholds[:, :, entry][:, tables.groups]
    return codes


def entry_sums(values: Tensor, codes: Tensor, tables: Tables) -> Tensor:
    """`values`, float32 ``[rows, columns]``, summed by entry: float32 ``[rows, groups, k]``.

    Sums are float64 on the CPU and run in one order; elsewhere they are products of matrices, which
    give the same bits each time on one device (a scatter would not).
    """
    if codes.is_cpu:
        out = torch.empty(tables.lut.shape, dtype=torch.float32)
        args = values.contiguous().numpy(), codes.numpy(), tables.groups.numpy(), out.numpy()
        add_rows(*args)
        return out
    return _entry_sums_torch(values, codes, tables)


def _entry_sums_torch(values: Tensor, codes: Tensor, tables: Tables) -> Tensor:
    columns = torch.arange(tables.groups.numel(), device=values.device)
    member = values.new_zeros(columns.numel(), tables.lut.shape[1])
    member[columns, tables.groups] = 1.0
    sums = [(values * (codes == entry)) @ member for entry in range(tables.entries)]
    return torch.stack(sums, dim=-1)


def sort_entries(codes: Tensor, lut: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The same matrix with every LUT ascending: new codes and LUT."""
    ascending, order = lut.sort(dim=-1, stable=True)
    rank = order.argsort(dim=-1).to(torch.float32)
    return decode(codes, rank, groups).to(torch.uint8), ascending
