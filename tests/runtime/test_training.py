"""Training through sketch modules: precision, checkpointing, autocast, what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sketchconv.kernels import plain
from sketchconv.runtime import functions


def dense(module, dtype=torch.float64):
    """An `nn.Linear` with the decoded weight."""
    twin = nn.Linear(module.columns, module.rows, dtype=dtype)
    twin.weight.data, twin.bias.data = module.dequantize(dtype), module.bias.detach().to(dtype)
    return twin


def by_code(module, weight_grad):
    codes = plain.unpack(module.sketch_index, module.bits, module.columns // module.groups)
    total = torch.zeros(module.sketch_lut.shape, dtype=weight_grad.dtype)
    return total.scatter_add_(2, codes.long(), weight_grad.reshape(codes.shape))


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)]
)
def test_gradients_against_float64(layers, dtype, unit, tokens):
    module = layers.linear(51, 20, 3, 3).to(dtype)
    twin = dense(module)
    x = torch.randn(tokens, 51).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    target = torch.randn(tokens, 20).to(dtype)
    module(x).backward(target)
    twin(wide).backward(target.double())
    assert x.grad.dtype is dtype
    sizes = target.double().abs() @ module.dequantize(torch.float64).abs()
    assert ((x.grad - wide.grad).abs() <= 2 * unit * sizes).all()
    assert module.sketch_lut.grad.dtype is torch.float32
    spread = by_code(module, target.double().abs().T @ wide.detach().abs())
    off = (module.sketch_lut.grad.double() - by_code(module, twin.weight.grad)).abs()
    assert (off <= 2.0**-15 * spread).all()  # never rounded to the dtype of x


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(layers, reentrant):
    module = layers.linear()
    x = torch.randn(2, 5, 48, requires_grad=True)
    module(x).square().sum().backward()
    expected = x.grad.clone(), module.sketch_lut.grad.clone()
    x.grad = module.sketch_lut.grad = None
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(module.sketch_lut.grad, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, 40])
def test_autocast_computes_as_a_linear_does(layers, dtype, tokens):
    module = layers.linear(lut=torch.float16)
    twin = dense(module, torch.float32)
    x = torch.randn(tokens, 48, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        found, expected = module(x), twin(y)
        found.float().sum().backward()
        expected.float().sum().backward()
        assert module(x.double()).dtype is torch.float64
    assert found.dtype is expected.dtype is dtype
    unit = 2.0**-7 if dtype is torch.bfloat16 else 2.0**-10
    sizes = x.detach().abs() @ twin.weight.detach().abs().T + twin.bias.detach().abs()
    assert ((found.float() - expected.float()).abs() <= 2 * unit * sizes).all()
    assert x.grad.dtype is torch.float32
    assert module.sketch_lut.grad.dtype is torch.float16
    limit = 2 * unit * float(twin.weight.detach().abs().sum(0).max())
    assert torch.allclose(x.grad, y.grad, rtol=0, atol=limit)


def test_autocast_leaves_kernels_alone(layers):
    """Sums stay float32: under autocast torch would round the tiles' products."""
    module = layers.linear(bias=False)
    grad, x = torch.randn(40, 20), torch.randn(40, 48)
    args = (module.sketch_index, module.sketch_lut.detach())
    expected = functions.grad_lut(grad, x, *args), functions.grad_input(grad, *args, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = functions.grad_lut(grad, x, *args), functions.grad_input(grad, *args, 48)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_siblings_keep_one_input_and_nothing_else(layers):
    modules = [layers.linear() for _ in range(3)]
    x = torch.randn(20, 48, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = sum(module(x).sum() for module in modules)
    held = {t.data_ptr() for t in kept}
    own = {t.data_ptr() for m in modules for t in (m.sketch_index, m.sketch_lut)}
    assert held == {x.data_ptr()} | own
    total.backward()


def test_a_frozen_sketch_keeps_no_input(layers):
    module = layers.linear().requires_grad_(False)
    x = torch.randn(20, 48, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    assert {t.data_ptr() for t in kept} == {
        module.sketch_index.data_ptr(), module.sketch_lut.data_ptr()
    }  # fmt: skip


def test_a_lut_changed_between_forward_and_backward_is_noticed(layers):
    module = layers.linear()
    y = module(torch.randn(3, 48))
    with torch.no_grad():
        module.sketch_lut.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
