"""Names that mean something to llama.cpp: ways of splitting text, and model names with tokens."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Final

from sketchconv.errors import RecipeError

_KNOWN: Final = """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r
    dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4
    f2llmv2 falcon falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o gpt3-finnish
    granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan hunyuan-dense
    hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano
    joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez
    mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2 mmbert modern-bert mpt olmo phi-2 pixtral
    poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe seed-coder smaug-bpe smollm solar-open
    spark2_5 stablelm2 starcoder superbpe talkie tekken tiny_aya trillion ufakzeka viking whitespace
    youtu
"""
SPLITTER_NAMES: Final = frozenset(_KNOWN.split())
"""Every `tokenizer.ggml.pre` that llama.cpp reads, in October 2026; it refuses all others."""

_PHI3: Final = ("phi-3", "phi3")
_PHI3_TOKENS: Final = ("</s>", "<unk>", "<s>", "<|endoftext|>")


def check_splitter_name(name: str) -> None:
    """Check a `tokenizer.ggml.pre` that was asked for.

    Raises:
        RecipeError: llama.cpp would refuse the file; names what is alike.
    """
    if name in SPLITTER_NAMES:
        return
    alike = difflib.get_close_matches(name, sorted(SPLITTER_NAMES), cutoff=0.4)
    hint = f"; alike are {', '.join(alike)}" if alike else ""
    raise RecipeError(f"--tokenizer-pre {name!r}: llama.cpp knows no such splitter{hint}")


def check_model_name(name: str, tokens: Collection[str]) -> None:
    """Check a `general.name`: by some, llama.cpp looks for certain tokens and fails without them.

    Raises:
        RecipeError: the name promises tokens that the vocabulary lacks.
    """
    missing = [token for token in _PHI3_TOKENS if token not in tokens]
    if missing and any(part in name.lower() for part in _PHI3):
        raise RecipeError(
            f"the model's name {name!r} makes llama.cpp look for the tokens"
            f" {', '.join(_PHI3_TOKENS)}, of which the tokenizer lacks {', '.join(missing)}, so"
            " that it would not load the file; pass --name with another one"
        )
