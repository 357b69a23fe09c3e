"""Tiny random models with a tokenizer of bytes, and texts for them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

VOCABULARY = 260


def make_tokenizer(*, template=True):
    """Bytes as tokens, and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<eos>": len(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    if template:
        fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return fast


@pytest.fixture
def byte_tokenizer():
    """Makes tokenizers of one's own."""
    return make_tokenizer


def llama_config(**changes):
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            **changes,
        }
    )


def save_model(folder, model, *, dtype="float32"):
    """Save a model with gains off 1, and its tokenizer, as a Hugging Face folder."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "bias" not in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 2:
                parameter.normal_(0, 0.3 if "embed" in name else 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path):
    """Saves tiny models by the name of their class, in three layers or as they are told."""

    def save(kind, **changes):
        import transformers

        cls = getattr(transformers, kind)
        return save_model(tmp_path / kind, cls(cls.config_class(vocab_size=VOCABULARY, **changes)))

    return save


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A Llama of three layers; read only."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("calibration") / "tiny-llama"
    return save_model(folder, LlamaForCausalLM(llama_config()))


@pytest.fixture
def fresh_llama(llama, tmp_path):
    """A Llama of one's own, to break."""
    return Path(shutil.copytree(llama, tmp_path / "fresh-llama"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A BERT encoder of two layers; read only."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("calibration") / "tiny-bert"
    return save_model(folder, BertModel(config))


def write_text(path, characters, seed):
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(1, 6))) for _ in range(60)]
    text = " ".join(generator.choices(words, k=characters // 3))[:characters]
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text of 6,000 bytes."""
    return write_text(tmp_path_factory.mktemp("text") / "words.txt", 6000, seed=1)


@pytest.fixture
def lines(tmp_path):
    """A JSONL with both kinds of records."""
    records = [{"text": "one two"}, {"messages": [{"role": "user", "content": "three"}]}]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path
