"""The code reader that all kernels share, on every width, order and tail."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sketchconv.kernels.gpu import layout
from sketchconv.kernels.gpu.codes import codes


@triton.jit
def read(index, out, size, GROUP: tl.constexpr, BITS: tl.constexpr, REPACKED: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, 128)
    mask = column < GROUP
    found = codes(index + row * size, column, mask, GROUP, BITS, REPACKED)
    tl.store(out + row * 128 + column, found)


@pytest.mark.parametrize("columns", [1, 7, 45, 64, 96])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("order", ["planes-le", "device"])
def test_codes(sketch, order, bits, columns):
    case = sketch(5, columns, bits)
    index = case.on(order)
    out = torch.full((5, 128), -1, dtype=torch.int32)
    repacked = order == "device" and layout.repacked(bits, columns)
    read[(5,)](index, out, index.shape[-1], columns, bits, repacked)
    assert torch.equal(out[:, :columns].long(), case.codes)
    assert not out[:, columns:].any()
