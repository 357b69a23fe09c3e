"""MLX export: the runtime itself decodes the weights of the sketch, and computes its logits."""

from __future__ import annotations

import importlib
import json
import tracemalloc
from unittest.mock import patch

import numpy as np
import pytest
from click.testing import CliRunner
from tiny import make_model

import sketchconv
from sketchconv.cli.main import cli
from sketchconv.errors import PlanError, ResumeError, SourceError, Suspended
from sketchconv.export.folder import _VALUE_BYTES
from sketchconv.export.mlx_config import mlx_config
from sketchconv.export.mlx_pairs import fit, reproduces, width_of
from sketchconv.export.mlx_plan import MlxWeight
from sketchconv.formats import grids
from sketchconv.formats.mlx_words import WIDTHS, pack_words
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import carried_to_f32, f32_to_bf16
from sketchconv.pipeline import convert
from sketchconv.recipe import Override, Recipe, SketchSpec

FORMS = [(grid, bits) for grid, known in grids.GRIDS.items() for bits in known.bits]
AFFINE = Recipe(SketchSpec(grid="affine"), weighting="equal")


@pytest.fixture(scope="module")
def mx():
    return pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def mlx_lm(mx):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    # It lowers the process's limit on open files when it is imported.
    with patch("resource.setrlimit"):
        return importlib.import_module("mlx_lm")


@pytest.fixture(scope="module")
def sketch(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("mlx") / "llama.sktch"
    convert(models("llama"), path, AFFINE)
    return path


def invoke(*arguments):
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def decoded(mx, folder):
    """Every weight as MLX decodes it, by name, float32."""
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization"]
    assert settings == config["quantization_config"]
    found = {}
    for path in folder.glob("model*.safetensors"):
        arrays, metadata = mx.load(str(path), return_metadata=True)
        assert metadata == {"format": "mlx"}
        found.update(arrays)
    for name in [n for n in found if n.endswith(".scales")]:
        stem = name.removesuffix(".scales")
        own = settings.get(stem, settings)
        parts = [found.pop(f"{stem}.{leaf}") for leaf in ("weight", "scales", "biases")]
        found[f"{stem}.weight"] = mx.dequantize(*parts, own["group_size"], own["bits"])
    return {name: np.array(value.astype(mx.float32)) for name, value in found.items()}


def check_decoded(mx, folder, path):
    """All of the sketch's tensors: the same bits, but that a zero may lose its sign."""
    found = decoded(mx, folder)
    with SktchModel.open(path) as model:
        for name in model.manifest.sketches:
            expected = model.decode(name) + np.float32(0)
            same = (found[name] + np.float32(0)).view(np.uint32) == expected.view(np.uint32)
            assert same.all(), name
    return found


@pytest.mark.parametrize(
    "kind", ["llama", "llama-untied", "llama3", "qwen2", "qwen2-yarn", "qwen3", "gemma2",
             "gemma3", "phi3", "mistral"],
)  # fmt: skip
def test_mlx_lm_computes_what_transformers_does(mx, mlx_lm, models, kind, tmp_path):
    import torch

    path = tmp_path / "tiny.sktch"
    convert(models(kind), path, AFFINE)
    report = sketchconv.export_mlx(path, tmp_path / "out")
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert tokenizer.encode("the fox")
    ids = torch.tensor([[5, 80, 33, 200, 17, 9, 123, 44, 300, 7]])
    expected = sketchconv.load(path, dtype=torch.float32)(ids).logits.detach().numpy()
    found = np.array(model(mx.array(ids.numpy())).astype(mx.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    check_decoded(mx, tmp_path / "out", path)
    assert any("affine, 4 bits, groups of 32, F32" in kind for kind in report.types)


@pytest.mark.parametrize(("grid", "bits"), FORMS)
def test_mlx_decodes_every_grid(mx, models, grid, bits, tmp_path):
    spec = SketchSpec(grid=grid, bits=bits, group_size=None)
    convert(models("llama"), tmp_path / "a.sktch", Recipe(spec, weighting="equal"))
    sketchconv.export_mlx(tmp_path / "a.sktch", tmp_path / "out")
    check_decoded(mx, tmp_path / "out", tmp_path / "a.sktch")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert settings["bits"] == (8 if grid == "iq4_nl" else bits)


def test_other_modules_shards_and_threads(mx, mlx_lm, models, tmp_path):
    """Own settings by module, embeddings that stay dense, several files, any number of threads."""
    overrides = (
        Override("*.down_proj", bits=5),
        Override("*.up_proj", grid="symmetric", group_size=64),
    )
    spec = SketchSpec(grid="affine")
    recipe = Recipe(spec, overrides=overrides, embed_bits=4, weighting="equal")
    convert(models("llama"), tmp_path / "a.sktch", recipe)
    for name, threads in (("out", 1), ("other", 3)):
        report = sketchconv.export_mlx(
            tmp_path / "a.sktch", tmp_path / name, threads=threads, max_shard_size=60_000
        )
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "other").iterdir()}
    assert "model.safetensors.index.json" in files
    assert "dense, in 98,304 bytes" in report.notes[0]
    assert "lm_head.weight and 1 more" in report.notes[0]
    settings = json.loads(files["config.json"])["quantization"]
    assert settings["model.layers.0.mlp.down_proj"]["bits"] == 5
    assert settings["model.layers.1.mlp.up_proj"]["group_size"] == 64
    check_decoded(mx, tmp_path / "out", tmp_path / "a.sktch")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert model.model.layers[0].mlp.down_proj.bits == 5


def test_free_luts_in_equal_steps_are_exact(mx, tmp_path):
    """Weights that lie on such a grid already: k-means finds it, and the dtype is the model's."""
    import torch
    from transformers import LlamaForCausalLM

    folder = make_model(tmp_path / "tiny", "llama", dtype="bfloat16")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    steps = torch.arange(16).repeat(2) / 64 - 0.125
    for name, weight in model.named_parameters():
        if "_proj" in name:
            count = weight.numel() // 32
            order = torch.rand(count, 32).argsort(dim=1)
            weight.data = steps[order].reshape(weight.shape).to(torch.bfloat16)
    model.save_pretrained(folder)
    spec = SketchSpec(group_size=32)
    convert(folder, tmp_path / "a.sktch", Recipe(spec, weighting="equal"))
    report = sketchconv.export_mlx(tmp_path / "a.sktch", tmp_path / "out")
    assert "affine, 4 bits, groups of 32, BF16 scales" in report.types
    check_decoded(mx, tmp_path / "out", tmp_path / "a.sktch")


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_one_stream_of_bits(mx, bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 96), np.uint8)
    words = pack_words(codes, bits)
    for row, packed in zip(codes, words, strict=True):
        whole = sum(int(code) << (bits * place) for place, code in enumerate(row))
        assert packed.tobytes() == whole.to_bytes(96 * bits // 8, "little")
    ones, zeros = mx.ones((3, 3)), mx.zeros((3, 3))
    assert (np.array(mx.dequantize(mx.array(words), ones, zeros, 32, bits)) == codes).all()


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        (np.full((1, 32), 4, np.uint8), 2),
        (np.zeros((1, 31), np.uint8), 4),
        (np.zeros((1, 32), np.uint8), 7),
        (np.zeros((1, 32), np.int32), 4),
    ],
)
def test_words_refuse_what_they_cannot_hold(codes, bits):
    with pytest.raises(ValueError, match=r"fit|cannot pack"):
        pack_words(codes, bits)


def record(bits, dtype, grid="free"):
    return SketchRecord("a.weight", (2, 64), dtype, bits, 2, dtype, grid)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_equal_steps_in_any_order_fit(dtype, bits):
    rng, count = np.random.default_rng(bits), 1 << bits
    order = np.stack([rng.permutation(count) for _ in range(4)]).reshape(2, 2, count)
    order[0, 0], order[0, 1] = np.arange(count), np.arange(count)[::-1]
    step = np.array([[0.0625, 0.25], [2.0, 0.0]], np.float32)[..., None]
    luts = np.float32(-0.5) + step * order.astype(np.float32)
    carried = (
        f32_to_bf16(luts) if dtype == "BF16" else luts.astype(f"<f{2 if dtype == 'F16' else 4}")
    )
    pairs = fit(record(bits, dtype), carried, dtype)
    assert pairs is not None
    codes = rng.integers(0, count, (2, 2, 32), np.uint8)
    expected = np.take_along_axis(luts, codes.astype(np.int64), axis=-1)
    scale, bias = (carried_to_f32(x, dtype)[..., None] for x in (pairs.scales, pairs.biases))
    new = pairs.codes(codes)
    assert new.max() >> width_of(record(bits, dtype)) == 0
    assert (scale * new + bias == expected).all()


def test_a_table_that_is_off_by_the_last_bit_does_not_fit():
    luts = np.arange(16, dtype=np.float32).reshape(1, 1, 16) / 64
    assert fit(record(4, "F32"), luts, "F32") is not None
    luts[0, 0, 7] = np.nextafter(luts[0, 0, 7], np.float32(1))
    assert fit(record(4, "F32"), luts, "F32") is None


def test_gptq_tables_do_not_fit_in_general():
    """Each entry is rounded by itself there, and MLX's sums are not."""
    scale = np.float16(0.0123)
    luts = (np.arange(-8, 8, dtype=np.float32) * np.float32(scale)).astype(np.float16)
    for dtype in ("F16", "F32"):
        assert fit(record(4, "F16"), luts.reshape(1, 1, 16), dtype) is None


def test_what_depends_on_how_a_kernel_rounds_is_not_exact():
    """Fused, 9 * s - 8 * s is s; rounded in between it is not."""
    scale = np.float32(np.float16(0.0123))
    given = scale, -8 * scale, np.float32(9), scale
    assert not reproduces(*given, "F16")
    assert reproduces(*given, "F32")
    assert not reproduces(np.float32(1e38), np.float32(0), np.float32(15), np.float32(1), "F32")


@pytest.mark.parametrize(("grid", "bits"), FORMS)
def test_float32_gives_every_entry_of_a_grid(grid, bits):
    """What is taken without a look is what a look at every entry would give."""
    known = record(bits, "F16", grid)
    scales = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(-1, 64)
    scales = np.where(np.isfinite(scales), scales, 1)[::7]
    fields = [scales, np.roll(scales, 5, axis=1)][: grids.GRIDS[grid].fields]
    tables = np.stack(fields, axis=-1)
    pairs = fit(known, tables, "F32")
    steps = np.arange(1 << bits) if pairs.order is None else pairs.order
    values = (pairs.scales[..., None], pairs.biases[..., None], steps.astype(np.float32))
    assert reproduces(*values, grids.expand(tables, grid, bits), "F32").all()
    for broken in (np.inf, np.nan):
        tables[3, 4, -1] = broken
        assert fit(known, tables, "F32") is None


def test_memory_of_a_weight_does_not_grow_with_its_tables():
    """Eight entries for each weight, twelve bytes and more for each of them."""
    known = SketchRecord("a.weight", (256, 4096), "F32", 8, 128, "F16", "symmetric")
    weight = MlxWeight(known, 8, 32, "F32")
    raw = bytes(256 * 4096) + np.ones((256, 128), np.float16).tobytes()
    tracemalloc.start()
    pieces = weight.pieces(raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(data) for _, data in pieces) == sum(info.nbytes for info in weight.infos)
    assert peak < _VALUE_BYTES * 256 * 4096


def test_tables_that_changed_since_the_plan_are_one_clear_line():
    weight = MlxWeight(record(4, "F16", "affine"), 4, 32, "F32")
    tables = np.full((2, 2, 2), np.nan, np.float16)
    with pytest.raises(SourceError, match=r"have changed since .* run the same command again"):
        weight.pieces(bytes(2 * 32) + tables.tobytes())


def test_free_luts_are_refused_with_the_way(models, tmp_path):
    convert(models("llama"), tmp_path / "a.sktch", Recipe(weighting="equal"))
    with pytest.raises(PlanError, match=r"14 of 14 linear weights have no exact form.*--grid"):
        sketchconv.export_mlx(tmp_path / "a.sktch", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.sktch"]
    with pytest.raises(SourceError, match="not a sketch"):
        sketchconv.export_mlx(models("llama"), tmp_path / "out")
    result = invoke(tmp_path / "a.sktch", tmp_path / "out", "--to", "mlx")
    assert result.exit_code == 1


def test_an_interrupted_export_goes_on(sketch, tmp_path):
    def stop(event):
        if event.action == "encode" and "layers.1" in event.name:
            raise KeyboardInterrupt

    sketchconv.export_mlx(sketch, tmp_path / "whole", threads=1)
    with pytest.raises(Suspended, match="tensors are finished and kept"):
        sketchconv.export_mlx(sketch, tmp_path / "m", threads=1, progress=stop)
    with pytest.raises(ResumeError, match="differs in"):  # the same folder, but a plain one
        sketchconv.export_dense(sketch, tmp_path / "m")
    sketchconv.export_mlx(sketch, tmp_path / "m", threads=2)
    made = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("whole", "m")]
    assert made[0] == made[1]


def test_the_command_plans_and_writes(sketch, tmp_path):
    out = tmp_path / "m"
    plan = json.loads(invoke(sketch, out, "--to", "mlx", "--dry-run", "--json").stdout)
    assert not out.exists()
    result = invoke(sketch, out, "--to", "mlx", "--quiet")
    assert result.exit_code == 0, result.output
    assert plan["files"] == {p.name: p.stat().st_size for p in out.iterdir()}
    assert "MLX model written" in result.output
    assert invoke(sketch, tmp_path / "a", "--to", "safetensors", "--quiet").exit_code == 0
    assert invoke(sketch, tmp_path / "b", "--dense", "--quiet").exit_code == 0
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("m", "--bits", "4"), "--bits is about sketches"),
        (("m", "--type", "F16"), "--type goes with"),
        (("m", "--force"), "an MLX export replaces nothing"),
        (("m", "--dense"), "two different folders"),
        (("m.gguf",), "--to mlx makes a folder"),
        (("m.safetensors",), "an MLX model is a folder"),
        (("none/m",), "no such folder"),
    ],
)
def test_what_does_not_go_with_mlx_is_refused(sketch, arguments, text, tmp_path):
    result = invoke(sketch, tmp_path / arguments[0], "--to", "mlx", *arguments[1:])
    assert result.exit_code in (1, 2)
    assert text in " ".join(result.output.split())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("Llama", {"hidden_act": "gelu"}, "the activation is 'gelu'"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
         "rope_type is 'dynamic'"),
        ("Qwen2", {"head_dim": 32}, "head_dim is 32"),
        ("Qwen3", {"attention_bias": True}, "attention has biases"),
        ("Gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is off"),
        ("Gemma3Text", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("Gemma3Text", {"layer_types": ["sliding_attention"] * 2}, "no layer attends"),
        ("Phi3", {"sliding_window": 8, "hidden_act": "relu"}, "the activation is 'relu'"),
        ("GPT2", {}, "an MLX model of type 'gpt2' cannot be written"),
    ],
)  # fmt: skip
def test_what_mlx_lm_computes_differently_is_refused(kind, changes, text):
    import transformers

    from sketchconv.errors import ArchitectureError

    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    sizes = {} if kind == "GPT2" else {**sizes, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **changes)
    with pytest.raises(ArchitectureError, match=text):
        mlx_config({}, config, tied=True)
