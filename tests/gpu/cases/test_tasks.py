"""Tokens of different tasks in one batch, against float64 products with the LUT of each."""

from __future__ import annotations

import pytest
import torch

from sketchconv.kernels.gpu import fragments, support, task_tiles, tasks

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
UNIT = {HALF: 2.0**-11, BRAIN: 2.0**-8, SINGLE: 2.0**-24}  # of one rounding to nearest

SHAPES = [  # bits, rows, columns, groups: tails of rows, columns and bytes, several tiles
    (1, 34, 96, 1),
    (2, 17, 90, 2),
    (3, 9, 130, 1),
    (4, 18, 135, 3),
    (5, 18, 45, 1),
    (6, 17, 72, 1),
    (7, 21, 99, 1),
    (8, 17, 70, 1),
    (4, 9, 24, 8),
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def several(case, count: int) -> torch.Tensor:
    """LUTs ``[count, rows, groups, entries]``: that of the sketch, and others."""
    noise = torch.randn(count, *case.lut.shape, generator=seeded(3)).to(case.lut.dtype)
    noise[0] = case.lut
    return noise


def choose(tokens: int, count: int) -> torch.Tensor:
    return torch.randint(0, count, (tokens,), generator=seeded(4))


def check(case, tokens: int, count: int, dtype: torch.dtype, order: str = "planes-le") -> None:
    luts, chosen = several(case, count), choose(tokens, count)
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    x = torch.randn(tokens, case.columns, generator=generator).to(dtype)
    found = tasks.multiply_tasks(x, case.on(order), luts, chosen, order)
    # Tiles of many tokens take the weights in the dtype of x, and so do permuted bytes.
    permuted = support.nvidia(x.device) and fragments.fits(x, case.on(order), luts, order)
    entries = luts.to(dtype) if tokens > tasks.FEW or permuted else luts
    rows, groups, _ = case.lut.shape
    codes = case.codes.reshape(rows, groups, -1)
    weights = [one.double().gather(2, codes).reshape(rows, -1) for one in entries]
    x = x.double()
    exact = torch.stack([weights[c] @ x[t] for t, c in enumerate(chosen)])
    spread = torch.stack([weights[c].abs() @ x[t].abs() for t, c in enumerate(chosen)])
    slack = (case.columns + 1) * 2.0**-24 * spread
    assert found.dtype is dtype
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= UNIT[dtype] * exact.abs() + slack + 2.0**-25).all()


@pytest.mark.parametrize("tokens", [3, 17])
@pytest.mark.parametrize(
    ("bits", "rows", "columns", "groups"),
    SHAPES,
)
def test_every_width(sketch, bits, rows, columns, groups, tokens):
    check(sketch(rows, columns, bits, groups), tokens, 3, BRAIN)


@pytest.mark.parametrize("lut", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("tokens", [7, 33])
def test_every_dtype(sketch, tokens, dtype, lut):
    check(sketch(21, 90, 3, 2, dtype=lut), tokens, 4, dtype)


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16])
def test_every_count_of_few_tokens(sketch, tokens):
    check(sketch(9, 70, 4), tokens, 5, HALF)


@pytest.mark.parametrize(("tokens", "count"), [(17, 40), (65, 1), (65, 2), (129, 2)])
def test_many_tokens(sketch, tokens, count):
    check(sketch(9, 70, 4), tokens, count, HALF)


@pytest.mark.parametrize("tokens", [2, 20])
def test_the_order_on_the_device(sketch, tokens):
    check(sketch(21, 128, 3, 2), tokens, 3, HALF, "device")


@pytest.mark.parametrize("tokens", [5, 20])
def test_a_task_that_does_not_exist_gives_nan(sketch, tokens):
    case = sketch(9, 70, 4)
    luts, chosen = several(case, 2), choose(tokens, 2)
    chosen[[0, 3, 4]] = torch.tensor([2, -1, 2**40])
    found = tasks.multiply_tasks(torch.ones(tokens, 70), case.index, luts, chosen)
    assert torch.equal(found.isnan().all(1), (chosen < 0) | (chosen > 1))
    assert torch.equal(found.isnan().any(1), (chosen < 0) | (chosen > 1))


@pytest.mark.parametrize("tokens", [5, 20])
def test_no_tasks(sketch, tokens):
    case = sketch(9, 70, 4)
    chosen = torch.zeros(tokens, dtype=torch.int64)
    found = tasks.multiply_tasks(torch.ones(tokens, 70), case.index, several(case, 1)[:0], chosen)
    assert found.isnan().all()
    assert found.shape == (tokens, 9)


def test_no_tokens(sketch):
    case = sketch(9, 70, 4)
    none = torch.empty(0, dtype=torch.int64)
    found = tasks.multiply_tasks(torch.empty(0, 70), case.index, several(case, 2), none)
    assert found.shape == (0, 9)


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (30, 1), (30, 7), (5, 40)])
def test_tiles_cover_every_token_once(tokens, count, size):
    chosen = choose(tokens, count).sort().values
    covered = []
    for task, begin, end in zip(*task_tiles._tiles(chosen, count, size), strict=True):
        assert begin <= end <= begin + size
        assert (chosen[begin:end] == task).all()
        covered += range(int(begin), int(end))
    assert covered == list(range(tokens))


@pytest.mark.parametrize("tokens", [5, 20])
def test_two_runs_agree_to_the_bit(sketch, tokens):
    case = sketch(9, 200, 3, 2)
    luts, chosen = several(case, 3), choose(tokens, 3)
    generator = torch.Generator(torch.get_default_device()).manual_seed(6)
    x = torch.randn(tokens, 200, generator=generator)
    runs = [tasks.multiply_tasks(x, case.index, luts, chosen) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("tokens", [5, 20])
def test_another_dtype_is_refused(sketch, tokens):
    case = sketch(9, 70, 4)
    x, chosen = torch.ones(tokens, 70, dtype=torch.float64), torch.zeros(tokens, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
        tasks.multiply_tasks(x, case.index, several(case, 1), chosen)
