"""Sketch modules: values, gradients, casts, copies, state."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from sketchconv.kernels import plain
from sketchconv.runtime.functions import SketchMatmul
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear
from sketchconv.runtime.tied import TiedSketchEmbedding, TiedSketchLinear


def fill(module, seed=0):
    torch.manual_seed(seed)
    module.sketch_index.random_(0, 256)
    with torch.no_grad():
        module.sketch_lut.normal_()
        if getattr(module, "bias", None) is not None:
            module.bias.normal_()
    return module


def linear(bits=4, groups=2, bias=True, lut=torch.float16, columns=48, rows=20):
    return fill(SketchLinear(columns, rows, bits, groups, bias=bias, lut_dtype=lut))


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_linear_equals_the_dense_one(bits):
    module = linear(bits, groups=3, columns=51)
    dense = nn.Linear(51, 20)
    dense.weight.data, dense.bias.data = module.dequantize(), module.bias.data
    x = torch.randn(2, 3, 51)
    with torch.no_grad():
        assert torch.allclose(module(x), dense(x), atol=1e-4)
        many = torch.randn(4, 5, 51)
        assert torch.allclose(module(many), dense(many), atol=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_plain_torch_agrees_with_the_kernels(bits):
    module = linear(bits, groups=3, columns=51)
    decoded = plain.decode(module.sketch_index, module.sketch_lut.data, 51, torch.float32)
    assert torch.equal(decoded, module.dequantize())
    x = torch.randn(2, 51)
    y = plain.multiply(x, module.sketch_index, module.sketch_lut.data)
    assert torch.allclose(y + module.bias, module(x), atol=1e-4)


def test_an_embedding_equals_the_dense_one():
    module = fill(SketchEmbedding(30, 24, 6, 2, padding_idx=3, dtype=torch.bfloat16))
    ids = torch.randint(0, 30, (2, 7))
    rows = module(ids)
    assert rows.dtype is torch.bfloat16
    assert torch.equal(rows, nn.functional.embedding(ids, module.dequantize()).bfloat16())
    with pytest.raises(IndexError):
        module(torch.tensor([30]))


def test_scaled_embeddings_multiply_their_rows():
    module = fill(SketchEmbedding(30, 24, 4, dtype=torch.bfloat16))
    ids = torch.arange(30)
    plain_rows = module(ids).detach()
    module.scale = 640**0.5
    assert torch.equal(module(ids), plain_rows * 640**0.5)
    module.round_scale = True
    assert torch.equal(module(ids), plain_rows * torch.tensor(640**0.5).bfloat16())


@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8])
def test_gradients_equal_those_of_the_dense_formula(bits, monkeypatch):
    monkeypatch.setattr(plain, "TILE_ROWS", 7)
    module = linear(bits, groups=3, columns=51, lut=torch.float32)
    x = torch.randn(2, 5, 51, requires_grad=True)
    target = torch.randn(2, 5, 20)
    (module(x) * target).sum().backward()
    codes = plain.unpack(module.sketch_index, bits, 17).long()
    lut = module.sketch_lut.detach().clone().requires_grad_()
    y = x.detach().requires_grad_()
    bias = module.bias.detach().clone().requires_grad_()
    weight = lut.gather(2, codes).reshape(20, 51)
    (nn.functional.linear(y, weight, bias) * target).sum().backward()
    assert torch.allclose(module.sketch_lut.grad, lut.grad, atol=1e-4)
    assert torch.allclose(x.grad, y.grad, atol=1e-4)
    assert torch.allclose(module.bias.grad, bias.grad, atol=1e-4)


def test_gradients_pass_gradcheck_in_float64():
    module = linear(2, groups=2, columns=10, rows=4, lut=torch.float32)
    lut = module.sketch_lut.detach().double().requires_grad_()
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    run = lambda x, lut: SketchMatmul.apply(x, module.sketch_index, lut, None, "planes-le")  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, lut))


def test_embedding_gradients_skip_padding():
    module = fill(SketchEmbedding(12, 8, 3, 2, padding_idx=5, lut_dtype=torch.float32))
    ids = torch.tensor([[1, 5, 1], [0, 11, 5]])
    target = torch.randn(2, 3, 8)
    (module(ids) * target).sum().backward()
    lut = module.sketch_lut.detach().clone().requires_grad_()
    codes = plain.unpack(module.sketch_index, 3, 4).long()
    weight = lut.gather(2, codes).reshape(12, 8)
    (nn.functional.embedding(ids, weight, padding_idx=5) * target).sum().backward()
    assert torch.allclose(module.sketch_lut.grad, lut.grad, atol=1e-5)
    assert module.sketch_lut.grad[5].abs().sum() == 0


def test_training_the_lut_lowers_the_loss():
    module = linear(4, lut=torch.float32)
    x, target = torch.randn(64, 48), torch.randn(64, 20)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = ((module(x) - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_modules_build_no_graph():
    module = linear().requires_grad_(False)
    assert not module(torch.randn(1, 48)).requires_grad
    assert module(torch.randn(1, 48, requires_grad=True)).requires_grad


def test_casts_keep_the_lut():
    module = linear()
    before = module.sketch_lut.detach().clone()
    for cast in (lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.float()):
        cast(module)
        assert module.sketch_lut.dtype is torch.float16
        assert torch.equal(module.sketch_lut, before)
    module.to(torch.bfloat16)
    assert module.bias.dtype is module.dtype is module.weight.dtype is torch.bfloat16
    assert next(module.parameters()).dtype is torch.bfloat16  # what `model.dtype` looks at
    assert module(torch.randn(1, 48).bfloat16()).dtype is torch.bfloat16
    assert module.to("meta").sketch_lut.device.type == "meta"


def test_state_has_the_documented_names():
    module = linear()
    assert list(module.state_dict()) == ["sketch_lut", "bias", "sketch_index"]
    other = SketchLinear(48, 20, 4, 2)
    other.load_state_dict(module.state_dict())
    x = torch.randn(1, 48)
    assert torch.equal(other(x), module(x))
    with pytest.raises(RuntimeError, match="sketch_lut"):
        other.load_state_dict({k: v for k, v in module.state_dict().items() if "lut" not in k})


def test_copies_and_pickles_are_independent_and_equal():
    module = linear()
    x = torch.randn(1, 48)
    expected = module(x).detach()
    twin = copy.deepcopy(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        module.sketch_lut.zero_()
    assert torch.equal(twin(x), expected)
    assert torch.equal(loaded(x), expected)
    assert torch.equal(module(x), module.bias.expand(1, -1))


def test_replaced_tensors_are_seen():
    module = linear(bias=False)
    x = torch.randn(1, 48)
    module(x)
    module.sketch_lut = nn.Parameter(torch.ones_like(module.sketch_lut))
    assert torch.allclose(module(x), x.sum().expand(1, 20), atol=1e-4)
    module.sketch_lut.data = torch.zeros(20, 2, 16, dtype=torch.bfloat16)
    assert module(x).abs().sum() == 0


def test_tied_modules_share_one_sketch():
    embedding = fill(SketchEmbedding(20, 48, 8, lut_dtype=torch.float32))
    head = TiedSketchLinear(embedding)
    assert not head.state_dict()
    assert [name for name, _ in head.named_parameters()] == ["dtype_anchor"]
    x = torch.randn(2, 48)
    assert torch.allclose(head(x), x @ embedding.dequantize().T, atol=1e-4)
    pair = copy.deepcopy(nn.ModuleDict({"embedding": embedding, "head": head}))
    with torch.no_grad():
        pair["embedding"].sketch_lut.zero_()
    assert pair["head"](x).abs().sum() == 0
    assert head(x).abs().sum() > 0
    (head(x).sum() + embedding(torch.tensor([0])).sum()).backward()
    assert embedding.sketch_lut.grad is not None
    back = TiedSketchEmbedding(linear(bias=False, columns=48), padding_idx=1)
    assert torch.equal(back(torch.tensor([3])), back.owner.dequantize()[3:4])


def test_compiled_modules_give_the_same(tmp_path):
    module = linear().requires_grad_(False)
    x = torch.randn(3, 48)
    compiled = torch.compile(module, backend="eager")
    assert torch.allclose(compiled(x), module(x), atol=1e-4)


def test_representation_names_shape_and_bits():
    text = "in_features=48, out_features=20, bias=True, bits=4, groups=2, lut=float16"
    assert repr(linear()) == f"SketchLinear({text})"


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        SketchLinear(10, 4, 4, 3)
    with pytest.raises(ValueError, match="bits is 9"):
        SketchLinear(10, 4, 9)
    with pytest.raises(ValueError, match="a LUT is"):
        SketchLinear(10, 4, 4, lut_dtype=torch.float64)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_default_device_does_not_move_the_results(tokens):
    """Memory of another device than the kernels' would end the process."""
    module = SketchLinear(16, 8, 4)
    rows = SketchEmbedding(8, 16, 4)
    x = torch.ones(tokens, 16, requires_grad=True)
    ids = torch.zeros(tokens, dtype=torch.int64)
    with torch.device("meta"):
        made = [module(x), rows(ids), module.dequantize()]
        with torch.no_grad():
            made.append(module(x))
        slopes = torch.autograd.grad(made[0].sum(), (x, module.sketch_lut))
    assert {each.device.type for each in (*made, *slopes)} == {"cpu"}


def test_ids_beyond_the_sketch_have_no_gradient():
    rows = SketchEmbedding(8, 16, 4)
    index, lut = rows.sketch_index, rows.sketch_lut.detach()
    for bad in (-1, 8):
        with pytest.raises(IndexError, match="of 8 rows"):
            torch.ops.sketchconv.embedding_grad_lut(
                torch.ones(1, 16), torch.tensor([bad]), index, lut, None, "planes-le"
            )
