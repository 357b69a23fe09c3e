"""Byte permutation: our PRMT against its definition, and the lookup against the table.

The definition is that of the PTX manual, section `prmt`, written again in NumPy.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from sketchconv.kernels.gpu.permute_tables import prmt
from sketchconv.kernels.gpu.support import interpreting


@triton.jit
def permute_all(low, high, selector, out, SIZE: tl.constexpr, ASM: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(low + i).to(tl.uint32, bitcast=True)
    b = tl.load(high + i).to(tl.uint32, bitcast=True)
    s = tl.load(selector + i).to(tl.uint32, bitcast=True)
    tl.store(out + i, prmt(a, b, s, ASM).to(tl.int32, bitcast=True))


def by_definition(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    source = np.stack([low, high], 1).view(np.uint8)
    out = np.zeros((low.size, 4), np.uint8)
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = source[np.arange(low.size), nibble & 7]
        out[:, place] = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
    return out.view(np.uint32)[:, 0]


def test_prmt_as_defined():
    """The steps in integers in the interpreter, which alone has their conversions; else PRMT."""
    rng = np.random.default_rng(0)
    low, high, selector = rng.integers(0, 2**32, (3, 4096), dtype=np.uint32)
    selector[:16] = np.arange(16) * 0x1111  # every nibble, those that ask for signs too
    out = torch.empty(4096, dtype=torch.int32)
    given = [torch.tensor(each.view(np.int32)) for each in (low, high, selector)]
    permute_all[(1,)](*given, out, 4096, not interpreting())
    assert (out.cpu().numpy().view(np.uint32) == by_definition(low, high, selector)).all()
