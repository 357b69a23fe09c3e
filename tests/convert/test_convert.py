"""The main job on tiny checkpoints: what is written, that it is exact, and always the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil

import numpy as np
import pytest
from safetensors import safe_open

import sketchconv
from sketchconv.errors import WeightError
from sketchconv.formats.reader import SktchModel
from sketchconv.job import prepare
from sketchconv.pipeline import Progress
from sketchconv.recipe import Override, Recipe, SketchSpec

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBED = "model.embed_tokens.weight"
LINEARS = 14


def digests(path):
    """SHA-256 of every file of a sketch, by relative name."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def source_weight(folder, name):
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                return file.get_tensor(name).float().numpy()
    raise KeyError(name)


def test_a_bundle_holds_sketches_copies_aliases_and_files(llama, tmp_path):
    out = tmp_path / "tiny.sktch"
    report = sketchconv.convert(llama, out)
    assert out.stat().st_size == report.output_bytes
    assert len(report.results) == LINEARS
    with SktchModel.open(out) as model:
        manifest = model.manifest
        assert set(manifest.sketches) == {
            n for n in model_names(llama) if n.endswith("_proj.weight")
        }
        assert dict(manifest.aliases) == {"lm_head.weight": EMBED}
        assert {"config.json", "generation_config.json"} <= set(manifest.files)
        config = json.loads(model.file("config.json"))
        assert config["quantization_config"]["quant_method"] == "sktch"
        assert manifest.sketches[Q_PROJ].bits == 4
        for name in model_names(llama):
            if name not in manifest.sketches:
                copied = bf16(model.array(name))
                assert np.array_equal(copied, source_weight(llama, name)), name
        assert manifest.source["id"] == llama.name
        assert manifest.source["format"] == "safetensors"


def model_names(folder):
    with safe_open(next(folder.glob("*.safetensors")), "np") as file:
        return list(file.keys())


def bf16(words):
    return (words.astype(np.uint32) << 16).view(np.float32)


def test_the_recorded_errors_are_those_of_the_decoded_weights(llama, tmp_path):
    out = tmp_path / "tiny.sktch"
    report = sketchconv.convert(llama, out)
    with SktchModel.open(out) as model:
        for result in report.results:
            dense = source_weight(llama, result.name).astype(np.float64)
            difference = dense - model.decode(result.name)
            expected = math.sqrt((difference**2).sum() / (dense**2).sum())
            assert result.relative_error == pytest.approx(expected, rel=1e-9)
            assert 0.01 < expected < 0.2
            assert model.manifest.errors[result.name] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("form", ["tiny.sktch", "tiny"])
def test_the_dry_run_predicts_the_size_to_the_byte(untied_shards, tmp_path, form):
    recipe = Recipe(SketchSpec(bits=3, groups=4), embed_bits=5)
    shard = 60_000
    job = prepare(untied_shards, tmp_path / form, recipe, max_shard_size=shard)
    job.source.close()
    assert not (tmp_path / form).exists()
    sketchconv.convert(untied_shards, tmp_path / form, recipe, max_shard_size=shard)
    path = tmp_path / form
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    assert {p.name: p.stat().st_size for p in files} == dict(job.sizes)
    assert sum(p.stat().st_size for p in files) == job.output_bytes
    if form == "tiny":
        assert len([p for p in files if p.suffix == ".safetensors"]) > 2


@pytest.mark.parametrize("form", ["tiny.sktch", "tiny"])
def test_bytes_depend_on_nothing_but_source_and_recipe(llama, tmp_path, form, monkeypatch):
    # let even these small matrices be cut among threads
    monkeypatch.setattr("sketchconv.kernels.threads.SMALLEST_WORK", 1)
    monkeypatch.setattr("sketchconv.kernels.threads.SMALLEST_SPAN", 1)
    recipe = Recipe(embed_bits=6)
    sketchconv.convert(llama, tmp_path / form, recipe, threads=1)
    first = digests(tmp_path / form)
    sketchconv.convert(llama, tmp_path / form, recipe, threads=2, force=True)
    assert digests(tmp_path / form) == first
    # one row at a time: chunking must not show either
    monkeypatch.setattr("sketchconv.job.chunk_budget", lambda _limit: 1)
    events: list[Progress] = []
    sketchconv.convert(llama, tmp_path / form, recipe, force=True, progress=events.append)
    assert digests(tmp_path / form) == first
    assert len(events) > 1000
    assert events[-1].done == events[-1].total


def test_overrides_filters_and_groups_reach_the_tensors(untied_shards, tmp_path):
    recipe = Recipe(
        SketchSpec(bits=2, group_size=32),
        embed_bits=5,
        exclude=("*.gate_proj",),
        overrides=(
            Override("*.down_proj", bits=5, groups=2, lut_dtype="F32"),
            Override("lm_head", action="copy"),
        ),
    )
    out = tmp_path / "tiny.sktch"
    report = sketchconv.convert(untied_shards, out, recipe)
    with SktchModel.open(out) as model:
        sketches = model.manifest.sketches
        q, down = sketches[Q_PROJ], sketches[DOWN]
        assert (q.bits, q.groups, q.lut_dtype) == (2, 2, "F16")
        assert (down.bits, down.groups, down.lut_dtype) == (5, 2, "F32")
        assert sketches[EMBED].bits == 5
        assert "lm_head.weight" not in sketches
        assert not any("gate_proj" in name for name in sketches)
        assert not model.manifest.aliases
        decoded = model.decode(DOWN)
    dense = source_weight(untied_shards, DOWN)
    assert np.abs(decoded - dense).max() < np.abs(dense).max() / 8
    reasons = {s.name: s.reason for s in report.plan.steps}
    assert reasons["model.layers.0.mlp.gate_proj.weight"] == "excluded: *.gate_proj"
    assert reasons["lm_head.weight"] == "recipe: lm_head"


def test_the_weighting_is_named_and_changes_the_sketch(llama, tmp_path):
    moments = sketchconv.convert(llama, tmp_path / "a.sktch")
    equal = sketchconv.convert(llama, tmp_path / "b.sktch", Recipe(weighting="equal"))
    assert "second moments" in moments.weighting
    assert "equal" in equal.weighting
    # equal weights minimise the plain error, so they cannot lose by it
    assert equal.relative_error < moments.relative_error


def test_covariances_lose_less_of_the_outputs_than_moments(llama, tmp_path):
    name, out = Q_PROJ, tmp_path / "tiny.sktch"
    embedding = source_weight(llama, EMBED).astype(np.float64)
    x = embedding * source_weight(llama, "model.layers.0.input_layernorm.weight")
    dense, lost = source_weight(llama, name), {}
    for weighting in ("moments", "covariances"):
        report = sketchconv.convert(llama, out, Recipe(weighting=weighting), force=True)
        with SktchModel.open(out) as model:
            lost[weighting] = np.square(x @ (model.decode(name) - dense).T).sum()
    assert report.weighting == "propagated covariances"
    assert lost["covariances"] < 0.9 * lost["moments"]


def test_covariances_give_the_same_bytes_on_any_number_of_threads(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("sketchconv.calibration.spans.SPAN", 16)
    monkeypatch.setattr("sketchconv.sensitivities.tiles.TILE", 16)
    recipe, out = Recipe(SketchSpec(bits=3), weighting="covariances"), tmp_path / "tiny.sktch"
    found = set()
    for threads in (1, 2, 3):
        monkeypatch.setattr("sketchconv.sensitivities.tiles.available_threads", lambda n=threads: n)
        sketchconv.convert(llama, out, recipe, threads=threads, force=True)
        found |= set(digests(out).values())
    assert len(found) == 1


def test_a_nan_in_a_copied_parameter_is_found_whatever_the_weighting(fresh_llama, tmp_path):
    from safetensors.torch import load_file, save_file

    path = fresh_llama / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    for weighting in ("covariances", "moments", "equal"):
        with pytest.raises(WeightError, match=r"model\.norm\.weight: 1 values"):
            sketchconv.convert(fresh_llama, tmp_path / "x.sktch", Recipe(weighting=weighting))
    assert not (tmp_path / "x.sktch").exists()


def test_a_nan_in_a_buffer_is_found_but_infinity_may_stay(tmp_path):
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=128, decoder_ffn_dim=128,
        encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=100,
        max_position_embeddings=32,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    for value, fails in ((torch.inf, False), (torch.nan, True)):
        model.final_logits_bias.fill_(0)
        model.final_logits_bias[0, 7] = value
        source = tmp_path / f"bart-{value}"
        model.save_pretrained(source)
        if fails:
            with pytest.raises(WeightError, match="final_logits_bias"):
                sketchconv.convert(source, tmp_path / "x.sktch", force=True)
            continue
        # learned positions have a forward of their own: copied, also when embeddings are sketched
        out = tmp_path / "y.sktch"
        report = sketchconv.convert(source, out, Recipe(SketchSpec(bits=2), embed_bits=3))
        copied = {s.name for s in report.plan.steps if s.action == "copy"}
        assert {n for n in copied if n.endswith("embed_positions.weight")}
        loaded = sketchconv.load(out)
        assert torch.isinf(loaded.final_logits_bias).sum() == 1


def test_a_name_that_is_not_unicode_still_gives_a_readable_sketch(llama, tmp_path):
    odd = tmp_path / os.fsdecode(b"bad\xffname")
    shutil.copytree(llama, odd)
    sketchconv.convert(odd, tmp_path / "x.sktch")
    with SktchModel.open(tmp_path / "x.sktch") as model:
        assert "bad" in model.manifest.source["id"]


def test_the_exact_solver_is_never_worse(llama, tmp_path):
    near = sketchconv.convert(llama, tmp_path / "a.sktch", Recipe(weighting="equal"))
    exact = sketchconv.convert(llama, tmp_path / "b.sktch", Recipe(weighting="equal", exact=True))
    # the optimum is that of the unrounded LUT: rounding to F16 may cost either a hair
    assert exact.relative_error <= near.relative_error * (1 + 1e-5)
    assert near.relative_error <= exact.relative_error * 1.01


def test_every_file_opens_with_the_safetensors_library(untied_shards, tmp_path):
    out = tmp_path / "folder"
    sketchconv.convert(untied_shards, out, max_shard_size=60_000)
    seen = {}
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "np") as file:
            seen |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with SktchModel.open(out) as model:
        assert seen.keys() == model.tensors.keys()
        for name, value in seen.items():
            assert value.tobytes() == model.array(name).tobytes(), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(seen)


def test_equal_tied_weights_that_are_stored_twice_become_an_alias(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("config.json", "generation_config.json"):
        (twice / name).write_bytes((llama / name).read_bytes())
    tensors = load_file(llama / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors[EMBED].clone()}, twice / "model.safetensors")
    once = sketchconv.convert(llama, tmp_path / "once.sktch")
    again = sketchconv.convert(twice, tmp_path / "again.sktch")
    assert again.parameters == once.parameters
    with SktchModel.open(tmp_path / "again.sktch") as model:
        assert dict(model.manifest.aliases) == {"lm_head.weight": EMBED}
