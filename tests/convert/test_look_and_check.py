"""`inspect` and `verify` on sketches, and `inspect` on foreign files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

import sketchconv
from sketchconv.errors import SketchconvError
from sketchconv.recipe import Recipe
from sketchconv.summary import fold_layers, is_sketch, summarise
from sketchconv.verify import verify

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=["tiny.sktch", "tiny"])
def sketch(request, llama, tmp_path_factory):
    """The tiny Llama in both forms."""
    out = tmp_path_factory.mktemp("sketch") / request.param
    report = sketchconv.convert(llama, out, Recipe(embed_bits=4))
    return out, report


def run(*arguments):
    command = [sys.executable, "-P", "-m", "sketchconv", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_summary_adds_up_and_folds_layers(sketch):
    out, report = sketch
    summary = summarise(out)
    assert summary.format == "sktch"
    assert summary.parameters == report.parameters
    assert summary.nbytes == report.output_bytes
    rows = {row.name: row for row in summary.rows if row.storage == "sketch"}
    assert len(rows) == len(report.results)
    for result in report.results:
        assert rows[result.name].error == pytest.approx(result.relative_error, rel=1e-6)
    folded = {r.name: r for r in fold_layers(summary.rows) if r.storage == "sketch"}
    name = "model.layers.*.self_attn.q_proj.weight"
    assert folded[name].count == 2
    errors = [rows[f"model.layers.{n}.self_attn.q_proj.weight"].error for n in (0, 1)]
    assert folded[name].error == max(errors)
    assert sum(r.parameters for r in folded.values()) == sum(r.parameters for r in rows.values())


def test_inspect_prints_a_table_and_json(sketch):
    out, report = sketch
    table = run("inspect", out)
    assert table.returncode == 0, table.stderr
    assert f"{report.parameters:,}" in table.stdout
    assert "q_proj" in table.stdout
    data = json.loads(run("inspect", out, "--json").stdout)
    assert data["bytes"] == report.output_bytes
    assert any(t["name"] == Q_PROJ and t["bits"] == 4 for t in data["tensors"])


def test_inspect_reads_a_dense_folder_and_a_single_file(llama):
    for path in (llama, llama / "model.safetensors"):
        summary = summarise(path)
        assert summary.format == "safetensors"
        assert {row.dtype for row in summary.rows} == {"BF16"}
    assert run("inspect", llama).returncode == 0


def test_inspect_refuses_what_it_does_not_know(tmp_path):
    other = tmp_path / "notes.txt"
    other.write_text("hello, this is not a model at all")
    for path in (other, tmp_path / "none", tmp_path):
        done = run("inspect", path)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
        assert "Traceback" not in done.stderr


def test_verify_finds_nothing_wrong_also_against_the_source(sketch, llama):
    out, report = sketch
    result = verify(out, against=str(llama))
    assert result.findings == ()
    assert result.compared == sum(r.parameters for r in report.results)
    assert result.relative_error == pytest.approx(report.relative_error, rel=1e-9)
    data = json.loads(run("verify", out, "--json").stdout)
    assert data["ok"] is True


def test_verify_against_the_source_of_a_folder_in_shards(llama, tmp_path):
    out = tmp_path / "shards"
    sketchconv.convert(llama, out, Recipe(embed_bits=4), max_shard_size=20_000)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert verify(out, against=str(llama)).findings == ()


def test_verify_against_another_source_finds_every_difference(sketch, fresh_llama):
    from safetensors.torch import load_file, save_file

    out, _ = sketch
    path = fresh_llama / "model.safetensors"
    tensors = load_file(path)
    tensors[Q_PROJ] *= 1.5
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    result = verify(out, against=str(fresh_llama))
    assert {f.where for f in result.findings} == {Q_PROJ, "model.norm.weight"}


def test_verify_against_a_source_with_more_or_untied_tensors(sketch, fresh_llama):
    from safetensors.torch import load_file, save_file

    out, _ = sketch
    path = fresh_llama / "model.safetensors"
    tensors = load_file(path)
    untied = tensors["model.embed_tokens.weight"] * 3
    more = {**tensors, "lm_head.weight": untied, "model.extra.weight": untied.clone()}
    save_file(more, path, metadata={"format": "pt"})
    result = verify(out, against=str(fresh_llama))
    assert {f.where for f in result.findings} == {"lm_head.weight", "model.extra.weight"}


def test_inspect_knows_a_sketch_whose_config_was_written_without_spaces(sketch, tmp_path):
    out, _ = sketch
    if out.is_file():
        assert is_sketch(out)
        return
    copy = tmp_path / "compact"
    shutil.copytree(out, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config, separators=(",", ":")))
    assert summarise(copy).format == "sktch"


def test_verify_fails_on_a_flipped_byte(sketch, tmp_path):
    out, _ = sketch
    copy = tmp_path / out.name
    if out.is_dir():
        shutil.copytree(out, copy)
    else:
        shutil.copy(out, copy)
    weights = copy / "model.safetensors" if copy.is_dir() else copy
    data = bytearray(weights.read_bytes())
    for place in (9, len(data) // 3, len(data) - 1):
        data[place] ^= 1
        weights.write_bytes(data)
        done = run("verify", copy)
        assert done.returncode == 1
        assert "FAILED" in done.stdout
        assert "Traceback" not in done.stderr
        data[place] ^= 1


def test_verify_says_when_it_could_not_check_the_tensors(tmp_path):
    other = tmp_path / "notes.sktch"
    other.write_text("not a sketch at all, only a few words")
    done = run("verify", other)
    assert done.returncode == 1
    assert "no tensor was checked" in done.stdout
    assert "every rule" not in done.stdout


def test_verify_of_nothing_is_an_error(tmp_path):
    with pytest.raises(SketchconvError, match="no such file"):
        verify(tmp_path / "none.sktch")
