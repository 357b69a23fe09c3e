"""LUTs as one vector: Adam, rounding, order."""

from __future__ import annotations

import pytest
import torch

from sketchconv.recovery.tables import Tables, sort_tables


def filled(tiny, bits=3, groups=2, lut=torch.float16, rows=20, columns=48):
    torch.manual_seed(bits)
    linear = torch.nn.Linear(columns, rows)
    return tiny.linear(linear, bits, groups, lut)


def test_steps_are_those_of_adam_on_relative_entries(tiny):
    modules = [filled(tiny, 3), filled(tiny, 2, 1, torch.bfloat16)]
    starts = [module.sketch_lut.detach().double() for module in modules]
    units = [start.abs().mean(-1, keepdim=True) for start in starts]
    shares = [torch.zeros_like(start, requires_grad=True) for start in starts]
    groups = [{"params": [shares[0]], "lr": 0.03}, {"params": [shares[1]], "lr": 0.02}]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-15)
    tables = Tables(modules, lambda bits: bits / 100)
    tables.open()
    for _ in range(4):
        adam.zero_grad()
        for module, start, unit, share in zip(modules, starts, units, shares, strict=True):
            slope = torch.randn(start.shape)
            module.sketch_lut.grad = slope.clone()
            share.grad = slope.double() * unit
        assert tables.step(1.0, (0.9, 0.95))
        adam.step()
    for module, start, unit, share in zip(modules, starts, units, shares, strict=True):
        assert module.sketch_lut.dtype is torch.float32
        expected = start + share.detach() * unit
        assert torch.allclose(module.sketch_lut.double(), expected, rtol=1e-5, atol=1e-7)


def test_entries_that_nothing_uses_stay(tiny):
    module = filled(tiny)
    before = module.sketch_lut.detach().clone()
    tables = Tables([module], lambda _: 0.1)
    tables.open()
    module.sketch_lut.grad = torch.zeros(before.shape)
    assert tables.step(1.0, (0.9, 0.95))
    tables.close(keep=True)
    assert torch.equal(module.sketch_lut, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(tiny, value):
    module = filled(tiny)
    tables = Tables([module], lambda _: 0.1)
    tables.open()
    before = tables.values.clone()
    module.sketch_lut.grad = torch.ones_like(module.sketch_lut)
    module.sketch_lut.grad[0, 0, 0] = value
    assert not tables.step(1.0, (0.9, 0.95))
    assert torch.equal(tables.values, before)


@pytest.mark.parametrize("lut", [torch.float16, torch.bfloat16, torch.float32])
def test_close_rounds_or_gives_back(tiny, lut):
    module = filled(tiny, lut=lut)
    own, before = module.sketch_lut, module.sketch_lut.detach().clone()
    for keep in (False, True):
        tables = Tables([module], lambda _: 0.1)
        tables.open()
        tables.values.mul_(1.0001)
        expected = tables.rounded()
        assert torch.equal(expected, (before.float() * 1.0001).to(lut).float().view(-1))
        tables.close(keep)
        assert module.sketch_lut is own
        assert own.dtype is lut
        assert not own.requires_grad
        assert torch.equal(own.float().view(-1), expected if keep else before.float().view(-1))


def test_shown_values_pass(tiny):
    module = filled(tiny)
    tables = Tables([module], lambda _: 0.1)
    tables.open()
    before = tables.values.clone()
    with tables.shown(torch.ones_like(before)):
        assert (module.sketch_lut == 1).all()
        assert (module.dequantize() == 1).all()
    assert torch.equal(module.sketch_lut.view(-1), before)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_sorting_keeps_every_weight(tiny, bits, groups):
    module = filled(tiny, bits, groups, columns=51)
    generator = torch.Generator().manual_seed(bits)
    lut = module.sketch_lut
    order = torch.randperm(2**bits, generator=generator)
    lut.data = lut.detach()[..., order].contiguous()
    lut.data[3] = 0.5  # all entries the same
    lut.data[4, :, ::2] = lut.data[4, :, :1].clone()  # ties
    before = module.dequantize()
    wrong = sort_tables(module)
    assert torch.equal(module.dequantize(), before)
    assert (lut[..., 1:] >= lut[..., :-1]).all()
    assert (wrong > 0) == (not torch.equal(order, torch.arange(2**bits)))
    assert sort_tables(module) == 0
