"""`sketchconv convert MODEL OUT.gguf`: sources, parts, plans, refusals, failures on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from tiny import MODELS, VOCABULARY, make_model

from sketchconv.cli.main import cli
from sketchconv.errors import ArchitectureError, OutputError, SketchconvError, SourceError
from sketchconv.export.job import prepare_gguf
from sketchconv.export.recipe import ExportRecipe, parse_choice
from sketchconv.export.run import export_gguf
from sketchconv.pipeline import convert
from sketchconv.recipe import Recipe


def invoke(*arguments):
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fields(path):
    return {n: f.contents() for n, f in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def sketch(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("sketch") / "tiny.sktch"
    convert(models("llama-untied"), path, Recipe(weighting="equal", embed_bits=4))
    return path


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_sketch_without_a_type_is_exported_exactly(sketch, models, form, tmp_path):
    source = sketch
    if form == "folder":
        source = tmp_path / "folder"
        convert(models("llama-untied"), source, Recipe(weighting="equal", embed_bits=4))
    path = tmp_path / "out.gguf"
    result = invoke(source, path, "--quiet")
    assert result.exit_code == 0, result.output
    from sketchconv.sources.sketch import SketchSource

    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    with SketchSource(sketch) as dense:
        for name, target in (
            ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
        ):
            expected = dense.float32(name, dense.rows(name, 0, dense.infos[name].shape[0]))
            assert tensors[target].tensor_type.name == "F16"
            assert np.array_equal(tensors[target].data.astype(np.float32), expected)


def test_a_sketch_runs_in_llama_cpp_as_in_transformers(models, sketch, tmp_path):
    pytest.importorskip("xllamacpp")
    import torch
    from peer import Runtime, divergence, prompts, reference

    import sketchconv

    path = tmp_path / "out.gguf"
    export_gguf(sketch, path)
    model = sketchconv.load(sketch, dtype=torch.float32)
    (tokens,) = prompts(models("llama-untied"), model, (20,))
    expected = reference(model, tokens)
    assert divergence(expected, Runtime(path).log_probabilities(tokens, VOCABULARY)) < 1e-4


def test_a_plain_reexport_is_the_same_file_and_a_partial_one_keeps_other_blocks(models, tmp_path):
    first, second, third = (tmp_path / f"{n}.gguf" for n in "abc")
    export_gguf(models("qwen2"), first, ExportRecipe("Q4_0"))
    assert invoke(first, second, "--quiet").exit_code == 0
    assert digest(first) == digest(second)
    assert invoke(first, third, "--quiet", "--type-for", "ffn_down=Q8_0").exit_code == 0
    before = {t.name: t for t in gguf.GGUFReader(first).tensors}
    for tensor in gguf.GGUFReader(third).tensors:
        changed = "ffn_down" in tensor.name
        assert tensor.tensor_type.name == (
            "Q8_0" if changed else before[tensor.name].tensor_type.name
        )
        if not changed:
            assert np.array_equal(tensor.data, before[tensor.name].data)
    assert fields(third)["tokenizer.ggml.tokens"] == fields(first)["tokenizer.ggml.tokens"]


def test_a_reexport_keeps_an_architecture_that_is_unknown_here(models, tmp_path):
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    export_gguf(models("gemma2"), first, ExportRecipe("F16"))
    export_gguf(first, second, ExportRecipe("Q8_0"))
    assert fields(second)["general.architecture"] == "gemma2"
    assert fields(second)["general.file_type"] == 7
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(second).tensors}
    assert kinds == {"F32", "Q8_0"}


def test_a_round_trip_at_f32_gives_the_weights_back(models, tmp_path):
    from sketchconv.sources.open import open_source

    for kind in ("llama", "qwen2", "qwen3"):
        path = tmp_path / f"{kind}.gguf"
        export_gguf(models(kind), path, ExportRecipe("F32"))
        back, dense = open_source(str(path)), open_source(str(models(kind)))
        for name, info in dense.infos.items():
            if name not in back.infos:
                assert name == "lm_head.weight"
                continue
            assert back.rows(name, 0, info.shape[0]) == dense.rows(name, 0, info.shape[0]), name
        for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "eos_token_id"):
            assert back.config()[key] == dense.config()[key]
        back.close()
        dense.close()


def test_transformers_loads_the_file(models, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    export_gguf(models("llama"), tmp_path / "m.gguf", ExportRecipe("F32"))
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name


def test_parts_load_together(models, tmp_path):
    pytest.importorskip("xllamacpp")
    from peer import Runtime

    path = tmp_path / "m.gguf"
    result = invoke(models("llama"), path, "--type", "f16", "--max-shard-size", "60kB", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    files = [Path(name) for name in report["files"]]
    assert files[0].name == f"m-00001-of-{len(files):05d}.gguf"
    assert len(files) > 2
    assert {f.name: f.stat().st_size for f in files} == {
        Path(n).name: size for n, size in report["files"].items()
    }
    whole = tmp_path / "whole.gguf"
    export_gguf(models("llama"), whole, ExportRecipe("F16"))
    text = "the quick brown fox"
    prompt = Runtime(whole).tokens(text)
    assert Runtime(files[0]).tokens(text) == prompt
    pieces = {t.name: t for f in files for t in gguf.GGUFReader(f).tensors}
    for tensor in gguf.GGUFReader(whole).tensors:
        assert np.array_equal(pieces.pop(tensor.name).data, tensor.data)
    assert not pieces


@pytest.mark.parametrize("kind", MODELS)
def test_a_dry_run_tells_the_exact_size_and_writes_nothing(models, kind, tmp_path):
    path = tmp_path / "m.gguf"
    result = invoke(models(kind), path, "--type", "Q8_0", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert not any(tmp_path.iterdir())
    export_gguf(models(kind), path, ExportRecipe("Q8_0"))
    assert plan["output_bytes"] == path.stat().st_size
    assert {t["name"] for t in plan["tensors"]} == {t.name for t in gguf.GGUFReader(path).tensors}
    assert "Plan" in invoke(models(kind), tmp_path / "n.gguf", "--dry-run").output


def test_the_bytes_depend_on_neither_threads_nor_memory(models, tmp_path):
    import sketchconv.export.rows as rows

    digests = set()
    for number, (threads, piece) in enumerate(((1, 1 << 20), (2, 640), (5, 6400))):
        path = tmp_path / f"{number}" / "m.gguf"
        path.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "PIECE", piece)
            export_gguf(models("llama"), path, ExportRecipe("Q5_1"), threads=threads)
        digests.add(digest(path))
    assert len(digests) == 1


def test_metadata_names_the_model_its_card_and_how_it_was_made(tmp_path, sketch):
    folder = make_model(tmp_path / "tiny", "llama")
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [en, de]\nbase_model: org/Base-1B\n"
        "tags:\n- chat\n---\n# Tiny\n"
    )
    export_gguf(folder, tmp_path / "m.gguf", ExportRecipe("Q8_0", name="My Model"))
    found = fields(tmp_path / "m.gguf")
    assert next(k for k in found if not k.startswith("GGUF.")) == "general.architecture"
    assert found["general.name"] == "My Model"
    assert found["general.license"] == "apache-2.0"
    assert found["general.languages"] == ["en", "de"]
    assert found["general.tags"] == ["chat"]
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/org/Base-1B"
    assert found["general.base_model.0.name"] == "Base-1B"
    assert found["general.file_type"] == 7
    assert found["general.quantization_version"] == 2
    export_gguf(sketch, tmp_path / "s.gguf")
    found = fields(tmp_path / "s.gguf")
    assert found["general.name"] == "tiny-llama-untied"
    assert found["sketchconv.source_format"] == "sktch"
    assert json.loads(found["sketchconv.recipe"])["default"]["bits"] == 4
    assert len(found["sketchconv.digest"]) == 64


@pytest.mark.parametrize("card", [b"no front matter", b"---\n: : :\n---\n", b"\xff\xfe", b"---\n"])
def test_a_broken_card_is_no_obstacle(card, tmp_path):
    folder = make_model(tmp_path / "tiny", "llama")
    (folder / "README.md").write_bytes(card)
    export_gguf(folder, tmp_path / "m.gguf", ExportRecipe("F16"))
    assert "general.license" not in fields(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation is 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is off"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled by the layer"),
        ("gpt2", {"activation_function": "relu"}, "'relu'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope scaling 'dynamic'",
        ),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "cannot be written"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(kind, change, text, tmp_path):
    folder = make_model(tmp_path / "model", kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ArchitectureError, match=text):
        export_gguf(folder, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_unsupported_architecture_is_refused_by_name(tmp_path):
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=64, vocab_size=50)).save_pretrained(
        tmp_path / "b"
    )
    result = invoke(tmp_path / "b", tmp_path / "m.gguf")
    assert result.exit_code == 1
    assert "BertModel cannot be written; supported are LlamaForCausalLM" in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("m.gguf", "--bits", "4"), "--bits is about sketches"),
        (("m.gguf", "--method", "gptq"), "--method is about sketches"),
        (("m.sktch", "--type", "Q8_0"), "--type goes with an output that ends in .gguf"),
        (("folder", "--type-for", "a=F16"), "--type-for goes with"),
        (("m.gguf", "--type", "Q4_9"), "'Q4_9' is no GGUF type"),
        (("m.gguf", "--type-for", "x"), "expected PATTERN=TYPE"),
        (("none/m.gguf",), "no such folder"),
        ((".gguf",), "needs a name"),
        (("m.onnx",), "writing .onnx is not supported"),
        (("m.safetensors",), "writing .safetensors is not supported"),
    ],
)
def test_options_that_do_not_fit_the_output_are_refused(models, arguments, text, tmp_path):
    result = invoke(models("llama"), tmp_path / arguments[0], *arguments[1:])
    assert result.exit_code in (1, 2)
    assert text in result.output
    assert not any(tmp_path.iterdir())


def test_a_sketch_is_not_made_in_a_gguf_file(models, tmp_path):
    with pytest.raises(OutputError, match="export that as GGUF afterwards"):
        convert(models("llama"), tmp_path / "m.gguf")


def test_outputs_are_replaced_only_on_request_and_never_the_source(models, tmp_path):
    path = tmp_path / "m.gguf"
    export_gguf(models("llama"), path, ExportRecipe("F16"))
    before = digest(path)
    result = invoke(models("llama"), path, "--type", "F32", "--quiet")
    assert "exists already; pass --force" in result.output
    assert digest(path) == before
    for force in ([], ["--force"]):
        result = invoke(path, path, "--type", "Q8_0", *force)
        assert "would overwrite the source" in result.output
    inside = models("llama") / "m.gguf"
    assert "would overwrite the source" in invoke(models("llama"), inside).output
    assert not inside.exists()
    assert invoke(models("llama"), path, "--type", "F32", "--quiet", "--force").exit_code == 0
    assert digest(path) != before
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_sources_are_not_modified(models, sketch, tmp_path):
    watched = [p for p in (*models("llama").iterdir(), sketch)]
    before = [(digest(p), p.stat().st_mtime_ns) for p in watched]
    export_gguf(models("llama"), tmp_path / "a.gguf")
    export_gguf(sketch, tmp_path / "b.gguf")
    assert [(digest(p), p.stat().st_mtime_ns) for p in watched] == before


def test_an_interruption_before_the_first_tensor_leaves_nothing(models, tmp_path):
    def stop(event):
        if event.done > 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(models("llama"), tmp_path / "m.gguf", progress=stop, max_shard_size=60_000)
    assert not any(tmp_path.iterdir())


def test_ctrl_c_ends_the_command_soon_and_says_what_is_left(tmp_path):
    folder = make_model(tmp_path / "big", "llama", intermediate_size=20_000, num_hidden_layers=6)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-P", "-m", "sketchconv", "convert", str(folder)]
    child = subprocess.Popen(
        [*command, str(out / "m.gguf"), "--type", "MXFP4", "--threads", "1"],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell starts what it runs in the background with SIGINT ignored; a child inherits that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not list(out.iterdir()):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, text = child.communicate()
    # By then the first tensor may be finished.
    kept = child.returncode == 75
    assert (b"tensors are finished and kept" if kept else b"no output was written") in text
    assert child.returncode in (75, 130)
    assert sorted(p.name for p in out.iterdir()) == (
        [".m.gguf.sktch-partial", ".m.gguf.sktch-state"] if kept else []
    )


def test_a_source_that_became_shorter_is_told_and_leaves_no_output(models, tmp_path):
    folder = make_model(tmp_path / "model", "llama")
    out = tmp_path / "out"
    out.mkdir()
    job = prepare_gguf(folder, out / "m.gguf", ExportRecipe("F16"))
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    from sketchconv.export.run import run

    with pytest.raises(SketchconvError):
        run(job)
    assert not [p for p in out.iterdir() if "sktch" not in p.suffix]


def hostile(raw, folder):
    path = folder / "h.gguf"
    path.write_bytes(raw)
    return path


def test_hostile_gguf_files_are_refused(models, tmp_path):
    """Cut, counted wrongly, of unknown types: one clear error each, no output."""
    good = tmp_path / "good.gguf"
    export_gguf(models("llama"), good, ExportRecipe("Q8_0"))
    raw = good.read_bytes()
    header = len(raw) - sum(t.n_bytes for t in gguf.GGUFReader(good).tensors)
    name = raw.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")
    cases = {cut: raw[:cut] for cut in (0, 3, 4, 8, 16, 24, 30, 200, header // 2, len(raw) - 4000)}
    cases["big endian"] = raw[:4] + b"\0\0\0\3" + raw[8:]
    cases["version"] = raw[:4] + b"\x09\0\0\0" + raw[8:]
    cases["tensors"] = raw[:8] + b"\xff" * 8 + raw[16:]
    cases["keys"] = raw[:16] + b"\xff" * 8 + raw[24:]
    cases["key length"] = raw[:24] + b"\xff" * 8 + raw[32:]
    cases["rank"] = raw[:name] + b"\x09" + raw[name + 1 :]
    cases["rows"] = raw[: name + 12] + b"\xff" * 7 + raw[name + 19 :]
    cases["columns"] = raw[: name + 4] + b"\x21" + raw[name + 5 :]
    cases["type"] = raw[: name + 20] + b"\x63" + raw[name + 21 :]
    cases["offset"] = raw[: name + 24] + b"\xff" * 6 + raw[name + 30 :]
    out = tmp_path / "out.gguf"
    for what, data in cases.items():
        with pytest.raises(SourceError) as caught:
            export_gguf(hostile(data, tmp_path), out, ExportRecipe("F16"))
        assert "\n" not in str(caught.value), what
        assert not out.exists(), what


def test_a_type_that_cannot_be_read_is_refused_unless_it_passes_through(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    blocks = np.arange(2 * 292, dtype=np.uint8).reshape(2, 292)
    writer.add_tensor("x.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    export_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf")
    (tensor,) = gguf.GGUFReader(tmp_path / "b.gguf").tensors
    assert np.array_equal(tensor.data, blocks)
    with pytest.raises(SourceError, match="Q8_K, which cannot be dequantized"):
        export_gguf(tmp_path / "a.gguf", tmp_path / "c.gguf", ExportRecipe("F16"))
    assert not (tmp_path / "c.gguf").exists()
    recipe = ExportRecipe(choices=(parse_choice("zzz=F16"),))
    with pytest.raises(SketchconvError, match="names no matrix"):
        export_gguf(tmp_path / "a.gguf", tmp_path / "c.gguf", recipe)


def test_a_reexport_leaves_alone_what_llama_cpp_never_quantizes(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "other")
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for name in ("blk.0.ffn_gate_inp.weight", "blk.0.ssm_conv1d.weight", "blk.0.ffn_up.weight"):
        writer.add_tensor(name, values)
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.stack([values, -values]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    export_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", ExportRecipe("Q8_0"))
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    kinds = {name.split(".")[2]: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds == {
        "ffn_gate_inp": "F32",
        "ssm_conv1d": "F32",
        "ffn_up": "Q8_0",
        "ffn_up_exps": "Q8_0",
    }
    experts = found["blk.0.ffn_up_exps.weight"]
    decoded = gguf.quants.dequantize(experts.data, experts.tensor_type)
    assert decoded.shape == (2, 4, 64)
    assert np.abs(decoded - np.stack([values, -values])).max() < 0.02
