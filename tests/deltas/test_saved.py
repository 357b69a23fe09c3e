"""A delta from a model that was loaded, changed and saved by transformers."""

import pytest
import torch

import sketchconv
from sketchconv.deltas import apply, create, resolve, revert
from sketchconv.recipe import Recipe

Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A sketched two-layer Llama, as a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=61,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "dense")
    sketchconv.convert(folder / "dense", folder / "base", Recipe(embed_bits=8))
    return folder / "base"


def logits(path):
    with torch.no_grad():
        return sketchconv.load(path)(torch.arange(12)[None]).logits


def test_tune_save_create_apply(tmp_path, base):
    model = sketchconv.load(base)
    with torch.no_grad():
        model.get_parameter(f"{Q_PROJ}.sketch_lut")[3:5] += 0.5
    model.save_pretrained(tmp_path / "tuned")
    made = create(base, tmp_path / "tuned", tmp_path / "d.sktch")
    assert (made.weights, made.changed, made.exact) == (1, 2, True)
    assert resolve(tmp_path / "d.sktch", base).keys() == {f"{Q_PROJ}.weight"}
    apply(base, tmp_path / "d.sktch", tmp_path / "applied")
    assert torch.equal(logits(tmp_path / "applied"), logits(tmp_path / "tuned"))
    assert not torch.equal(logits(tmp_path / "applied"), logits(base))


def test_a_folder_that_transformers_wrote_comes_back_byte_by_byte(tmp_path, base):
    sketchconv.load(base).save_pretrained(tmp_path / "own", max_shard_size="20KB")
    model = sketchconv.load(base)
    tuned = {f"{Q_PROJ}.weight": -model.get_parameter(f"{Q_PROJ}.sketch_lut")}
    create(base, tuned, tmp_path / "d.sktch")
    apply(tmp_path / "own", tmp_path / "d.sktch", tmp_path / "applied")
    revert(tmp_path / "applied", tmp_path / "d.sktch", tmp_path / "back")
    own = {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()}
    assert len([name for name in own if name.endswith(".safetensors")]) > 1
    assert own == {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()}
