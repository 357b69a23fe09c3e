"""Mixtures of types, against the counts that llama.cpp's `quantize` prints for a 32-block llama."""

from __future__ import annotations

from collections import Counter

import gguf
import pytest
from tiny import make_model

from sketchconv.export.encoders import ENCODERS
from sketchconv.export.mixtures import MIXTURES, exceptions
from sketchconv.export.recipe import ExportRecipe, parse_choice
from sketchconv.export.run import export_gguf

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
NAMES = [
    "token_embd.weight", "output.weight",
    *(f"blk.{n}.{part}.weight" for n in range(32) for part in PARTS),
    *(f"blk.{n}.attn_v.bias" for n in range(32)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("Q4_K_M", {"Q6_K": 32}),
        ("Q4_K_S", {"Q5_K": 8}),
        ("Q5_K_M", {"Q6_K": 32}),
        ("Q5_K_S", {}),
        ("Q3_K_S", {}),
        ("Q3_K_M", {"Q5_K": 4, "Q4_K": 92}),
        ("Q3_K_L", {"Q5_K": 96}),
    ],
)
def test_counts(name, counts):
    assert Counter(kind for _, kind in exceptions(MIXTURES[name], NAMES)) == counts


def test_which_blocks_get_more_bits():
    found = dict(exceptions(MIXTURES["Q4_K_M"], NAMES))
    blocks = [n for n in range(32) if f"blk.{n}.ffn_down.weight" in found]
    assert blocks == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert not any(name.endswith("bias") for name in found)


def test_every_type_of_a_mixture_can_be_written():
    for mixture in MIXTURES.values():
        assert {mixture.base, *(rule.type for rule in mixture.rules)} <= set(ENCODERS)


def test_a_file_of_a_mixture_runs_and_choices_come_last(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    folder = make_model(tmp_path / "wide", "llama", **sizes)
    path = tmp_path / "model.gguf"
    export_gguf(folder, path, ExportRecipe("q4_k_m", (parse_choice("ffn_down=Q5_K"),)))
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_v.weight"] == "Q6_K"
    assert types["blk.0.ffn_down.weight"] == "Q5_K"
    assert types["blk.0.attn_q.weight"] == "Q4_K"
    pytest.importorskip("xllamacpp")
    from peer import Runtime
    from tiny import VOCABULARY

    assert len(Runtime(path).log_probabilities([5, 6, 7], VOCABULARY)) == VOCABULARY
    again = tmp_path / "again.gguf"
    export_gguf(path, again, ExportRecipe("Q4_K_M"))
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(again).tensors}
    assert types["blk.0.ffn_down.weight"] == "Q6_K"
