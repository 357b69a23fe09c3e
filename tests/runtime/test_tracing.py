"""Sketch modules under tracers and transforms: compile, export, fake tensors, torch.func."""

from __future__ import annotations

import pytest
import torch
from torch import func, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from sketchconv.runtime.modules import SketchLinear
from sketchconv.runtime.tied import TiedSketchLinear


class Net(nn.Module):
    """An embedding, a layer, and a head tied to the embedding."""

    def __init__(self, layers):
        super().__init__()
        self.embedding = layers.embedding(padding_idx=3)
        self.layer = layers.linear(48, 48)
        self.head = TiedSketchLinear(self.embedding)

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids)).tanh())


@pytest.fixture
def net(layers):
    torch._dynamo.reset()
    return Net(layers)


@pytest.fixture
def words():
    return torch.tensor([[1, 3, 5], [7, 1, 0]])


def gradients(model, run, words):
    model.zero_grad()
    y = run(words)
    y.square().mean().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_whole_forward_and_backward(net, words, backend):
    expected, grads = gradients(net, net, words)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    found, same = gradients(net, compiled, words)
    assert torch.allclose(found, expected, atol=1e-5)
    assert grads.keys() == same.keys() == {"embedding.sketch_lut", "layer.sketch_lut", "layer.bias"}
    assert all(torch.allclose(same[name], grads[name], atol=1e-5) for name in grads)


def test_compiled_for_any_number_of_tokens(layers):
    torch._dynamo.reset()
    module = layers.linear()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (2, 3, 9):
        x = torch.randn(tokens, 48)
        assert torch.allclose(compiled(x), module(x), atol=1e-5)


def test_compiled_under_autocast(layers):
    torch._dynamo.reset()
    module = layers.linear()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = compiled(x), module(x)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_hold_our_operations_and_run(net, words, strict, tmp_path):
    program = torch.export.export(net, (words,), strict=strict)
    calls = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"sketchconv.embedding.default", "sketchconv.linear.default"} <= calls
    torch.export.save(program, tmp_path / "program.pt2")
    again = torch.export.load(tmp_path / "program.pt2")
    with torch.no_grad():
        assert torch.allclose(again.module()(words), net(words), atol=1e-6)


def test_recorded_by_make_fx(layers):
    module = layers.linear(bias=False)
    graph = make_fx(lambda x: module(x))(torch.randn(2, 48)).graph
    calls = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert calls == ["sketchconv.linear.default"]


def test_fake_and_meta_tensors_have_the_shapes(layers):
    with FakeTensorMode():
        module = SketchLinear(48, 20, 4, 2)
        y = module(torch.empty(2, 3, 48, dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((2, 3, 20), torch.bfloat16)
    meta = layers.linear().to("meta")
    x = torch.empty(5, 48, device="meta", requires_grad=True)
    y = meta(x)
    y.sum().backward()
    assert (y.shape, y.device.type) == ((5, 20), "meta")
    assert x.grad.shape == x.shape
    assert meta.sketch_lut.grad.shape == meta.sketch_lut.shape
    rows = layers.embedding(dtype=torch.float16).to("meta")
    found = rows(torch.empty(2, 3, dtype=torch.int64, device="meta"))
    assert (found.shape, found.dtype) == ((2, 3, 48), torch.float16)


@pytest.mark.parametrize("trained", [False, True])
def test_operations_pass_the_checks_of_torch(layers, words, trained):
    linear, rows = layers.linear(), layers.embedding()
    lut = linear.sketch_lut.detach().clone().requires_grad_(trained)
    x = torch.randn(4, 48, requires_grad=trained)
    opcheck(torch.ops.sketchconv.linear.default, (x, linear.sketch_index, lut, "planes-le"))
    lut = rows.sketch_lut.detach().clone().requires_grad_(trained)
    args = (words, rows.sketch_index, lut, 48, torch.bfloat16, 3, "planes-le")
    opcheck(torch.ops.sketchconv.embedding.default, args)


def test_transforms_of_torch_func(layers):
    module = layers.linear()
    parameters, x = dict(module.named_parameters()), torch.randn(5, 48)

    def loss(parameters, x):
        return func.functional_call(module, parameters, (x,)).square().sum()

    found = func.grad(loss)(parameters, x)
    loss(parameters, x).backward()
    for name in ("sketch_lut", "bias"):
        assert torch.allclose(found[name], parameters[name].grad, rtol=1e-4, atol=1e-3)
    assert torch.allclose(func.vmap(module)(x), module(x), atol=1e-5)
    each = func.vmap(func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    assert torch.allclose(each["sketch_lut"].sum(0), found["sketch_lut"], rtol=1e-4, atol=1e-3)
    weight = module.dequantize()
    assert torch.allclose(func.jacrev(module)(x[0]), weight, atol=1e-5)
    assert torch.allclose(func.jacfwd(module)(x[0]), weight, atol=1e-5)
    curved = func.hessian(lambda x: module(x).square().sum())(x[0])
    assert torch.allclose(curved, 2 * weight.T @ weight, rtol=1e-4, atol=1e-3)


def test_transforms_of_an_embedding(layers, words):
    module = layers.embedding(padding_idx=3)
    parameters = dict(module.named_parameters())

    def loss(parameters, words):
        return func.functional_call(module, parameters, (words,)).square().sum()

    found = func.grad(loss)(parameters, words)["sketch_lut"]
    loss(parameters, words).backward()
    assert torch.allclose(found, module.sketch_lut.grad, rtol=1e-5, atol=1e-5)
    assert found[3].abs().sum() == 0
    assert torch.equal(func.vmap(module)(words), module(words))


def test_functional_call_uses_the_given_tensors(layers):
    module, x = layers.linear(), torch.randn(2, 48)
    before = module(x).detach()
    zero = {"sketch_lut": torch.zeros_like(module.sketch_lut)}
    with torch.no_grad():
        found = func.functional_call(module, zero, (x,))
    assert torch.equal(found, module.bias.expand(2, -1))
    assert torch.equal(module(x), before)


def test_forward_mode_differentiation(layers):
    module, x = layers.linear(bias=False), torch.randn(2, 48)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, x + 1))).tangent
    assert torch.allclose(tangent, module(x + 1), atol=1e-4)


def test_a_second_derivative_is_refused(layers):
    module = layers.linear()
    x = torch.randn(2, 48, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()
    index, lut = module.sketch_index, module.sketch_lut
    y = torch.ops.sketchconv.linear(x, index, lut, "planes-le")
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        slope.sum().backward()
