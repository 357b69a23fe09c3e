"""Second moments of whole inputs, propagated without data, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sketchconv.errors import PlanError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.moments import make_moments
from sketchconv.sensitivities.activations import activated

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
SHARE = 0.3
HIDDEN, HEAD_DIM, FFN, LAYERS = 24, 4, 28, 2
ROOT = "model.layers."


def network(vocabulary=300, *, biases=True):
    rng = np.random.default_rng(11)
    heads, values = 6 * HEAD_DIM, 2 * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        block = {
            "input_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (heads, HIDDEN),
            "self_attn.k_proj.weight": (values, HIDDEN),
            "self_attn.v_proj.weight": (values, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, heads),
            "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.gate_proj.weight": (FFN, HIDDEN),
            "mlp.up_proj.weight": (FFN, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, FFN),
        }
        if biases:
            block["self_attn.v_proj.bias"] = (values,)
            block["self_attn.o_proj.bias"] = (HIDDEN,)
            block["mlp.gate_proj.bias"] = (FFN,)
            block["mlp.down_proj.bias"] = (HIDDEN,)
        shapes |= {f"{ROOT}{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (vocabulary, HIDDEN)
    tensors = {
        name: (0.4 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    embedding = tensors["model.embed_tokens.weight"]
    embedding += embedding[:, :1] * np.linspace(1, 2, HIDDEN, dtype=np.float32)  # correlated
    return tensors


def definition(tensors):
    """Hessians of all inputs, and the mean squares of those of `down`."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    e = w["model.embed_tokens.weight"]
    mean, spread, found = e.mean(axis=0), np.cov(e.T, bias=True), {}

    def normed(gain):
        size = (mean**2 + np.diag(spread)).mean() + 1e-5
        return gain * mean / np.sqrt(size), np.outer(gain, gain) * spread / size

    def hessian(m, c):
        return np.outer(m, m) + c

    for layer in range(LAYERS):
        at = f"{ROOT}{layer}."

        def through(name, m, c, at=at):
            weight = w[f"{at}{name}.weight"]
            return weight @ m + w.get(f"{at}{name}.bias", 0.0), weight @ c @ weight.T

        x = normed(w[f"{at}input_layernorm.weight"])
        found |= {f"{at}self_attn.{n}_proj.weight": hessian(*x) for n in "qkv"}
        values, heads = through("self_attn.v_proj", *x)
        m, c = np.zeros(6 * HEAD_DIM), np.zeros((6 * HEAD_DIM, 6 * HEAD_DIM))
        for query in range(6):
            to, value = slice(query * HEAD_DIM, (query + 1) * HEAD_DIM), query // 3
            source = slice(value * HEAD_DIM, (value + 1) * HEAD_DIM)
            m[to], c[to, to] = values[source], SHARE * heads[source, source]
        found[f"{at}self_attn.o_proj.weight"] = hessian(m, c)
        m, c = through("self_attn.o_proj", m, c)
        mean, spread = mean + m, spread + c
        x = normed(w[f"{at}post_attention_layernorm.weight"])
        found |= {f"{at}mlp.{n}_proj.weight": hessian(*x) for n in ("gate", "up")}
        gate, up = through("mlp.gate_proj", *x), through("mlp.up_proj", *x)
        value = activated("silu", gate[0], np.diag(gate[1]))
        found[f"{at}mlp.down_proj.weight"] = square = value.square * (up[0] ** 2 + np.diag(up[1]))
        m = value.mean * up[0]
        slope = value.mean[:, None] * w[f"{at}mlp.up_proj.weight"]
        slope = slope + (value.slope * up[0])[:, None] * w[f"{at}mlp.gate_proj.weight"]
        shared = slope @ x[1] @ slope.T
        own = np.maximum(square - m**2 - np.diag(shared), 0)
        m, c = through("mlp.down_proj", m, np.diag(own) + shared)
        mean, spread = mean + m, spread + c
    found["lm_head.weight"] = hessian(*normed(w["model.norm.weight"]))
    return found


def propagate(tensors, cuts):
    """What the pipeline does: Hessians and weights of a tensor first, then its rows."""
    infos = {name: TensorInfo(name, "F32", value.shape) for name, value in tensors.items()}
    moments = make_moments(CONFIG, infos, "covariances")
    hessians, weights = {}, {}
    for name in moments.order:
        factors, weights[name] = moments.factors(name), moments.column_weights(name)
        hessians[name] = None if factors is None else factors.statistics.hessian.clone()
        if moments.needs(name):
            for begin in range(0, len(tensors[name]), cuts):
                moments.observe(name, begin, tensors[name][begin : begin + cuts])
    return hessians, weights


@pytest.mark.parametrize("biases", [False, True])
def test_streamed_hessians_are_the_definition(biases):
    tensors = network(biases=biases)
    hessians, weights = propagate(tensors, cuts=1000)
    for name, wanted in definition(tensors).items():
        diagonal = wanted if wanted.ndim == 1 else np.diag(wanted)
        np.testing.assert_allclose(weights[name], diagonal / diagonal.mean(), rtol=1e-4)
        if name == "lm_head.weight" or wanted.ndim == 1:
            assert hessians[name] is None
            continue
        scale = np.sqrt(np.outer(diagonal, diagonal))
        assert np.abs(hessians[name].numpy() - wanted).max() < 1e-4 * scale.max()
    assert weights["model.embed_tokens.weight"] is None


@pytest.mark.parametrize("cuts", [1, 7, 4096, 5000])
def test_no_bit_depends_on_how_rows_are_cut_or_on_threads(cuts, monkeypatch):
    tensors = network(9000)
    whole, _ = propagate(tensors, cuts=100_000)
    monkeypatch.setattr("sketchconv.sensitivities.tiles.available_threads", lambda: 3)
    cut, _ = propagate(tensors, cuts=cuts)
    for name, value in whole.items():
        assert (value is None) == (cut[name] is None)
        assert value is None or torch.equal(value, cut[name])


def test_a_tensor_that_was_not_shown_is_named():
    tensors = network()
    infos = {name: TensorInfo(name, "F32", value.shape) for name, value in tensors.items()}
    moments = make_moments(CONFIG, infos, "covariances")
    embedding = "model.embed_tokens.weight"
    moments.observe(embedding, 0, tensors[embedding])
    with pytest.raises(PlanError, match=r"v_proj.weight need model.layers.0.input_layernorm"):
        moments.factors(f"{ROOT}0.self_attn.v_proj.weight")


def test_other_architectures_have_equal_weights():
    tensors = network()
    infos = {name: TensorInfo(name, "F32", value.shape) for name, value in tensors.items()}
    moments = make_moments({**CONFIG, "model_type": "granite"}, infos, "covariances")
    assert moments.description.startswith("equal weights: not known for model type 'granite'")
