"""Compensation, coordinate descent and refit against their plain references."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sketchconv.kernels import calibration_reference as reference
from sketchconv.kernels import compensation, descent
from sketchconv.kernels.compensation import compensate
from sketchconv.kernels.cpu import solve_rows
from sketchconv.kernels.descent import descend
from sketchconv.kernels.refit import refit
from sketchconv.kernels.tables import (
    _decode_torch,
    _entry_sums_torch,
    decode,
    encode,
    entry_sums,
    make_tables,
    sort_entries,
)

ROWS, COLUMNS = 21, 160  # neither a whole number of tiles nor of blocks


def hard_rows(columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """Gaussian and heavy rows, and those that break things."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_t(4, (ROWS, columns)).astype(np.float32) * np.float32(0.02)
    rows[0] = 0.0
    rows[1] = 0.125
    rows[2] = rng.integers(-8, 9, columns) / 16  # ties between entries
    rows[3] = rng.choice([-0.5, 0.25, 0.75], columns)  # fewer values than entries
    rows[4, 7] = 300.0  # one outlier
    rows[5, :-3] = 0.0
    return torch.from_numpy(rows)


def hessian_of(columns: int = COLUMNS, seed: int = 1) -> torch.Tensor:
    """Second moments of correlated inputs of unequal size, damped a little."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) / np.sqrt(columns) + 0.5 * np.eye(columns)
    inputs = rng.standard_normal((2 * columns, columns)) @ mix * rng.uniform(0.1, 3, columns)
    matrix = inputs.T @ inputs / (2 * columns)
    matrix += 0.03 * np.diag(matrix).mean() * np.eye(columns)
    return torch.from_numpy(matrix.astype(np.float32))


def factor_of(hessian: torch.Tensor) -> torch.Tensor:
    inverse = torch.linalg.inv(hessian.double())
    return torch.linalg.cholesky(inverse, upper=True).float()


def case(bits: int, groups: int, mixed: bool):
    weight = hard_rows()
    lut = torch.from_numpy(solve_rows(weight.numpy(), bits, groups, lut_dtype="F32").lut)
    order = torch.arange(COLUMNS)
    if mixed:
        order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))
    return weight[:, order].contiguous(), make_tables(lut, order // (COLUMNS // groups))


CASES = [(4, 1, False), (3, 4, True), (2, 2, True), (1, 1, False), (5, 2, True)]


@pytest.mark.parametrize(("bits", "groups", "mixed"), CASES)
@pytest.mark.parametrize("block", [32, 128])
def test_compensation_gives_the_codes_of_the_reference(bits, groups, mixed, block):
    weight, tables = case(bits, groups, mixed)
    upper = factor_of(hessian_of())
    found = compensate(weight, upper, tables, block)
    expected = reference.compensate(weight, upper, tables.lut, tables.groups, block)
    # Equal entries (fewer values than entries) may bear other codes: compare what they decode to.
    values = [decode(codes, tables.lut, tables.groups) for codes in (found, expected)]
    assert torch.equal(*values)


def test_compensation_at_a_size_of_real_layers():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(128, 640, generator=generator) * 0.02
    lut = torch.from_numpy(solve_rows(weight.numpy(), 4, 1, lut_dtype="F32").lut)
    tables = make_tables(lut, torch.zeros(640, dtype=torch.int64))
    upper = factor_of(hessian_of(640))
    found = compensate(weight, upper, tables)
    expected = reference.compensate(weight, upper, lut, tables.groups, 128)
    assert torch.equal(found, expected)


def test_compensation_beats_rounding_on_its_objective():
    weight, tables = case(3, 1, False)
    hessian = hessian_of()
    plain = reference.objective(
        weight, decode(encode(weight, tables), tables.lut, tables.groups), hessian
    )
    codes = compensate(weight, factor_of(hessian), tables)
    told = reference.objective(weight, decode(codes, tables.lut, tables.groups), hessian)
    assert told[6:].sum() < 0.9 * plain[6:].sum()


@pytest.mark.parametrize(("bits", "groups", "mixed"), CASES)
def test_descent_never_raises_the_objective(bits, groups, mixed):
    weight, tables = case(bits, groups, mixed)
    hessian = hessian_of()
    codes = encode(weight, tables)
    gradient = (weight - decode(codes, tables.lut, tables.groups)) @ hessian
    before = reference.objective(weight, decode(codes, tables.lut, tables.groups), hessian)
    start = before
    slack = 1e-6 * reference.objective(weight, torch.zeros_like(weight), hessian)
    for _ in range(4):
        codes, gradient = descend(codes, gradient, hessian, tables, block=32)
        decoded = decode(codes, tables.lut, tables.groups)
        after = reference.objective(weight, decoded, hessian)
        assert (after <= before + slack).all()
        before = after
        # The gradient that comes along is that of the new codes.
        expected = (weight - decoded).double() @ hessian.double()
        scale = expected.abs().max(1, keepdim=True).values + 1e-3
        assert ((gradient.double() - expected).abs() <= 1e-3 * scale).all()
    assert before[6:].sum() < 0.95 * start[6:].sum()


def test_descent_agrees_with_trying_every_entry():
    weight, tables = case(3, 4, True)
    hessian = hessian_of()
    codes = encode(weight, tables)
    gradient = (weight - decode(codes, tables.lut, tables.groups)) @ hessian
    found, _ = descend(codes, gradient, hessian, tables)
    expected = reference.descend(weight, codes, hessian, tables.lut, tables.groups)
    same = decode(found, tables.lut, tables.groups) == decode(expected, tables.lut, tables.groups)
    # Sums in float32 turn the rare coordinate that lies between two entries.
    assert same[6:].float().mean() > 0.995
    objectives = [
        reference.objective(weight, decode(c, tables.lut, tables.groups), hessian)[6:]
        for c in (found, expected)
    ]
    torch.testing.assert_close(objectives[0], objectives[1], rtol=0.01, atol=0)


@pytest.mark.parametrize(("bits", "groups", "mixed"), CASES)
def test_refit_never_raises_the_objective(bits, groups, mixed):
    weight, tables = case(bits, groups, mixed)
    hessian = hessian_of()
    codes = compensate(weight, factor_of(hessian), tables)
    gradient = (weight - decode(codes, tables.lut, tables.groups)) @ hessian
    before = reference.objective(weight, decode(codes, tables.lut, tables.groups), hessian)
    slack = 1e-6 * reference.objective(weight, torch.zeros_like(weight), hessian)
    for steps in (1, 2, 4, 8):
        lut, after_gradient = refit(codes, gradient, hessian, tables, steps)
        decoded = decode(codes, lut, tables.groups)
        after = reference.objective(weight, decoded, hessian)
        assert (after <= before + slack).all()
        before = after
        expected = (weight - decoded) @ hessian
        torch.testing.assert_close(after_gradient, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("bits", "groups"), [(3, 1), (2, 4)])
def test_refit_comes_to_the_least_squares_solution(bits, groups):
    weight, tables = case(bits, groups, True)
    hessian = hessian_of()
    codes = encode(weight, tables)
    gradient = (weight - decode(codes, tables.lut, tables.groups)) @ hessian
    lut, _ = refit(codes, gradient, hessian, tables, 24)
    best = reference.refit(weight, codes, hessian, tables.lut, tables.groups)
    found, least = (
        reference.objective(weight, reference.decode(codes, entries, tables.groups), hessian)
        for entries in (lut, best)
    )
    assert (found[6:] <= 1.001 * least[6:]).all()
    assert (found[6:] >= 0.999 * least[6:]).all()


def test_refit_leaves_entries_that_nothing_uses():
    weight, tables = case(4, 1, False)
    codes = encode(weight, tables).clamp(max=3)
    hessian = hessian_of()
    gradient = (weight - decode(codes, tables.lut, tables.groups)) @ hessian
    lut, _ = refit(codes, gradient, hessian, tables, 6)
    assert torch.equal(lut[:, :, 4:], tables.lut[:, :, 4:])


def test_sorting_changes_no_value():
    generator = torch.Generator().manual_seed(2)
    lut = torch.randn(ROWS, 4, 8, generator=generator)
    codes = torch.randint(0, 8, (ROWS, COLUMNS), generator=generator, dtype=torch.uint8)
    groups = torch.arange(COLUMNS) // (COLUMNS // 4)
    sorted_codes, ascending = sort_entries(codes, lut, groups)
    assert (ascending.diff(dim=-1) >= 0).all()
    assert torch.equal(decode(codes, lut, groups), decode(sorted_codes, ascending, groups))


@pytest.mark.parametrize(("bits", "groups", "mixed"), CASES)
def test_codes_by_thresholds_are_the_nearest_entries(bits, groups, mixed):
    weight, tables = case(bits, groups, mixed)
    found = decode(encode(weight, tables), tables.lut, tables.groups)
    for column in range(COLUMNS):
        entries = tables.lut[:, tables.groups[column]]
        code = reference.nearest(weight[:, column], entries)
        assert torch.equal(found[:, column], entries.gather(1, code[:, None])[:, 0])


def test_sums_by_entry():
    weight, tables = case(3, 4, True)
    codes = encode(weight, tables)
    place = tables.groups * tables.entries + codes.long()
    expected = torch.zeros(ROWS, tables.lut[0].numel(), dtype=torch.float64)
    expected.scatter_add_(1, place, weight.double())
    found = entry_sums(weight, codes, tables)
    torch.testing.assert_close(found.flatten(1), expected.float(), rtol=1e-6, atol=1e-7)
    by_products = _entry_sums_torch(weight, codes, tables)
    torch.testing.assert_close(found, by_products, rtol=1e-5, atol=1e-5)


def test_the_torch_forms_do_what_the_compiled_ones_do():
    """What a GPU runs, on the CPU: the same codes, as both round each product and difference."""
    weight, tables = case(3, 4, True)
    hessian = hessian_of()
    upper = factor_of(hessian)[:64, :64].contiguous()
    part = type(tables)(tables.lut, tables.thresholds, tables.groups[:64])
    work = weight[:, :64].contiguous()
    fast = compensation._block_cpu(work.clone(), upper, part)
    plain = compensation._block_torch(work.clone(), upper, part)
    assert torch.equal(fast[0], plain[0])
    assert torch.equal(fast[1], plain[1])
    codes = encode(work, part)
    before = decode(codes, part.lut, part.groups)
    assert torch.equal(before, _decode_torch(codes, part.lut, part.groups))
    square = hessian[:64, :64].contiguous()
    gradient = (work - before) @ square
    fast = descent._block_cpu(gradient.clone(), square, part, before.clone())
    plain = descent._block_torch(gradient.clone(), square, part, before.clone())
    assert torch.equal(fast[0], plain[0])
    assert torch.equal(fast[1], plain[1])


def test_the_benchmark_of_the_column_loop_runs():
    script = Path(__file__).parents[1] / "bench" / "bench_column_loop.py"
    shape = ["--rows", "32", "--columns", "256", "--bits", "3", "--rounds", "1"]
    command = [sys.executable, "-P", str(script), *shape]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "codes that differ from the reference: 0, from the plain loop: 0" in printed
