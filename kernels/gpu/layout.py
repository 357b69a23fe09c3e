"""The order of a packed index on a GPU: other places for the same bits, in the same bytes.

Three bits are two planes on disk, which costs a byte-permuting kernel as many instructions as it
saves. The device order puts 32 columns into three little-endian words of eight nibbles: columns
0-7, 8-15 and 16-23 are the low three bits of the nibbles of one word each, and bit `p` of columns
24-31 is the fourth bit of the nibbles of word `p`. So each word is a ready selector of eight
columns. The first words of all blocks of a group come first, then the second, then the third, so
that neighbours load neighbours. Other widths, and groups that are no multiple of 32 columns, keep
the order of the disk.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # columns


def repacked(bits: int, group_columns: int) -> bool:
    """Whether the device order differs from that of the disk."""
    return bits == 3 and group_columns % BLOCK == 0


def repack(index: Tensor, bits: int, group_columns: int) -> Tensor:
    """`index` in device order: uint8 ``[..., bytes]`` of the same shape, on the same device.

    The tensor itself where the order of the disk is used as it is.

    Raises:
        ValueError: if the last size is not that of a group of `group_columns` codes.
    """
    if not repacked(bits, group_columns):
        return index
    _check(index, group_columns)
    low = _split(index[..., : group_columns // 4], 2)
    high = _split(index[..., group_columns // 4 :], 1)
    code = _parts(low | high << 2, BLOCK)
    nibble = _parts(code[..., :24], 8)
    last = code[..., 24:].unsqueeze(-2)
    fourth = last >> _steps(3, 1, index.device).unsqueeze(-1) & 1
    return _join(nibble | fourth << 3, 4).transpose(-3, -2).flatten(-3)


def restore(index: Tensor, bits: int, group_columns: int) -> Tensor:
    """The order of the disk again: the inverse of `repack`, with the same arguments and errors."""
    if not repacked(bits, group_columns):
        return index
    _check(index, group_columns)
    nibble = _split(index, 4).reshape(*index.shape[:-1], 3, -1, 8).transpose(-3, -2)
    fourth = nibble >> 3 & 1
    last = (fourth << _steps(3, 1, index.device).unsqueeze(-1)).sum(-2, dtype=torch.uint8)
    code = torch.cat(((nibble & 7).flatten(-2), last), -1).flatten(-2)
    return torch.cat((_join(code & 3, 2), _join(code >> 2, 1)), -1)


def _check(index: Tensor, group_columns: int) -> None:
    wanted = group_columns * 3 // 8
    if index.dtype is not torch.uint8 or index.shape[-1] != wanted:
        raise ValueError(
            f"a group of {group_columns} columns at 3 bits is uint8 of {wanted} bytes, "
            f"got {index.dtype} of {index.shape[-1]}"
        )


def _steps(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, dtype=torch.uint8, device=device)


def _split(packed: Tensor, width: int) -> Tensor:
    """Fields of `width` bits, lowest first: ``[..., bytes]`` to ``[..., bytes * 8 // width]``."""
    shifts = _steps(8 // width, width, packed.device)
    fields: Tensor = packed.unsqueeze(-1) >> shifts & 2**width - 1
    return fields.flatten(-2)


def _join(fields: Tensor, width: int) -> Tensor:
    """The inverse of `_split`: ``[..., fields]`` to ``[..., fields * width // 8]``."""
    per_byte = 8 // width
    shifts = _steps(per_byte, width, fields.device)
    joined: Tensor = (_parts(fields, per_byte) << shifts).sum(-1, dtype=torch.uint8)
    return joined


def _parts(tensor: Tensor, size: int) -> Tensor:
    """The last dimension cut into parts of `size`: ``[..., n]`` to ``[..., n // size, size]``."""
    return tensor.reshape(*tensor.shape[:-1], -1, size)
