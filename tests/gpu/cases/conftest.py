"""Sketches to multiply with, and the only place that imports what the interpreter needs.

With the interpreter on everything lies on the CPU; without it, on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sketchconv.kernels.gpu import layout
from sketchconv.kernels.gpu.support import interpreting
from sketchconv.kernels.planes import pack_rows

DEVICE = torch.device("cpu" if interpreting() else "cuda")


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Where the kernels run, which is where every tensor of a test is made."""
    with DEVICE:
        yield DEVICE


@dataclass(frozen=True)
class Sketch:
    """`codes` ``[rows, columns]`` int64 and the packed `index` and `lut` that they came from."""

    codes: Tensor
    index: Tensor
    lut: Tensor
    bits: int

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The weight ``[rows, columns]``, exact."""
        rows, groups, _ = self.lut.shape
        codes = self.codes.reshape(rows, groups, -1)
        return self.lut.to(dtype).gather(2, codes).reshape(rows, -1)

    def on(self, name: str) -> Tensor:
        """The index in the order `name`: "planes-le" or "device"."""
        if name == "planes-le":
            return self.index
        return layout.repack(self.index, self.bits, self.columns // self.lut.shape[1])


def build(rows: int, columns: int, bits: int, groups: int, dtype: torch.dtype, seed: int) -> Sketch:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    # Hard rows: every code alike, then few distinct values; a table of one outlier; zeros.
    codes[0] = 2**bits - 1
    codes[1 % rows] &= 1
    lut = torch.randn(rows, groups, 2**bits, generator=generator)
    lut[2 % rows, :, 0] = 300.0
    lut[3 % rows] = 0.0
    index = torch.from_numpy(pack_rows(codes.cpu().numpy(), bits, groups)).to(DEVICE)
    return Sketch(codes.long(), index, lut.to(dtype), bits)


@pytest.fixture
def sketch() -> Callable[..., Sketch]:
    """`sketch(rows, columns, bits, groups=1, dtype=torch.float16, seed=0)`."""

    def make(
        rows: int,
        columns: int,
        bits: int,
        groups: int = 1,
        dtype: torch.dtype = torch.float16,
        seed: int = 0,
    ) -> Sketch:
        return build(rows, columns, bits, groups, dtype, seed)

    return make
