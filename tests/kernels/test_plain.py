"""Plain torch operations: sums of gradients in float32 at least, whatever comes in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sketchconv.formats import packing
from sketchconv.kernels import plain

ROWS, GROUPS, COLUMNS, BITS, TOKENS = 96, 2, 40, 4, 33


@pytest.fixture
def sketch(monkeypatch):
    """Small tiles, so that a rounding of each would show."""
    monkeypatch.setattr(plain, "TILE_ROWS", 4)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << BITS, (ROWS, GROUPS, COLUMNS // GROUPS), dtype=np.uint8)
    lut = torch.from_numpy(rng.standard_normal((ROWS, GROUPS, 1 << BITS))).half()
    return torch.from_numpy(packing.pack(codes, BITS)), lut, torch.from_numpy(codes).long()


def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11), (torch.float32, 1e-6),
     (torch.float64, 1e-14)],
)  # fmt: skip
def test_the_gradient_of_the_input_is_rounded_once(sketch, dtype, unit):
    index, lut, codes = sketch
    weight = lut.double().gather(2, codes).reshape(ROWS, COLUMNS)
    grad = noise(TOKENS, ROWS, dtype=dtype)
    found = plain.grad_input(grad, index, lut, COLUMNS)
    exact = grad.double() @ weight
    slack = (1e-14 if dtype is torch.float64 else 1e-6) * (grad.double().abs() @ weight.abs())
    assert found.dtype is dtype
    assert ((found.double() - exact).abs() <= unit * exact.abs() + slack).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_gradient_of_the_lut_is_never_rounded_to_the_input(sketch, dtype):
    index, lut, codes = sketch
    grad, x = noise(TOKENS, ROWS, dtype=dtype), noise(TOKENS, COLUMNS, dtype=dtype)
    found = plain.grad_lut(grad, x, index, lut)

    def by_code(dense: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(lut.shape, dtype=torch.float64)
        return total.scatter_add_(2, codes, dense.reshape(codes.shape))

    exact = by_code(grad.double().T @ x.double())
    spread = by_code(grad.double().abs().T @ x.double().abs())
    double = dtype is torch.float64
    assert found.dtype is (torch.float64 if double else torch.float32)
    assert ((found.double() - exact).abs() <= (1e-14 if double else 1e-6) * spread).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_of_several_tasks_get_their_own_luts(sketch, dtype):
    index, lut, _ = sketch
    luts = torch.stack((lut, -2 * lut, lut + 1, lut * 0))
    x = noise(6, COLUMNS, dtype=dtype)
    tasks = torch.tensor([2, 0, 0, 3, 1, 2])
    found = plain.multiply_tasks(x, index, luts, tasks)
    assert found.dtype is dtype
    for token, task in enumerate(tasks.tolist()):
        weight = plain.decode(index, luts[task], COLUMNS, torch.float64)
        exact = weight @ x[token].double()
        sizes = weight.abs() @ x[token].double().abs()
        unit = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float64: 1e-14}[dtype]
        assert ((found[token].double() - exact).abs() <= unit * sizes).all()


def test_products_of_tasks_are_differentiable(sketch):
    index, lut, _ = sketch
    luts = torch.stack((lut, 2 * lut))[:, :4].double().requires_grad_()
    x = noise(3, COLUMNS, dtype=torch.float64).requires_grad_()
    tasks = torch.tensor([1, 0, 1])
    run = lambda x, luts: plain.multiply_tasks(x, index[:4], luts, tasks)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, luts))


def test_tasks_that_do_not_fit_are_refused(sketch):
    index, lut, _ = sketch
    luts, x = lut[None], noise(2, COLUMNS, dtype=torch.float32)
    assert plain.multiply_tasks(x[:0], index, luts, torch.zeros(0).long()).shape == (0, ROWS)
    for bad in (-1, 1):
        with pytest.raises(IndexError, match=f"task {bad} is not among 1 LUTs"):
            plain.multiply_tasks(x, index, luts, torch.tensor([0, bad]))
    with pytest.raises(ValueError, match="expected"):
        plain.multiply_tasks(x, index, luts, torch.tensor([0]))
    with pytest.raises(ValueError, match="expected"):
        plain.multiply_tasks(x, index, lut, torch.tensor([0, 0]))


def test_looked_up_rows_are_decoded_rows(sketch):
    index, lut, _ = sketch
    ids = torch.tensor([[3, 95], [0, 3]])
    found = plain.gather(ids, index, lut, COLUMNS, torch.float32)
    assert torch.equal(found, plain.decode(index, lut, COLUMNS, torch.float32)[ids])
