"""Every architecture in llama.cpp: next-token log-probabilities as in transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peer import Runtime, divergence, prompts, reference
from tiny import MODELS, VOCABULARY

from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.run import export_gguf

pytest.importorskip("xllamacpp")


def dense(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def check(folder, path, lengths, context, bound, largest=0.1):
    model, runtime = dense(folder), Runtime(path, context)
    for tokens in prompts(folder, model, lengths):
        expected = reference(model, tokens)
        found = runtime.log_probabilities(tokens, VOCABULARY)
        # The random models are far from uniform, so agreement says something.
        assert expected.max() - expected.min() > 4
        assert divergence(expected, found) < bound
        assert np.abs(expected - found).max() < largest


@pytest.mark.parametrize("kind", MODELS)
def test_f32_is_the_same_model(models, kind, tmp_path):
    folder, path = models(kind), tmp_path / "model.gguf"
    export_gguf(folder, path, ExportRecipe("F32"))
    check(folder, path, (3, 40, 120), 256, 1e-5)


def test_the_long_factors_of_phi3_act_in_long_contexts(models, tmp_path):
    folder, path = models("phi3-long"), tmp_path / "model.gguf"
    export_gguf(folder, path, ExportRecipe("F32"))
    check(folder, path, (300, 350), 512, 1e-5)


def test_the_local_window_of_gemma_is_in_the_file(models, tmp_path):
    """Beyond the window of 16 tokens the model without it is another one."""
    folder, path = models("gemma2"), tmp_path / "model.gguf"
    export_gguf(folder, path, ExportRecipe("F32"))
    model, runtime = dense(folder), Runtime(path)
    wide = dense(folder)
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = None
        layer.self_attn.is_sliding = False
    wide.config.layer_types = ["full_attention"] * 2
    (tokens,) = prompts(folder, model, (100,))
    found = runtime.log_probabilities(tokens, VOCABULARY)
    assert divergence(reference(model, tokens), found) < 1e-5
    assert divergence(reference(wide, tokens), found) > 1e-4


@pytest.mark.parametrize(
    ("type_name", "bound", "largest"),
    [("F16", 1e-4, 0.1), ("BF16", 1e-3, 0.3), ("Q8_0", 0.02, 0.5)],
)
def test_other_types_stay_within_their_bounds(models, type_name, bound, largest, tmp_path):
    for kind in ("llama", "gemma3"):
        path = tmp_path / f"{kind}.gguf"
        export_gguf(models(kind), path, ExportRecipe(type_name))
        check(models(kind), path, (3, 40), 256, bound, largest)
