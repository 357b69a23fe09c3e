"""The fused comparison of rows of logits against its reference."""

from __future__ import annotations

import pytest
import torch

from sketchconv.kernels.likeness import kl_rows, kl_rows_plain


def rows(count, vocabulary, size=4.0, apart=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randn(count, vocabulary, generator=generator) * size
    found = wanted + torch.randn(count, vocabulary, generator=generator) * apart
    return wanted.bfloat16(), found.bfloat16()


def hard(name):
    wanted, found = rows(3, 700)
    if name == "equal":
        return wanted, wanted.clone()
    if name == "constant":
        return torch.full_like(wanted, 2.0), torch.full_like(found, -3.0)
    if name == "one outlier":
        wanted[:, 5], found[:, 600] = 300.0, 400.0
    elif name == "ties at the top":
        wanted[:, ::7] = found[:, ::7] = 9.0
    elif name == "zeros":
        return torch.zeros_like(wanted), torch.zeros_like(found)
    elif name == "all far below zero":
        return wanted - 30000.0, found - 20000.0
    return wanted, found


def check(wanted, found, scale=0.25):
    loss, slope = kl_rows_plain(wanted, found, scale)
    given = found.clone()
    result = kl_rows(wanted, given, scale)
    assert result.dtype is torch.float64
    # Sums of up to 512 float32 in lanes of 32, and exponentials good to 2e-7.
    size = (wanted.double().softmax(-1) * (wanted.double() - found.double()).abs()).sum(-1)
    assert ((result - loss).abs() <= 4e-6 * (1 + size)).all()
    # Rounded once to bfloat16; the difference of two shares can lose 2e-6 of them before.
    spread = wanted.double().softmax(-1) + found.double().softmax(-1)
    bound = 2.0**-8 * slope.abs() + 2e-6 * scale * spread + 1e-37
    assert ((given.double() - slope).abs() <= bound).all()


@pytest.mark.parametrize("vocabulary", [1, 5, 16, 511, 512, 513, 1200])
def test_matches_the_reference(vocabulary):
    check(*rows(4, vocabulary))


@pytest.mark.parametrize(
    "name", ["equal", "constant", "one outlier", "ties at the top", "zeros", "all far below zero"]
)
def test_hard_rows(name):
    check(*hard(name))


def test_equal_rows_have_no_divergence_and_no_gradient():
    wanted, _ = rows(2, 600)
    found = wanted.clone()
    assert (kl_rows(wanted, found, 1.0) == 0).all()
    assert (found == 0).all()


def test_a_row_with_nan_says_so():
    wanted, found = rows(2, 600)
    found[1, 3] = float("nan")
    result = kl_rows(wanted, found, 1.0)
    assert torch.isfinite(result[0])
    assert torch.isnan(result[1])


def test_the_same_at_any_number_of_threads():
    wanted, found = rows(40, 3000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            given = found.clone()
            results.append((kl_rows(wanted, given, 1.0), given))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        (torch.zeros(2, 3).bfloat16(), torch.zeros(2, 4).bfloat16()),
        (torch.zeros(3, 2).bfloat16().T, torch.zeros(2, 3).bfloat16()),
        (torch.zeros(2, 0).bfloat16(), torch.zeros(2, 0).bfloat16()),
    ],
)
def test_refuses_what_it_cannot_read(wanted, found):
    with pytest.raises(ValueError, match=r"rows are|must be contiguous"):
        kl_rows(wanted, found, 1.0)
