"""The gradient of an embedding's LUT: only rows that were looked up, and always the same bits."""

from __future__ import annotations

import pytest
import torch

from sketchconv.kernels.gpu import embedding

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def check(case, ids: torch.Tensor, dtype: torch.dtype, order: str = "planes-le", padding=None):
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    grad = torch.randn(*ids.shape, case.columns, generator=generator).to(dtype)
    found = embedding.grad_gather(grad, ids, case.on(order), case.lut, padding, order)
    exact, spread = (by_code(case, ids, part, padding) for part in (grad, grad.abs()))
    additions = ids.numel() + case.columns // case.lut.shape[1]
    assert found.dtype is SINGLE
    assert found.shape == case.lut.shape
    assert ((found.double() - exact).abs() <= additions * 2.0**-24 * spread).all()
    return found


def by_code(case, ids: torch.Tensor, grad: torch.Tensor, padding: int | None) -> torch.Tensor:
    rows, groups, _ = case.lut.shape
    dense = torch.zeros(rows, case.columns, dtype=torch.float64)
    dense.index_add_(0, ids.reshape(-1).long(), grad.reshape(-1, case.columns).double())
    if padding is not None:
        dense[padding] = 0
    codes = case.codes.reshape(rows, groups, -1)
    total = torch.zeros(case.lut.shape, dtype=torch.float64)
    return total.scatter_add_(2, codes, dense.reshape(codes.shape))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "groups"), [(90, 2), (45, 1), (300, 1), (24, 8)])
def test_every_width(sketch, bits, columns, groups):
    case = sketch(11, columns, bits, groups)
    check(case, torch.tensor([3, 0, 10, 3, 3]), BRAIN)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
def test_every_dtype_with_many_look_ups_of_one_row(sketch, dtype):
    case = sketch(9, 70, 4)
    ids = torch.tensor([[4] * 30 + [0, 4, 8], [4] * 4 + [2] * 29], dtype=torch.int32)
    found = check(case, ids, dtype)
    assert not found[[1, 3, 5, 6, 7]].any()


def test_the_order_on_the_device(sketch):
    check(sketch(9, 128, 3, 2), torch.tensor([8, 8, 1]), HALF, "device")


@pytest.mark.parametrize("padding", [0, 4, 8])
def test_padding_has_no_gradient(sketch, padding):
    found = check(sketch(9, 70, 2), torch.tensor([0, 4, 4, 8, 1]), SINGLE, padding=padding)
    assert not found[padding].any()


def test_ids_outside_of_the_sketch_are_left_out(sketch):
    case = sketch(9, 70, 4)
    grad = torch.ones(5, 70)
    ids = torch.tensor([9, -1, 3, 2**40, 3])
    found = embedding.grad_gather(grad, ids, case.index, case.lut)
    wanted = by_code(case, torch.tensor([3, 3]), grad[:2], None)
    assert torch.equal(found.double(), wanted)


def test_nothing_looked_up(sketch):
    case = sketch(9, 70, 4)
    none = torch.empty(0, dtype=torch.int64)
    assert not embedding.grad_gather(torch.empty(0, 70), none, case.index, case.lut).any()


def test_two_runs_agree_to_the_bit(sketch):
    case = sketch(9, 300, 3, 2)
    ids = torch.tensor([2, 5, 2, 2, 8, 5] * 5)
    assert torch.equal(check(case, ids, BRAIN), check(case, ids, BRAIN))


def test_another_dtype_is_refused(sketch):
    case = sketch(9, 70, 4)
    grad = torch.ones(1, 70, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
        embedding.grad_gather(grad, torch.tensor([1]), case.index, case.lut)
