"""`from_pretrained` and `save_pretrained` of sketched folders."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import sketchconv
from sketchconv.errors import LoadError
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.reader import SktchModel
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear, SketchModule
from sketchconv.runtime.tied import TiedSketchLinear


def logits(model, ids):
    with torch.no_grad():
        out = model(ids)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def assert_same(sketch, dense, ids, tolerance=1e-3):
    assert torch.allclose(logits(sketch, ids), logits(dense, ids), atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"tie_word_embeddings": False}, {"head": True}),
        ({"tie_word_embeddings": True}, {}),
        ({"tie_word_embeddings": True}, {"embeddings": True, "bits": {"model.embed_tokens": 8}}),
        ({"tie_word_embeddings": False}, {"embeddings": True, "head": True, "groups": 4}),
        ({}, {"bits": 3, "groups": 2, "lut": torch.bfloat16}),
        ({}, {"bits": 7, "lut": torch.float32}),
        ({"attention_bias": True, "mlp_bias": True}, {"bits": 2}),
    ],
)
def test_llama_runs_as_its_dense_twin(tiny, tmp_path, ids, changes, options):
    sketch = tiny.write(tiny.build("LlamaForCausalLM", **changes), tmp_path / "m", **options)
    model = AutoModelForCausalLM.from_pretrained(sketch.path)
    count = sum(isinstance(m, SketchLinear) for m in model.modules())
    assert count >= 14
    assert model.dtype is torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert_same(model, sketch.dense, ids)
    assert_same(model, sketch.dense, ids[:, :3])


@pytest.mark.parametrize("kind", ["Qwen2ForCausalLM", "Gemma3ForCausalLM", "BertModel"])
def test_other_architectures(tiny, tmp_path, ids, kind):
    changes = {"head_dim": 16} if "Gemma" in kind else {}
    dense = tiny.build(kind, **changes)
    sketch = tiny.write(dense, tmp_path / "m", embeddings=True, bits=5)
    model = getattr(transformers, kind).from_pretrained(sketch.path)
    assert any(isinstance(m, SketchEmbedding) for m in model.modules())
    assert_same(model, sketch.dense, ids)


def test_a_tied_head_shares_the_embedding(tiny, tmp_path, ids):
    dense = tiny.build("LlamaForCausalLM", tie_word_embeddings=True)
    sketch = tiny.write(dense, tmp_path / "m", embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(sketch.path)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(head, TiedSketchLinear)
    assert head.sketch_lut is embedding.sketch_lut
    assert head.sketch_index is embedding.sketch_index
    assert not any("lm_head" in key for key in model.state_dict())
    model.tie_weights()
    assert_same(model, sketch.dense, ids)
    assert_same(copy.deepcopy(model), sketch.dense, ids)
    with_base = AutoModel.from_pretrained(sketch.path)
    assert not hasattr(with_base, "lm_head")


def test_shards_of_our_own_writer_load(tiny, tmp_path, ids):
    dense = tiny.build("LlamaForCausalLM", tie_word_embeddings=False)
    sketch = tiny.write(dense, tmp_path / "m", shard=20_000)
    assert len(list(sketch.path.glob("*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(sketch.path)
    assert_same(model, sketch.dense, ids)
    last = sorted(sketch.path.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises((LoadError, OSError)):
        AutoModelForCausalLM.from_pretrained(sketch.path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_device_map(tiny, tmp_path, ids, dtype):
    sketch = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "m", embeddings=True)
    for device_map in ("cpu", "auto"):
        model = AutoModelForCausalLM.from_pretrained(
            sketch.path, dtype=dtype, device_map=device_map
        )
        assert model.dtype is dtype
        assert model.model.norm.weight.dtype is dtype
        assert model.model.layers[0].mlp.up_proj.sketch_lut.dtype is torch.float16
        out = logits(model, ids)
        assert out.dtype is dtype
        assert torch.allclose(out.float(), logits(sketch.dense, ids), atol=0.15)


def test_cached_decoding_equals_a_whole_forward(tiny, tmp_path, ids):
    sketch = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(sketch.path)
    written = model.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)
    again = sketch.dense.generate(ids[:1], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(written, again)


def stored(folder):
    tensors, documents = {}, []
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
        with safe_open(path, "pt") as file:
            documents.append(file.metadata()["sktch"])
    return tensors, documents


@pytest.mark.parametrize("shard", [None, "30KB"])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "BertModel"])
def test_saving_round_trips_bit_for_bit(tiny, tmp_path, ids, shard, kind):
    sketch = tiny.write(tiny.build(kind), tmp_path / "m", embeddings=True, lut=torch.bfloat16)
    cls = getattr(transformers, kind)
    first = cls.from_pretrained(sketch.path)
    first.save_pretrained(tmp_path / "again", **({"max_shard_size": shard} if shard else {}))
    before, (old_text,) = stored(sketch.path)
    after, texts = stored(tmp_path / "again")
    assert (len(texts) > 1) == (shard is not None)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype is after[name].dtype
        assert torch.equal(tensor, after[name]), name
    old, new = Manifest.from_json(old_text, "old"), Manifest.from_json(texts[0], "new")
    assert replace(new, tool=old.tool) == old
    assert len(set(texts)) == 1
    with SktchModel.open(tmp_path / "again") as model:
        assert model.manifest.sketches == sketch.records
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sktch"
    assert config["dtype"] == "float32"
    second = cls.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(first, ids), logits(second, ids))


def test_saved_folders_pass_validation_and_trained_luts_lose_their_error(tiny, tmp_path, ids):
    from sketchconv.formats.validate import validate

    sketch = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(sketch.path)
    trained = model.model.layers[0].mlp.up_proj.sketch_lut
    trained.requires_grad_(True)
    loss = model(ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        trained -= trained.grad.clamp(-0.01, 0.01)
    model.save_pretrained(tmp_path / "tuned")
    assert list(validate(tmp_path / "tuned")) == []
    with SktchModel.open(tmp_path / "tuned") as saved:
        errors = saved.manifest.errors
    assert errors.pop("model.layers.0.mlp.up_proj.weight") is None
    assert set(errors.values()) == {0.125}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_a_base_model_gets_a_new_head_and_back(tiny, tmp_path, ids):
    sketch = tiny.write(tiny.build("BertModel"), tmp_path / "base", embeddings=True)
    classifier = AutoModelForSequenceClassification.from_pretrained(sketch.path, num_labels=3)
    assert classifier.classifier.weight.abs().sum() > 0
    assert isinstance(classifier.bert.encoder.layer[0].output.dense, SketchLinear)
    assert_same(classifier.bert, sketch.dense, ids)
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(logits(again, ids), logits(classifier, ids))
    assert_same(AutoModel.from_pretrained(tmp_path / "classifier"), sketch.dense, ids)
    masked = transformers.AutoModelForMaskedLM.from_pretrained(sketch.path)
    assert isinstance(masked.cls.predictions.decoder, TiedSketchLinear)
    assert logits(masked, ids).shape[-1] == 97


def test_dequantize_gives_an_ordinary_model(tiny, tmp_path, ids):
    dense = tiny.build("LlamaForCausalLM", tie_word_embeddings=True)
    sketch = tiny.write(dense, tmp_path / "m", embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(sketch.path).dequantize()
    assert not any(isinstance(m, SketchModule) for m in model.modules())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, ids), logits(sketch.dense, ids))
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again, ids), logits(sketch.dense, ids))


def edit(folder, change):
    """Rewrite the weights of a folder with `change` applied to its tensors and its document."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        manifest = Manifest.from_json(file.metadata()["sktch"], "test")
    manifest = change(tensors, manifest) or manifest
    save_file(tensors, path, {"format": "pt", "sktch": manifest.to_json()})


def drop(name):
    def change(tensors, manifest):
        del tensors[name]
        return replace(manifest, digests={k: v for k, v in manifest.digests.items() if k != name})

    return change


def test_missing_tensors_fail_before_loading(tiny, tmp_path):
    sketch = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "m")
    edit(sketch.path, drop("model.norm.weight"))
    with pytest.raises(LoadError, match=r"needs are missing: model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(sketch.path)
    undocumented = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "n")

    def forget(tensors, _):
        del tensors["model.norm.weight"]

    edit(undocumented.path, forget)
    with pytest.raises(LoadError, match="not a sound sketch"):
        AutoModelForCausalLM.from_pretrained(undocumented.path)


def test_a_lost_sketch_fails_before_loading(tiny, tmp_path):
    sketch = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "m")
    name = "model.layers.1.mlp.down_proj"

    def change(tensors, manifest):
        gone = {f"{name}.sketch_index", f"{name}.sketch_lut"}
        for key in gone:
            del tensors[key]
        weight = f"{name}.weight"
        return replace(
            manifest,
            sketches={k: v for k, v in manifest.sketches.items() if k != weight},
            errors={k: v for k, v in manifest.errors.items() if k != weight},
            digests={k: v for k, v in manifest.digests.items() if k not in gone},
        )

    edit(sketch.path, change)
    with pytest.raises(LoadError, match=r"missing: model\.layers\.1\.mlp\.down_proj\.weight"):
        AutoModelForCausalLM.from_pretrained(sketch.path)


def test_foreign_tensors_fail_before_loading(tiny, tmp_path):
    sketch = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "m")

    def change(tensors, manifest):
        tensors["model.layers.9.input_layernorm.weight"] = torch.ones(64)
        extra = {"model.layers.9.input_layernorm.weight": "0" * 64}
        return replace(manifest, digests={**manifest.digests, **extra})

    edit(sketch.path, change)
    with pytest.raises(
        LoadError, match=r"does not have: model\.layers\.9\.input_layernorm\.weight"
    ):
        AutoModelForCausalLM.from_pretrained(sketch.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"intermediate_size": 80},
            r"down_proj.weight is \[64, 96\], the model expects \[64, 80\]",
        ),
        ({"num_hidden_layers": 3}, "needs are missing: model.layers.2"),
        ({"num_hidden_layers": 1}, "does not have: model.layers.1"),
        ({"vocab_size": 150}, r"lm_head.weight is \[151, 64\], the model expects \[150, 64\]"),
    ],
)
def test_a_config_that_does_not_fit_fails(tiny, tmp_path, changes, message):
    sketch = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "m", config=changes)
    with pytest.raises(LoadError, match=message):
        AutoModelForCausalLM.from_pretrained(sketch.path)


def test_a_folder_whose_weights_are_no_sketch_fails(tiny, tmp_path):
    sketch = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "m")
    dense = tiny.build("LlamaForCausalLM")
    save_file(dict(dense.model.state_dict()), sketch.path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match="not a sound sketch"):
        AutoModelForCausalLM.from_pretrained(sketch.path)


def test_modules_without_a_sketched_form_are_refused(tmp_path):
    from sketchconv.formats.sketches import SketchRecord
    from sketchconv.runtime.replace import sketched

    record = SketchRecord("h.weight", (8, 4), "F32", 4, 1, "F16")
    conv = torch.nn.Conv1d(4, 8, 1)
    with pytest.raises(LoadError, match="belongs to a Conv1d"):
        sketched(conv, record, torch.float32)

    class Odd(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    with pytest.raises(LoadError, match="embedding of type Odd"):
        sketched(Odd(8, 4), record, torch.float32)


def test_plain_transformers_fails_loudly(tiny, tmp_path):
    """Without `import sketchconv` there must be an error, never random weights."""
    sketch = tiny.write(tiny.build("LlamaForCausalLM"), tmp_path / "m")
    code = f"""
import sys
from transformers import AutoModelForCausalLM
assert not any(name.startswith("sketchconv") for name in sys.modules)
try:
    AutoModelForCausalLM.from_pretrained({str(sketch.path)!r})
except RuntimeError as error:
    print("refused:", "size mismatch" in str(error) or "mismatch" in str(error))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert done.stdout.strip() == "refused: True", done.stderr[-2000:]


@pytest.mark.parametrize("order", ["sketchconv, transformers", "transformers, sketchconv"])
def test_importing_sketchconv_registers_the_method(tmp_path, order):
    code = f"""
import {order}
import transformers.quantizers.auto as auto, sys
from transformers import AutoModelForCausalLM
assert "sktch" in auto.AUTO_QUANTIZER_MAPPING
from sketchconv.runtime.quantizer import register_quantizer
register_quantizer()
kernels = sys.modules.get("kernels")
assert kernels is None or "sketchconv" not in str(kernels), kernels
print("known")
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "known", done.stderr[-2000:]
    assert sketchconv.__version__
