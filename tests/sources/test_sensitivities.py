"""Propagated moments against what transformers' own models show for random tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sketchconv.formats.tensors import TensorInfo
from sketchconv.moments import make_moments

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 400,
    "pad_token_id": 0,
}
# Nearly even attention over 1 to 9 tokens, or 3 of an encoder, leaves 0.3 of the variance.
LENGTH, ENCODER_LENGTH = 9, 3
GPT2 = {
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": LENGTH,
    "vocab_size": 400,
    "initializer_range": 0.1,
}
BERT = {
    **{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")},
    "max_position_embeddings": ENCODER_LENGTH,
}
MODELS = {
    "LlamaForCausalLM": SIZES,
    "Qwen2ForCausalLM": SIZES,
    "Qwen3ForCausalLM": SIZES,
    "GemmaForCausalLM": SIZES,
    "Gemma2ForCausalLM": {**SIZES, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0},
    "Gemma3ForCausalLM": SIZES,
    "Phi3ForCausalLM": {**SIZES, "head_dim": None},
    "GPT2LMHeadModel": GPT2,
    "BertModel": BERT,
}
LAYER_NORM = ("GPT2LMHeadModel", "BertModel")
REPEATS = 3


def network(kind, *, alike=False, seed=3):
    """A random model with gains, biases and a mean embedding as trained ones have them.

    With `alike` all embeddings have the same norm and no position or type adds to them, so that
    the first norm divides all tokens alike.
    """
    import transformers

    cls = getattr(transformers, kind)
    sizes = {key: value for key, value in MODELS[kind].items() if value is not None}
    model = cls(cls.config_class(**sizes)).eval()
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, scale, mean=0.0):
        tensor.copy_(mean + scale * torch.randn(tensor.shape, generator=generator))

    offset = 1.0 if "Gemma" in kind else 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name.lower() or ".ln_" in name
            if parameter.dim() == 1 and name.endswith("weight"):
                normal(parameter, 0.3, 1.0 - offset)
            elif is_norm:
                normal(parameter, 0.2)
            elif parameter.dim() == 1:
                normal(parameter, 0.3)
            elif any(part in name for part in ("q_proj", "k_proj", "query", "key")):
                normal(parameter, 0.02)  # attention that is nearly even
            elif any(part in name for part in ("embed", "wte", "wpe")):
                spread = torch.linspace(0.5, 1.5, parameter.shape[1])
                normal(parameter, 1.0)
                parameter.mul_(spread).add_(0.3 * spread.flip(0))
            else:
                normal(parameter, 0.15)
        for name, parameter in model.named_parameters():
            if "qkv_proj" in name:
                parameter[: 2 * SIZES["hidden_size"]] *= 0.1
            if "c_attn.weight" in name:
                parameter[:, : 2 * SIZES["hidden_size"]] *= 0.1
            if alike and any(part in name for part in ("position", "wpe", "token_type")):
                parameter.zero_()
        if alike:
            table = model.get_input_embeddings().weight
            if kind in LAYER_NORM:
                table.sub_(table.mean(1, keepdim=True))
            table.div_(table.square().mean(1, keepdim=True).sqrt())
    return model


def measured(model):
    """E[x x'] of every linear module's input over random tokens, by the weight's name.

    At every position every token comes equally often.
    """
    from transformers.pytorch_utils import Conv1D

    length = ENCODER_LENGTH if type(model).__name__ == "BertModel" else LENGTH
    rows = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(rows, generator=generator) for _ in range(REPEATS * length)]
    ids = torch.stack(orders).view(length, -1).T
    sums, counts, handles = {}, {}, []

    def note(name, args):
        x = args[0].reshape(-1, args[0].shape[-1]).double()
        sums[name] = sums.get(name, 0) + x.T @ x
        counts[name] = counts.get(name, 0) + len(x)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and "pooler" not in name:
            handles.append(
                module.register_forward_pre_hook(lambda _m, a, n=f"{name}.weight": note(n, a))
            )
    with torch.no_grad():
        for part in ids.split(500):
            model(input_ids=part)
    for handle in handles:
        handle.remove()
    return {name: (value / counts[name]).numpy() for name, value in sums.items()}


def propagated(model, weighting, cuts=1000, *, matrix=False):
    """Column weights and Hessians as the pipeline asks for them.

    With `matrix` weights that are stored ``[in, out]`` come as ``[out, in]``, as sketched ones do.
    """
    stored = {k: v.float().numpy() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    infos = {name: TensorInfo(name, "F32", value.shape) for name, value in stored.items()}
    moments = make_moments(model.config.to_dict(), infos, weighting)
    assert moments.description.startswith("propagated"), moments.description
    weights, hessians = {}, {}
    for name in moments.order:
        weights[name], factors = moments.column_weights(name), moments.factors(name)
        hessians[name] = None if factors is None else factors.statistics.hessian.double().numpy()
        if moments.needs(name):
            value, turn = stored[name], matrix and name.split(".")[-2].startswith("c_")
            value = np.ascontiguousarray(value.T) if turn and value.ndim == 2 else value
            for begin in range(0, len(value), cuts):
                moments.observe(name, begin, value[begin : begin + cuts], matrix=matrix)
    return weights, hessians


FIRST = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query", "key", "value")
OUT = ("o_proj", "attn.c_proj", "attention.output.dense")
DOWN = ("down_proj", "mlp.c_proj", "0.output.dense", "1.output.dense")


def module_of(name):
    return name.removesuffix(".weight")


@pytest.mark.parametrize("kind", MODELS)
def test_the_first_inputs_are_exact_where_all_tokens_are_alike(kind):
    model = network(kind, alike=True)
    truth = measured(model)
    for weighting in ("moments", "covariances"):
        weights, hessians = propagated(model, weighting)
        checked = 0
        for name, wanted in truth.items():
            if ".0." not in name or not module_of(name).endswith(FIRST):
                continue
            checked += 1
            squares = np.diag(wanted)
            exact = weighting == "covariances" or kind not in LAYER_NORM
            # Without covariances, taking out the mean over channels is not quite known.
            tolerance = 1e-4 if exact else 0.1
            np.testing.assert_allclose(weights[name], squares / squares.mean(), rtol=tolerance)
            if hessians[name] is not None:
                assert np.linalg.norm(hessians[name] - wanted) < 1e-4 * np.linalg.norm(wanted)
        assert checked in (1, 3)


@pytest.mark.parametrize("weighting", ["moments", "covariances"])
@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_near_those_of_random_tokens(kind, weighting):
    """Mean deviation of a column's weight from the truth: 0.25 behind norms, 0.4 elsewhere.

    What is left out: tokens of unlike norms, heads and their positions, gates that vary with what
    they gate. Equal weights are farther off everywhere.
    """
    model = network(kind)
    truth = measured(model)
    weights, hessians = propagated(model, weighting)
    known = {name for name, value in weights.items() if value is not None}
    assert known >= {name for name in truth if not name.startswith("lm_head")}
    for name, wanted in truth.items():
        if name not in known:
            continue
        truly = np.diag(wanted) / np.diag(wanted).mean()
        off = np.abs(weights[name] / truly - 1).mean()
        behind_norm = not module_of(name).endswith((*OUT, *DOWN))
        assert off < (0.25 if behind_norm else 0.4), name
        assert off < 0.85 * np.abs(1 / truly - 1).mean(), name
        if hessians[name] is not None and behind_norm:
            # Heads are taken as independent; even attention makes them see the same tokens.
            assert np.linalg.norm(hessians[name] - wanted) < 0.6 * np.linalg.norm(wanted), name
    assert (weighting == "covariances") == any(h is not None for h in hessians.values())


@pytest.mark.parametrize("weighting", ["moments", "covariances"])
def test_weights_that_are_stored_transposed_may_come_either_way(weighting):
    model = network("GPT2LMHeadModel")
    stored, _ = propagated(model, weighting, cuts=7)
    turned, _ = propagated(model, weighting, cuts=11, matrix=True)
    for name, value in stored.items():
        assert (value is None) == (turned[name] is None)
        assert value is None or value.tobytes() == turned[name].tobytes()


def test_old_names_of_norms_are_known():
    stored = {name: value.shape for name, value in network("BertModel").state_dict().items()}
    config = network("BertModel").config.to_dict()

    def order(names):
        infos = {name: TensorInfo(name, "F32", tuple(shape)) for name, shape in names.items()}
        return make_moments(config, infos).order

    renamed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def old(name):
        for new, former in renamed.items():
            name = name.replace(new, former)
        return f"bert.{name}"

    assert order({old(name): shape for name, shape in stored.items()}) == tuple(
        old(name) for name in order(stored)
    )
    assert len(order(stored)) == len(stored)


def test_a_conversion_of_an_encoder_says_what_it_weighed_by(tmp_path):
    import sketchconv
    from sketchconv.recipe import Recipe, SketchSpec

    network("BertModel").save_pretrained(tmp_path / "bert")
    recipe = Recipe(SketchSpec(bits=2))
    report = sketchconv.convert(tmp_path / "bert", tmp_path / "bert.sktch", recipe)
    assert report.weighting == "propagated covariances"
