"""Attention runs once per block and model in a calibration, and no byte changes by that."""

from __future__ import annotations

import shutil

import pytest
import torch

import sketchconv
from sketchconv.calibration import streams
from sketchconv.calibration.blocks import catch_first, find_blocks
from sketchconv.calibration.options import Calibration
from sketchconv.calibration.shortcuts import find_shortcut
from sketchconv.calibration.stages import find_stages
from sketchconv.recipe import Recipe, SketchSpec

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
ATTENTION = ("self_attn", "self_attn.o_proj", True)
FOUND = {
    ("Llama", "num_key_value_heads"): ATTENTION,
    ("Qwen2", "num_key_value_heads"): ATTENTION,
    # Its attention returns the scores as well, and has to run.
    ("Gemma2", "num_key_value_heads"): ("mlp", "mlp.down_proj", True),
    ("Mixtral", "num_key_value_heads"): ATTENTION,
    ("GPTNeoX", None): ("attention", "attention.dense", True),
    ("Phi", None): ("self_attn", "self_attn.dense", True),
    ("Bert", None): ("attention.self", "attention.output.dense", False),
}


def build(kind, keys):
    import transformers

    more = {} if keys is None else {keys: 2}
    more |= {"head_dim": 8} if kind == "Gemma2" else {"pad_token_id": 0} if kind == "Phi" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **more, use_cache=False)
    name = {"Bert": "BertModel"}.get(kind, f"{kind}ForCausalLM")
    return getattr(transformers, name)(config).eval()


def found_in(model):
    """The first block, a call of it, hidden states and its shortcut."""
    block = model.get_submodule(find_blocks(model))[0]
    with torch.no_grad():
        hidden, call = catch_first(model, [block], torch.arange(16).view(2, 8))
        linears = [n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
        stages, _ = find_stages(block, call, hidden, linears)
        return block, call, hidden, find_shortcut(block, call, hidden, stages)


@pytest.mark.parametrize(("kind", "keys"), FOUND)
def test_attention_is_found(kind, keys):
    _, _, _, found = found_in(build(kind, keys))
    assert (found.module, found.linear, found.behind) == FOUND[kind, keys]


def convert(source, out, text, **changes):
    given = {"tokens": 1024, "seq_len": 32, "device": "cpu", "recover": 0, **changes}
    recipe = Recipe(SketchSpec(3, 2))
    sketchconv.convert(
        source, out, recipe, calibration=Calibration((str(text),), **given), threads=1
    )
    return out.read_bytes()


def narrow(source, folder):
    """The same model in bfloat16, in which hidden states are kept then."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    AutoModelForCausalLM.from_pretrained(source).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(params=["float32", "bfloat16", "bert"])
def model(request, tmp_path):
    """A model, and the class of its attention."""
    from transformers.models.bert.modeling_bert import BertSelfAttention
    from transformers.models.llama.modeling_llama import LlamaAttention

    if request.param == "bert":
        return request.getfixturevalue("bert"), BertSelfAttention
    llama = request.getfixturevalue("llama")
    folder = llama if request.param == "float32" else narrow(llama, tmp_path / "narrow")
    return folder, LlamaAttention


@pytest.mark.parametrize(("method", "most"), [("sketch", 0.5), ("gptq", 0.75)])
def test_no_byte_changes_and_attention_runs_less(model, text, tmp_path, monkeypatch, method, most):
    folder, attention = model
    runs = []
    forward = attention.forward

    def counted(self, *args, **kwargs):
        runs.append(len(args[0] if args else kwargs["hidden_states"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", counted)
    spared = convert(folder, tmp_path / "spared.sktch", text, method=method)
    few = sum(runs)
    runs.clear()
    monkeypatch.setattr(streams, "find_shortcut", lambda *_args: None)
    assert convert(folder, tmp_path / "whole.sktch", text, method=method) == spared
    assert 0 < few < most * sum(runs)
