"""Dense export: a plain Hugging Face folder with the weights that a sketch stands for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import make_model

import sketchconv
from sketchconv.cli.main import cli
from sketchconv.errors import OutputError, RecipeError, WeightError
from sketchconv.export.dense import prepare_dense
from sketchconv.export.folder import run_folder
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.run import export_gguf
from sketchconv.pipeline import convert
from sketchconv.recipe import Recipe
from sketchconv.sources.open import open_source


def invoke(*arguments):
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def weights(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


@pytest.fixture(scope="module")
def sketch(tmp_path_factory):
    root = tmp_path_factory.mktemp("dense")
    folder = make_model(root / "tiny", "llama", dtype="bfloat16", tie_word_embeddings=True)
    convert(folder, root / "tiny.sktch", Recipe(weighting="equal"))
    return root / "tiny.sktch"


def test_transformers_opens_the_folder_as_the_sketch(sketch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sketchconv.export_dense(sketch, tmp_path / "m", "F32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    tokens = torch.tensor([[5, 80, 33, 200]])
    expected = sketchconv.load(sketch, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").encode("the fox")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", None])
def test_values_are_the_decoded_ones_rounded_once(sketch, dtype, tmp_path):
    sketchconv.export_dense(sketch, tmp_path / "m", dtype)
    torch_dtype = {"F32": torch.float32, "F16": torch.float16}.get(dtype or "", torch.bfloat16)
    found, source = weights(tmp_path / "m"), open_source(str(sketch), sketches=True)
    assert found.keys() == source.infos.keys()
    for name, info in source.infos.items():
        values = source.float32(name, source.rows(name, 0, info.shape[0]))
        expected = torch.from_numpy(np.array(values)).to(torch_dtype)
        assert found[name].dtype == torch_dtype, name
        assert torch.equal(found[name], expected), name
    source.close()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == str(torch_dtype).removeprefix("torch.")


def test_a_checkpoint_comes_back_bit_for_bit_by_way_of_gguf(models, tmp_path):
    export_gguf(models("qwen3"), tmp_path / "m.gguf", ExportRecipe("F32"))
    sketchconv.export_dense(tmp_path / "m.gguf", tmp_path / "back", "F32")
    before, after = weights(models("qwen3")), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_the_config_of_a_gguf_file_has_the_dtype_of_its_weights(models, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    export_gguf(models("llama-untied"), tmp_path / "m.gguf", ExportRecipe(kind))
    sketchconv.export_dense(tmp_path / "m.gguf", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    stored = weights(tmp_path / "back")["model.layers.0.mlp.up_proj.weight"]
    assert config["dtype"] == str(stored.dtype).removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, stored)


def test_shards_have_an_index_and_the_same_bytes_at_any_number_of_threads(sketch, tmp_path):
    for name, threads in (("a", 1), ("b", 4)):
        sketchconv.export_dense(
            sketch, tmp_path / name, "F32", max_shard_size=60_000, threads=threads
        )
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert "model.safetensors.index.json" in files
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    source = open_source(str(tmp_path / "a"))
    assert source.infos.keys() == weights(tmp_path / "a").keys()
    source.close()


def test_the_command_plans_and_writes(sketch, tmp_path):
    out = tmp_path / "m"
    plan = json.loads(invoke(sketch, out, "--dense", "--dry-run", "--json").stdout)
    assert not out.exists()
    assert "Plan" in invoke(sketch, out, "--dense", "--dry-run").output
    result = invoke(sketch, out, "--dense", "--quiet")
    assert result.exit_code == 0, result.output
    assert sum(p.stat().st_size for p in out.iterdir()) == plan["output_bytes"]
    assert plan["files"] == {p.name: p.stat().st_size for p in out.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("m", "--bits", "4"), "--bits is about sketches"),
        (("m", "--type-for", "a=F16"), "--type-for goes with"),
        (("m", "--tokenizer-pre", "x"), "--tokenizer-pre goes with"),
        (("m", "--force"), "replaces nothing"),
        (("m", "--type", "Q8_0"), "holds F32, F16 or BF16"),
        (("m.gguf",), "--dense makes a folder"),
        (("m.sktch",), "--dense makes a folder"),
        (("m.safetensors",), "a dense model is a folder"),
        (("none/m",), "no such folder"),
    ],
)
def test_what_does_not_fit_is_refused(sketch, arguments, text, tmp_path):
    result = invoke(sketch, tmp_path / arguments[0], "--dense", *arguments[1:])
    assert result.exit_code in (1, 2)
    assert text in result.output
    assert not any(tmp_path.iterdir())


def test_nothing_that_is_there_is_replaced(sketch, models, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="replaces nothing"):
        sketchconv.export_dense(sketch, taken)
    with pytest.raises(OutputError, match="overwrite the source"):
        sketchconv.export_dense(models("llama"), models("llama"))
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    sketchconv.export_dense(sketch, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "taken"]


def test_failures_on_the_way_leave_nothing(tmp_path):
    from test_types import spoil

    folder = make_model(tmp_path / "broken", "llama")
    spoil(folder, "model.layers.0.mlp.up_proj.weight", 1e6)
    with pytest.raises(WeightError, match=r"up_proj\.weight: .* beyond F16"):
        sketchconv.export_dense(folder, tmp_path / "m", "F16")
    spoil(folder, "model.layers.0.mlp.up_proj.weight", np.nan)
    with pytest.raises(WeightError, match=r"1 values are NaN .* row 5"):
        sketchconv.export_dense(folder, tmp_path / "m")

    def stop(event):
        if event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_folder(prepare_dense(folder, tmp_path / "m"), progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_an_unknown_dtype_is_refused(sketch, tmp_path):
    with pytest.raises(RecipeError, match="holds F32, F16 or BF16"):
        prepare_dense(sketch, tmp_path / "m", "F64")
