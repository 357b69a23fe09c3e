"""Blocks, their stages and their residual streams are found by structure, for many families."""

from __future__ import annotations

import pytest
import torch

from sketchconv.calibration.blocks import Call, catch_first, find_blocks
from sketchconv.calibration.stages import Tap, find_stages
from sketchconv.errors import CalibrationError

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}


def build(kind, **changes):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    name = {"Bert": "BertModel"}.get(kind, f"{kind}ForCausalLM")
    return getattr(transformers, name)(config).eval()


def stages_of(model):
    """(names of each stage's linears, residual taps by name, linears that did not run)."""
    path = find_blocks(model)
    blocks = list(model.get_submodule(path))
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        hidden, call = catch_first(model, blocks, ids)
        linears = [n for n, m in blocks[0].named_modules() if isinstance(m, torch.nn.Linear)]
        stages, unseen = find_stages(blocks[0], call, hidden, linears)
    names = [[[n.split(".", 1)[-1] for n in g.linears] for g in s.groups] for s in stages]
    taps = {n.split(".", 1)[-1]: t for s in stages for g in s.groups for n, t in g.residual.items()}
    return [groups[0] if len(groups) == 1 else groups for groups in names], taps, unseen


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
def test_llama_like_blocks(kind):
    model = build(kind, num_key_value_heads=2)
    assert find_blocks(model) == "model.layers"
    stages, taps, unseen = stages_of(model)
    assert stages == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert taps["down_proj"] == Tap("post_attention_layernorm", "in")
    assert taps["o_proj"] in (Tap("", "in"), Tap("input_layernorm", "in"))
    assert set(taps) == {"o_proj", "down_proj"}
    assert unseen == []


def test_norms_before_the_sum_hide_the_residual_stream():
    model = build("Gemma2", num_key_value_heads=2, head_dim=8)
    stages, taps, _ = stages_of(model)
    assert [len(stage) for stage in stages] == [3, 1, 2, 1]
    assert taps == {}


def test_bert_blocks_add_before_the_norm():
    model = build("Bert")
    assert find_blocks(model) == "encoder.layer"
    stages, taps, _ = stages_of(model)
    assert [len(stage) for stage in stages] == [3, 1, 1, 1]
    assert len(taps) == 2


def test_fused_and_parallel_blocks():
    phi3, taps, _ = stages_of(build("Phi3", num_key_value_heads=2, pad_token_id=0))
    assert phi3 == [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]
    assert set(taps) == {"o_proj", "down_proj"}
    phi, taps, _ = stages_of(build("Phi"))
    assert phi[0] == ["q_proj", "k_proj", "v_proj", "fc1"]
    assert taps == {}


class Experts(torch.nn.Module):
    """A block with a list of experts, of which the last is never chosen."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(8, 8)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)) for _ in range(3)
        )

    def forward(self, hidden):
        flat = hidden.reshape(-1, 8)
        out = self.router(flat)
        for i in range(2):
            out[i::2] += self.experts[i](flat[i::2])
        return out.view(hidden.shape)


def test_experts_share_stages_and_the_idle_one_is_named():
    torch.manual_seed(0)
    linears = ["router", *(f"experts.{i}.{j}" for i in range(3) for j in range(2))]
    with torch.no_grad():
        hidden = torch.randn(2, 4, 8)
        stages, unseen = find_stages(Experts(), Call((), {}, None), hidden, linears)
    names = [[group.linears for group in stage.groups] for stage in stages]
    assert names == [
        [("router",)],
        [("experts.0.0",), ("experts.1.0",)],
        [("experts.0.1",), ("experts.1.1",)],
    ]
    assert unseen == ["experts.2.0", "experts.2.1"]


def test_two_stacks_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=50)
    with pytest.raises(CalibrationError, match="several stacks of blocks"):
        find_blocks(T5ForConditionalGeneration(config))


def test_a_model_without_blocks_is_refused():
    with pytest.raises(CalibrationError, match="no list of blocks"):
        find_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)))
