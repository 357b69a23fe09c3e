"""Models that llama.cpp would load wrongly or not at all are refused before any work."""

from __future__ import annotations

import pytest
from test_tokenizer import edit
from tiny import MODELS, make_model

from sketchconv.errors import ArchitectureError, RecipeError, SourceError
from sketchconv.export.llama_cpp_names import SPLITTER_NAMES, check_model_name
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.rope import plain_rope
from sketchconv.export.run import export_gguf
from sketchconv.sources.gguf_splitters import SPLITTERS


def test_yarn_without_rounded_borders_is_refused():
    rope = {**MODELS["qwen2-yarn"][1]["rope_parameters"]}
    assert plain_rope({**rope, "truncate": True}, 16) == plain_rope(rope, 16)
    with pytest.raises(ArchitectureError, match="truncate = false"):
        plain_rope({**rope, "truncate": False}, 16)


LLAMA3 = MODELS["llama3"][1]["rope_parameters"]


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type is 'llama3'.*llama.cpp's qwen2"),
        ("qwen3", {"rope_parameters": LLAMA3}, "rope_type is 'llama3'.*llama.cpp's qwen3"),
        ("gemma2", {"rope_parameters": LLAMA3}, "rope_type is 'llama3'.*llama.cpp's gemma2"),
        ("qwen3", {"attention_bias": True}, r"[qk]_proj\.bias: GGUF architecture 'qwen3'"),
        ("gemma2", {"attention_bias": True}, r"[qk]_proj\.bias: GGUF architecture 'gemma2'"),
        ("gemma3", {"attention_bias": True}, r"[qk]_proj\.bias: GGUF architecture 'gemma3'"),
    ],
)
def test_tensors_that_llama_cpp_does_not_read_are_refused(kind, changes, text, tmp_path):
    folder = make_model(tmp_path / "m", kind, **changes)
    with pytest.raises(ArchitectureError, match=text):
        export_gguf(folder, tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_splitters_that_llama_cpp_does_not_know_are_refused():
    assert set(SPLITTERS) <= SPLITTER_NAMES
    assert ExportRecipe(tokenizer_pre="deepseek-v3").tokenizer_pre == "deepseek-v3"
    with pytest.raises(RecipeError, match=r"llama-bep.*alike are .*llama-bpe"):
        ExportRecipe(tokenizer_pre="llama-bep")


@pytest.mark.parametrize("name", sorted(SPLITTER_NAMES - {"gemma4", "granite-embed-multi-311m"}))
def test_llama_cpp_knows_every_splitter_name(name, models, tmp_path):
    pytest.importorskip("xllamacpp")
    from peer import Runtime

    export_gguf(models("llama"), tmp_path / "x.gguf", ExportRecipe("F16", tokenizer_pre=name))
    assert Runtime(tmp_path / "x.gguf").tokens("a")


def test_names_that_promise_tokens_are_refused_without_them(models, tmp_path):
    with pytest.raises(RecipeError, match=r"'My-Phi-3'.*lacks <\|endoftext\|>.*--name"):
        export_gguf(models("llama"), tmp_path / "x.gguf", ExportRecipe(name="My-Phi-3"))
    check_model_name("phi3", ["</s>", "<unk>", "<s>", "<|endoftext|>"])


def test_a_text_with_two_ids_is_refused(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    edit(folder, lambda t: t["model"]["vocab"].update({"[PAD383]": 380}))
    with pytest.raises(SourceError, match=r"'\[PAD383\]' has two ids, 380 and 383"):
        export_gguf(folder, tmp_path / "x.gguf")
