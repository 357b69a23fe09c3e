"""Modules whose index the CPU's kernels put into the order `woven`: nothing else may notice."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

import sketchconv
from sketchconv.kernels import dispatch, plain, woven
from sketchconv.kernels.orders import PLANES, WOVEN
from sketchconv.runtime import functions, ops
from sketchconv.runtime.modules import SketchLinear
from sketchconv.runtime.tied import TiedSketchLinear

reason = dispatch.why_not(dispatch.AVX512_FEATURES)
pytestmark = pytest.mark.skipif(reason is not None, reason=f"avx512: {reason}")
COLUMNS = 1200  # two groups of 512 woven columns and 88 others


@pytest.fixture
def module(layers):
    return layers.linear(COLUMNS, 20, 3)


def disk(module):
    """Index and LUT as they are before any use."""
    assert module.layout == PLANES
    return module.sketch_index.clone(), module.sketch_lut.detach().clone()


def test_products_are_those_of_the_disk_order(module):
    index, lut = disk(module)
    bias = module.bias.detach()
    for shape in ((1, COLUMNS), (3, COLUMNS), (2, 9, COLUMNS)):
        x = torch.randn(shape)
        for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 1.0), (torch.float64, 1e-4)):
            y = module(x.to(dtype))
            expected = plain.multiply(x.to(dtype).double(), index, lut.double()) + bias
            assert y.dtype is dtype
            assert torch.allclose(y.double(), expected, atol=near)
    assert module.layout == WOVEN
    assert module.sketch_index.shape == index.shape
    assert torch.equal(module.dequantize(), plain.decode(index, lut, COLUMNS, torch.float32))


def test_the_state_has_the_order_of_the_disk(module, layers):
    index, _ = disk(module)
    x = torch.randn(1, COLUMNS)
    expected = module(x)
    assert not torch.equal(module.sketch_index, index)
    assert torch.equal(module.state_dict()["sketch_index"], index)
    assert torch.equal(module.disk_index(), index)
    other = layers.linear(COLUMNS, 20, 3)
    other.sketch_index.zero_()
    other(x)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.sketch_index, index)
    assert torch.equal(other(x), expected)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (twin.layout, module.layout) == (PLANES, WOVEN)
        assert torch.equal(twin.sketch_index, index)
        assert torch.equal(twin(x), expected)
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved)["sketch_index"], index)


def test_moves_and_casts_go_through_the_order_of_the_disk(module):
    index, _ = disk(module)
    x = torch.randn(1, COLUMNS)
    module.bias.data.round_()
    expected = module(x)
    module.to(torch.bfloat16)
    assert torch.equal(module.sketch_index, index)
    module.float()
    assert torch.equal(module(x), expected)
    assert module.layout == WOVEN
    module.settle()
    assert torch.equal(module.disk_index(), index)
    module.to("meta")
    assert (module.packed(), module.layout) == (None, PLANES)


def test_tensors_put_in_its_place_have_the_order_of_the_disk(module):
    index, _ = disk(module)
    x = torch.randn(1, COLUMNS)
    expected = module(x)
    for change in (
        lambda: setattr(module, "sketch_index", index.clone()),
        lambda: setattr(module.sketch_index, "data", index.clone()),
    ):
        change()
        assert torch.equal(module.disk_index(), index)
        assert torch.equal(module(x), expected)
        assert module.layout == WOVEN


def test_shared_memory_is_left_as_it_is(module):
    index, _ = disk(module)
    expected = module(torch.ones(1, COLUMNS))
    module.share_memory()
    assert torch.allclose(module(torch.ones(1, COLUMNS)), expected, atol=1e-4)
    assert module.layout == PLANES
    assert module.sketch_index.is_shared()
    assert torch.equal(module.sketch_index, index)


def test_gradients_after_a_first_use_in_inference_mode(module):
    index, lut = disk(module)
    with torch.inference_mode():
        module(torch.randn(1, COLUMNS))
    x = torch.randn(4, COLUMNS, requires_grad=True)
    up = torch.randn(4, 20)
    module(x).backward(up)
    assert torch.allclose(x.grad, plain.grad_input(up, index, lut, COLUMNS), atol=1e-4)
    expected = plain.grad_lut(up, x.detach(), index, lut)
    assert torch.allclose(module.sketch_lut.grad, expected, atol=1e-3)
    wide = torch.randn(2, COLUMNS, dtype=torch.float64, requires_grad=True)
    module.sketch_lut.grad = None
    module(wide).backward(torch.ones(2, 20, dtype=torch.float64))
    ones = torch.ones(2, 20, dtype=torch.float64)
    assert torch.allclose(wide.grad, plain.grad_input(ones, index, lut.double(), COLUMNS))
    expected = plain.grad_lut(ones, wide.detach(), index, lut.double())
    assert torch.allclose(module.sketch_lut.grad.double(), expected, atol=1e-4)


def test_transforms_and_operations_of_tracers(module):
    index, lut = disk(module)
    x = torch.randn(3, COLUMNS)
    expected = module(x).detach()
    assert module.layout == WOVEN
    with torch.no_grad():
        mapped = torch.func.vmap(module)(x)
    assert torch.allclose(mapped, expected, atol=1e-4)
    x = x.requires_grad_()
    y = ops.linear(x, module.sketch_index, module.sketch_lut, module.layout)
    assert torch.equal(y + module.bias, expected)
    y.sum().backward()
    assert torch.allclose(
        x.grad, plain.grad_input(torch.ones(3, 20), index, lut, COLUMNS), atol=1e-4
    )


def test_a_program_of_another_machine_reads_it_too(module, monkeypatch):
    """Traced where the order was woven, run where no kernel reads it."""
    index, lut = disk(module)
    turned = woven.weave(index, 3, COLUMNS // 2)
    monkeypatch.setattr(functions, "reads_woven", lambda: False)
    packed = functions.packed_of(turned, lut, COLUMNS, WOVEN)
    assert packed.order == PLANES
    assert torch.equal(packed.index, index)


def test_embeddings_and_heads_that_share_them(layers):
    rows = layers.embedding(40, COLUMNS)
    index, lut = disk(rows)
    head = TiedSketchLinear(rows)
    x = torch.randn(2, COLUMNS)
    expected = plain.multiply(x.double(), index, lut.double())
    assert torch.allclose(head(x).double(), expected, atol=1e-4)
    assert head.layout == rows.layout == WOVEN
    ids = torch.tensor([[3, 39], [0, 3]])
    decoded = plain.decode(index, lut, COLUMNS, torch.float32)
    assert torch.equal(rows(ids), decoded[ids])
    rows(ids).sum().backward()
    expected = plain.grad_gather(torch.ones(2, 2, COLUMNS), ids, index, lut, None)
    assert torch.allclose(rows.sketch_lut.grad, expected)
    assert torch.equal(rows.state_dict()["sketch_index"], index)


def test_threads_that_use_a_module_first_turn_it_once(layers):
    x = torch.randn(1, COLUMNS)
    expected = layers.linear(COLUMNS, 300, 3)(x)
    for train in (False, True) * 5:
        module = layers.linear(COLUMNS, 300, 3).requires_grad_(train)
        start = threading.Barrier(4)

        def work(_, module=module, start=start):
            start.wait()
            return torch.equal(module(x), expected)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


def test_short_groups_and_other_widths_keep_their_order(layers):
    for made in (layers.linear(1000, 8, 3), layers.linear(COLUMNS, 8, 4)):
        made(torch.randn(1, made.columns))
        assert (made.layout, made.packed().order) == (PLANES, PLANES)
    assert isinstance(made, SketchLinear)


def test_a_loaded_model_is_saved_as_it_was(tiny, ids, tmp_path):
    changes = {"hidden_size": 512, "intermediate_size": 600, "num_hidden_layers": 1}
    dense = tiny.build("LlamaForCausalLM", **changes)
    sketch = tiny.write(dense, tmp_path / "first", bits=3, embeddings=True)
    model = sketchconv.load(sketch.path, dtype=torch.float32)
    layer = model.model.layers[0]
    assert layer.mlp.gate_proj.layout == model.model.embed_tokens.layout == WOVEN
    assert layer.mlp.down_proj.layout == WOVEN
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.allclose(logits, sketch.dense(ids).logits, atol=1e-3)
    model.save_pretrained(tmp_path / "second")
    stored = [
        load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("first", "second")
    ]
    names = [name for name in stored[0] if name.endswith("sketch_index")]
    assert len(names) == 8
    for name in names:
        assert torch.equal(*(tensors[name] for tensors in stored))
    assert layer.mlp.gate_proj.layout == WOVEN
