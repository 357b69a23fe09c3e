"""The order on a device: the same bytes of memory, and there and back without a change."""

from __future__ import annotations

import pytest
import torch

from sketchconv.kernels import plain
from sketchconv.kernels.gpu import layout
from sketchconv.kernels.planes import pack_rows, packed_size


def packed(bits: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 2**bits, (5, 3, columns), dtype=torch.uint8, generator=generator)
    return pack(codes, bits)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, groups = codes.shape[:2]
    return torch.from_numpy(pack_rows(codes.reshape(rows, -1).numpy(), bits, groups))


@pytest.mark.parametrize("columns", [1, 7, 16, 31, 32, 45, 64, 576, 1376])
@pytest.mark.parametrize("bits", range(1, 9))
def test_restore_undoes_repack(bits, columns):
    index = packed(bits, columns)
    moved = layout.repack(index, bits, columns)
    assert (moved.shape, moved.dtype) == (index.shape, index.dtype)
    assert moved.shape[-1] == packed_size(columns, bits)
    assert torch.equal(layout.restore(moved, bits, columns), index)
    assert (moved is index) == (not layout.repacked(bits, columns))


def test_every_code_is_where_the_kernels_look_for_it():
    codes = torch.randint(0, 8, (4, 2, 96), dtype=torch.uint8)
    moved = layout.repack(pack(codes, 3), 3, 96)
    words = (
        moved.contiguous().view(torch.int32).reshape(4, 2, 3, 3).mT.long()
    )  # three words of each block
    for column in range(96):
        block, slot = divmod(column, 32)
        if slot < 24:
            found = words[:, :, block, slot // 8] >> (slot % 8 * 4) & 7
        else:
            bits = words[:, :, block] >> ((slot - 24) * 4 + 3) & 1
            found = bits[..., 0] | bits[..., 1] << 1 | bits[..., 2] << 2
        assert torch.equal(found, codes[:, :, column].long()), column


def test_a_group_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"12 bytes, got torch\.uint8 of 13"):
        layout.repack(torch.zeros(2, 1, 13, dtype=torch.uint8), 3, 32)


def test_the_plain_reference_reads_what_is_restored():
    index = packed(3, 64)
    again = layout.restore(layout.repack(index, 3, 64), 3, 64)
    assert torch.equal(plain.unpack(again, 3, 64), plain.unpack(index, 3, 64))
