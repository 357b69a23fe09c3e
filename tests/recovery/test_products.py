"""Products with weights that are decoded once per step."""

from __future__ import annotations

import pytest
import torch

from sketchconv.kernels import plain
from sketchconv.recovery import products
from sketchconv.recovery.products import decoded
from sketchconv.runtime.modules import SketchLinear


def gradients(module, x, slope):
    x = x.detach().clone().requires_grad_()
    module.sketch_lut.requires_grad_().grad = None
    y = module(x)
    y.backward(slope)
    return y.detach(), x.grad, module.sketch_lut.grad


@pytest.mark.parametrize(
    ("bits", "columns"),
    [(1, 51), (3, 51), (4, 51), (8, 51), (3, 1539)],  # the last one woven
)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-7)])
def test_gradients(tiny, monkeypatch, bits, columns, groups, dtype, unit):
    monkeypatch.setattr(products, "TILE_WEIGHTS", 8 * columns)
    monkeypatch.setattr(products, "LEAST_ROWS", 8)
    module = tiny.linear(torch.nn.Linear(columns, 20), bits, groups, torch.float32)
    x, slope = torch.randn(2, 9, columns).to(dtype), torch.randn(2, 9, 20).to(dtype)
    with decoded([module], dtype) as weights:
        weights.refresh()
        found = gradients(module, x, slope)
    assert "forward" not in vars(module)
    wide, far = x.double().view(-1, columns), slope.double().view(-1, 20)
    weight = module.dequantize().to(dtype).double()
    y = wide @ weight.T + module.bias.double()
    sizes = wide.abs() @ weight.abs().T + module.bias.abs().double()
    assert found[0].dtype is found[1].dtype is dtype
    assert ((found[0].double().view(-1, 20) - y).abs() <= unit * sizes).all()
    near = (found[1].double().view(-1, columns) - far @ weight).abs()
    assert (near <= unit * (far.abs() @ weight.abs())).all()
    assert found[2].dtype is torch.float32
    dense, spread = torch.zeros_like(found[2]).double(), torch.zeros_like(found[2]).double()
    plain.add_by_code(dense, module.disk_index(), far.T @ wide)
    plain.add_by_code(spread, module.disk_index(), far.abs().T @ wide.abs())
    assert ((found[2].double() - dense).abs() <= unit * spread + 1e-6).all()


def test_weights_change_only_with_refresh(tiny):
    module = tiny.linear(torch.nn.Linear(16, 8), 2, 1, torch.float32)
    x = torch.randn(3, 16)
    with decoded([module], torch.float32) as weights, torch.no_grad():
        weights.refresh()
        before = module(x)
        module.sketch_lut.data.mul_(2)
        assert torch.equal(module(x), before)
        weights.refresh()
        assert not torch.equal(module(x), before)
        assert torch.allclose(module(x), x @ module.dequantize().T + module.bias, atol=1e-5)


def test_other_dtypes_go_the_usual_way(tiny):
    module = tiny.linear(torch.nn.Linear(16, 8), 2, 1, torch.float32)
    x = torch.randn(3, 16, dtype=torch.float64)
    expected = module(x)
    with decoded([module], torch.float32) as weights:
        weights.refresh()
        assert torch.equal(module(x), expected)


def test_without_room_the_modules_are_left_alone(tiny):
    module = tiny.linear(torch.nn.Linear(16, 8), 2, 1, torch.float32)
    with decoded([module], None) as weights:
        weights.refresh()
        assert "forward" not in vars(module)


def test_a_forward_of_somebody_else_stays(tiny):
    module = tiny.linear(torch.nn.Linear(16, 8), 2, 1, torch.float32)
    module.forward = hooked = lambda x: SketchLinear.forward(module, x) + 1
    with decoded([module], torch.float32) as weights:
        weights.refresh()
        assert module.forward is hooked
    assert module.forward is hooked
