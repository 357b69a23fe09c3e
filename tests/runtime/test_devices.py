"""Which kernels a module uses, and the order of its index, with stand-ins for the GPU's."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from sketchconv.kernels import plain
from sketchconv.runtime import devices
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear
from sketchconv.runtime.tied import TiedSketchLinear

# Where each operation takes its index
PLACES = {
    "multiply": 1,
    "grad_input": 1,
    "grad_lut": 2,
    "decode": 0,
    "gather": 1,
    "grad_gather": 2,
}


class Gpu:
    """Takes CPU tensors for a GPU's; its order of an index is that of the disk, reversed."""

    def __init__(self, monkeypatch, reason=None):
        self.calls, self.asked = [], []
        ops, support, layout = (types.ModuleType(name) for name in ("ops", "support", "layout"))

        def why_not(device):
            self.asked.append(device)
            return reason

        def turn(index, bits, group_columns):
            assert index.shape[2] == -(-group_columns * bits // 8)
            self.calls.append("turn")
            return index.flip(-1)

        support.why_not, layout.repack, layout.restore = why_not, turn, turn
        for name in PLACES:
            setattr(ops, name, self.wrapped(name))
        for module in (ops, support, layout):
            monkeypatch.setitem(sys.modules, f"{devices.GPU}.{module.__name__}", module)
        monkeypatch.setattr(devices, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(SketchLinear, "packed", lambda self: None)
        monkeypatch.setattr(SketchEmbedding, "packed", lambda self: None)
        from sketchconv.runtime import functions

        monkeypatch.setattr(functions, "packed_of", lambda *_: None)
        devices._kernels.cache_clear()

    def wrapped(self, name):
        place = PLACES[name]

        def run(*args, layout):
            assert layout == "device"
            self.calls.append(name)
            args = list(args)
            args[place] = args[place].flip(-1)
            return getattr(plain, name)(*args)

        return run


@pytest.fixture
def plain_results(layers):
    """What plain torch gives, made before the stand-ins are in place."""
    module, rows = layers.linear(), layers.embedding(columns=48)
    x = torch.randn(2, 48)
    y = module(x)
    y.square().sum().backward()
    return module, rows, x, y.detach(), module.sketch_lut.grad.clone()


@pytest.fixture
def gpu(plain_results, monkeypatch):
    yield Gpu(monkeypatch)
    devices._kernels.cache_clear()


def test_modules_use_the_kernels_of_the_gpu(plain_results, gpu):
    module, rows, x, y, grad = plain_results
    disk = module.sketch_index.clone()
    module.sketch_lut.grad = None
    x = x.requires_grad_()
    found = module(x)
    found.square().sum().backward()
    assert torch.allclose(found, y, atol=1e-4)
    assert torch.allclose(module.sketch_lut.grad, grad, rtol=1e-4, atol=1e-3)
    assert gpu.calls == ["turn", "multiply", "grad_input", "grad_lut"]
    assert torch.equal(module.sketch_index, disk.flip(-1))
    with torch.no_grad():
        module(x)
        ids = torch.tensor([[3, 29]])
        assert rows(ids).shape == (1, 2, 48)
        weight = module.dequantize()
    assert gpu.calls[4:] == ["multiply", "turn", "gather", "decode"]
    assert torch.allclose(y, x.detach() @ weight.T + module.bias, atol=1e-4)
    gpu.calls.clear()
    rows(ids).sum().backward()
    assert rows.sketch_lut.grad[3].abs().sum() > 0
    assert gpu.calls == ["gather", "grad_gather"]


def test_the_order_of_the_disk_comes_back(plain_results, gpu):
    module, _, x, y, _ = plain_results
    disk = module.sketch_index.clone()
    module(x)
    assert module.layout == "device"
    assert torch.equal(module.state_dict()["sketch_index"], disk)
    assert torch.equal(module.sketch_index, disk.flip(-1))  # still as the kernels want it
    assert torch.equal(copy.deepcopy(module).sketch_index, disk)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded.sketch_index, disk)
    assert torch.allclose(loaded(x), y, atol=1e-4)
    module.cpu()
    assert (module.layout, module.sketch_index.tolist()) == ("planes-le", disk.tolist())
    assert torch.allclose(module(x), y, atol=1e-4)


def test_new_tensors_are_put_in_order_again(plain_results, gpu):
    module, _, x, y, _ = plain_results
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module(x)
    module.load_state_dict(state)
    assert torch.allclose(module(x), y, atol=1e-4)
    module.load_state_dict(state, assign=True)
    assert torch.allclose(module(x), y, atol=1e-4)
    module.sketch_index = state["sketch_index"].clone()
    assert torch.allclose(module(x), y, atol=1e-4)
    module.sketch_index.data = state["sketch_index"].clone()
    assert torch.equal(module.state_dict()["sketch_index"], state["sketch_index"])
    assert torch.allclose(module(x), y, atol=1e-4)
    assert module.layout == "device"


def test_settling_orders_what_tracers_will_read(plain_results, gpu):
    module, _, x, y, _ = plain_results
    module.settle()
    assert module.layout == "device"
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(x), y, atol=1e-4)
    assert gpu.calls == ["turn", "multiply"]


def test_tied_modules_follow_their_owner(layers, monkeypatch):
    rows = layers.embedding()
    head, x = TiedSketchLinear(rows), torch.randn(2, 48)
    y = head(x).detach()
    gpu = Gpu(monkeypatch)
    assert torch.allclose(head(x), y, atol=1e-4)
    assert head.layout == rows.layout == "device"
    rows(torch.tensor([1]))
    assert gpu.calls == ["turn", "multiply", "gather"]
    devices._kernels.cache_clear()


def test_without_kernels_plain_torch_runs_and_says_why_once(plain_results, monkeypatch):
    module, _, x, y, _ = plain_results
    gpu = Gpu(monkeypatch, reason="triton is missing")
    with pytest.warns(UserWarning, match="run as plain torch operations, slowly: triton is miss"):
        found = module(x)
    assert torch.allclose(found, y, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)
    assert not gpu.calls
    assert len(gpu.asked) == 1
    devices._kernels.cache_clear()


def test_the_cpu_asks_nobody(layers, monkeypatch):
    monkeypatch.setattr(devices, "_kernels", None)
    layers.linear()(torch.randn(2, 48))
    layers.embedding()(torch.tensor([1]))


def test_different_devices_are_an_error(layers):
    meta, here = layers.linear().to("meta"), layers.linear()
    for module, x in ((meta, torch.ones(2, 48)), (here, torch.ones(2, 48, device="meta"))):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            module(x)
    with pytest.raises(RuntimeError, match="ids is on meta, the index on cpu and the LUT on cpu"):
        layers.embedding()(torch.ones(2, dtype=torch.int64, device="meta"))
    here.sketch_lut = nn.Parameter(here.sketch_lut.to("meta"))
    with pytest.raises(RuntimeError, match="the LUT on meta"):
        here(torch.ones(2, 48))


def test_inputs_of_other_kinds_are_refused(layers):
    module = layers.linear()
    with pytest.raises(ValueError, match=r"x must be float \[\.\.\., 48\], got .*int64 \(2, 48"):
        module(torch.ones(2, 48, dtype=torch.int64))
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match="47"):
            module(torch.ones(2, 47, dtype=dtype))


INTERPRETED = """
import inspect
import torch
from sketchconv.kernels import plain
from sketchconv.kernels.gpu import ops
from sketchconv.runtime import devices, functions
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear

for name in ops.__all__:
    ours = [*inspect.signature(getattr(plain, name)).parameters, "layout"]
    assert list(inspect.signature(getattr(ops, name)).parameters) == ours, name
torch.manual_seed(0)
module = SketchLinear(64, 32, 3, 2, lut_dtype=torch.float32)
rows = SketchEmbedding(30, 64, 3, 2, lut_dtype=torch.float32)
for each in (module, rows):
    each.sketch_index.random_(0, 256)
    each.sketch_lut.data.normal_()
x = torch.randn(3, 64, requires_grad=True)

def run():
    x.grad = None
    y, z = module(x), rows(torch.tensor([[1, 4], [4, 29]]))
    slopes = torch.autograd.grad(
        y.square().sum() + z.square().sum(), (x, module.sketch_lut, rows.sketch_lut)
    )
    return y, z, *slopes, module.dequantize()

expected = run()
devices.on_gpu = lambda tensor: True
functions.packed_of = lambda *_: None
SketchLinear.packed = SketchEmbedding.packed = lambda self: None
for one, other in zip(run(), expected, strict=True):
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-4)
assert module.layout == rows.layout == "device"
"""


def test_modules_and_real_gpu_kernels_agree_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-P", "-c", INTERPRETED], check=True, env=environment)
