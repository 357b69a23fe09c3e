"""Tiny language models with a tokenizer of words, as folders that transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = 90
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": WORDS + 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make_tokenizer(*, bos: bool = False, words: int = WORDS) -> Any:
    """Words w0, w1, ... get the ids 3, 4, ...; with `bos` every text is opened by <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n + 3 for n in range(words)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        plain.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_model(kind: str = "LlamaForCausalLM", seed: int = 0, **changes: Any) -> Any:
    """A tiny random model whose predictions differ from token to token."""
    import transformers

    cls = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def make_text(words: int, seed: int = 0) -> str:
    chosen = torch.randint(WORDS, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{n}" for n in chosen.tolist())


@pytest.fixture(scope="session")
def makers():
    """`makers.model`, `makers.tokenizer`, `makers.text`, `makers.folder`."""

    class Makers:
        model = staticmethod(make_model)
        tokenizer = staticmethod(make_tokenizer)
        text = staticmethod(make_text)

        @staticmethod
        def folder(path: Path, model: Any = None, tokenizer: Any = None) -> Path:
            (model or make_model()).save_pretrained(path)
            (tokenizer or make_tokenizer()).save_pretrained(path)
            return path

    return Makers


@pytest.fixture(autouse=True)
def _torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
