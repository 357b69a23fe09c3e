"""The checked form of a shaped sketch, and products with it."""

from __future__ import annotations

import re

import pytest
import torch

from sketchconv.formats import grids
from sketchconv.kernels import dispatch
from sketchconv.kernels.decoder.network import Matrix
from sketchconv.kernels.ggml import packed as module
from sketchconv.kernels.ggml.gemv import chosen_kernel, multiply_kernel, multiply_plain
from sketchconv.kernels.ggml.packed import PackedShaped, multiply

ROWS, COLUMNS = 21, 192


def tensors(grid="affine", bits=4, width=64):
    """Random codes and scales."""
    seed = torch.Generator().manual_seed(3)
    groups = COLUMNS // width
    shape = (ROWS, groups, width * bits // 8)
    index = torch.randint(0, 256, shape, dtype=torch.uint8, generator=seed)
    scale = torch.randn(ROWS, groups, grids.GRIDS[grid].fields, generator=seed).half()
    return index, scale


def test_sizes_are_those_of_the_tensors():
    index, scale = tensors()
    made = PackedShaped.of(index, scale.requires_grad_(), COLUMNS, "affine", 4)
    assert (made.rows, made.columns, made.groups, made.group_columns) == (ROWS, COLUMNS, 3, 64)
    assert (made.index_pointer, made.scale_pointer) == (index.data_ptr(), scale.data_ptr())
    matrix = Matrix(made)
    assert (matrix.rows, matrix.columns) == (ROWS, COLUMNS)
    assert matrix.source(None)[1:] == (index.data_ptr(), scale.data_ptr(), 3, 64)
    with pytest.raises(ValueError, match="an embedding cannot be a shaped sketch"):
        matrix.source(None, rows_only=True)


INDEX, SCALE = tensors()
WRONG = {
    "no grid": ((INDEX, SCALE, COLUMNS, "affine", 8), "no grid 'affine' of 8 bits"),
    "no minimum": ((INDEX, SCALE[..., :1], COLUMNS, "affine", 4), "do not fit together"),
    "rows": ((INDEX[1:], SCALE, COLUMNS, "affine", 4), "do not fit together"),
    "no rows": ((INDEX[:0], SCALE[:0], COLUMNS, "affine", 4), "at least one row"),
    "columns": ((INDEX, SCALE, COLUMNS + 3, "affine", 4), "a multiple of 32 columns"),
    "narrow": ((INDEX, SCALE, COLUMNS // 4, "affine", 4), "a multiple of 32 columns"),
    "bytes": ((INDEX, SCALE, COLUMNS, "affine", 5), "take 40 bytes per group, index has 32"),
    "codes": ((INDEX.char(), SCALE, COLUMNS, "affine", 4), "index must be torch.uint8"),
    "scales": ((INDEX, SCALE.float(), COLUMNS, "affine", 4), "scale must be torch.float16"),
    "strides": ((INDEX[:, :, ::2][::2], SCALE[::2], 96, "affine", 4), "index must be contiguous"),
    "meta": ((INDEX, SCALE.to("meta"), COLUMNS, "affine", 4), "scale must be contiguous in CPU"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    args, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedShaped.of(*args)


@pytest.mark.parametrize("kernel", [None, "portable"])
@pytest.mark.parametrize("least", [1, 1 << 30], ids=["shared", "alone"])
def test_products(kernel, least, monkeypatch):
    monkeypatch.setattr(module, "PARALLEL_WEIGHTS", least)
    index, scale = tensors("iq4_nl", 4)
    matrix = PackedShaped.of(index, scale, COLUMNS, "iq4_nl", 4)
    x = torch.randn(2, 3, COLUMNS)
    found = multiply(matrix, x, kernel)
    expected = multiply_plain(x.view(6, -1).numpy(), index.numpy(), scale.numpy(), "iq4_nl", 4)
    assert found.shape == (2, 3, ROWS)
    error = found.view(6, -1) - torch.from_numpy(expected)
    assert error.norm() < 1e-6 * found.norm()
    assert torch.equal(multiply(matrix, x.mT.contiguous().mT, kernel), found)
    short = multiply(matrix, x.bfloat16().half(), kernel)
    assert torch.equal(short, multiply(matrix, x.bfloat16().float(), kernel).half())
    assert multiply(matrix, x[:0], kernel).shape == (0, 3, ROWS)


def test_wrong_activations_are_refused():
    matrix = PackedShaped.of(*tensors(), COLUMNS, "affine", 4)
    with pytest.raises(ValueError, match="x has 64 columns, the matrix 192"):
        multiply(matrix, torch.zeros(3, 64))
    with pytest.raises(ValueError, match=r"must be float in CPU memory, got torch\.float64"):
        multiply(matrix, torch.zeros(COLUMNS, dtype=torch.float64))
    with pytest.raises(ValueError, match="must be float in CPU memory"):
        multiply(matrix, torch.zeros(COLUMNS, device="meta"))


def test_kernels_by_name():
    narrow = chosen_kernel("affine", 4, 32, "portable")
    assert narrow is multiply_kernel("affine", 4, False, True)
    assert chosen_kernel("affine", 4, 64, "portable") is multiply_kernel("affine", 4, False, False)
    fast = dispatch.why_not(dispatch.AVX2_FEATURES) is None
    assert chosen_kernel("affine", 4, 64) is multiply_kernel("affine", 4, fast, False)
    with pytest.raises(ValueError, match="no kernels named 'slow'"):
        chosen_kernel("affine", 4, 64, "slow")
