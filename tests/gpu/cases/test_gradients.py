"""Gradients of the input and of the LUT, against sums in float64 of the same numbers."""

from __future__ import annotations

import pytest
import torch

from sketchconv.kernels.gpu import gradients, layout, lut_gradient, support

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
UNIT = {HALF: 2.0**-11, BRAIN: 2.0**-8, SINGLE: 2.0**-24}  # of one rounding to nearest
SHAPES = [  # bits, rows, columns, groups: tails of rows, columns and bytes, several tiles
    (1, 70, 96, 1),
    (2, 33, 90, 2),
    (3, 70, 128, 2),
    (3, 65, 130, 1),
    (4, 70, 135, 3),
    (5, 37, 45, 1),
    (6, 33, 72, 1),
    (7, 21, 99, 1),
    (8, 17, 70, 1),
    (4, 9, 24, 8),
]


def noise(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def by_code(case, dense: torch.Tensor) -> torch.Tensor:
    """`dense` ``[rows, columns]`` summed per entry, float64."""
    total = torch.zeros(case.lut.shape, dtype=torch.float64)
    rows, groups, _ = case.lut.shape
    codes = case.codes.reshape(rows, groups, -1)
    return total.scatter_add_(2, codes, dense.double().reshape(codes.shape))


def check_input(case, grad: torch.Tensor, order: str = "planes-le") -> None:
    found = gradients.grad_input(grad, case.on(order), case.lut, case.columns, order)
    # The weights as they enter the product, and then one rounding for each of the additions.
    weight = case.dense(case.lut.dtype).to(grad.dtype).double()
    exact = grad.double() @ weight
    spread = grad.double().abs() @ weight.abs()
    slack = case.lut.shape[0] * 2.0**-24 * spread
    if support.nvidia(grad.device):  # a BLAS may add up parts that are rounded
        slack = slack + UNIT[grad.dtype] * spread
    smallest = 2.0**-25 if grad.dtype is HALF else 0.0  # half of the smallest float16
    assert found.shape == exact.shape
    assert found.dtype is grad.dtype
    assert (
        (found.double() - exact).abs() <= UNIT[grad.dtype] * exact.abs() + slack + smallest
    ).all()


def check_lut(case, grad: torch.Tensor, x: torch.Tensor, order: str = "planes-le") -> torch.Tensor:
    found = gradients.grad_lut(grad, x, case.on(order), case.lut, order)
    exact = by_code(case, grad.double().T @ x.double())
    spread = by_code(case, grad.double().abs().T @ x.double().abs())
    additions = x.shape[0] + case.columns // case.lut.shape[1]
    assert found.dtype is SINGLE
    assert found.shape == case.lut.shape
    assert ((found.double() - exact).abs() <= additions * 2.0**-24 * spread).all()
    return found


@pytest.mark.parametrize(("bits", "rows", "columns", "groups"), SHAPES)
def test_every_width(sketch, bits, rows, columns, groups):
    case = sketch(rows, columns, bits, groups)
    grad, x = noise(7, rows, dtype=BRAIN), noise(7, columns, dtype=BRAIN, seed=2)
    check_input(case, grad)
    check_lut(case, grad, x)


@pytest.mark.parametrize("lut", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("tokens", [1, 33])
def test_every_dtype(sketch, tokens, dtype, lut):
    case = sketch(37, 90, 3, 2, dtype=lut)
    grad, x = noise(tokens, 37, dtype=dtype), noise(tokens, 90, dtype=dtype, seed=2)
    check_input(case, grad)
    check_lut(case, grad, x)


def test_many_tokens_in_the_shape_of_a_batch(sketch):
    case = sketch(66, 70, 4)
    grad = noise(5, 13, 66, dtype=HALF)
    check_input(case, grad)
    check_lut(case, grad.reshape(65, 66), noise(65, 70, dtype=HALF, seed=2))


def test_the_order_on_the_device(sketch):
    case = sketch(34, 128, 3, 2)
    assert layout.repacked(3, 64)
    grad, x = noise(7, 34, dtype=HALF), noise(7, 128, dtype=HALF, seed=2)
    check_input(case, grad, "device")
    check_lut(case, grad, x, "device")


def test_gradient_and_input_of_two_dtypes(sketch):
    case = sketch(34, 64, 2)
    check_lut(case, noise(7, 34, dtype=SINGLE), noise(7, 64, dtype=BRAIN, seed=2))


def test_a_gradient_that_is_not_contiguous(sketch):
    case = sketch(34, 64, 4)
    grad = noise(34, 7, dtype=SINGLE).T
    check_input(case, grad)
    check_lut(case, grad, noise(64, 7, dtype=SINGLE, seed=2).T)
    check_input(case, torch.ones(1, 1, dtype=SINGLE).expand(7, 34))


def test_entries_without_columns_have_no_gradient(sketch):
    case = sketch(20, 70, 4)
    found = check_lut(case, noise(7, 20, dtype=BRAIN), noise(7, 70, dtype=BRAIN, seed=2))
    used = torch.zeros(case.lut.shape, dtype=torch.bool)
    used.scatter_(2, case.codes.reshape(20, 1, 70), True)
    assert not used[0, 0, :15].any()  # all codes of this row are alike
    assert (found[~used] == 0).all()
    assert (found[used] != 0).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_numbers_that_are_not_finite_stay_where_they_are(sketch):
    case = sketch(20, 70, 4)
    grad, x = noise(7, 20, dtype=BRAIN), noise(7, 70, dtype=BRAIN, seed=2)
    x[3, 69] = torch.inf
    grad[2, 5] = torch.nan
    found = gradients.grad_lut(grad, x, case.index, case.lut)
    exact = by_code(case, grad.double().T @ x.double())
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.isfinite(), exact.isfinite())
    used = gradients.grad_input(grad, case.index, case.lut, 70)
    assert torch.equal(used.isnan().any(1), torch.arange(7) == 2)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_an_infinite_weight_in_the_last_row_meets_no_zero_from_beyond(sketch):
    case = sketch(33, 45, 4)
    case.lut[32] = torch.inf
    found = gradients.grad_input(torch.ones(1, 33), case.index, case.lut, 45)
    assert (found == torch.inf).all()


def test_wide_groups_are_summed_in_parts(sketch):
    """Groups of which several programs take a share each."""
    case = sketch(5, 512, 2)
    assert lut_gradient._span(1, 512, 4, 64) == 64
    check_lut(case, noise(7, 5, dtype=HALF), noise(7, 512, dtype=HALF, seed=2))


@pytest.mark.parametrize("entries", [2, 16, 256])
@pytest.mark.parametrize("width", [1, 45, 576, 1376, 4096, 11008])
def test_parts_cover_a_group_and_stay_small(width, entries):
    for programs in (1, 64, 5000):
        span = lut_gradient._span(programs, width, entries, 64)
        parts = -(-width // span)
        assert span % 64 == 0
        assert parts == 1 or parts * entries * 4 <= width


def test_no_tokens(sketch):
    case = sketch(20, 70, 4)
    empty = noise(0, 20, dtype=HALF)
    assert gradients.grad_input(empty, case.index, case.lut, 70).shape == (0, 70)
    found = gradients.grad_lut(empty, noise(0, 70, dtype=HALF), case.index, case.lut)
    assert not found.any()


def test_two_runs_agree_to_the_bit(sketch):
    case = sketch(70, 200, 3, 2)
    grad, x = noise(33, 70, dtype=BRAIN), noise(33, 200, dtype=BRAIN, seed=2)
    runs = [gradients.grad_lut(grad, x, case.index, case.lut) for _ in range(2)]
    assert torch.equal(*runs)
    runs = [gradients.grad_input(grad, case.index, case.lut, 200) for _ in range(2)]
    assert torch.equal(*runs)


def test_an_unknown_order_is_refused(sketch):
    case = sketch(5, 45, 4)
    with pytest.raises(ValueError, match='layout is "rows", must be "planes-le" or "device"'):
        gradients.grad_input(noise(1, 5, dtype=HALF), case.index, case.lut, 45, "rows")


@pytest.mark.parametrize("order", ["planes-le", "device"])
def test_float64_goes_through_tiles_of_plain_torch(sketch, order):
    case = sketch(33, 64, 3)
    grad, x = noise(7, 33, dtype=torch.float64), noise(7, 64, dtype=torch.float64, seed=2)
    found = gradients.grad_input(grad, case.on(order), case.lut, 64, order)
    torch.testing.assert_close(found, grad @ case.dense(), rtol=1e-13, atol=1e-11)
    found = gradients.grad_lut(grad, x, case.on(order), case.lut, order)
    torch.testing.assert_close(found, by_code(case, grad.T @ x), rtol=1e-13, atol=1e-11)
