"""Second moments propagated without data, against a whole-matrix reference."""

from __future__ import annotations

import numpy as np
import pytest

from sketchconv.errors import PlanError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.moments import equal_weights, make_moments
from sketchconv.sensitivities.activations import ACTIVATIONS, activated

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
SHARE = 0.3  # of attention's output, in the residual stream
HIDDEN, HEAD_DIM, FFN, VOCAB, LAYERS = 20, 4, 28, 33, 3
SHAPES = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (6 * HEAD_DIM, HIDDEN),
    "self_attn.k_proj.weight": (2 * HEAD_DIM, HIDDEN),
    "self_attn.v_proj.weight": (2 * HEAD_DIM, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, 6 * HEAD_DIM),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (FFN, HIDDEN),
    "mlp.up_proj.weight": (FFN, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, FFN),
}
BIASES = {
    "self_attn.q_proj.bias": (6 * HEAD_DIM,),
    "self_attn.v_proj.bias": (2 * HEAD_DIM,),
    "self_attn.o_proj.bias": (HIDDEN,),
}


def network(*, head=True, biases=False, root="model."):
    """Random tensors of a llama, in an order that is not the network's."""
    rng = np.random.default_rng(5)
    shapes = {f"{root}norm.weight": (HIDDEN,), f"{root}embed_tokens.weight": (VOCAB, HIDDEN)}
    if head:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in reversed(range(LAYERS)):
        for name, shape in {**(BIASES if biases else {}), **SHAPES}.items():
            shapes[f"{root}layers.{layer}.{name}"] = shape
    scales = {name: 1.0 if len(shape) == 1 else 0.4 for name, shape in shapes.items()}
    return {
        name: (scales[name] * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def infos_of(tensors):
    return {name: TensorInfo(name, "F32", value.shape) for name, value in tensors.items()}


def by_integration(name, mean, variance, of=lambda value, slope: value):
    """E[of(f(s), f'(s))] by a fine sum over the density."""
    z = np.linspace(-10, 10, 20001)
    density = np.exp(-z * z / 2)
    value, slope = ACTIVATIONS[name](mean[:, None] + np.sqrt(variance)[:, None] * z)
    return (of(value, slope) * density).sum(axis=1) / density.sum()


def silu_by_nodes(mean, variance):
    """E silu(s) and its square in the 32 nodes of the definition, one by one."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    first, second = np.zeros_like(variance), np.zeros_like(variance)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        s = mean + np.sqrt(variance) * node
        first += weight * s / (1 + np.exp(-s))
        second += weight * (s / (1 + np.exp(-s))) ** 2
    return first, second


def reference(tensors, root="model."):
    """The definition, with whole matrices; returns the input moments of every linear weight."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    embedding = w[f"{root}embed_tokens.weight"]
    mean, variance = embedding.mean(axis=0), embedding.var(axis=0)
    inputs = {}
    for layer in range(LAYERS):

        def get(name, layer=layer):
            return w.get(f"{root}layers.{layer}.{name}", 0.0)

        def put(m, v, *names, layer=layer):
            inputs.update({f"{root}layers.{layer}.{name}.weight": m**2 + v for name in names})

        def through(name, m, v):
            weight = get(f"{name}.weight")
            return weight @ m + get(f"{name}.bias"), weight**2 @ v

        def normed(gain, m, v):
            size = (m**2 + v).mean() + 1e-5
            return gain * m / np.sqrt(size), gain**2 * v / size

        def shared(values):
            return np.concatenate([values[:HEAD_DIM]] * 3 + [values[HEAD_DIM:]] * 3)

        x = normed(get("input_layernorm.weight"), mean, variance)
        put(*x, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        m, v = through("self_attn.v_proj", *x)
        o = shared(m), SHARE * shared(v)
        put(*o, "self_attn.o_proj")
        m, v = through("self_attn.o_proj", *o)
        mean, variance = mean + m, variance + v
        x = normed(get("post_attention_layernorm.weight"), mean, variance)
        put(*x, "mlp.gate_proj", "mlp.up_proj")
        first, second = silu_by_nodes(*through("mlp.gate_proj", *x))
        m, v = through("mlp.up_proj", *x)
        down = first * m, second * (m**2 + v) - (first * m) ** 2
        put(*down, "mlp.down_proj")
        m, v = through("mlp.down_proj", *down)
        mean, variance = mean + m, variance + v
    m, v = normed(w[f"{root}norm.weight"], mean, variance)
    inputs["lm_head.weight"] = m**2 + v
    return inputs


def propagate(tensors, moments, cuts):
    """What the pipeline does: weights first, then the rows, for every tensor in order."""
    weights = {}
    for name in moments.order:
        value = tensors[name]
        weights[name] = moments.column_weights(name)
        if moments.needs(name):
            for begin in range(0, len(value), cuts):
                moments.observe(name, begin, value[begin : begin + cuts])
    return weights


@pytest.mark.parametrize("root", ["model.", ""])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_streamed_moments_are_the_definition(head, biases, root):
    tensors = network(head=head, biases=biases, root=root)
    moments = make_moments(CONFIG, infos_of(tensors))
    assert moments.description == "propagated second moments"
    weights = propagate(tensors, moments, cuts=1000)
    wanted = reference(tensors, root)
    if not head:
        del wanted["lm_head.weight"]
    assert {name for name, value in weights.items() if value is not None} == set(wanted)
    for name, value in wanted.items():
        assert weights[name].dtype == np.float64
        np.testing.assert_allclose(weights[name], value / value.mean(), rtol=1e-9)


@pytest.mark.parametrize("cuts", [1, 3, 7, 20])
def test_no_bit_depends_on_how_rows_are_cut(cuts):
    tensors = network(biases=True)
    whole = propagate(tensors, make_moments(CONFIG, infos_of(tensors)), cuts=1000)
    cut = propagate(tensors, make_moments(CONFIG, infos_of(tensors)), cuts=cuts)
    for name, value in whole.items():
        assert (value is None) == (cut[name] is None)
        if value is not None:
            assert value.tobytes() == cut[name].tobytes()


def test_weights_have_mean_one_and_are_not_equal():
    tensors = network()
    weights = propagate(tensors, make_moments(CONFIG, infos_of(tensors)), cuts=8)
    for value in weights.values():
        if value is not None:
            assert value.mean() == pytest.approx(1.0)
            assert value.min() >= 0
            assert value.std() > 0.1


def test_order_follows_the_network():
    tensors = network(biases=True)
    order = make_moments(CONFIG, infos_of(tensors)).order
    assert set(order) == set(tensors)
    assert order[0] == "model.embed_tokens.weight"
    assert order[-2:] == ("model.norm.weight", "lm_head.weight")
    first = [n.removeprefix("model.layers.0.") for n in order if n.startswith("model.layers.0.")]
    assert [name for name in first if name.endswith(".weight")] == list(SHAPES)


def test_weights_do_not_depend_on_the_scale_of_the_residual():
    """RMSNorm divides it out, but for epsilon: embeddings times 4 change what o and down add."""
    tensors = network()
    quiet = {**CONFIG, "rms_norm_eps": 0.0}
    first = "model.layers.0.self_attn.q_proj.weight"
    before = propagate(tensors, make_moments(quiet, infos_of(tensors)), cuts=99)[first]
    scaled = {**tensors, "model.embed_tokens.weight": 4 * tensors["model.embed_tokens.weight"]}
    after = propagate(scaled, make_moments(quiet, infos_of(tensors)), cuts=99)[first]
    np.testing.assert_allclose(after, before, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_moments_of_activations_are_the_integrals(name):
    mean = np.array([0.0, 0.0, 0.3, -1.0, 2.0, 0.0, -3.0])
    variance = np.array([0.0, 1e-6, 0.01, 0.3, 1.0, 5.0, 4.0])
    found = activated(name, mean, variance)
    kink = 0.2 if name == "relu" else 1e-2  # of which 32 nodes see little
    np.testing.assert_allclose(
        found.mean, by_integration(name, mean, variance), rtol=kink, atol=1e-9
    )
    wanted = by_integration(name, mean, variance, lambda value, slope: value**2)
    np.testing.assert_allclose(found.square, wanted, rtol=kink, atol=1e-9)
    wanted = by_integration(name, mean, variance, lambda value, slope: slope)
    np.testing.assert_allclose(found.slope, wanted, rtol=kink, atol=1e-2)
    far = activated(name, np.array([0.0, -1e3]), np.array([1e12, 1.0]))
    assert np.isfinite([far.mean, far.square, far.slope]).all()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_slopes_are_those_of_the_values(name):
    s = np.array([-30.0, -2.5, -0.3, 0.4, 1.7, 30.0])
    step = 1e-6
    f = ACTIVATIONS[name]
    np.testing.assert_allclose(f(s)[1], (f(s + step)[0] - f(s - step)[0]) / (2 * step), atol=1e-8)


@pytest.mark.parametrize(
    "name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu"]
)
def test_activations_are_those_of_transformers(name):
    import torch
    from transformers.activations import ACT2FN

    s = np.linspace(-6, 6, 200)
    wanted = ACT2FN[name](torch.from_numpy(s)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](s)[0], wanted, atol=5e-4)


def test_a_tensor_that_was_not_shown_is_named():
    tensors = network()
    moments = make_moments(CONFIG, infos_of(tensors))
    gate = "model.layers.0.mlp.gate_proj.weight"
    for name in moments.order[: moments.order.index(gate)]:
        if moments.needs(name):
            moments.observe(name, 0, tensors[name])
    assert moments.column_weights(gate) is not None
    with pytest.raises(PlanError, match=gate):
        moments.column_weights("model.layers.0.mlp.down_proj.weight")
    moments.observe(gate, 0, tensors[gate][:-1])
    with pytest.raises(PlanError, match=gate):
        moments.column_weights("model.layers.0.mlp.down_proj.weight")


def test_side_modules_are_ignored_and_strangers_are_not():
    tensors = network()
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(HEAD_DIM, np.float32)
    assert make_moments(CONFIG, infos_of(tensors)).order
    tensors["model.layers.1.mlp.experts.0.up_proj.weight"] = np.ones((2, 2), np.float32)
    description = make_moments(CONFIG, infos_of(tensors)).description
    assert description == "equal weights: unknown module mlp.experts.0.up_proj in a layer"


def without(name):
    return lambda tensors: tensors.pop(name)


def reshaped(name, shape):
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        ({"model_type": "granite"}, None, "not known for model type 'granite' yet"),
        ({"model_type": "bert"}, None, "no single stack of layers"),
        ({"model_type": "gemma2"}, None, "layer 0 has no norm_2"),
        ({"hidden_act": "mish"}, None, "the activation 'mish'"),
        ({"num_attention_heads": None}, None, "no usable num_attention_heads"),
        ({"num_attention_heads": 5}, None, "no usable num_attention_heads"),
        ({"num_attention_heads": 4}, None, "8 value rows do not fit 4 heads of 6"),
        ({}, without("model.layers.1.mlp.up_proj.weight"), "layer 1 has no up"),
        ({}, without("model.embed_tokens.weight"), "no model.embed_tokens.weight"),
        ({}, without("model.norm.weight"), "no model.norm.weight"),
        ({}, reshaped("model.layers.2.mlp.up_proj.weight", (3, 3)), "unexpected shape"),
        ({}, reshaped("model.layers.2.mlp.up_proj.weight", (3,)), "two-dimensional"),
        ({}, reshaped("vision.layers.0.mlp.up_proj.weight", (3, 3)), "no single stack"),
    ],
)
def test_equal_weights_elsewhere_say_why(config, change, reason):
    tensors = network()
    if change is not None:
        change(tensors)
    moments = make_moments({**CONFIG, **config}, infos_of(tensors))
    assert moments.description.startswith("equal weights: ")
    assert reason in moments.description
    assert moments.order == ()
    assert not moments.needs("model.embed_tokens.weight")
    assert moments.column_weights("model.layers.0.mlp.up_proj.weight") is None


def test_equal_weights_on_request():
    moments = equal_weights("asked for")
    assert moments.description == "equal weights: asked for"
    moments.observe("anything", 0, np.ones((1, 1), np.float32))
    assert moments.column_weights("anything") is None


def test_heads_of_their_own_values():
    """Without grouping, and without head counts for keys in the config."""
    tensors = network()
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        tensors[name] = np.tile(tensors[name], (3, 1))
    config = {k: v for k, v in CONFIG.items() if k != "num_key_value_heads"}
    weights = propagate(tensors, make_moments(config, infos_of(tensors)), cuts=99)
    assert weights["model.layers.0.self_attn.o_proj.weight"].shape == (24,)
    repeated = reference(network())["model.layers.0.self_attn.o_proj.weight"].reshape(
        2, 3, HEAD_DIM
    )
    got = weights["model.layers.0.self_attn.o_proj.weight"]
    wanted = np.tile(repeated[:, 0].reshape(-1), 3)
    np.testing.assert_allclose(got, wanted / wanted.mean(), rtol=1e-6)
