"""The commands take every GGUF architecture, whole or split: convert, eval, dense, verify."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny import CORPUS

from sketchconv.cli.main import cli
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.run import export_gguf

# One for each way in which a GGUF file differs from a checkpoint.
SLOW = ("llama", "qwen2", "qwen3", "gemma2", "phi3")  # seven seconds each
KINDS = ("gemma3", "gpt2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW))


def invoke(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(CORPUS * 30))
    return path


def split(folder, path, kind="F32"):
    """Export in several parts; all of them."""
    export_gguf(folder, path, ExportRecipe(kind), max_shard_size=60_000)
    parts = sorted(path.parent.glob(f"{path.stem}-0*.gguf"))
    assert len(parts) > 2
    return parts


@pytest.mark.parametrize("kind", KINDS)
def test_one_after_the_other(models, kind, text, tmp_path):
    """The part in the middle stands for the whole: sketch, check, measure, decode."""
    exact = kind != "gpt2"
    source = split(models(kind), tmp_path / "m.gguf", "F32" if exact else "Q8_0")[1]
    sketch, dense = tmp_path / "m.sktch", tmp_path / "dense"
    given = ("--calibration", text, "--tokens", 512, "--seq-len", 64)
    invoke("convert", source, sketch, *given, "--quiet")
    report = json.loads(invoke("verify", sketch, "--against", source, "--json"))
    assert report["ok"], report["findings"]
    assert report["compared_weights"] > 10_000
    assert 0 < report["relative_error"] < 0.2
    invoke("convert", source, dense, "--dense", "--type", "F32", "--quiet")
    cut = ("--text", text, "--seq-len", 64, "--windows", 2, "--json", "--quiet")
    cut += ("--reference", models(kind), "--dtype", "float32")
    scores = json.loads(invoke("eval", source, dense, sketch, *cut))["models"]
    first, second, third = (m["texts"][0]["divergence"]["kl"]["mean"] for m in scores)
    assert first == second
    assert abs(first) < (1e-9 if exact else 0.01)
    assert third > abs(first)


@pytest.mark.parametrize("kind", ["gemma3", "gpt2"])
def test_parts_and_the_whole_are_one_source(models, kind, tmp_path):
    """The same sketch, dense folder and re-export from the parts as from the one file."""
    whole = tmp_path / "m.gguf"
    export_gguf(models(kind), whole, ExportRecipe("Q8_0"))
    parts = split(models(kind), tmp_path / "m.gguf", "Q8_0")
    made: dict[str, list[bytes]] = {}
    for number, source in enumerate((whole, parts[0], parts[-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        invoke("convert", source, folder / "a.sktch")
        invoke("convert", source, folder / "dense", "--dense")
        invoke("convert", source, folder / "a.gguf")
        names = ("a.sktch", "a.gguf", "dense/model.safetensors", "dense/tokenizer.json")
        for name in names:
            made.setdefault(name, []).append(Path(folder, name).read_bytes())
    assert made["a.gguf"][0] == whole.read_bytes()
    for name, files in made.items():
        assert files[0] == files[1] == files[2], name


def test_inspect_shows_the_whole_of_a_split(models, tmp_path):
    parts = split(models("llama"), tmp_path / "m.gguf")
    shown = json.loads(invoke("inspect", parts[2], "--json"))
    assert shown["bytes"] == sum(part.stat().st_size for part in parts)
    assert f"in {len(parts)} parts" in shown["facts"]["format"]
    export_gguf(models("llama"), tmp_path / "one.gguf", ExportRecipe("F32"))
    whole = json.loads(invoke("inspect", tmp_path / "one.gguf", "--json"))
    assert shown["tensors"] == whole["tensors"]


def test_no_part_of_the_source_is_ever_overwritten(models, tmp_path):
    parts = split(models("llama"), tmp_path / "m.gguf")
    before = [part.read_bytes() for part in parts]
    again = ("--max-shard-size", "60000", "--force")
    said = invoke("convert", parts[0], tmp_path / "m.gguf", *again, code=1)
    assert "would overwrite the source" in said
    assert [part.read_bytes() for part in parts] == before
