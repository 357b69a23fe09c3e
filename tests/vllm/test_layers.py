"""Layers of vLLM (its stand-ins) give what ours give, on one rank and on several."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sketchconv
from sketchconv.errors import LoadError
from sketchconv.formats.reader import SktchModel
from sketchconv.vllm import register

PARTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj")
HIDDEN, INNER, HEADS, KV, WORDS = 64, 96, 4, 2, 151


def config_of(path, stubs, tied=False, mapping=None):
    register()
    cls = stubs_config()
    found = json.loads((path / "config.json").read_text())["quantization_config"]
    config = cls.from_config(found)
    config.maybe_update_config(str(path), hf_config=SimpleNamespace(tie_word_embeddings=tied))
    config.packed_modules_mapping = stubs.LLAMA if mapping is None else mapping
    return pickle.loads(pickle.dumps(config))  # so it reaches vLLM's workers


def stubs_config():
    from vllm.model_executor.layers.quantization import get_quantization_config

    return get_quantization_config("sktch")


def make_model(stubs, config, rank=0, size=1, tied=False, layers=2):
    """Llama without its attention and its norms: what is loaded by name."""
    stubs.ranks.rank, stubs.ranks.size = rank, size
    root, inner = nn.Module(), nn.Module()
    root.model = inner
    inner.embed_tokens = stubs.VocabParallelEmbedding(WORDS, HIDDEN, config)  # without a prefix
    inner.layers = nn.ModuleList()
    for number in range(layers):
        at = f"model.layers.{number}"
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        layer.self_attn.qkv_proj = stubs.QKVParallelLinear(
            HIDDEN, HIDDEN // HEADS, HEADS, KV, config, f"{at}.self_attn.qkv_proj"
        )
        layer.self_attn.o_proj = stubs.RowParallelLinear(
            HIDDEN, HIDDEN, config, f"{at}.self_attn.o_proj"
        )
        layer.mlp.gate_up_proj = stubs.MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], config, f"{at}.mlp.gate_up_proj"
        )
        layer.mlp.down_proj = stubs.RowParallelLinear(INNER, HIDDEN, config, f"{at}.mlp.down_proj")
        inner.layers.append(layer)
    root.lm_head = stubs.ParallelLMHead(WORDS, HIDDEN, config, "lm_head")
    if tied:
        root.lm_head = root.lm_head.tie_weights(inner.embed_tokens)
    return root


def stored(path):
    """Names and tensors of the weight files, but for the norms."""
    from safetensors.torch import load_file

    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if "norm" not in name:
                yield name, tensor


def ranks_of(stubs, path, size, tied=False):
    config = config_of(path, stubs, tied)
    models = [make_model(stubs, config, rank, size, tied) for rank in range(size)]
    for model in models:
        stubs.load_weights(model, stored(path))
    return models


def by_rank(models, name):
    return [model.get_submodule(name) for model in models]


def check_layers(models, ours, size):
    """Every layer of all ranks together against our modules."""
    torch.manual_seed(1)
    x, wide = torch.randn(5, HIDDEN), torch.randn(5, INNER)
    for number in range(2):
        at = f"model.layers.{number}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        told = [m(x) for m in by_rank(models, f"{attention}.qkv_proj")]
        kv = max(1, KV // size) * HIDDEN // HEADS
        parts = zip(*(y.split([HIDDEN // size, kv, kv], -1) for y in told), strict=True)
        for name, part in zip(PARTS[:3], parts, strict=True):
            pieces = part if name == "q_proj" else part[:: max(1, size // KV)]
            expected = ours.get_submodule(f"{attention}.{name}")(x)
            assert torch.equal(torch.cat(pieces, -1), expected), (number, name)
        told = [m(x).chunk(2, -1) for m in by_rank(models, f"{mlp}.gate_up_proj")]
        for name, part in zip(PARTS[3:5], zip(*told, strict=True), strict=True):
            assert torch.equal(torch.cat(part, -1), ours.get_submodule(f"{mlp}.{name}")(x)), name
        for name, value in ((f"{attention}.o_proj", x), (f"{mlp}.down_proj", wide)):
            parts = value.chunk(size, -1)
            found = sum(m(v) for m, v in zip(by_rank(models, name), parts, strict=True))
            # The same products in another order of float32 sums.
            torch.testing.assert_close(found, ours.get_submodule(name)(value), rtol=0, atol=1e-5)


def check_words(models, ours):
    ids = torch.tensor([0, 3, 76, 127, 128, 150])
    found = sum(m(ids) for m in by_rank(models, "model.embed_tokens"))
    assert torch.equal(found, ours.model.embed_tokens(ids))
    x = torch.randn(3, HIDDEN)
    logits = torch.cat([m.quant_method.apply(m, x) for m in by_rank(models, "lm_head")], -1)
    torch.testing.assert_close(logits[:, :WORDS], ours.lm_head(x), rtol=0, atol=1e-5)
    assert not logits[:, WORDS:].any()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("bits", "groups"), [(4, 2), (3, 1), (5, 4), (2, 1)])
def test_layers_are_ours(vllm, makers, tmp_path, size, bits, groups):
    sketch = makers.write(
        makers.build("LlamaForCausalLM"), tmp_path / "s", bits=bits, groups=groups, shard=20_000
    )
    models = ranks_of(vllm, sketch.path, size)
    check_layers(models, sketchconv.load(sketch.path), size)
    check_words(models, sketchconv.load(sketch.path))


def test_more_ranks_than_kv_heads_and_groups(vllm, makers, tmp_path):
    sketch = makers.write(makers.build("LlamaForCausalLM"), tmp_path / "s", bits=4, groups=2)
    check_layers(ranks_of(vllm, sketch.path, 4), sketchconv.load(sketch.path), 4)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_sketched_embeddings_and_heads(vllm, makers, tmp_path, size, tied):
    model = makers.build("LlamaForCausalLM", tie_word_embeddings=tied)
    sketch = makers.write(model, tmp_path / "s", embeddings=True, head=not tied)
    assert "model.embed_tokens.weight" in sketch.records
    models = ranks_of(vllm, sketch.path, size, tied)
    for model in models:
        shared = model.lm_head.sketch_index is model.model.embed_tokens.sketch_index
        assert shared is tied
        assert not hasattr(model.lm_head, "weight")
    check_words(models, sketchconv.load(sketch.path))


def test_a_bias_is_added(vllm, makers, tmp_path):
    sketch = makers.write(makers.build("LlamaForCausalLM"), tmp_path / "s")
    config = config_of(sketch.path, vllm)
    name = "model.layers.0.self_attn.o_proj"
    layer = vllm.ColumnParallelLinear(HIDDEN, [HIDDEN], config, name, bias=True)
    weights = {n: t for n, t in stored(sketch.path) if n.startswith(name)}
    for part in ("sketch_index", "sketch_lut"):
        param = getattr(layer, part)
        param.weight_loader(param, weights[f"{name}.{part}"])
    layer.quant_method.process_weights_after_loading(layer)
    layer.bias.data.normal_()
    x = torch.randn(2, HIDDEN)
    expected = sketchconv.load(sketch.path).get_submodule(name)(x) + layer.bias
    assert torch.equal(layer(x), expected)


def test_a_matrix_that_is_fused_in_the_checkpoint(vllm, makers, tmp_path):
    sketch = makers.write(makers.build("LlamaForCausalLM"), tmp_path / "s", groups=2)
    config = config_of(sketch.path, vllm, mapping={})
    name = "model.layers.1.mlp.up_proj"  # as if it were [gate; up]
    for size in (1, 2):
        parts = []
        for rank in range(size):
            vllm.ranks.rank, vllm.ranks.size = rank, size
            layer = vllm.MergedColumnParallelLinear(HIDDEN, [INNER // 2] * 2, config, name)
            for n, t in stored(sketch.path):
                if n.startswith(name + ".sketch"):
                    param = getattr(layer, n.rpartition(".")[2])
                    param.weight_loader(param, t)
            layer.quant_method.process_weights_after_loading(layer)
            parts.append(layer)
        x = torch.randn(2, HIDDEN)
        halves = zip(*(layer(x).chunk(2, -1) for layer in parts), strict=True)
        found = torch.cat([torch.cat(half, -1) for half in halves], -1)
        assert torch.equal(found, sketchconv.load(sketch.path).get_submodule(name)(x))


def test_plain_layers_stay_with_vllm(vllm, makers, tmp_path):
    sketch = makers.write(makers.build("LlamaForCausalLM"), tmp_path / "s")
    config = config_of(sketch.path, vllm)
    assert type(vllm.ReplicatedLinear(8, 8, config, "model.other").quant_method) is (
        vllm.UnquantizedLinearMethod
    )
    assert config.get_quant_method(nn.Module(), "model.layers.0.self_attn.attn") is None
    model = make_model(vllm, config)
    assert isinstance(model.lm_head.quant_method, vllm.UnquantizedMethod)


def test_the_index_goes_into_the_order_of_its_device_once(vllm, makers, tmp_path, monkeypatch):
    from sketchconv.runtime import devices

    sketch = makers.write(
        makers.build("LlamaForCausalLM", tie_word_embeddings=True),
        tmp_path / "s",
        bits=3,
        embeddings=True,
    )
    (model,) = ranks_of(vllm, sketch.path, 1, tied=True)
    index = model.lm_head.sketch_index
    before = index.data.clone()
    with SktchModel.open(sketch.path) as file:
        disk = torch.from_numpy(copy.deepcopy(file.array("model.embed_tokens.sketch_index")))
    order = devices.best_order(disk, 3, HIDDEN)
    assert index.sketch_order == order
    rows = devices.restored(index.data, 3, HIDDEN, order)[:WORDS]
    assert torch.equal(rows, disk)
    model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
    assert torch.equal(index.data, before)
    monkeypatch.setattr(index, "sketch_order", "device")
    with pytest.raises(LoadError, match="in use cannot take new weights"):
        index.weight_loader(index, disk)


def test_compiled_whole_as_vllm_does(vllm, makers, tmp_path):
    sketch = makers.write(makers.build("LlamaForCausalLM"), tmp_path / "s", bits=3, embeddings=True)
    (model,) = ranks_of(vllm, sketch.path, 1)
    layer, ids = model.model.layers[0], torch.tensor([1, 2, 150])

    class Two(nn.Module):
        def forward(self, ids):
            x = model.model.embed_tokens.quant_method.embedding(model.model.embed_tokens, ids)
            return layer.mlp.gate_up_proj(x)

    with torch.no_grad():
        compiled = torch.compile(Two(), backend="eager", fullgraph=True)
        assert torch.equal(compiled(ids), Two()(ids))
