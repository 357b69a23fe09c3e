"""Tiny random models of families whose weights are fused, transposed or experts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 260
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
_MOE = {**_LLAMA, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "phi3": ("Phi3ForCausalLM", {**_LLAMA, "sliding_window": None}),
    "mixtral": ("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_MOE, "head_dim": 16}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**_MOE, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    ),
}


def make_tokenizer() -> Any:
    """Bytes as tokens, and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<eos>": len(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make(kind: str, folder: Path, *, stacked: bool = False, **changes: Any) -> Path:
    """Save a random model with gains and biases off 1 and 0, and its tokenizer.

    `stacked` leaves fused experts as tensors of three dimensions.
    """
    import transformers
    from safetensors.torch import save_file

    name, settings = KINDS[kind]
    cls = getattr(transformers, name)
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**settings, **ids, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                low, high = (-0.3, 0.3) if "bias" in name else (0.5, 1.5)
                parameter.uniform_(low, high)
            else:
                parameter.normal_(0, 0.3 if "embed" in name or "wte" in name else 0.15)
    model.save_pretrained(folder)
    if stacked:
        state = {n: t.contiguous() for n, t in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del state["lm_head.weight"]
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Families:
    """`families(kind)` is a folder, made once, read only; `make` makes one's own."""

    root: Path
    made: dict[tuple[str, bool], Path]
    make = staticmethod(make)

    def __call__(self, kind: str, *, stacked: bool = False) -> Path:
        key = (kind, stacked)
        if key not in self.made:
            folder = self.root / f"{kind}{'-stacked' * stacked}"
            self.made[key] = make(kind, folder, stacked=stacked)
        return self.made[key]


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """Folders of tiny models by kind."""
    return Families(tmp_path_factory.mktemp("families"), {})


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text of 8,000 bytes."""
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(1, 6))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(generator.choices(words, k=2600))[:8000], encoding="utf-8")
    return path


@pytest.fixture
def ids():
    """Two sequences of twelve tokens."""
    return torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(4))
