"""Shaped sketches fitted to a Hessian: the objective falls, scales are least squares, codes fit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import sketchconv
from sketchconv.calibration.factors import Factors
from sketchconv.calibration.methods import METHODS
from sketchconv.calibration.options import Calibration
from sketchconv.calibration.rows import Fit
from sketchconv.calibration.shaped import ShapedRows, luts_of, start
from sketchconv.calibration.solve import Solution, solve
from sketchconv.calibration.statistics import Statistics
from sketchconv.errors import RecipeError, WeightError
from sketchconv.formats import grids
from sketchconv.formats.reader import SktchModel
from sketchconv.kernels.calibration_reference import objective
from sketchconv.kernels.scales import refit_scales
from sketchconv.recipe import Override, Recipe, SketchSpec

FORMS = [(grid, bits) for grid, known in grids.GRIDS.items() for bits in known.bits]
every_form = pytest.mark.parametrize(("grid", "bits"), FORMS)
ROWS, COLUMNS, GROUPS = 140, 96, 3
OURS = METHODS["sketch"]


def inputs(seed: int, tokens: int = 600) -> torch.Tensor:
    mixture = np.random.default_rng(0)
    mix = mixture.standard_normal((COLUMNS, COLUMNS)) / 8 + 0.5 * np.eye(COLUMNS)
    scale = 10 ** mixture.uniform(-1, 0.5, COLUMNS)
    rows = np.random.default_rng(seed).standard_normal((tokens, COLUMNS))
    return torch.from_numpy((rows @ mix * scale).astype(np.float32))


def moments(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / x.shape[0]


def statistics() -> Statistics:
    return Statistics(moments(inputs(1)), 600, held_out=moments(inputs(2, 200)))


def a_weight() -> torch.Tensor:
    """Hard rows among random ones: zeros, a constant, one outlier, few values, tiny values."""
    rng = np.random.default_rng(9)
    weight = (rng.standard_t(5, (ROWS, COLUMNS)) * 0.03).astype(np.float32)
    weight[0] = 0
    weight[1] = 0.25
    weight[2, 40] = 30
    weight[3] = np.sign(weight[3])
    weight[4] *= 1e-7
    weight[5] += 2
    return torch.from_numpy(weight)


def decoded(found: Solution, grid: str, bits: int) -> torch.Tensor:
    codes, table = found.indices.numpy(), found.lut.numpy()
    return torch.from_numpy(grids.decode(codes, table, grid, bits))


def search(grid: str, bits: int) -> tuple[ShapedRows, list[torch.Tensor], torch.Tensor]:
    factor = Factors(statistics()).factor(0.03, act_order=True)
    weight = a_weight()
    groups = factor.order // (COLUMNS // GROUPS)
    rows = ShapedRows(weight[:, factor.order], groups, factor, OURS, grid, bits)
    return rows, [start(weight, grid, bits, GROUPS, None, 1).lut], factor.hessian


@every_form
@pytest.mark.parametrize("name", ["rtn", "gptq", "sketch"])
def test_solutions_are_well_formed(grid, bits, name):
    weight = a_weight()
    known = statistics()
    found = solve(weight, bits, GROUPS, "F16", METHODS[name], known, grid=grid)
    assert found.indices.dtype is torch.uint8
    assert int(found.indices.max()) < 1 << bits
    assert bits < 8 or int(found.indices.min()) > 0  # never -128
    assert found.lut.dtype is torch.float16
    assert found.lut.shape == (ROWS, GROUPS, grids.GRIDS[grid].fields)
    assert torch.isfinite(found.lut).all()
    values = decoded(found, grid, bits)
    gap = (weight - values).double()
    torch.testing.assert_close(found.squared_error, gap.square().sum(1))
    assert torch.equal(values[0], torch.zeros(COLUMNS))
    if name != "rtn":
        held = known.held_out
        expected = objective(weight, values, held).sum()
        expected /= objective(weight, torch.zeros_like(weight), held).sum()
        assert found.error == pytest.approx(float(expected), rel=1e-3)


@every_form
def test_the_result_does_not_depend_on_the_threads(grid, bits):
    one, two = (
        solve(a_weight(), bits, GROUPS, "F16", OURS, statistics(), grid=grid, threads=n)
        for n in (1, 2)
    )
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.lut.view(torch.int16), two.lut.view(torch.int16))


@every_form
def test_no_round_raises_the_objective_of_any_row(grid, bits):
    rows, starts, hessian = search(grid, bits)
    found = rows._rounded(starts[0])
    least = rows.errors(found, hessian)
    # Rounding errors of float32 sums are about 1e-6 of what the rows themselves weigh.
    room = 1e-6 * rows.errors(Fit(found.codes, found.lut * 0), hessian)
    for _ in range(4):
        found = rows.improve(found)
        now = rows.errors(found, hessian)
        assert (now <= least + room).all()
        least = now


@every_form
def test_compensation_and_rounds_pay(grid, bits):
    weight, held = a_weight()[6:], statistics().held_out
    lost = {}
    for name in ("rtn", "gptq", "sketch"):
        found = solve(weight, bits, GROUPS, "F16", METHODS[name], statistics(), grid=grid)
        lost[name] = float(objective(weight, decoded(found, grid, bits), held).sum())
    assert lost["sketch"] < lost["gptq"] < 0.6 * lost["rtn"]


@every_form
def test_many_steps_of_the_refit_reach_the_least_squares_solution(grid, bits):
    rows, starts, hessian = search(grid, bits)
    weight, fields = rows.weight.double(), grids.GRIDS[grid].fields
    found = rows._rounded(starts[0])
    codes = rows._turned(found.codes, found.lut)
    chosen = torch.from_numpy(grids.levels(grid, bits))[codes.long()]
    lut = luts_of(found.lut, grid, bits)
    now = lut.flatten(1).gather(1, rows.groups * lut.shape[2] + codes.long())
    gradient = (rows.weight - now) @ hessian
    table = refit_scales(found.lut.float(), chosen, gradient, hessian, rows.groups, 60)
    for row in (10, 50, 139):
        columns = []
        for group in range(GROUPS):
            inside = (rows.groups == group).double()
            columns += [chosen[row].double() * inside, inside][:fields]
        basis = torch.stack(columns)
        exact = torch.linalg.solve(
            basis @ hessian.double() @ basis.T, basis @ hessian.double() @ weight[row]
        )
        torch.testing.assert_close(table[row].flatten().double(), exact, rtol=2e-3, atol=2e-5)


def test_a_column_of_dead_inputs_changes_nothing_for_the_others():
    weight, known = a_weight(), statistics()
    hessian, held = known.hessian.clone(), known.held_out.clone()
    for matrix in (hessian, held):
        matrix[7], matrix[:, 7] = 0, 0
    dead = dataclasses.replace(known, hessian=hessian, held_out=held)
    found = solve(weight, 4, GROUPS, "F16", OURS, dead, grid="affine")
    assert torch.isfinite(found.lut).all()
    assert "1 of 96 inputs were always zero" in " ".join(found.notes)


def test_values_beyond_float16_scales_are_refused():
    weight = a_weight()
    weight[3, 5] = 1e9
    with pytest.raises(WeightError, match="row 3, column 5 is 1000000000"):
        solve(weight, 4, GROUPS, "F16", METHODS["gptq"], statistics(), grid="affine")


def shaped(grid: str = "iq4_nl", **changes) -> Recipe:
    return Recipe(SketchSpec(grid=grid), **changes)


def options(text, **changes) -> Calibration:
    return Calibration((str(text),), tokens=512, seq_len=32, device="cpu", **changes)


def test_a_calibrated_conversion_keeps_grids_by_pattern(llama, text, tmp_path):
    out = tmp_path / "tiny.sktch"
    recipe = shaped(
        exclude=("*.down_proj",),
        overrides=(Override("*.v_proj", grid="affine"), Override("*.o_proj", grid="free", bits=3)),
    )
    report = sketchconv.convert(llama, out, recipe, calibration=options(text), threads=1)
    with SktchModel.open(out) as model:
        found = {n.split(".")[-2]: r.grid for n, r in model.manifest.sketches.items()}
        assert model.manifest.version == "1.1"
    assert found["q_proj"] == "iq4_nl"
    assert found["v_proj"] == "affine"
    assert found["o_proj"] == "free"
    assert report.calibration is not None
    assert not report.calibration.skipped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recover": 256}, "--recover trains LUTs"),
        ({"method": "leanquant"}, "method leanquant makes free LUTs"),
        ({"method": "kmeans"}, "method kmeans makes free LUTs"),
    ],
)
def test_what_needs_free_luts_is_refused_before_any_work(llama, text, tmp_path, changes, message):
    recipe = shaped(exclude=("*.down_proj",))
    with pytest.raises(RecipeError, match=message):
        sketchconv.convert(
            llama, tmp_path / "x.sktch", recipe, calibration=options(text, **changes)
        )
    assert not list(tmp_path.iterdir())
