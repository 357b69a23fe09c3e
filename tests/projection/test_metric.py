"""Projections of changes on index maps, against plain dense least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fine_tunes import plain_projection

from sketchconv.projection.metric import Codes, Diagonal, Full

ROWS, COLUMNS, GROUPS, ENTRIES = 6, 48, 2, 8


@pytest.fixture
def case():
    """Codes with unused entries, and changes of which one row is constant and one is zeros."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, ENTRIES, (ROWS, COLUMNS)).astype(np.uint8)
    codes[1] = 5  # one entry in use
    codes[2] %= 3  # some never used
    change = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    change[3], change[4], change[5, 7] = 0.25, 0.0, 1000.0
    return codes, change


def solved(metric, codes, change):
    return metric.solve(Codes(torch.from_numpy(codes), GROUPS, ENTRIES), torch.from_numpy(change))


@pytest.mark.parametrize("weighted", [False, True])
def test_means_are_the_least_squares_solution(case, weighted):
    codes, change = case
    weights = np.random.default_rng(1).uniform(0.1, 5, COLUMNS) if weighted else None
    metric = Diagonal(None if weights is None else torch.from_numpy(weights))
    found = solved(metric, codes, change).numpy()
    expected = plain_projection(codes, GROUPS, ENTRIES, change, weights)
    for row in range(ROWS):  # sums are float64, rounded to float32 once, as is each product
        scale = np.abs(expected[row]).max() + 1e-12
        np.testing.assert_allclose(found[row] / scale, expected[row] / scale, atol=1e-6)


def test_entries_that_no_column_uses_get_no_change(case):
    codes, change = case
    for metric in (Diagonal(), Full(torch.eye(COLUMNS))):
        found = solved(metric, codes, change)
        assert (found[2, :, 3:] == 0).all()
        assert (found[1, :, :5] == 0).all()
        assert (found[4] == 0).all()


def test_columns_without_weight_follow_the_plain_mean():
    codes = np.zeros((1, 4), np.uint8)
    codes[0, 2:] = 1
    change = np.array([[1.0, 3.0, 5.0, 9.0]], np.float32)
    metric = Diagonal(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    found = metric.solve(Codes(torch.from_numpy(codes), 1, 2), torch.from_numpy(change))
    assert found[0, 0].tolist() == pytest.approx([2.0, 5.0])
    nothing = Diagonal(torch.zeros(4))
    found = nothing.solve(Codes(torch.from_numpy(codes), 1, 2), torch.from_numpy(change))
    assert found[0, 0].tolist() == [2.0, 7.0]


def test_the_full_hessian_gives_the_solution_of_the_normal_equations(case):
    codes, change = case
    inputs = np.random.default_rng(2).normal(size=(200, COLUMNS)) * np.linspace(0.5, 2, COLUMNS)
    inputs[:, 1] += inputs[:, 0]
    hessian = inputs.T @ inputs / 200
    damped = hessian / np.diag(hessian).mean() + 0.01 * np.eye(COLUMNS)
    metric = Full(torch.from_numpy(hessian).float(), steps=40)
    found = solved(metric, codes, change)
    root = np.linalg.cholesky(damped).T
    group = np.arange(COLUMNS) // (COLUMNS // GROUPS)
    for row in range(ROWS):
        design = np.zeros((COLUMNS, GROUPS * ENTRIES))
        design[np.arange(COLUMNS), group * ENTRIES + codes[row]] = 1
        expected = np.linalg.lstsq(root @ design, root @ change[row], rcond=None)[0]
        scale = np.abs(expected).max() + 1e-12
        np.testing.assert_allclose(found[row].numpy().ravel() / scale, expected / scale, atol=2e-4)


def test_a_better_norm_leaves_less_in_itself(case):
    codes, change = case
    inputs = torch.randn(300, COLUMNS, generator=torch.Generator().manual_seed(5))
    inputs[:, 1::2] += inputs[:, ::2]
    full = Full(inputs.T @ inputs / 300)
    maps, wanted = Codes(torch.from_numpy(codes), GROUPS, ENTRIES), torch.from_numpy(change)

    def left(metric):
        return full.energy(wanted - maps.spread(metric.solve(maps, wanted)))

    assert left(full) < left(Diagonal((inputs**2).mean(0))) * 0.999


def test_energies_are_the_norms(case):
    _, change = case
    wide = change.astype(np.float64)
    weights = np.random.default_rng(1).uniform(0.1, 5, COLUMNS)
    assert Diagonal().energy(torch.from_numpy(change)) == pytest.approx((wide**2).sum())
    found = Diagonal(torch.from_numpy(weights)).energy(torch.from_numpy(change))
    assert found == pytest.approx((wide**2 * weights / weights.mean()).sum(), rel=1e-6)
    square = np.cov(np.random.default_rng(4).normal(size=(COLUMNS, 500)))
    damped = square / np.diag(square).mean() + 0.01 * np.eye(COLUMNS)
    metric = Full(torch.from_numpy(square).float())
    expected = np.einsum("ri,ij,rj->", wide, damped, wide)
    assert metric.energy(torch.from_numpy(change)) == pytest.approx(expected, rel=1e-5)
