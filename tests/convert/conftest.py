"""Tiny random checkpoints, made by transformers itself."""

from __future__ import annotations

import pytest


def make_llama(folder, *, tied=True, dtype="bfloat16", shard="5GB"):
    """A two-layer Llama with grouped-query attention, saved as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=301,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tied bf16 Llama; read only."""
    return make_llama(tmp_path_factory.mktemp("llama") / "tiny-llama")


@pytest.fixture(scope="session")
def untied_shards(tmp_path_factory):
    """An untied fp32 Llama in several shards; read only."""
    folder = tmp_path_factory.mktemp("untied") / "tiny-untied"
    return make_llama(folder, tied=False, dtype="float32", shard="100KB")


@pytest.fixture
def fresh_llama(tmp_path):
    """A Llama of one's own, to break."""
    return make_llama(tmp_path / "fresh-llama")
