"""Gradients on the CPU against float64: hard rows, tails, groups, every number of bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sketchconv.kernels import gradients, plain
from sketchconv.kernels.packed import Packed
from sketchconv.kernels.planes import pack_rows

# Half a unit in the last place. Two bfloat16 products carry the sum to 2**-8 * 2**-8 of it.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PAIR = 2.0**-16


def codes_of(rows: int, columns: int, bits: int) -> np.ndarray:
    """Random codes, and rows of one code, of alternating ones, and of one outlier."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    codes[0] = 0
    codes[1] = (1 << bits) - 1
    codes[2] = np.arange(columns) % 2
    codes[3] = 0
    codes[3, columns // 2] = (1 << bits) - 1
    return codes


def sketch(rows=21, columns=45, bits=4, groups=1, lut=torch.float16):
    codes = codes_of(rows, columns, bits)
    torch.manual_seed(bits)
    table = torch.randn(rows, groups, 1 << bits).to(lut)
    table[4] = 0
    packed = torch.from_numpy(pack_rows(codes, bits, groups))
    wide = torch.from_numpy(codes).long().view(rows, groups, -1)
    return Packed.of(packed, table, columns), wide


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def exact_lut(codes, grad, x):
    """The gradient in float64, and the sum of the sizes of all that was added."""
    rows, groups, _ = codes.shape

    def by_code(dense: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(rows, groups, int(codes.max()) + 1, dtype=torch.float64)
        return total.scatter_add_(2, codes, dense.reshape(codes.shape))

    grad, x = grad.double(), x.double()
    return by_code(grad.T @ x), by_code(grad.T.abs() @ x.abs()), by_code((grad.T @ x).abs())


def check_lut(matrix, codes, grad, x):
    found = gradients.grad_lut(matrix, grad, x)
    assert found.dtype is torch.float32
    assert found.shape == matrix.lut.shape
    exact, spread, products = exact_lut(codes, grad, x)
    terms = x.shape[0] + codes.shape[2]
    slack = terms * 2.0**-24 * spread + PAIR * products * (x.dtype is torch.bfloat16)
    wide = torch.zeros(found.shape, dtype=torch.float64)
    limit = torch.zeros(found.shape, dtype=torch.float64)
    wide[..., : exact.shape[2]], limit[..., : exact.shape[2]] = exact, slack
    assert ((found.double() - wide).abs() <= limit).all()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_gradient_of_the_lut(bits, dtype):
    for groups, columns in ((1, 45), (3, 45), (5, 35), (8, 8), (2, 130)):
        matrix, codes = sketch(21, columns, bits, groups)
        check_lut(matrix, codes, noise(33, 21, dtype=dtype), noise(33, columns, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 2, 9, 300])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_any_number_of_tokens(tokens, dtype):
    matrix, codes = sketch(19, 51, 3, 3)
    check_lut(matrix, codes, noise(tokens, 19, dtype=dtype), noise(tokens, 51, dtype=dtype))


@pytest.mark.parametrize("dtype", ROUNDING)
def test_tiles_change_nothing(monkeypatch, dtype):
    matrix, codes = sketch(29, 45, 4, 3)
    grad, x = noise(33, 29, dtype=dtype), noise(33, 45, dtype=dtype)
    whole = gradients.grad_input(matrix, grad)
    monkeypatch.setattr(gradients, "TILE_WEIGHTS", 1)
    monkeypatch.setattr(gradients, "FEWEST_ROWS", 8)
    check_lut(matrix, codes, grad, x)
    tiled = gradients.grad_input(matrix, grad)
    weight = matrix.lut.double().gather(2, codes).view(29, 45)
    exact = grad.double() @ weight
    sizes = grad.double().abs() @ weight.abs()
    for found in (whole, tiled):
        assert found.dtype is dtype
        assert ((found.double() - exact).abs() <= bound(dtype, exact, sizes, 29)).all()


def bound(dtype, exact, sizes, terms):
    """Rounding of the sum, of the decoded weights, and, for tiles, of each tile's product."""
    # A float16 entry of a LUT loses three bits in bfloat16, and so does a product of a tile.
    narrow = 2 * ROUNDING[torch.bfloat16] * sizes if dtype is torch.bfloat16 else 0
    return ROUNDING[dtype] * exact.abs() + terms * 2.0**-24 * sizes + narrow


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("lut", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_gradient_of_the_input(bits, lut, dtype):
    for groups, columns in ((1, 45), (3, 45), (8, 40)):
        matrix, codes = sketch(21, columns, bits, groups, lut)
        grad = noise(2, 7, 21, dtype=dtype)
        found = gradients.grad_input(matrix, grad)
        weight = matrix.lut.double().gather(2, codes).view(21, columns)
        exact, sizes = grad.double() @ weight, grad.double().abs() @ weight.abs()
        assert found.dtype is dtype
        assert found.shape == (2, 7, columns)
        assert ((found.double() - exact).abs() <= bound(dtype, exact, sizes, 21)).all()


def test_rows_of_one_entry_collect_the_whole_row():
    matrix, _ = sketch(21, 45, 4, 1)
    ones = torch.ones(1, 21), torch.ones(1, 45)
    found = gradients.grad_lut(matrix, *ones)
    assert found[0, 0].tolist() == [45.0] + 15 * [0.0]
    assert found[1, 0].tolist() == 15 * [0.0] + [45.0]
    assert found[2, 0, :2].tolist() == [23.0, 22.0]
    assert found[3, 0, 15] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_stay_with_their_entry(dtype):
    matrix, codes = sketch(21, 45, 4, 3)
    grad, x = noise(9, 21, dtype=dtype).abs(), noise(9, 45, dtype=dtype).abs()
    x[4, 20] = torch.inf
    found = gradients.grad_lut(matrix, grad, x)
    hit = torch.zeros(found.shape, dtype=torch.bool)
    hit[torch.arange(21), 20 // 15, codes[:, 20 // 15, 20 % 15]] = True
    assert (found[hit] == torch.inf).all()
    assert torch.isfinite(found[~hit]).all()
    x[4, 20] = torch.nan
    assert gradients.grad_lut(matrix, grad, x)[hit].isnan().all()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_threads_change_nothing(monkeypatch, dtype):
    monkeypatch.setattr(gradients, "PARALLEL_VALUES", 0)
    matrix, _ = sketch(301, 90, 3, 2)
    grad, x = noise(64, 301, dtype=dtype), noise(64, 90, dtype=dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((gradients.grad_lut(matrix, grad, x), gradients.grad_input(matrix, grad)))
    finally:
        torch.set_num_threads(before)
    for lut, back in found[1:]:
        assert torch.equal(lut, found[0][0])
        assert torch.equal(back, found[0][1])


def test_strides_change_nothing():
    matrix, _ = sketch(21, 45, 5, 3)
    grad, x = noise(12, 21), noise(12, 45)
    spread = torch.stack((grad, grad), -1)[..., 0], x.t().contiguous().t()
    assert not spread[0].is_contiguous()
    assert torch.equal(gradients.grad_lut(matrix, *spread), gradients.grad_lut(matrix, grad, x))
    assert torch.equal(gradients.grad_input(matrix, spread[0]), gradients.grad_input(matrix, grad))
    three = gradients.grad_lut(matrix, grad.view(3, 4, 21), x.view(3, 4, 45))
    assert torch.equal(three, gradients.grad_lut(matrix, grad, x))
    one = torch.ones(1, 1).expand(12, 21)
    assert torch.equal(
        gradients.grad_lut(matrix, one, x), gradients.grad_lut(matrix, one.clone(), x)
    )


def test_no_tokens_give_zeros():
    matrix, _ = sketch()
    assert not gradients.grad_lut(matrix, torch.empty(0, 21), torch.empty(0, 45)).any()
    assert gradients.grad_input(matrix, torch.empty(0, 21)).shape == (0, 45)


@pytest.mark.parametrize("bits", range(1, 9))
def test_sums_by_code_of_some_rows(bits):
    matrix, _ = sketch(21, 45, bits, 3)
    rows, dense = torch.tensor([20, 3, 3, 0]), noise(4, 45)
    expected = torch.zeros(4, 3, 1 << bits, dtype=torch.float64)
    plain.add_by_code(expected, matrix.index[rows], dense.double())
    found = gradients.sum_by_code(matrix, rows, dense)
    assert torch.allclose(found.double(), expected, rtol=0, atol=15 * 2.0**-24 * 15)


def test_what_does_not_fit_is_refused():
    matrix, _ = sketch()
    with pytest.raises(ValueError, match="grad has 20 columns, expected 21"):
        gradients.grad_input(matrix, torch.ones(1, 20))
    with pytest.raises(ValueError, match="x has 44 columns, expected 45"):
        gradients.grad_lut(matrix, torch.ones(1, 21), torch.ones(1, 44))
    with pytest.raises(ValueError, match="grad has 2 tokens, x has 1"):
        gradients.grad_lut(matrix, torch.ones(2, 21), torch.ones(1, 45))
    with pytest.raises(ValueError, match=r"grad must be float in CPU memory, got torch\.float64"):
        gradients.grad_input(matrix, torch.ones(1, 21).double())


@pytest.mark.parametrize("shape", [(1, 1), (31, 70), (32, 32), (65, 33), (2, 0), (0, 3)])
def test_transposed_copies(shape):
    width = shape[1] + 5
    whole = torch.arange(shape[0] * width).view(shape[0], width).to(torch.bfloat16)
    for given in (whole[:, 2 : shape[1] + 2], whole[:, : shape[1]].t().contiguous().t()):
        found = gradients._across(given)
        assert found.is_contiguous()
        assert torch.equal(found, given.t())
