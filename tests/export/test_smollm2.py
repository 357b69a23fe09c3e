"""SmolLM2 in full: from its GGUF to a sketch, and from there to llama.cpp."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_tokenizer import texts

import sketchconv
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.rows import rotary_order
from sketchconv.export.run import export_gguf
from sketchconv.formats.reader import SktchModel
from sketchconv.recipe import Recipe, SketchSpec

pytestmark = [pytest.mark.model, pytest.mark.slow]
PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which plants",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "In 1969, the first people walked on the",
)


@pytest.fixture(scope="module")
def source():
    spec = importlib.util.spec_from_file_location("models", Path(__file__).parents[1] / "models.py")
    models = importlib.util.module_from_spec(spec)
    sys.modules["models"] = models
    spec.loader.exec_module(models)
    return models.fetch(models.SMOLLM2)


@pytest.fixture(scope="module")
def sketch(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2") / "smollm2.sktch"
    sketchconv.convert(source, out, Recipe(weighting="equal"))
    return out


@pytest.fixture(scope="module")
def exported(sketch):
    """Exports of the sketch by type."""
    paths = {name: sketch.parent / f"{name}.gguf" for name in ("AUTO", "Q8_0")}
    for name, path in paths.items():
        export_gguf(sketch, path, ExportRecipe(name))
    return paths


def test_the_default_export_holds_the_sketchs_values(sketch, exported):
    tensors = {t.name: t for t in gguf.GGUFReader(exported["AUTO"]).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    with SktchModel.open(sketch) as model:
        chosen = [name for name in model.manifest.sketches if ".7." in name or ".29." in name]
        assert len(chosen) == 14
        for name in chosen:
            expected = model.decode(name)
            if "q_proj" in name or "k_proj" in name:
                expected = expected[rotary_order(np.arange(len(expected)), 64)]
            tensor = tensors[names.get_name(name, (".weight",))]
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(found, expected), name


def test_log_probabilities_tokens_and_text_in_llama_cpp(sketch, exported):
    pytest.importorskip("xllamacpp")
    import torch
    from peer import Runtime, divergence, reference

    model = sketchconv.load(sketch, dtype=torch.float32)
    tokenizer = sketchconv.load_tokenizer(sketch)
    for name, bound in (("AUTO", 1e-4), ("Q8_0", 0.02)):
        runtime, found = Runtime(exported[name]), []
        for prompt in PROMPTS:
            tokens = tokenizer.encode(prompt)
            expected = reference(model, tokens)
            found.append(divergence(expected, runtime.log_probabilities(tokens, len(expected))))
        assert np.mean(found) < bound, name
    for text in texts():
        assert runtime.tokens(text) == tokenizer.encode(text, add_special_tokens=False), text
    answer = runtime.complete(prompt=PROMPTS[0], n_predict=12)
    assert "Paris" in answer["choices"][0]["text"]


def test_a_plain_reexport_of_the_source_is_the_same_file(source, tmp_path):
    export_gguf(source, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == source.read_bytes()


def test_a_shaped_sketch_is_the_same_model_in_llama_cpp(source, tmp_path):
    pytest.importorskip("xllamacpp")
    import torch
    from peer import Runtime, divergence, reference

    sketch, path = tmp_path / "shaped.sktch", tmp_path / "shaped.gguf"
    sketchconv.convert(source, sketch, Recipe(SketchSpec(grid="iq4_nl")))
    export_gguf(sketch, path)
    model, tokenizer = (
        sketchconv.load(sketch, dtype=torch.float32),
        sketchconv.load_tokenizer(sketch),
    )
    runtime, found = Runtime(path), []
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt)
        expected = reference(model, tokens)
        found.append(divergence(expected, runtime.log_probabilities(tokens, len(expected))))
    assert np.mean(found) < 0.02  # llama.cpp rounds activations to 8 bits
    answer = runtime.complete(prompt=PROMPTS[0], n_predict=12)
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    written = tokenizer.decode(text[0, prompt.input_ids.shape[1] :])
    assert answer["choices"][0]["text"].startswith(written[:8])
    assert len(set(answer["choices"][0]["text"].split())) > 2
