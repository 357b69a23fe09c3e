"""A weight and statistics to codes and LUTs: methods, stages, fallbacks, errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sketchconv.calibration.factors import Factors, damped
from sketchconv.calibration.methods import METHODS, method_named, needs_statistics
from sketchconv.calibration.rows import errors, improve
from sketchconv.calibration.solve import Solution, solve
from sketchconv.calibration.spans import Request, fit
from sketchconv.calibration.statistics import Statistics, StatisticsError
from sketchconv.calibration.targets import target
from sketchconv.errors import RecipeError, WeightError
from sketchconv.kernels.calibration_reference import decode, objective
from sketchconv.kernels.cpu import LutRangeError, solve_rows

ROWS, COLUMNS = 150, 96
OURS = METHODS["sketch"]


def inputs(seed: int, tokens: int = 600, columns: int = COLUMNS) -> torch.Tensor:
    """Correlated inputs; their mixture does not depend on the seed."""
    mixture = np.random.default_rng(0)
    mix = mixture.standard_normal((columns, columns)) / 8 + 0.5 * np.eye(columns)
    scale = 10 ** mixture.uniform(-1, 0.5, columns)
    rows = np.random.default_rng(seed).standard_normal((tokens, columns))
    return torch.from_numpy((rows @ mix * scale).astype(np.float32))


def moments(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / x.shape[0]


def statistics(**changes: object) -> Statistics:
    known = Statistics(moments(inputs(1)), 600, held_out=moments(inputs(2, 200)))
    return dataclasses.replace(known, **changes)


def a_weight(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    rng = np.random.default_rng(9)
    return torch.from_numpy((rng.standard_t(5, (rows, columns)) * 0.03).astype(np.float32))


def decoded(solution: Solution) -> torch.Tensor:
    groups = solution.lut.shape[1]
    columns = torch.arange(solution.indices.shape[1])
    return decode(solution.indices, solution.lut.float(), columns // (columns.numel() // groups))


def skip_without_sklearn(name: str) -> None:
    if name == "leanquant":
        pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("bits", "groups", "lut_dtype"), [(4, 1, "F16"), (2, 3, "BF16"),
                                                           (3, 4, "F32")])  # fmt: skip
def test_solutions_are_well_formed(name, bits, groups, lut_dtype):
    skip_without_sklearn(name)
    rows = 12 if name == "leanquant" else ROWS  # scikit-learn is slow
    weight = a_weight(rows)
    found = solve(weight, bits, groups, lut_dtype, METHODS[name], statistics())
    assert found.indices.dtype is torch.uint8
    assert found.indices.shape == weight.shape
    assert found.indices.max() < 1 << bits
    assert found.lut.shape == (rows, groups, 1 << bits)
    assert (found.lut.float().diff(dim=-1) >= 0).all()
    gap = (weight - decoded(found)).double()
    torch.testing.assert_close(found.squared_error, gap.square().sum(1))
    torch.testing.assert_close(found.squared_norm, weight.double().square().sum(1))
    if needs_statistics(METHODS[name]):
        held = statistics().held_out
        expected = objective(weight, decoded(found), held).sum()
        expected /= objective(weight, torch.zeros_like(weight), held).sum()
        assert found.error == pytest.approx(float(expected), rel=1e-3)
        assert found.damping > 0
    else:
        assert found.error is None
        assert found.damping is None


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ours_is_the_best_on_tokens_that_nothing_saw(bits):
    weight, unseen = a_weight(), moments(inputs(3, 2000))
    scores = {}
    for name in METHODS:
        if name != "leanquant":  # slow; tests/bench compares it
            found = solve(weight, bits, 1, "F16", METHODS[name], statistics())
            scores[name] = float(objective(weight, decoded(found), unseen).sum())
    assert min(scores, key=scores.__getitem__) == "sketch"
    assert scores["sketch"] < 0.9 * scores["gptq"]
    assert scores["gptq"] < scores["rtn"]


def test_kmeans_is_the_calibration_free_solver():
    weight = a_weight()
    masses = torch.linspace(0.1, 2, COLUMNS)
    found = solve(weight, 3, 2, "F16", METHODS["kmeans"], column_weights=masses)
    rows = solve_rows(weight.numpy(), 3, 2, column_weights=masses.numpy(), lut_dtype="F16")
    np.testing.assert_array_equal(found.indices.numpy(), rows.indices)
    np.testing.assert_array_equal(found.lut.numpy(), rows.lut)


@pytest.mark.parametrize("name", ["gptq", "sketch"])
def test_the_result_does_not_depend_on_threads(name):
    many = a_weight(300)
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        results.append(solve(many, 3, 2, "F16", METHODS[name], statistics(), threads=threads))
        assert torch.get_num_threads() == before
    for other in results[1:]:
        assert torch.equal(results[0].indices, other.indices)
        assert torch.equal(results[0].lut, other.lut)
        assert results[0].error == other.error


def test_rows_do_not_depend_on_those_beside_them():
    """With the damping fixed, a row has the same solution in any weight of whole spans."""
    fixed = dataclasses.replace(OURS, dampings=())
    whole = solve(a_weight(256), 3, 1, "F16", fixed, statistics())
    first = solve(a_weight(256)[:128], 3, 1, "F16", fixed, statistics())
    assert torch.equal(whole.indices[:128], first.indices)
    assert torch.equal(whole.lut[:128], first.lut)


@pytest.mark.parametrize("groups", [1, 4])
def test_no_round_raises_the_objective(groups):
    weight = a_weight()
    factor = Factors(statistics()).factor(0.03, act_order=True)
    ordered = weight[:, factor.order]
    columns = factor.order // (COLUMNS // groups)
    plain = dataclasses.replace(OURS, rounds=0, dampings=())
    found = fit(weight, Request(3, groups, "F32", plain), factor, None)
    before = errors(ordered, found, columns, factor.hessian)
    for _ in range(4):
        found = improve(ordered, found, columns, factor.hessian, OURS)
        after = errors(ordered, found, columns, factor.hessian)
        assert (after <= before * (1 + 1e-4)).all()
        before = after


def test_each_row_keeps_the_round_that_held_out_tokens_call_best():
    weight = a_weight()
    factor = Factors(statistics()).factor(0.03, act_order=True)
    judge = statistics().held_out
    ruler = judge[factor.order][:, factor.order]
    last = None
    for rounds in range(4):
        method = dataclasses.replace(OURS, rounds=rounds, dampings=())
        found = fit(weight, Request(3, 1, "F16", method), factor, judge)
        now = errors(weight[:, factor.order], found, torch.zeros(COLUMNS, dtype=torch.int64), ruler)
        if last is not None:
            assert (now <= last * (1 + 1e-6)).all()
        last = now


def test_the_damping_is_the_best_of_its_choices_on_held_out_tokens():
    known = dataclasses.replace(statistics(), hessian=moments(inputs(1, 110)), tokens=110)
    weight = a_weight(96)
    chosen = solve(weight, 3, 1, "F16", OURS, known)
    alone = {
        damping: solve(weight, 3, 1, "F16", dataclasses.replace(OURS, dampings=(damping,)), known)
        for damping in OURS.dampings
    }
    assert chosen.error == pytest.approx(min(s.error for s in alone.values()), rel=0.02)


def test_asymmetric_targets_repair_the_inputs():
    """The dense layer's outputs are nearer, from compressed inputs, than without the target."""
    dense, weight = inputs(1), a_weight()
    noisy = dense + 0.3 * dense[:, torch.randperm(COLUMNS, generator=torch.manual_seed(0))]
    known = Statistics(moments(noisy), 600, cross=(dense - noisy).T @ noisy / 600)
    goal = target(weight, Factors(known), None, 1e-4)
    wanted = dense @ weight.T
    lost = [float((wanted - noisy @ w.T).square().sum()) for w in (weight, goal)]
    assert lost[1] < 0.2 * lost[0]
    plain = dataclasses.replace(OURS, asymmetric=False)
    found = [decoded(solve(weight, 4, 1, "F16", m, known)) for m in (plain, OURS)]
    lost = [float((wanted - noisy @ w.T).square().sum()) for w in found]
    assert lost[1] < 0.7 * lost[0]


def test_residual_errors_are_repaired():
    x, weight = inputs(1), a_weight()
    shift = torch.randn(ROWS, COLUMNS, generator=torch.manual_seed(1)) * 0.01
    behind = x @ shift.T  # an error of the residual stream that this layer can see
    known = Statistics(moments(x), 600, residual=behind.T @ x / 600)
    goal = target(weight, Factors(known), known.residual, 1e-5)
    left = x @ (goal - weight - shift).T
    assert left.square().sum() < 0.01 * behind.square().sum()


def test_a_dead_column_is_reported_and_rounded_to_nearest():
    known = statistics()
    hessian, held = known.hessian.clone(), known.held_out.clone()
    for matrix in (hessian, held):
        matrix[5] = 0
        matrix[:, 5] = 0
    dead = dataclasses.replace(known, hessian=hessian, held_out=held)
    found = solve(a_weight(), 3, 1, "F16", OURS, dead)
    assert found.notes == ("1 of 96 inputs were always zero: their columns are rounded to nearest",)
    weight, lut = a_weight()[:, 5:6], found.lut[:, 0].float()
    nearest = (weight - lut).abs().amin(1)
    torch.testing.assert_close((weight[:, 0] - decoded(found)[:, 5]).abs(), nearest)


def test_a_singular_hessian_gets_more_damping_and_is_reported():
    x = inputs(1, 20)  # fewer tokens than columns
    plain = dataclasses.replace(METHODS["gptq"], damping=0.0)
    found = solve(a_weight(), 4, 1, "F16", plain, Statistics(moments(x), 20))
    assert any("singular Hessian" in note for note in found.notes)
    assert found.damping > 0
    assert np.isfinite(found.error)


def test_inputs_that_are_all_zero_leave_plain_rounding():
    nothing = Statistics(torch.zeros(COLUMNS, COLUMNS), 10)
    found = solve(a_weight(), 4, 1, "F16", OURS, nothing)
    rows = solve_rows(a_weight().numpy(), 4, 1)
    assert found.squared_error.sum() <= 1.01 * rows.squared_error.sum()
    assert found.error == 0.0
    assert "96 of 96 inputs" in found.notes[0]


def test_one_huge_direction_does_not_break_the_factor():
    """The first tokens of a window can hold nearly all of the trace."""
    known = statistics()
    spike = torch.zeros(COLUMNS)
    spike[::7] = 300.0
    huge = dataclasses.replace(known, hessian=known.hessian + torch.outer(spike, spike))
    found = solve(a_weight(), 3, 1, "F16", OURS, huge)
    assert np.isfinite(found.error)


@pytest.mark.parametrize("name", ["hessian", "held_out", "cross", "residual"])
def test_nan_statistics_are_named(name):
    known = statistics(cross=torch.zeros(COLUMNS, COLUMNS), residual=torch.zeros(ROWS, COLUMNS))
    matrix = getattr(known, name).clone()
    matrix[3, 4] = torch.nan
    with pytest.raises(StatisticsError, match=f"{name}: 1 of .* NaN or infinite"):
        solve(a_weight(), 3, 1, "F16", OURS, dataclasses.replace(known, **{name: matrix}))


def test_statistics_of_another_layer_are_refused():
    with pytest.raises(StatisticsError, match=r"hessian: expected float32 \[64, 64\]"):
        solve(a_weight(8, 64), 3, 1, "F16", OURS, statistics())


def test_a_matrix_that_is_no_hessian_is_refused():
    bad = torch.diag(torch.linspace(1, 2, COLUMNS))
    bad[0, 1] = bad[1, 0] = 1e9
    with pytest.raises(StatisticsError, match="not positive definite even with"):
        solve(a_weight(), 3, 1, "F16", METHODS["gptq"], Statistics(bad, 10))


def test_no_statistics_where_they_are_needed():
    with pytest.raises(WeightError, match="method sketch needs statistics"):
        solve(a_weight(), 3, 1, "F16", OURS)


def test_weights_that_are_not_finite_are_refused():
    weight = a_weight()
    weight[7, 1] = torch.inf
    with pytest.raises(WeightError, match="1 values are NaN or infinite, the first in row 7"):
        solve(weight, 3, 1, "F16", OURS, statistics())


def test_entries_beyond_float16_are_refused():
    weight = a_weight()
    weight[3] *= 1e8
    with pytest.raises(LutRangeError) as caught:
        solve(weight, 3, 1, "F16", OURS, statistics())
    assert caught.value.row == 3


@pytest.mark.parametrize("weight", ["constant", "zero", "few", "outlier"])
@pytest.mark.parametrize("name", ["rtn", "gptq", "sketch"])
def test_hard_weights(name, weight):
    rows = {
        "constant": torch.full((20, COLUMNS), 0.25),
        "zero": torch.zeros(20, COLUMNS),
        "few": (a_weight(20) > 0).float() * 0.5,
        "outlier": a_weight(20).index_fill(1, torch.tensor([3]), 100.0),
    }[weight]
    found = solve(rows, 2, 1, "F16", METHODS[name], statistics())
    assert torch.isfinite(decoded(found)).all()
    if weight != "outlier" and name != "gptq":
        torch.testing.assert_close(decoded(found), rows, rtol=0, atol=1e-3)


def test_shared_factors_change_nothing():
    known = statistics()
    shared = Factors(known)
    for seed in range(2):
        weight = a_weight() * (1 + seed)
        own = solve(weight, 3, 1, "F16", OURS, known)
        other = solve(weight, 3, 1, "F16", OURS, known, factors=shared)
        assert torch.equal(own.indices, other.indices)
        assert own.error == other.error


def test_factors_are_what_they_say():
    known = statistics()
    factor = Factors(known).factor(0.1, act_order=True)
    product = factor.upper.double().T @ factor.upper.double() @ factor.hessian.double()
    torch.testing.assert_close(product, torch.eye(COLUMNS, dtype=torch.float64), rtol=0, atol=1e-3)
    assert torch.equal(factor.upper, factor.upper.triu())
    diagonal = factor.hessian.diagonal()
    assert (diagonal.diff() <= 0).all()
    matrix, dead = damped(known.hessian, 0.1)
    assert torch.equal(matrix[factor.order][:, factor.order], factor.hessian)
    assert dead == 0


def test_unknown_methods_are_refused():
    with pytest.raises(RecipeError, match="method must be one of rtn, kmeans, gptq"):
        method_named("awq")
    assert method_named("sketch") is OURS


def agrees(found: Solution, other: Solution) -> None:
    """The tolerance between devices: sums in another order turn a few codes, and little else.

    A code turns where a value lies between two entries, to within the rounding of the sums before
    it; the columns after it then make up for another error, and the whole row may end elsewhere.
    So nearly all rows are equal, and the objective, which is flat there, is nearly that of the
    other.
    """
    assert other.damping == found.damping
    assert other.error == pytest.approx(found.error, rel=0.005)
    same = (other.indices == found.indices).all(1)
    assert same.float().mean() > 0.95
    near = torch.isclose(other.lut.float(), found.lut.float(), rtol=2e-3, atol=1e-5)
    assert near[same].float().mean() > 0.99
    torch.testing.assert_close(other.squared_norm, found.squared_norm)


@pytest.mark.parametrize("name", ["gptq", "sketch"])
@pytest.mark.parametrize(("bits", "groups"), [(4, 1), (2, 3)])
def test_what_a_gpu_runs_agrees_with_the_compiled_loops(monkeypatch, name, bits, groups):
    """All of it in torch, on the CPU."""
    found = solve(a_weight(), bits, groups, "F16", METHODS[name], statistics())
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))
    other = solve(a_weight(), bits, groups, "F16", METHODS[name], statistics())
    agrees(found, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_agrees_with_the_cpu():
    known = statistics(cross=0.1 * statistics().hessian)
    found = solve(a_weight(), 3, 2, "F16", OURS, known)
    agrees(found, solve(a_weight().cuda(), 3, 2, "F16", OURS, known))
