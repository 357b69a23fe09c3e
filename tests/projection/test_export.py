"""Deltas for other tools: merged models bit for bit, and low-rank adapters."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fine_tunes import codes_of, load, noise, retuned
from tiny import make_model

import sketchconv
from sketchconv.deltas import create, resolve
from sketchconv.errors import DeltaError, ProjectionError, RecipeError, SourceError
from sketchconv.projection.adapter import export_lora
from sketchconv.projection.export import export_gguf, export_safetensors
from sketchconv.projection.extract import Extraction
from sketchconv.recipe import Recipe, SketchSpec
from sketchconv.sources.overlay import OverlaidSketch

UP = "model.layers.0.mlp.up_proj.weight"
TOKENS = [5, 17, 200, 3, 90, 41, 8]


def decoded(base, luts, name):
    """The tuned weight by the format's own formula."""
    codes, lut = codes_of(base, name)
    table = luts[name].astype(np.float32) if name in luts else lut
    rows, columns = codes.shape
    group = np.arange(columns) // (columns // lut.shape[1])
    return table[np.arange(rows)[:, None], group, codes]


def test_the_merged_folder_is_exact(llama, delta, tmp_path):
    export_safetensors(delta, llama.base, tmp_path / "merged")
    luts, found, dense = resolve(delta, llama.base), load(tmp_path / "merged"), load(llama.dense)
    assert len(luts) == 14
    for name, value in found.items():
        if name in luts:
            assert (value.numpy() == decoded(llama.base, luts, name)).all()
        else:
            assert torch.equal(value, dense[name])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "task.sktch"]


def test_the_merged_gguf_is_exact(llama, delta, tmp_path):
    from sketchconv.sources.gguf import GgufSource

    export_gguf(delta, llama.base, tmp_path / "merged.gguf")
    luts = resolve(delta, llama.base)
    with GgufSource(tmp_path / "merged.gguf") as source:
        for name in (UP, "model.layers.1.self_attn.q_proj.weight"):
            info = source.infos[name]
            assert info.dtype == "F16"
            rows = source.float32(name, source.rows(name, 0, info.shape[0]))
            assert (rows == decoded(llama.base, luts, name)).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged.gguf", "task.sktch"]


def test_an_overlay_checks_its_tables(llama):
    for name, table, message in (
        ("nothing.weight", np.zeros((1, 1, 8), np.float16), "no sketched weight 'nothing.weight'"),
        (UP, np.zeros((1, 2, 8), np.float16), r"the table is F16 \[160, 2, 8\], got float16 \[1"),
        (UP, np.zeros((160, 2, 8), np.float32), "got float32"),
    ):
        with pytest.raises(SourceError, match=message):
            OverlaidSketch(llama.base, {name: table}, "task")


def test_a_delta_of_another_base_is_refused(llama, delta, tmp_path):
    other = tmp_path / "other.sktch"
    sketchconv.convert(llama.tuned, other, Recipe(SketchSpec(3, 2)))
    for export in (export_safetensors, export_gguf, export_lora):
        with pytest.raises(DeltaError, match="was not made for"):
            export(delta, other, tmp_path / "out.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.sktch", "task.sktch"]


def truncated(difference, rank):
    left, values, right = np.linalg.svd(difference.astype(np.float64), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def differences(trio, delta):
    luts = resolve(delta, trio.base)
    return {n: decoded(trio.base, luts, n) - decoded(trio.base, {}, n) for n in luts}


def merged_by_hand(trio, delta, rank):
    """The dense model plus the best part of each difference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trio.dense, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, difference in differences(trio, delta).items():
            part = torch.from_numpy(truncated(difference, rank)).float()
            weight = model.get_parameter(name)
            weight += part if weight.shape == part.shape else part.T
    return model


def test_peft_loads_the_adapter_as_the_truncated_difference(llama, delta, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    report = export_lora(delta, llama.base, tmp_path / "lora", rank=8, min_energy=0, dtype="F32")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    leaves = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert config["target_modules"] == list(leaves)
    plain = AutoModelForCausalLM.from_pretrained(llama.dense, dtype=torch.float32).eval()
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        before = plain(ids).logits
        found = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()(ids).logits
        expected = merged_by_hand(llama, delta, 8)(ids).logits
    assert (expected - before).abs().max() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-4)
    shares = {}
    for name, difference in differences(llama, delta).items():
        values = np.linalg.svd(difference.astype(np.float64), compute_uv=False) ** 2
        shares[name] = values[:8].sum() / values.sum()
    assert report.weights == pytest.approx(shares, rel=1e-5)
    assert 0 < report.captured < 1


def test_peft_loads_an_adapter_of_transposed_modules(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    dense = make_model(tmp_path / "dense", "gpt2")
    tuned = retuned(dense, tmp_path / "tuned", noise(0.05, only="h.1.attn.c_proj.weight"))
    base, delta = tmp_path / "base.sktch", tmp_path / "task.sktch"
    sketchconv.convert(dense, base, Recipe(SketchSpec(3, 2)))
    with Extraction(base, tuned, dense) as work:
        create(base, work.luts(), delta)
    export_lora(delta, base, tmp_path / "lora", rank=64, dtype="F32")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["transformer.h.1.attn.c_proj"]
    name = "transformer.h.1.attn.c_proj.weight"
    difference = decoded(base, resolve(delta, base), name) - decoded(base, {}, name)
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.no_grad():
        merged = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").merge_and_unload()
    found = merged.get_parameter(name) - load(dense)[name]
    np.testing.assert_allclose(found.detach(), difference.T, atol=1e-5)


def test_llama_cpp_applies_the_adapter(llama, delta, tmp_path):
    from gguf import GGUFReader
    from peer import Runtime, divergence, reference

    from sketchconv.export.run import export_gguf as export_model

    report = export_lora(delta, llama.base, tmp_path / "lora.gguf", rank=24, min_energy=0)
    reader = GGUFReader(tmp_path / "lora.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 28
    # gguf-py gives sizes innermost first.
    assert tensors["blk.0.ffn_up.weight.lora_a"].shape.tolist() == [64, 24]
    assert tensors["blk.0.ffn_up.weight.lora_b"].shape.tolist() == [24, 160]
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.lora.alpha"].contents() == 24.0
    export_model(llama.dense, tmp_path / "dense.gguf")
    expected = reference(merged_by_hand(llama, delta, 24), TOKENS)
    runtime = Runtime(tmp_path / "dense.gguf", adapter=tmp_path / "lora.gguf")
    found = runtime.log_probabilities(TOKENS, 384)
    without = Runtime(tmp_path / "dense.gguf").log_probabilities(TOKENS, 384)
    assert divergence(expected, found) < 1e-4 < 1e-2 < divergence(expected, without)
    assert report.files == ((str(tmp_path / "lora.gguf"), (tmp_path / "lora.gguf").stat().st_size),)


def test_an_adapter_that_would_lose_too_much_is_refused(llama, delta, tmp_path):
    for out in ("lora", "lora.gguf"):
        with pytest.raises(ProjectionError, match=r"rank 2 keeps .* less than 80\.0 % \(rank"):
            export_lora(delta, llama.base, tmp_path / out, rank=2)
    assert [p.name for p in tmp_path.iterdir()] == ["task.sktch"]
    try:
        export_lora(delta, llama.base, tmp_path / "lora", rank=2)
    except ProjectionError as error:
        needed = int(str(error).partition("(rank ")[2].partition(" ")[0])
    assert export_lora(delta, llama.base, tmp_path / "lora", rank=needed).captured >= 0.8
    with pytest.raises(ProjectionError, match="less than 80"):
        export_lora(delta, llama.base, tmp_path / "other", rank=needed - 1)


def test_an_adapter_never_lands_in_its_sources(llama, tmp_path):
    from sketchconv.errors import OutputError

    delta = tmp_path / "task"
    with Extraction(llama.base, llama.tuned, llama.dense) as work:
        create(llama.base, work.luts(), delta)
    before = sorted(delta.rglob("*"))
    for out in (delta, delta / "lora", delta / "lora.gguf"):
        with pytest.raises(OutputError, match="would overwrite"):
            export_lora(delta, llama.base, out, rank=60, force=True)
    with pytest.raises(OutputError, match="no such folder"):
        export_lora(delta, llama.base, tmp_path / "none" / "lora", rank=60)
    assert sorted(delta.rglob("*")) == before


def test_changes_that_an_adapter_cannot_hold_are_refused_by_name(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    tuned = retuned(dense, tmp_path / "tuned", noise(0.05, only="embed_tokens.weight"))
    base, delta = tmp_path / "base.sktch", tmp_path / "task.sktch"
    sketchconv.convert(dense, base, Recipe(SketchSpec(3, 2), embed_bits=3))
    with Extraction(base, tuned, dense) as work:
        create(base, work.luts(), delta)
    with pytest.raises(ProjectionError, match=r"embed_tokens\.weight: is an embedding"):
        export_lora(delta, base, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "at least 1"),
        ({"min_energy": 2}, "between 0 and 1"),
        ({"dtype": "Q4_0"}, "F32, F16"),
    ],
)
def test_bad_options_are_refused(llama, delta, tmp_path, wrong, message):
    with pytest.raises(RecipeError, match=message):
        export_lora(delta, llama.base, tmp_path / "lora", **wrong)


def test_the_command(llama, delta, tmp_path):
    from click.testing import CliRunner

    from sketchconv.cli.delta_export import command

    def invoke(out, *args):
        words = [str(delta), str(llama.base), str(tmp_path / out), *args]
        return CliRunner().invoke(command, words)

    assert invoke("a", "--to", "safetensors", "--quiet").exit_code == 0
    luts = resolve(delta, llama.base)
    assert (load(tmp_path / "a")[UP].numpy() == decoded(llama.base, luts, UP)).all()
    result = invoke("b.gguf", "--to", "gguf", "--type", "Q8_0", "--json", "--quiet")
    assert "Q8_0" in json.loads(result.stdout)["types"]
    result = invoke("c", "--to", "lora", "--rank", "60", "--json", "--quiet")
    assert json.loads(result.stdout)["captured"] > 0.8
    result = invoke("d.gguf", "--to", "lora", "--rank", "60", "--quiet")
    assert "captured" in result.output
    for args in (
        ("x", "--to", "gguf"),
        ("x", "--to", "safetensors", "--rank", "4"),
        ("x", "--to", "lora", "--force"),
        ("x", "--to", "lora", "--max-memory", "2GB"),
        ("x",),
    ):
        assert invoke(*args).exit_code == 2
    assert not (tmp_path / "x").exists()
