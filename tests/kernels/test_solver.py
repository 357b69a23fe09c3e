"""The solver against the NumPy reference and the exact optimum."""

from __future__ import annotations

import numpy as np
import pytest

from sketchconv.formats.tensors import bf16_to_f32, f32_to_bf16
from sketchconv.kernels import cpu, reference

LUT_DTYPES = ("F16", "BF16", "F32")


def lut_values(solved: cpu.SolvedRows, lut_dtype: str) -> np.ndarray:
    """The LUT as float32, widened by NumPy alone."""
    if lut_dtype == "BF16":
        return (solved.lut.astype(np.uint32) << 16).view(np.float32)
    return solved.lut.astype(np.float32)


def optimum(weight: np.ndarray, bits: int, groups: int, weights: np.ndarray | None) -> np.ndarray:
    """Smallest possible weighted squared error of each row, from the reference."""
    rows, columns = weight.shape
    size = columns // groups
    total = np.zeros(rows)
    for row in range(rows):
        for group in range(groups):
            span = slice(group * size, (group + 1) * size)
            values = weight[row, span].astype(np.float64)
            w = np.ones(size) if weights is None else weights[span]
            lut = reference.optimal_lut(values, 1 << bits, w)
            gap = np.abs(values[:, None] - lut[None, :]).min(axis=1)
            total[row] += (w * gap * gap).sum()
    return total


def heavy_rows(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def spread_weights(columns: int, decades: float, seed: int = 1) -> np.ndarray:
    return 10.0 ** np.random.default_rng(seed).uniform(-decades / 2, decades / 2, columns)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("columns", "groups"), [(40, 1), (120, 3), (300, 1)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_exact_mode_reaches_the_reference(bits, columns, groups, weighted):
    weight = heavy_rows(3, columns)
    weights = spread_weights(columns, 4) if weighted else None
    solved = cpu.solve_rows(
        weight, bits, groups, column_weights=weights, lut_dtype="F32", exact=True
    )
    found = reference.squared_error(weight, solved.indices, solved.lut, weights)
    np.testing.assert_allclose(found, optimum(weight, bits, groups, weights), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("columns", [320, 576, 2304])
@pytest.mark.parametrize(("bits", "mean", "worst"), [(1, 1.004, 1.02), (2, 1.004, 1.03),
                                                     (3, 1.004, 1.05), (4, 1.006, 1.08),
                                                     (5, 1.008, 1.06), (6, 1.01, 1.06),
                                                     (8, 1.01, 1.03)])  # fmt: skip
def test_near_the_optimum_with_equal_weights(columns, bits, mean, worst):
    weight = heavy_rows(12, columns, seed=bits)
    near, exact = (
        cpu.solve_rows(weight, bits, 1, lut_dtype="F32", exact=flag) for flag in (False, True)
    )
    ratio = near.squared_error / np.maximum(exact.squared_error, 1e-30)
    assert ratio.min() > 1 - 1e-5
    assert ratio.mean() < mean
    assert ratio.max() < worst


def test_the_promised_closeness_to_the_optimum():
    """At 4096 columns and 16 entries: 1.002 times the optimum over all rows, 1.05 in each."""
    gaussian = np.random.default_rng(11).standard_normal((24, 4096)).astype(np.float32)
    rows = np.concatenate([heavy_rows(24, 4096, seed=12), gaussian]) * np.float32(0.02)
    weight = bf16_to_f32(f32_to_bf16(rows))
    near, exact = (cpu.solve_rows(weight, 4, 1, exact=flag) for flag in (False, True))
    ratio = near.squared_error / exact.squared_error
    assert near.squared_error.sum() <= 1.002 * exact.squared_error.sum()
    assert ratio.mean() <= 1.002
    assert ratio.max() <= 1.05


@pytest.mark.parametrize("decades", [1, 3, 6])
@pytest.mark.parametrize("columns", [320, 576, 2304])
@pytest.mark.parametrize("bits", [2, 4])
def test_near_the_optimum_with_column_weights(columns, bits, decades):
    weight = heavy_rows(12, columns, seed=columns)
    weights = spread_weights(columns, decades)
    errors = []
    for exact in (False, True):
        solved = cpu.solve_rows(
            weight, bits, 1, column_weights=weights, lut_dtype="F32", exact=exact
        )
        errors.append(reference.squared_error(weight, solved.indices, solved.lut, weights))
    ratio = errors[0] / errors[1]
    assert ratio.mean() < 1.015
    assert ratio.max() < 1.15


def test_column_weights_matter():
    weight = heavy_rows(4, 576)
    weights = spread_weights(576, 6)
    equal = cpu.solve_rows(weight, 3, 1, lut_dtype="F32")
    told = cpu.solve_rows(weight, 3, 1, column_weights=weights, lut_dtype="F32")
    before, after = (
        reference.squared_error(weight, s.indices, s.lut, weights) for s in (equal, told)
    )
    assert (after < 0.75 * before).all()


@pytest.mark.parametrize("lut_dtype", LUT_DTYPES)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "groups"), [(48, 1), (600, 1), (600, 2), (330, 10)])
def test_codes_are_nearest_and_errors_are_right(columns, groups, bits, lut_dtype):
    weight = heavy_rows(3, columns, seed=7)
    solved = cpu.solve_rows(weight, bits, groups, lut_dtype=lut_dtype)
    lut = lut_values(solved, lut_dtype)
    assert solved.indices.dtype == np.uint8
    assert lut.shape == (3, groups, 1 << bits)
    assert (np.diff(lut, axis=2) >= 0).all()
    np.testing.assert_array_equal(solved.indices, reference.encode(weight, lut))
    expected = reference.squared_error(weight, solved.indices, lut)
    np.testing.assert_allclose(solved.squared_error, expected, rtol=1e-6)
    norm = (weight.astype(np.float64) ** 2).sum(axis=1)
    np.testing.assert_allclose(solved.squared_norm, norm, rtol=1e-12)


@pytest.mark.parametrize("columns", [64, 1000])
def test_ties_go_to_the_lower_index(columns):
    """Half the values lie exactly between two others, in three dtypes of LUT."""
    grid = np.arange(-8, 9, dtype=np.float32) / 8
    weight = np.tile(grid, -(-columns // grid.size))[None, :columns].copy()
    for bits in (1, 2, 3):
        solved = cpu.solve_rows(weight, bits, 1, lut_dtype="F32")
        np.testing.assert_array_equal(solved.indices, reference.encode(weight, solved.lut))


@pytest.mark.parametrize("lut_dtype", LUT_DTYPES)
@pytest.mark.parametrize("columns", [1, 5, 300, 1200])
@pytest.mark.parametrize("distinct", [1, 2, 3, 15, 16])
def test_few_distinct_values_are_kept_exactly(distinct, columns, lut_dtype):
    rng = np.random.default_rng(distinct)
    values = (rng.choice(np.arange(-100, 100), distinct, replace=False) / 64).astype(np.float32)
    weight = rng.choice(values, (2, columns))
    weights = rng.choice([0.0, 1.0, 1e6], columns)
    for given in (None, weights):
        solved = cpu.solve_rows(weight, 4, 1, column_weights=given, lut_dtype=lut_dtype)
        lut = lut_values(solved, lut_dtype)
        np.testing.assert_array_equal(reference.decode(solved.indices, lut), weight)
        assert (solved.squared_error == 0).all()


def planted(name: str, columns: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    row = rng.normal(0, 0.02, columns)
    if name == "constant":
        row[:] = 0.03
    elif name == "ties":
        row = np.round(row * 500) / 500
    elif name == "outlier":
        row[columns // 3] = 0.02 * 1e4
    elif name == "two outliers":
        row[0], row[-1] = -200.0, 300.0
    elif name == "zeros":
        row[:] = 0.0
    elif name == "mostly zeros":
        row[rng.random(columns) < 0.97] = 0.0
    elif name == "far mean":
        row += 30.0
    elif name == "two lumps":
        row += np.where(rng.random(columns) < 0.5, -3.0, 5.0)
    elif name == "one sign":
        row = np.abs(row) ** 3
    elif name == "negative zero":
        row[::2] = -0.0
    return row.astype(np.float32)[None]


PLANTED = ("constant", "ties", "outlier", "two outliers", "zeros", "mostly zeros", "far mean",
           "two lumps", "one sign", "negative zero")  # fmt: skip


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("columns", [96, 600])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_hard_rows(name, columns, bits):
    weight = planted(name, columns)
    solved = cpu.solve_rows(weight, bits, 1, lut_dtype="F32")
    best = optimum(weight, bits, 1, None)
    floor = 1e-12 * float((weight.astype(np.float64) ** 2).sum())
    assert solved.squared_error[0] <= 1.06 * best[0] + floor
    np.testing.assert_array_equal(solved.indices, reference.encode(weight, solved.lut))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("columns", [50, 600])
def test_denormal_and_huge_values(columns, scale):
    rng = np.random.default_rng(0)
    weight = (rng.uniform(-1, 1, (2, columns)) * scale).astype(np.float32)
    solved = cpu.solve_rows(weight, 3, 1, lut_dtype="F32")
    assert np.isfinite(solved.lut).all()
    np.testing.assert_array_equal(solved.indices, reference.encode(weight, solved.lut))
    if scale > 1e-40:
        unit = (weight.astype(np.float64) / scale).astype(np.float32)
        expected = cpu.solve_rows(unit, 3, 1, lut_dtype="F32").squared_error * scale**2
        np.testing.assert_allclose(solved.squared_error, expected, rtol=0.05)


def test_f16_rounding_is_that_of_numpy():
    """Distinct values become entries as they are, so the LUT shows the rounding alone."""
    rng = np.random.default_rng(0)
    exponents = rng.uniform(-26, 15.9, (50, 200))
    weight = (np.exp2(exponents) * rng.choice([-1, 1], exponents.shape)).astype(np.float32)
    solved = cpu.solve_rows(weight, 8, 1, lut_dtype="F16")
    expected = np.sort(weight, axis=1).astype(np.float16)
    assert solved.lut[:, 0, :200].tobytes() == expected.tobytes()


@pytest.mark.parametrize("lut_dtype", LUT_DTYPES)
@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-30, -1e-30])
def test_zero_keeps_its_sign(zero, lut_dtype):
    """Smaller values than a half can hold become a zero of their sign, too."""
    weight = np.array([[zero, 1, 2, 3]], np.float32)
    solved = cpu.solve_rows(weight, 2, 1, lut_dtype=lut_dtype)
    if lut_dtype == "F16":
        assert solved.lut.tobytes() == weight.astype(np.float16).tobytes()
    else:
        assert bool(np.signbit(lut_values(solved, lut_dtype)[0, 0, 0])) == (str(zero)[0] == "-")


@pytest.mark.parametrize("columns", [64, 600])
@pytest.mark.parametrize("value", [65520.0, -65520.0, 1e30])
def test_a_lut_entry_beyond_its_dtype_is_refused(value, columns):
    weight = heavy_rows(5, columns)
    weight[3, 2] = value
    with pytest.raises(cpu.LutRangeError, match="row 3") as caught:
        cpu.solve_rows(weight, 4, 1, lut_dtype="F16")
    assert (caught.value.row, caught.value.value) == (3, pytest.approx(value))
    cpu.solve_rows(weight, 4, 1, lut_dtype="BF16")
    weight[3, 2] = 65519.0 if value > 0 else -65519.0
    assert np.abs(cpu.solve_rows(weight, 4, 1, lut_dtype="F16").lut).max() == 65504


def test_bf16_overflow_is_refused():
    weight = np.full((1, 4), 3.4e38, np.float32)
    with pytest.raises(cpu.LutRangeError, match="BF16"):
        cpu.solve_rows(weight, 2, 1, lut_dtype="BF16")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    weight = heavy_rows(4, 600)
    weight[2, [5, 599]] = bad
    np.testing.assert_array_equal(cpu.nonfinite_rows(weight), [0, 0, 2, 0])
    for bits, groups, exact in ((4, 1, False), (4, 2, False), (8, 3, False), (2, 1, True)):
        with pytest.raises(ValueError, match="row 2 has 2 values"):
            cpu.solve_rows(weight, bits, groups, exact=exact)


@pytest.mark.parametrize("columns", [30, 600])
def test_weights_of_zero(columns):
    weight = heavy_rows(3, columns)
    equal = cpu.solve_rows(weight, 3, 1)
    zeros = cpu.solve_rows(weight, 3, 1, column_weights=np.zeros(columns))
    np.testing.assert_array_equal(zeros.indices, equal.indices)
    some = np.zeros(columns)
    some[:: columns // 8] = 1.0
    solved = cpu.solve_rows(weight, 4, 1, column_weights=some, lut_dtype="F32")
    kept = reference.squared_error(weight, solved.indices, solved.lut, some)
    np.testing.assert_allclose(kept, 0.0, atol=1e-10)


def test_weights_in_other_units_change_nothing():
    weight = heavy_rows(3, 600)
    weights = spread_weights(600, 2)
    base = cpu.solve_rows(weight, 4, 2, column_weights=weights)
    other = cpu.solve_rows(weight, 4, 2, column_weights=weights * 2.0**200)
    np.testing.assert_array_equal(base.indices, other.indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 0}, "bits is 0"),
        ({"bits": 9}, "bits is 9"),
        ({"groups": 7}, "7 groups do not divide 64"),
        ({"groups": 0}, "0 groups"),
        ({"lut_dtype": "F64"}, "lut_dtype"),
        ({"column_weights": np.ones(63)}, "63"),
        ({"column_weights": np.full(64, -1.0)}, "column weight 0 is -1"),
        ({"column_weights": np.full(64, np.nan)}, "column weight 0 is nan"),
        ({"column_weights": np.full(64, np.inf)}, "column weight 0 is inf"),
        ({"weight": np.zeros((2, 64))}, "float32"),
        ({"weight": np.zeros(64, np.float32)}, "float32"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    given = {"weight": heavy_rows(2, 64), "bits": 4, "groups": 1, **change}
    with pytest.raises(ValueError, match=message):
        cpu.solve_rows(**given)


def same(a: cpu.SolvedRows, b: cpu.SolvedRows) -> bool:
    pairs = ((a.indices, b.indices), (a.lut, b.lut), (a.squared_error, b.squared_error),
             (a.squared_norm, b.squared_norm))  # fmt: skip
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_same_bytes_at_any_number_of_threads_and_in_any_chunks(bits, weighted):
    weight = heavy_rows(150, 640)
    weight[40] = 0.0
    weights = spread_weights(640, 3) if weighted else None

    def solve(rows: np.ndarray, threads: int) -> cpu.SolvedRows:
        return cpu.solve_rows(rows, bits, 2, column_weights=weights, threads=threads)

    one = solve(weight, 1)
    for threads in (2, 3):
        assert same(one, solve(weight, threads))
    parts = [solve(weight[a:b], 2) for a, b in ((0, 1), (1, 41), (41, 43), (43, 150))]
    joined = cpu.SolvedRows(
        *(np.concatenate([getattr(p, name) for p in parts])
          for name in ("indices", "lut", "squared_error", "squared_norm"))
    )  # fmt: skip
    assert same(one, joined)


def test_inputs_stay_as_they_are_and_may_be_views():
    base = heavy_rows(6, 1200)
    kept = base.copy()
    view = base[::2, ::2]
    a = cpu.solve_rows(view, 4, 1)
    b = cpu.solve_rows(np.ascontiguousarray(view), 4, 1)
    assert same(a, b)
    np.testing.assert_array_equal(base, kept)


def test_no_rows():
    solved = cpu.solve_rows(np.zeros((0, 8), np.float32), 4, 2)
    assert solved.indices.shape == (0, 8)
    assert solved.lut.shape == (0, 2, 16)
