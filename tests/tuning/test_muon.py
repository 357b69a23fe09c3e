"""Muon over LUTs: its orthogonal factor against a singular value decomposition, and its steps."""

from __future__ import annotations

import math

import pytest
import torch

import sketchconv
from sketchconv.errors import TuningError
from sketchconv.tuning.checkpoints import load_optimizer, save_optimizer
from sketchconv.tuning.masters import training_of
from sketchconv.tuning.muon import MOST_COLUMNS, SCALE, LutMuon, directions, orthogonal
from sketchconv.tuning.optimizer import lut_optimizer


def reference(matrix):
    """``U V^T`` in float64."""
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (20, 20), (3, 40, 16)])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_the_orthogonal_factor(shape, size):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    matrix[..., 0] *= 1e3  # one direction that a float32 square would leave alone with noise
    assert torch.allclose(orthogonal(matrix).double(), reference(matrix), atol=1e-6)


def test_hard_matrices_stay_small():
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(40, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    constant = torch.full((40, 16), 3.0)
    outlier = torch.zeros(40, 16)
    outlier[3, 5] = 7.0
    for matrix in (thin, constant, outlier):
        found = orthogonal(matrix).double()
        assert float(torch.linalg.matrix_norm(found, 2)) < 1.001
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        kept = s > 1e-5 * s[0]
        inner = u[:, kept].T @ found @ v[kept].T
        assert torch.allclose(inner, torch.eye(len(inner), dtype=torch.float64), atol=1e-5)
    assert bool((orthogonal(torch.zeros(40, 16)) == 0).all())


def test_wide_tables_are_taken_by_group():
    gradient = torch.randn(24, 2, MOST_COLUMNS, generator=torch.Generator().manual_seed(0))
    found = directions(gradient)
    for group in range(2):
        wanted = reference(gradient[:, group]) * math.sqrt(MOST_COLUMNS)
        assert torch.allclose(found[:, group].double(), wanted, atol=1e-4)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m.parameter.shape, generator=generator) for m in training_of(model).masters]


def stepped(model, optimizer, seed):
    for master, gradient in zip(training_of(model).masters, gradients(model, seed), strict=True):
        master.parameter.grad = gradient
    optimizer.step()


@pytest.mark.parametrize("relative", [True, False])
def test_steps(tiny, relative):
    """Two steps against the formulas of the paper."""
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    masters = training_of(model).masters
    optimizer = lut_optimizer(model, 1e-2, optimizer="muon", relative=relative, momentum=0.8)
    before = [m.parameter.detach().double() for m in masters]
    stepped(model, optimizer, 1)
    stepped(model, optimizer, 2)
    for n, master in enumerate(masters):
        rows, wanted, average = master.module.rows, before[n], 0.0
        for seed in (1, 2):
            gradient = gradients(model, seed)[n].double().view(rows, -1)
            average = 0.8 * average + gradient
            factor = reference(gradient + 0.8 * average)
            unit = float(master.unit.mean()) if relative else 1.0
            size = SCALE * 1e-2 * unit * math.sqrt(max(factor.shape))
            wanted = wanted - size * factor.view(wanted.shape)
        assert torch.allclose(master.parameter.double(), wanted, atol=1e-6)


def test_weight_decay_shrinks(tiny):
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    master = training_of(model).masters[0]
    before = master.parameter.detach().clone()
    optimizer = lut_optimizer(model, 1e-2, optimizer="muon", weight_decay=0.5)
    for m in training_of(model).masters:
        m.parameter.grad = torch.zeros_like(m.parameter)
    optimizer.step()
    assert torch.allclose(master.parameter, before * (1 - 0.5e-2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_changes_nothing(tiny, value):
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    masters = training_of(model).masters
    optimizer = LutMuon(masters, 1e-2)
    before = [m.parameter.detach().clone() for m in masters]
    for master, gradient in zip(masters, gradients(model, 0), strict=True):
        master.parameter.grad = gradient
    masters[5].parameter.grad[0, 0, 1] = value
    optimizer.step()
    assert optimizer.broken
    assert all(torch.equal(m.parameter, b) for m, b in zip(masters, before, strict=True))


def test_the_state_is_kept_and_is_of_one_optimizer(tiny, tmp_path):
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    names = [m.name for m in training_of(model).masters]
    optimizer = lut_optimizer(model, 1e-2, optimizer="muon")
    stepped(model, optimizer, 1)
    save_optimizer(tmp_path, optimizer, {"last_epoch": 1}, names)
    again = lut_optimizer(model, 3e-2, optimizer="muon")
    assert load_optimizer(tmp_path, again, names) == {"last_epoch": 1}
    assert again.param_groups[0]["lr"] == 1e-2
    for parameter in optimizer.param_groups[0]["params"]:
        kept = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(again.state[parameter]["momentum_buffer"], kept)
    with pytest.raises(TuningError, match=r"of LutMuon, this training has LutAdamW"):
        load_optimizer(tmp_path, lut_optimizer(model, 1e-2, optimizer="adamw"), names)
    with pytest.raises(TuningError, match="adamw, muon"):
        lut_optimizer(model, 1e-2, optimizer="sgd")
