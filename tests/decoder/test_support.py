"""Why a model is not decoded by the compiled step: every reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sketchconv.runtime.decoder import Decoder, why_not


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def attach_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *args: None)


def attach_pre_hook(model):
    model.register_forward_pre_hook(lambda *args: None)


def own_forward(model):
    model.model.norm.forward = model.model.norm.forward


def replace_linear(model):
    class Linear(nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj.__class__ = Linear


def parametrized(model):
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())


def more_modules(model):
    model.model.layers[0].adapter = nn.Identity()


def fewer_modules(model):
    del model.model.layers[1].mlp.up_proj


def other_activation(model):
    model.model.layers[1].mlp.act_fn = nn.GELU()


def meta(model):
    model.model.norm.to("meta")


def double(model):
    model.double()


def transposed(model):
    weight = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(weight.detach().T.contiguous().T)


def other_attention(model):
    model.config._attn_implementation = "flex_attention"


def dynamic_rotation(model):
    model.model.rotary_emb.rope_type = "dynamic"


def partial_rotation(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:2]


def largest_norm(model):
    model.model.embed_tokens.max_norm = 1.0


CHANGES = {
    attach_hook: "model.layers.1.mlp has hooks",
    attach_pre_hook: "the model has hooks",
    own_forward: "model.norm has a forward of its own",
    replace_linear: "model.layers.0.mlp.up_proj is a Linear of another kind",
    parametrized: "lm_head",
    more_modules: "a module too many: model.layers.0.adapter",
    fewer_modules: "lacks a module: model.layers.1.mlp.up_proj",
    other_activation: "model.layers.1.mlp.act_fn is a GELU",
    meta: "model.norm.weight is on meta",
    double: "is torch.float64",
    transposed: "lm_head.weight is not contiguous",
    other_attention: "attention is 'flex_attention'",
    dynamic_rotation: "rotary embeddings are 'dynamic'",
    partial_rotation: "do not cover heads of 16",
    largest_norm: "max_norm",
    nn.Module.train: "training mode",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_that_the_step_does_not_know(makers, change):
    model = makers.build("LlamaForCausalLM")
    assert why_not(model) is None
    change(model)
    reason = why_not(model)
    assert reason is not None
    assert CHANGES[change] in reason
    with pytest.raises(ValueError, match="cannot be decoded"):
        Decoder(model)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("GemmaForCausalLM", {}, "GemmaForCausalLM is not a model that"),
        ("LlamaForSequenceClassification", {}, "is not a model that"),
        ("BertForMaskedLM", {}, "is not a model that"),
        ("MistralForCausalLM", {"sliding_window": 32}, "sliding window"),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding window",
        ),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "act_fn"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
    ],
)
def test_models_that_the_step_does_not_know(makers, kind, changes, reason):
    answer = why_not(makers.build(kind, **changes))
    assert answer is not None
    assert reason in answer


def test_a_subclass_is_another_model(makers):
    model = makers.build("LlamaForCausalLM")

    class Mine(type(model)):
        pass

    model.__class__ = Mine
    assert "Mine is not a model" in str(why_not(model))


def test_a_class_whose_forward_was_replaced(makers, monkeypatch):
    model = makers.build("LlamaForCausalLM")
    kind = type(model.model.norm)
    monkeypatch.setattr(kind, "forward", lambda self, x: x)
    assert "model.norm is a LlamaRMSNorm of another kind" in str(why_not(model))


def test_adapters_of_peft(makers):
    peft = pytest.importorskip("peft")
    model = makers.build("LlamaForCausalLM")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    assert "PeftModel" in str(why_not(wrapped))
    assert why_not(model) is not None  # what is inside has adapters too


def test_scales_of_another_dtype(pair):
    """Casts leave them alone; whoever puts others in place gets the modules."""
    model = pair(shapes={"o_proj": ("iq4_nl", 4, 32)}).model
    assert why_not(model) is None
    module = model.model.layers[1].self_attn.o_proj
    module.sketch_scale.data = module.sketch_scale.data.float()
    expected = "model.layers.1.self_attn.o_proj.sketch_scale is torch.float32, not float16"
    assert why_not(model) == expected
    with torch.no_grad():
        assert model(torch.tensor([[5]])).logits.isfinite().all()


def test_a_class_of_shaped_sketches_that_nobody_knows(pair):
    model = pair(shapes={"o_proj": ("iq4_nl", 4, 32)}).model
    module = model.model.layers[0].self_attn.o_proj
    module.__class__ = type("Mine", (type(module),), {})
    assert "o_proj is a Mine of another kind" in str(why_not(model))


def test_scaled_embeddings(pair):
    model = pair(embeddings=True).model
    model.model.embed_tokens.scale = 2.0
    assert why_not(model) == "embeddings are scaled"


def test_all_reasons_hold_at_every_dtype(makers):
    for dtype in (torch.bfloat16, torch.float16):
        assert why_not(makers.build("LlamaForCausalLM").to(dtype)) is None
