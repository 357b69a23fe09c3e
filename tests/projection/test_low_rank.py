"""Spectra and truncations, against numpy's singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sketchconv.projection.low_rank import rank_for, spectrum, truncate


def matrix(rows, columns, decay=0.8, seed=0):
    """Singular values that fall by `decay` each."""
    rng = np.random.default_rng(seed)
    short = min(rows, columns)
    left = np.linalg.qr(rng.normal(size=(rows, short)))[0]
    right = np.linalg.qr(rng.normal(size=(columns, short)))[0]
    return torch.from_numpy(left * decay ** np.arange(short) @ right.T).float()


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_the_spectrum_is_numpys(shape):
    value = matrix(*shape)
    expected = np.linalg.svd(value.numpy().astype(np.float64), compute_uv=False) ** 2
    np.testing.assert_allclose(spectrum(value), expected, rtol=1e-9, atol=1e-12 * expected[0])


def test_ranks():
    energies = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert [rank_for(energies, share) for share in (0.4, 0.41, 0.7, 0.9, 0.91, 1.0)] == [
        *(1, 2, 2, 3, 4, 4)
    ]
    assert rank_for(torch.zeros(3, dtype=torch.float64), 0.9) == 0
    assert rank_for(torch.zeros(0, dtype=torch.float64), 0.9) == 0
    assert rank_for(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), 1.0) == 1


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
@pytest.mark.parametrize("exact", [True, False])
def test_truncation_is_the_best_one(shape, exact):
    value = matrix(*shape)
    found = truncate(value, 6, exact=exact)
    left, values, right = np.linalg.svd(value.numpy().astype(np.float64), full_matrices=False)
    best = left[:, :6] * values[:6] @ right[:6]
    np.testing.assert_allclose(found.left @ found.right, best, atol=2e-6)
    assert found.energy == pytest.approx((values**2).sum())
    assert found.captured == pytest.approx((values[:6] ** 2).sum(), rel=1e-6)
    assert found.left.shape == (shape[0], 6)
    assert found.right.shape == (6, shape[1])
    # Both factors carry the same weight.
    np.testing.assert_allclose(found.left.norm(dim=0), found.right.norm(dim=1), rtol=1e-4)


def test_the_randomised_one_keeps_nearly_as_much_of_a_flat_spectrum():
    value = matrix(200, 300, decay=0.99)
    exact, fast = truncate(value, 20, exact=True), truncate(value, 20, exact=False)
    assert not fast.exact
    assert 0.97 * exact.captured < fast.captured <= exact.captured * (1 + 1e-6)
    error = float((value - fast.left @ fast.right).double().square().sum())
    assert error == pytest.approx(fast.energy - fast.captured, rel=1e-4)
    again = truncate(value, 20, exact=False)
    assert torch.equal(again.left, fast.left)


def test_hard_matrices():
    zero = truncate(torch.zeros(4, 7), 2)
    assert (zero.left == 0).all() or (zero.right == 0).all()
    assert (zero.energy, zero.captured) == (0.0, 0.0)
    one = torch.outer(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 0.0, 1.0, 5.0]))
    found = truncate(one, 5)  # beyond the smaller side
    assert found.left.shape == (3, 5)
    assert found.right.shape == (5, 4)
    np.testing.assert_allclose(found.left @ found.right, one, atol=1e-5)
    assert found.captured == pytest.approx(found.energy)
    assert torch.isfinite(found.left).all()
    assert torch.isfinite(found.right).all()
