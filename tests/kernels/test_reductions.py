"""Reductions over rows: right values, and bits that no chunking and no thread changes."""

from __future__ import annotations

import numpy as np
import pytest

from sketchconv.formats import tensors
from sketchconv.kernels import cpu


def matrix(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(columns).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 576])
def test_squared_matvec(columns):
    weight = matrix(9, columns)
    x = np.random.default_rng(1).uniform(0, 2, columns)
    expected = (weight.astype(np.float64) ** 2) @ x
    np.testing.assert_allclose(cpu.squared_matvec(weight, x), expected, rtol=1e-13)


def test_squared_matvec_has_the_same_bits_at_any_number_of_threads():
    weight, x = matrix(301, 577), np.random.default_rng(1).uniform(0, 2, 577)
    one = cpu.squared_matvec(weight, x, threads=1)
    assert one.tobytes() == cpu.squared_matvec(weight, x, threads=3).tobytes()
    parts = [cpu.squared_matvec(weight[a:b], x) for a, b in ((0, 7), (7, 300), (300, 301))]
    assert one.tobytes() == np.concatenate(parts).tobytes()


@pytest.mark.parametrize("columns", [1, 17, 600])
def test_accumulate_column_squares(columns):
    weight = matrix(33, columns)
    out = np.full(columns, 2.0)
    cpu.accumulate_column_squares(weight, out)
    expected = 2.0 + (weight.astype(np.float64) ** 2).sum(axis=0)
    np.testing.assert_allclose(out, expected, rtol=1e-13)


def test_accumulate_column_squares_has_the_same_bits_in_any_chunks():
    weight = matrix(301, 577)
    whole, parts = np.zeros(577), np.zeros(577)
    cpu.accumulate_column_squares(weight, whole, threads=1)
    for begin, end in ((0, 1), (1, 150), (150, 301)):
        cpu.accumulate_column_squares(weight[begin:end], parts, threads=3)
    assert whole.tobytes() == parts.tobytes()


def test_sizes_that_differ_are_refused():
    weight = matrix(3, 8)
    with pytest.raises(ValueError, match="8 columns"):
        cpu.squared_matvec(weight, np.zeros(7))
    for out in (np.zeros(7), np.zeros(8, np.float32), np.zeros(16)[::2]):
        with pytest.raises(ValueError, match="contiguous float64"):
            cpu.accumulate_column_squares(weight, out)


def test_nonfinite_rows():
    weight = matrix(200, 400)
    weight[3, 5] = np.nan
    weight[199, [0, 398, 399]] = np.inf, -np.inf, np.nan
    expected = (~np.isfinite(weight)).sum(axis=1)
    np.testing.assert_array_equal(cpu.nonfinite_rows(weight), expected)
    assert expected.sum() == 4


def test_bf16_widens_every_pattern_exactly():
    every = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    wide = cpu.bf16_to_f32(every)
    assert wide.shape == every.shape
    np.testing.assert_array_equal(wide.view(np.uint32), every.astype(np.uint32) << 16)
    assert wide.tobytes() == tensors.bf16_to_f32(every).tobytes()
