"""Shaped LUTs: fits against the plain reference and a fine search, blocks without loss."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from sketchconv.kernels.ggml import blocks, shaped

COLUMNS = 256
every_grid = pytest.mark.parametrize("grid", shaped.GRIDS)


def rows_of(seed: int = 0, count: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, COLUMNS))
    rows[1] = rng.standard_t(2, COLUMNS)
    rows[2] = 0
    rows[3] = 0.25
    rows[4, 9] = 100
    rows[5] = rows[5] * 0.01 + 4
    rows[6] = np.round(rows[6])
    rows[7] *= 1e-9
    rows[8] *= 1e-6
    rows[9] = np.arange(COLUMNS) % 16
    return rows.astype(np.float32)


def weights_of(seed: int = 1) -> np.ndarray:
    weights = np.exp(np.random.default_rng(seed).standard_normal(COLUMNS)).astype(np.float32)
    weights[::17] = 0
    return weights


def same(one: shaped.Shaped, other: shaped.Shaped) -> bool:
    pairs = [(one.codes, other.codes), (one.scale, other.scale), (one.minimum, other.minimum)]
    return all(
        (a is None and b is None) or np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for a, b in pairs
    )


@every_grid
@pytest.mark.parametrize("group", [32, 64, 256])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_compiled_fit_is_the_plain_one_at_any_number_of_threads(grid, group, weighted):
    weights = weights_of() if weighted else None
    rows = np.concatenate([rows_of(), rows_of(2, 300)])
    found = shaped.fit(rows, grid, group, weights, threads=3)
    assert same(found, shaped.fit(rows, grid, group, weights, threads=1))
    few = shaped.fit_plain(rows[:24], grid, group, weights)
    assert same(shaped.fit(rows[:24], grid, group, weights), few)
    assert np.array_equal(found.codes[:24], few.codes)


@every_grid
@pytest.mark.parametrize("group", [32, 128])
def test_blocks_hold_exactly_the_fitted_weights(grid, group):
    found = shaped.fit(rows_of(), grid, group, weights_of())
    packed = shaped.pack(found, grid)
    kind = shaped.GRIDS[grid].kind
    decoded = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(decoded.view(np.uint32), shaped.values(found, grid).view(np.uint32))
    assert np.array_equal(decoded, blocks.decode(kind, packed, COLUMNS))


@every_grid
def test_unpacking_reverses_packing(grid):
    found = shaped.fit(rows_of(), grid)
    assert same(shaped.unpack(shaped.pack(found, grid), grid, COLUMNS), found)


@every_grid
def test_blocks_of_others_survive_unpacking_and_packing(grid):
    kind = gguf.GGMLQuantizationType[shaped.GRIDS[grid].kind]
    size = COLUMNS // 32 * gguf.GGML_QUANT_SIZES[kind][1]
    data = np.random.default_rng(4).integers(0, 256, (50, size), dtype=np.uint8)
    assert np.array_equal(shaped.pack(shaped.unpack(data, grid, COLUMNS), grid), data)


def relative_error(found: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights * (found.astype(np.float64) - rows) ** 2).sum(axis=1)


def fine_search(rows: np.ndarray, grid: str, weights: np.ndarray) -> np.ndarray:
    """Weighted squared error of each row with the best of many scales and no float16."""
    levels = np.array(shaped.GRIDS[grid].levels)
    rows = rows.astype(np.float64)
    low, high = rows.min(axis=1), rows.max(axis=1)
    best = np.full(len(rows), np.inf)
    size = np.abs(rows).max(axis=1)
    for part in np.linspace(0.2, 1.3, 400):
        for sign in (1, -1):
            if shaped.GRIDS[grid].has_minimum:
                scale = part * (high - low) / (len(levels) - 1)
                middle = (weights * rows).sum(axis=1) / weights.sum()
                minimum = middle - (len(levels) - 1) / 2 * scale
            else:
                scale, minimum = sign * part * size / np.abs(levels).max(), np.zeros(len(rows))
            scaled = (rows - minimum[:, None]) / scale[:, None]
            near = levels[np.abs(scaled[:, :, None] - levels).argmin(axis=2)]
            gap = rows - scale[:, None] * near - minimum[:, None]
            best = np.minimum(best, (weights * gap**2).sum(axis=1))
    return best


@every_grid
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fit_is_as_good_as_a_fine_search(grid, weighted):
    rows = np.random.default_rng(5).standard_t(5, (8, COLUMNS)).astype(np.float32)
    weights = weights_of() if weighted else np.ones(COLUMNS, np.float32)
    found = shaped.fit(rows, grid, COLUMNS, weights)
    mine = relative_error(shaped.values(found, grid), rows, weights)
    # Of many levels some starts are left out: the fine search tries 800 scales.
    bound = 1.005 if len(shaped.GRIDS[grid].levels) == 16 else 1.03
    assert mine.sum() <= bound * fine_search(rows, grid, weights).sum()


@every_grid
def test_rows_that_a_grid_can_hold_are_kept(grid):
    levels = np.array(shaped.GRIDS[grid].levels, np.float32)
    rng = np.random.default_rng(6)
    least = 1 if grid == "symmetric_8" else 0  # -128 is never used
    codes = rng.integers(least, len(levels), COLUMNS)
    codes[:16] = np.linspace(least, len(levels) - 1, 16)
    rows = (0.125 * levels[codes])[None]
    found = shaped.fit(rows, grid, COLUMNS)
    assert np.array_equal(shaped.values(found, grid), rows)


@pytest.mark.parametrize(
    ("grid", "group", "message"),
    [
        ("cubic", 32, "unknown grid 'cubic'; known are iq4_nl"),
        ("affine", 48, "group is 48, must be a multiple of 32"),
        ("affine", 0, "group is 0"),
        ("affine", 96, "256 columns, Q4_1 takes multiples of 96"),
    ],
)
def test_wrong_arguments_are_refused(grid, group, message):
    with pytest.raises(ValueError, match=message):
        shaped.fit(rows_of(), grid, group)


@every_grid
def test_a_value_that_is_not_finite_is_named(grid):
    rows = rows_of()
    rows[11, 40] = np.nan
    with pytest.raises(ValueError, match="row 11, column 40 is nan"):
        shaped.fit(rows, grid, 64)


def test_blocks_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"256 columns of Q4_1 take uint8 \[n, 160\]"):
        shaped.unpack(np.zeros((2, 144), np.uint8), "affine", COLUMNS)
