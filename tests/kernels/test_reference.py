"""The reference itself, against enumeration and hand-made cases."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sketchconv.kernels import reference


def best_by_trying(values: np.ndarray, k: int, weights: np.ndarray) -> float:
    order = np.argsort(values)
    x, w = values[order], weights[order]
    best = np.inf
    for cuts in combinations(range(1, x.size), k - 1):
        total = 0.0
        for a, b in zip((0, *cuts), (*cuts, x.size), strict=True):
            mean = np.average(x[a:b], weights=w[a:b])
            total += float((w[a:b] * (x[a:b] - mean) ** 2).sum())
        best = min(best, total)
    return best


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_optimal_lut_is_optimal(seed, k):
    rng = np.random.default_rng(seed)
    values, weights = rng.standard_normal(10), rng.uniform(0.1, 5, 10)
    lut = reference.optimal_lut(values, k, weights)
    found = (weights * np.abs(values[:, None] - lut).min(axis=1) ** 2).sum()
    assert lut.shape == (k,)
    assert (np.diff(lut) > 0).all()
    assert found == pytest.approx(best_by_trying(values, k, weights))


def test_optimal_lut_repeats_the_last_of_few_values():
    np.testing.assert_array_equal(reference.optimal_lut([3.0, 1.0, 3.0], 4), [1, 3, 3, 3])
    np.testing.assert_array_equal(reference.optimal_lut([3.0, 1.0, 2.0], 2, [1, 1, 0]), [1, 3])
    np.testing.assert_array_equal(reference.optimal_lut([3.0, 1.0], 2, [0, 0]), [1, 3])


def test_encode_takes_the_nearest_and_the_lower_of_two():
    lut = np.array([[[0, 1, 1, 3], [-2, -2, 0, 5]]], np.float32)
    weight = np.array([[0.5, 0.6, 2.0, 9.0, -9.0, -1.0, 2.5, 2.6]], np.float32)
    codes = reference.encode(weight, lut)
    np.testing.assert_array_equal(codes, [[0, 1, 1, 3, 0, 0, 2, 3]])
    decoded = reference.decode(codes, lut)
    np.testing.assert_array_equal(decoded, [[0, 1, 1, 3, -2, -2, 0, 5]])
    error = reference.squared_error(weight, codes, lut, np.arange(8.0))
    expected = (np.arange(8) * (weight.astype(np.float64) - decoded) ** 2).sum()
    assert error == pytest.approx(expected)
