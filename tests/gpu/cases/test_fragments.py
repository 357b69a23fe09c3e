"""Products of few tokens, thread by thread, against the exact product.

The interpreter emulates `mma` lane by lane, so what is tested there is which lane holds what.
"""

from __future__ import annotations

import pytest
import torch

from sketchconv.kernels.gpu import fragments

HALF, BRAIN = torch.float16, torch.bfloat16
UNIT = {HALF: 2.0**-11, BRAIN: 2.0**-8}


def numbers(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(tokens + columns)
    return torch.randn(tokens, columns, generator=generator).to(dtype)


def close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    exact, spread = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    slack = (x.shape[1] + 1) * 2.0**-24 * spread + 2.0**-25  # half of the smallest float16
    assert ((found.double() - exact).abs() <= UNIT[x.dtype] * exact.abs() + slack).all()


def product(case, x: torch.Tensor) -> torch.Tensor:
    index = case.on("device")
    assert fragments.fits(x, index, case.lut, "device")
    found = torch.full((x.shape[0], case.lut.shape[0]), torch.nan, dtype=x.dtype)
    fragments.run(x, index, case.lut, found)
    return found


@pytest.mark.parametrize(
    ("bits", "columns", "groups", "dtype", "tokens"),
    [(4, 256, 1, HALF, 1),  # whole turns of two warps
     (4, 168, 1, BRAIN, 1),  # one step, and one that is mostly beyond the end
     (4, 80, 5, HALF, 9),  # tables change within a turn; two tiles of tokens
     (3, 512, 1, BRAIN, 1),
     (3, 192, 3, HALF, 2),
     (2, 256, 1, HALF, 3),
     (2, 160, 2, BRAIN, 1),
     (1, 256, 1, HALF, 1)],
)  # fmt: skip
def test_few_tokens(sketch, bits, columns, groups, dtype, tokens):
    case = sketch(18 if bits == 2 else 9, columns, bits, groups, dtype=dtype, seed=bits)
    x = numbers(tokens, columns, dtype)
    close(product(case, x), x, case.dense())


def test_more_tokens_than_a_program_takes(sketch):
    case = sketch(5, 32, 4)
    x = numbers(70, 32, HALF)
    close(product(case, x), x, case.dense())


def test_tokens_apart_and_a_table_of_another_type(sketch):
    case = sketch(9, 64, 4, dtype=torch.float32)
    x = numbers(3, 128, HALF)[:, 64:]
    close(product(case, x), x, case.dense(HALF).double())


def test_a_column_that_is_not_finite_reaches_its_token_only(sketch):
    case = sketch(5, 64, 4)
    x = numbers(3, 64, HALF)
    x[1, 63] = torch.inf
    found = product(case, x)
    close(found[::2], x[::2], case.dense())
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("bits", [3, 4])
def test_tokens_of_several_tasks(sketch, bits):
    case = sketch(9, 64, bits)
    x, tasks = numbers(7, 64, HALF), torch.tensor([2, 0, 2, 5, 0, -1, 2])
    luts = torch.stack([case.lut, case.lut / 2, -case.lut.flip(2)])
    found = torch.full((7, 9), torch.nan, dtype=HALF)
    fragments.run(x, case.on("device"), luts, found, tasks)
    for task in (0, 2):
        mine = tasks == task
        weight = luts[task].double().gather(2, case.codes[:, None]).reshape(9, 64)
        close(found[mine], x[mine], weight)
    assert torch.equal(found.isnan().all(1), (tasks < 0) | (tasks > 2))


def test_two_runs_agree_to_the_bit(sketch):
    case = sketch(9, 64, 2, dtype=BRAIN)
    x = numbers(2, 64, BRAIN)
    assert torch.equal(product(case, x), product(case, x))


@pytest.mark.parametrize(
    ("bits", "columns", "layout", "dtype"),
    [(5, 64, "device", HALF), (4, 12, "device", HALF), (3, 64, "planes-le", HALF),
     (3, 48, "device", HALF), (4, 64, "device", torch.float32), (1, 48, "device", HALF)],
)  # fmt: skip
def test_sketches_that_do_not_fit(sketch, bits, columns, layout, dtype):
    case = sketch(4, columns, bits)
    x = torch.zeros(1, columns, dtype=dtype)
    assert not fragments.fits(x, case.index, case.lut, layout)


def test_what_lies_askew_does_not_fit(sketch):
    case = sketch(4, 64, 4)
    wide = torch.zeros(2, 72, dtype=HALF)
    assert fragments.fits(wide[:, 8:], case.index, case.lut, "device")
    assert not fragments.fits(wide[:, 4:68], case.index, case.lut, "device")
    room = torch.empty(case.index.numel() + 4, dtype=torch.uint8)
    moved = room[4:].reshape(case.index.shape)
    assert not fragments.fits(wide[:, 8:], moved, case.lut, "device")
