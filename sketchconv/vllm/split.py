"""Groups of a sketch cut into smaller ones with the same values, so that ranks can share a row.

A row-parallel layer gives each rank a range of columns. Where the ranks divide the groups, each
gets whole groups. Otherwise a group is cut into `parts` of equal width: each plane of its packed
index is cut where bytes end, and its LUT is repeated; nothing is decoded. So also a sketch of one
group a row, the default, can be split.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from sketchconv.errors import LoadError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.kernels.planes import fields


def parts_for(record: SketchRecord, degree: int) -> int:
    """Into how many parts each group is cut so that `degree` ranks have whole ones; 1 is as it is.

    Raises:
        LoadError: they cannot be cut where bytes end.
    """
    parts = degree // gcd(record.groups, degree)
    width = record.group_size // parts
    if record.group_size % parts or (parts > 1 and any(width * w % 8 for w in fields(record.bits))):
        raise LoadError(
            f"{record.name}: {record.groups} groups of {record.group_size} columns at "
            f"{record.bits} bits cannot be split among {degree} ranks at whole bytes; use another "
            "tensor parallel size, or more groups"
        )
    return parts


def cut_index(index: Tensor, bits: int, group_columns: int, parts: int) -> Tensor:
    """Packed groups cut into `parts`: uint8 ``[rows, G, bytes]`` to ``[rows, G * parts, ...]``.

    `group_columns`, a multiple of what `parts_for` asks for, are those of an uncut group.
    """
    if parts == 1:
        return index
    planes, begin = [], 0
    for width in fields(bits):
        size = group_columns * width // 8
        planes.append(index[..., begin : begin + size].reshape(*index.shape[:-1], parts, -1))
        begin += size
    return torch.cat(planes, -1).flatten(1, 2)


def cut_lut(lut: Tensor, parts: int) -> Tensor:
    """The LUTs of the cut groups: ``[rows, G, entries]`` to ``[rows, G * parts, entries]``."""
    return lut if parts == 1 else lut.repeat_interleave(parts, 1)
