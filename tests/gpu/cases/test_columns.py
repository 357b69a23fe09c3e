"""The column loops: every code is the nearest to the value that its column has come to.

The loop is replayed in float64 with the errors that the kernel returned, so what may differ is the
rounding of a column's own updates: two for each column before it, of numbers no larger than the sum
of all that was added.
"""

from __future__ import annotations

import pytest
import torch

from sketchconv.kernels import compensation, descent
from sketchconv.kernels.gpu import columns
from sketchconv.kernels.gpu.support import interpreting
from sketchconv.kernels.tables import make_tables

SHAPES = [(1, 37, 24, 1), (2, 16, 40, 3), (3, 5, 33, 1), (4, 33, 64, 2), (8, 17, 20, 1)]


def case(bits: int, rows: int, count: int, groups: int):
    """Values, a triangular and a positive definite matrix, and tables with hard rows."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(bits)
    values = torch.randn(rows, count, generator=generator)
    mix = torch.randn(2 * count, count, generator=generator) / count**0.5
    hessian = mix.T @ mix + 0.1 * torch.eye(count)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    lut = torch.randn(rows, groups, 1 << bits, generator=generator)
    values[0] = 0.25  # constant
    lut[1] = 0.5  # ties
    values[2, 3] = 1e4  # an outlier
    lut[3, :, 1:] = lut[3, :, :1]  # fewer distinct entries than there are
    values[4] = 0.0
    number = torch.randint(0, groups, (count,), generator=generator)
    return values, upper.contiguous(), hessian, make_tables(lut.sort(-1).values, number)


def chosen(tables, codes: torch.Tensor, j: int) -> tuple[torch.Tensor, torch.Tensor]:
    entries = tables.lut[:, tables.groups[j]].double()
    return entries, entries.gather(1, codes[:, j : j + 1].long())[:, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding(shape):
    work, upper, _, tables = case(*shape)
    codes, errors = columns.round_block(work.clone(), upper, tables)
    if interpreting():
        wanted, lost = compensation._block_torch(work.clone(), upper, tables)
        assert torch.equal(codes, wanted)
        assert torch.allclose(errors, lost, rtol=1e-5, atol=1e-5)
    value, spread = work.double(), work.double().abs()
    for j in range(work.shape[1]):
        x, slack = value[:, j], (2 * j + 2) * 2.0**-24 * spread[:, j]
        entries, entry = chosen(tables, codes, j)
        best = (x[:, None] - entries).abs().min(1).values
        assert ((x - entry).abs() <= best + 2 * slack).all()
        error = errors[:, j].double()
        assert ((error * upper[j, j] - (x - entry)).abs() <= slack + 2.0**-22 * best).all()
        step = error[:, None] * upper[j, j + 1 :].double()
        value[:, j + 1 :] -= step
        spread[:, j + 1 :] += step.abs()


@pytest.mark.parametrize("shape", SHAPES)
def test_descent(shape):
    weight, _, hessian, tables = case(*shape)
    start = tables.lut[:, tables.groups].gather(2, torch.zeros_like(weight)[:, :, None].long())
    before = start[:, :, 0].contiguous()
    gradient = (weight - before) @ hessian
    codes, moves = columns.descend_block(gradient.clone(), hessian, tables, before)
    if interpreting():
        wanted, _ = descent._block_torch(gradient.clone(), hessian, tables, before)
        assert torch.equal(codes, wanted)
    value, spread = gradient.double(), gradient.double().abs()
    for j in range(weight.shape[1]):
        own = hessian[j, j].double()
        slack = (2 * j + 4) * 2.0**-24 * (spread[:, j] / own + before[:, j].abs())
        goal = before[:, j].double() + value[:, j] / own
        entries, entry = chosen(tables, codes, j)
        best = (goal[:, None] - entries).abs().min(1).values
        assert ((goal - entry).abs() <= best + 2 * slack).all()
        move = moves[:, j].double()
        assert ((move - (entry - before[:, j])).abs() <= 2.0**-23 * (entry.abs() + 1)).all()
        step = move[:, None] * hessian[j, j + 1 :].double()
        value[:, j + 1 :] -= step
        spread[:, j + 1 :] += step.abs()


def test_a_gpu_takes_these_loops(monkeypatch):
    """As `compensate` and `descend` choose them."""
    for module in (compensation, descent):
        monkeypatch.setattr(module, "why_not", lambda device: None)
        assert module._inside(torch.device("cuda")).__module__ == columns.__name__
        monkeypatch.setattr(module, "why_not", lambda device: "no Triton")
        assert module._inside(torch.device("cuda")) is module._block_torch
        assert module._inside(torch.device("cpu")) is module._block_cpu
