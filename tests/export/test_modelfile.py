"""`convert MODEL OUT.gguf --modelfile`: what Ollama's parser would read, and refusals."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from sketchconv.cli.main import cli
from sketchconv.errors import OutputError, SourceError
from sketchconv.export import modelfile
from sketchconv.export.modelfile import modelfile_text, quoted, write_modelfile


def invoke(*arguments):
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def parsed(text):
    """Instructions and values by the rules of Ollama's parser: quotes without escapes."""
    found = []
    for line in text.splitlines():
        if line.startswith("#") or not line:
            continue
        name, value = line.split(" ", 1)
        if name == "PARAMETER":
            name, value = value.split(" ", 1)
        for mark in ('"""', '"'):
            if value.startswith(mark):
                assert len(value) >= 2 * len(mark)
                assert value.endswith(mark)
                value = value[len(mark) : -len(mark)]
                break
        found.append((name, value))
    return found


def test_a_modelfile_is_written_beside_the_gguf(models, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(models("llama"), source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1, 9999]}))
    path = tmp_path / "my model.gguf"
    done = invoke(source, path, "--modelfile", "--quiet", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    written = tmp_path / "Modelfile"
    assert report["files"][str(written)] == written.stat().st_size
    assert any("no TEMPLATE" in note for note in report["notes"])
    assert parsed(written.read_text()) == [
        ("FROM", "./my model.gguf"),
        ("num_ctx", "256"),
        ("stop", "</s>"),
        ("stop", "<s>"),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Modelfile", "model", "my model.gguf"]


def test_a_long_context_is_cut_and_said(models, tmp_path, monkeypatch):
    path = tmp_path / "long.gguf"
    assert invoke(models("llama-untied"), path, "--quiet").exit_code == 0
    assert ("num_ctx", "2048") in parsed(modelfile_text(path))  # of Llama's config
    monkeypatch.setattr(modelfile, "LARGEST_CONTEXT", 512)
    text = modelfile_text(path)
    assert "made for 2048 tokens" in text
    assert ("num_ctx", "512") in parsed(text)
    assert "TEMPLATE" not in dict(parsed(text))


def test_a_gguf_source_has_the_ends_that_it_names(models, tmp_path):
    first, second = tmp_path / "a.gguf", tmp_path / "sub" / "b.gguf"
    second.parent.mkdir()
    assert invoke(models("qwen2"), first, "--quiet").exit_code == 0
    done = invoke(first, second, "--type", "Q8_0", "--modelfile", "--quiet")
    assert done.exit_code == 0, done.output
    found = parsed((second.parent / "Modelfile").read_text())
    assert found[0] == ("FROM", "./b.gguf")
    assert [value for name, value in found if name == "stop"] == ["</s>"]
    assert not (tmp_path / "Modelfile").exists()


def test_nothing_is_replaced_and_nothing_done_before_the_refusal(models, tmp_path):
    path, there = tmp_path / "m.gguf", tmp_path / "Modelfile"
    there.write_text("FROM mine\n")
    done = invoke(models("llama"), path, "--modelfile", "--quiet")
    assert done.exit_code == 1
    assert "Modelfile: exists already" in done.output
    assert not path.exists()
    assert there.read_text() == "FROM mine\n"
    assert invoke(models("llama"), path, "--modelfile", "--force", "--quiet").exit_code == 0
    assert there.read_text() != "FROM mine\n"
    with pytest.raises(OutputError, match="exists already"):
        write_modelfile(path)
    there.unlink()
    done = invoke(models("llama"), path, "--modelfile", "--force", "--dry-run")
    assert done.exit_code == 0
    assert not there.exists()


def test_refusals(models, tmp_path):
    done = invoke(models("llama"), tmp_path / "m.sktch", "--modelfile")
    assert "--modelfile goes with an output that ends in .gguf" in done.output
    done = invoke(models("llama"), tmp_path / "m.gguf", "--modelfile", "--max-shard-size", "100KB")
    assert "and Ollama takes one file" in done.output
    done = invoke(models("llama"), tmp_path / "a\tb.gguf", "--modelfile")
    assert "cannot be written in a Modelfile" in done.output
    (tmp_path / "none.gguf").write_bytes(b"nothing of that kind")
    with pytest.raises(SourceError):
        modelfile_text(tmp_path / "none.gguf")
    assert not (tmp_path / "Modelfile").exists()


@pytest.mark.parametrize(
    "text", ["a", "<|im_end|>", 'say "no"', '"""', '"x', " two  words ", "#x", "日本"]
)
def test_values_come_back_as_they_were(text):
    assert parsed(f"PARAMETER stop {quoted(text)}") == [("stop", text)]


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\tb", "\x00"])
def test_values_that_no_modelfile_can_hold(text):
    with pytest.raises(OutputError, match="cannot be written in a Modelfile"):
        quoted(text)
