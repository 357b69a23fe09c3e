"""Tiny random models of every architecture that can be exported, with tokenizers of their own."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

VOCABULARY = 384
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
CORPUS = (
    "the quick brown fox jumps over the lazy dog and it's 1234567 times faster than 42 others",
    "def main(args):\n    return [x ** 2 for x in range(10)]  # squares\n\n\n",
    "Пример текста на русском языке, 日本語のテキスト, naïve café, 🚀🚀 ünïcödé",
    "They'll say WE'RE done; don't. HTTPServer2 handles 3.14159 requests/s!?\t\ttabs",
)
_SHARED = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
_GROUPED = {**_SHARED, "num_attention_heads": 4, "num_key_value_heads": 2}
_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 256,
}
# name -> transformers' config and model, and the settings that make it small.
MODELS = {
    "llama": ("Llama", {**_GROUPED, "max_position_embeddings": 256}),
    "llama-bias": ("Llama", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama-untied": ("Llama", {**_GROUPED, "tie_word_embeddings": False, "head_dim": 32}),
    "llama3": (
        "Llama",
        {**_GROUPED, "max_position_embeddings": 512, "rope_parameters": _LLAMA3},
    ),
    "llama-linear": (
        "Llama",
        {
            **_GROUPED,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "mistral": ("Mistral", {**_GROUPED, "head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2-yarn": (
        "Qwen2",
        {
            **_GROUPED,
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 32}),
    "gemma2": (
        "Gemma2",
        {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **_GROUPED,
            "num_hidden_layers": 7,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
        },
    ),
    "phi3": ("Phi3", {**_GROUPED, "sliding_window": None, "max_position_embeddings": 256}),
    "phi3-long": (
        "Phi3",
        {
            **_GROUPED,
            "sliding_window": None,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": _LONG,
        },
    ),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}
_CAUSAL = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def make_model(folder: Path, kind: str, *, dtype: str = "float32", **changes) -> Path:
    """Save a random model of one kind, and a tokenizer; norms and biases are not 0 or 1."""
    import torch
    import transformers

    family, settings = MODELS[kind]
    config = getattr(transformers, f"{family}Config")(**{**_IDS, **settings, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, _CAUSAL.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                low, high = (-0.2, 0.2) if name.endswith("bias") else (0.6, 1.4)
                shift = 1.0 if family.startswith("Gemma") and low > 0 else 0.0
                parameter.uniform_(low - shift, high - shift)
            else:
                parameter.normal_(0.0, 0.15)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(folder, "spm" if family in ("Gemma2", "Gemma3Text", "Mistral") else "gpt-2")
    return folder


def make_tokenizer(folder: Path, kind: str, **settings) -> None:
    """Save a tokenizer trained on `CORPUS`: `spm`, or a splitter's name for byte-level BPE."""
    tokenizer = _sentence_piece() if kind == "spm" else _byte_level(kind)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _added() -> list[dict]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": i, "content": t, **plain, "special": True} for i, t in enumerate(SPECIAL)]


@cache
def _trained() -> str:
    """A byte-level BPE vocabulary; every splitter can go with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 10,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    text: str = tokenizer.to_str()
    return text


def _byte_level(splitter: str) -> dict:
    from sketchconv.sources.gguf_splitters import SPLITTERS

    value = json.loads(_trained())
    rules = SPLITTERS[splitter]
    value["pre_tokenizer"] = rules.json()
    value["normalizer"] = {"type": "NFC"} if rules.compose else None
    value["decoder"] = {**value["pre_tokenizer"]["pretokenizers"][-1]}
    value["model"]["ignore_merges"] = rules.whole_words
    return value


def _sentence_piece() -> dict:
    """As transformers writes a SentencePiece vocabulary: byte fallback, all cuts as merges."""
    from sketchconv.sources.gguf_tokenizer import merges_from_scores

    words = [t.replace(" ", "▁") for t in CORPUS]
    tokens = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))]
    merged = ["▁t", "▁th", "▁the", "he", "in", "er", "an", "▁a", "re", "▁f", "▁fox", "ox", "fo"]
    merged += ["qu", "ick", "ck", "ic", "▁▁", "▁▁▁▁", "ow", "ro", "ve", "ver", "es", "at"]
    letters = sorted({c for text in words for c in text} - {"\t", "\n"})
    room = VOCABULARY - 4 - len(tokens) - len(merged)
    tokens += [*merged, *letters[:room]]
    scores = [0.0] * (len(SPECIAL) + 256) + [-float(i) for i in range(len(merged) + len(letters))]
    known = {token: index for index, token in enumerate(tokens)}
    merges = [m for m in merges_from_scores(tokens, scores) if not any("<" in part for part in m)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": known,
            "merges": merges,
        },
    }
