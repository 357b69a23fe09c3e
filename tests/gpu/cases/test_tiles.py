"""Tiles of the weight: decoded by byte permutation, multiplied by a BLAS, and sums by code."""

from __future__ import annotations

import pytest
import torch

from sketchconv.kernels.gpu import decode, expand, lut_sums, tiles

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("bits", "columns", "groups", "dtype"),
    [(4, 344, 1, HALF), (4, 96, 4, BRAIN), (3, 160, 1, BRAIN), (3, 192, 3, HALF)],
)
def test_columns_by_permuted_bytes(sketch, bits, columns, groups, dtype):
    case = sketch(5, columns, bits, groups, dtype=dtype)
    index = case.on("device")
    assert expand.fits(index, case.lut, columns, dtype, "device")
    for begin, end in ((0, columns), (40, columns - 8)):
        found = torch.full((5, end - begin), torch.nan, dtype=dtype)
        expand.run(index, case.lut, found, columns, begin)
        assert torch.equal(found, case.dense(dtype)[:, begin:end])


@pytest.mark.parametrize("bits", [3, 4])
def test_look_up_by_permuted_bytes(sketch, bits):
    case = sketch(7, 64, bits)
    ids = torch.tensor([3, 7, 0, -1, 6, 3])
    found = torch.empty(6, 64, dtype=HALF)
    expand.run(case.on("device"), case.lut, found, 64, 0, ids)
    known = torch.tensor([0, 2, 4, 5])
    assert torch.equal(found[known], case.dense(HALF)[ids[known]])
    assert found[[1, 3]].isnan().all()


@pytest.mark.parametrize(
    ("bits", "columns", "layout", "dtype"),
    [(5, 64, "device", HALF), (4, 12, "device", HALF), (3, 64, "planes-le", HALF),
     (4, 64, "device", SINGLE), (3, 48, "device", HALF)],
)  # fmt: skip
def test_sketches_that_are_not_decoded_so(sketch, bits, columns, layout, dtype):
    case = sketch(4, columns, bits, dtype=dtype)
    assert not expand.fits(case.index, case.lut, columns, dtype, layout)


@pytest.mark.parametrize(
    ("bits", "columns", "groups"), [(5, 90, 2), (3, 300, 1), (8, 45, 1), (4, 24, 3)]
)
def test_columns_by_look_up(sketch, bits, columns, groups):
    case = sketch(9, columns, bits, groups)
    for begin, end in ((0, columns), (8, columns - 3), (columns - 5, columns)):
        found = torch.full((9, end - begin), torch.nan)
        decode.tile(case.index, case.lut, found, columns, "planes-le", begin)
        assert torch.equal(found, case.dense(SINGLE)[:, begin:end])


@pytest.mark.parametrize(("bits", "groups", "dtype"), [(3, 2, HALF), (5, 1, BRAIN), (8, 1, SINGLE)])
def test_products_by_tiles(sketch, monkeypatch, bits, groups, dtype):
    """Tiles of 16 rows or columns, the last of them not whole."""
    monkeypatch.setattr(tiles, "_size", lambda *_: 16)
    case = sketch(37, 72, bits, groups, dtype=dtype)
    x, grad = torch.randn(9, 72).to(dtype), torch.randn(9, 37).to(dtype)
    y, back = torch.empty(9, 37, dtype=dtype), torch.empty(9, 72, dtype=dtype)
    tiles.multiply(x, case.index, case.lut, y, "planes-le")
    tiles.grad_input(grad, case.index, case.lut, back, "planes-le")
    weight = case.dense()
    for found, left, right in ((y, x, weight.T), (back, grad, weight)):
        # A float32 sum of n products in any order (Higham 2002, section 3.1); then one rounding,
        # and those of partial sums where a BLAS keeps them in 16 bits.
        error = left.shape[1] * 2.0**-24 + 4 * torch.finfo(dtype).eps
        spread = left.double().abs() @ right.abs()
        assert ((found.double() - left.double() @ right).abs() <= error * spread).all()


@pytest.mark.parametrize(("rows", "row_bytes"), [(1, 2), (70, 100), (4096, 8192), (11008, 8192)])
def test_a_tile_is_never_all_of_a_big_weight(rows, row_bytes):
    size = tiles._size(rows, row_bytes)
    assert size >= 1
    assert size * row_bytes <= tiles.MOST_BYTES
    assert size < rows or rows * row_bytes <= tiles.WHOLE_BYTES


@pytest.mark.parametrize(
    ("bits", "columns", "groups", "dtype"),
    [(1, 96, 1, HALF), (3, 128, 2, BRAIN), (4, 135, 3, SINGLE), (7, 40, 1, HALF)],
)
def test_sums_by_code(sketch, monkeypatch, bits, columns, groups, dtype):
    monkeypatch.setattr(lut_sums, "TILE_ROWS", 8)
    case = sketch(21, columns, bits, groups)
    grad, x = torch.randn(9, 21).to(dtype), torch.randn(9, columns).to(dtype)
    found = lut_sums.run(grad, x, case.on("device"), case.lut, "device")
    codes = case.codes.reshape(21, groups, -1)
    exact, spread = (
        torch.zeros(case.lut.shape, dtype=torch.float64).scatter_add_(2, codes, d.view(codes.shape))
        for d in (grad.double().T @ x.double(), grad.double().abs().T @ x.double().abs())
    )
    assert found.dtype is SINGLE
    assert ((found.double() - exact).abs() <= (9 + columns) * 2.0**-24 * spread).all()


def test_a_gradient_that_is_not_finite_reaches_its_own_entries_only(sketch):
    case = sketch(8, 64, 4)
    grad, x = torch.randn(5, 8), torch.randn(5, 64)
    x[3, 63] = torch.inf
    grad[2, 5] = torch.nan
    found = lut_sums.run(grad, x, case.index, case.lut, "planes-le")
    last = torch.zeros(8, 16, dtype=torch.bool).scatter_(1, case.codes[:, -1:], True)
    last[5] = found[5, 0] != 0
    assert torch.equal(~found[:, 0].isfinite(), last)
