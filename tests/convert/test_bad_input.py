"""Bad input: one clear line, a non-zero exit, nothing half-written, the source untouched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def sketchconv(*arguments, cwd):
    """The command as a user types it, in this process: importing torch takes seconds."""
    from click.testing import CliRunner

    from sketchconv.cli.main import cli

    with chdir(cwd):
        done = CliRunner().invoke(cli, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr)


@contextmanager
def chdir(folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def content(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(done, *words):
    """The run failed with one clear line that says all of these words."""
    assert done.returncode not in (0, -11), done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def break_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def break_renamed_pickle(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))


def break_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def break_nan(folder):
    change(folder, Q_PROJ, lambda values: values.__setitem__((3, 5), np.nan))


def break_inf_in_norm(folder):
    change(folder, "model.norm.weight", lambda values: values.__setitem__(2, np.inf))


def change(folder, name, edit):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def break_missing_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[Q_PROJ]
    save_file(tensors, folder / "model.safetensors")


def break_config(folder):
    (folder / "config.json").unlink()


def break_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 72, "head_dim": 16}))


def break_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))


def break_quantized(folder):
    config = json.loads((folder / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantized))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_pickle, ["pytorch_model.bin", "safetensors"]),
        (break_renamed_pickle, ["model.safetensors"]),
        (break_truncated, ["model.safetensors"]),
        (break_nan, [Q_PROJ, "row 3"]),
        (break_inf_in_norm, ["model.norm.weight", "infinite"]),
        (break_missing_tensor, [Q_PROJ]),
        (break_config, ["config.json"]),
        (break_shape, ["72"]),
        (break_model_type, ["no-such-model"]),
        (break_quantized, ["gptq"]),
    ],
)
@pytest.mark.parametrize("form", ["out.sktch", "out"])
def test_a_bad_checkpoint_is_refused_and_left_alone(fresh_llama, tmp_path, damage, words, form):
    damage(fresh_llama)
    before = content(fresh_llama)
    refused(sketchconv("convert", fresh_llama, form, cwd=tmp_path), *words)
    assert content(fresh_llama) == before
    assert [p.name for p in tmp_path.iterdir()] == [fresh_llama.name]


def test_a_missing_shard_is_named(untied_shards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(untied_shards, broken)
    victim = sorted(broken.glob("*.safetensors"))[1]
    victim.unlink()
    refused(sketchconv("convert", broken, "out.sktch", cwd=tmp_path), victim.name)
    assert not (tmp_path / "out.sktch").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "9"], ["--bits", "9"]),
        (["--groups", "7"], ["7 groups", "160 columns"]),
        (["--group-size", "48"], ["48"]),
        (["--groups", "2", "--group-size", "32"], ["not both"]),
        (["--exclude", "*.none"], ["*.none"]),
        (["--recipe", "missing.toml"], ["missing.toml"]),
        (["--max-memory", "1MB"], ["--max-memory"]),
        (["--max-memory", "lots"], ["lots"]),
        (["--bits", "8", "--groups", "16"], ["linear parameters"]),
        (["--colour", "red"], ["--colour"]),
    ],
)
def test_a_wrong_option_is_refused(llama, tmp_path, options, words):
    refused(sketchconv("convert", llama, "out.sktch", *options, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_empty_names_are_no_places(llama, tmp_path):
    refused(sketchconv("convert", "", "x.sktch", cwd=tmp_path), "empty")
    refused(sketchconv("convert", llama, "", cwd=tmp_path), "empty")
    assert not list(tmp_path.iterdir())


def test_places_that_must_not_be_written(fresh_llama, tmp_path):
    before = content(fresh_llama)
    for target in (fresh_llama, fresh_llama / "model.safetensors", fresh_llama / "x.sktch", "."):
        refused(sketchconv("convert", fresh_llama, target, "--force", cwd=tmp_path))
    refused(sketchconv("convert", fresh_llama, "no/such/x.sktch", cwd=tmp_path), "no/such")
    refused(sketchconv("convert", fresh_llama, "x.onnx", cwd=tmp_path), ".onnx")
    refused(sketchconv("convert", fresh_llama, "no/such/x.gguf", cwd=tmp_path), "no/such")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("my only copy")
    refused(sketchconv("convert", fresh_llama, "mine", cwd=tmp_path), "--force")
    refused(sketchconv("convert", fresh_llama, "mine", "--force", cwd=tmp_path), "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "my only copy"
    assert content(fresh_llama) == before


def test_an_existing_sketch_is_kept_until_force(llama, tmp_path):
    out = tmp_path / "out.sktch"
    out.write_bytes(b"mine")
    refused(sketchconv("convert", llama, out, cwd=tmp_path), "--force")
    assert out.read_bytes() == b"mine"
    assert sketchconv("convert", llama, out, "--force", cwd=tmp_path).returncode == 0
    assert out.stat().st_size > 4


@pytest.mark.parametrize("form", ["out.sktch", "out"])
def test_a_full_disk_leaves_nothing_behind(llama, tmp_path, form, monkeypatch):
    import sketchconv as package
    from sketchconv.errors import SketchconvError

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SketchconvError, match=r"(?i)space|disk"):
        package.convert(llama, tmp_path / form)
    assert not list(tmp_path.iterdir())


def test_too_little_free_disk_is_refused_before_the_work(llama, tmp_path, monkeypatch):
    import sketchconv as package
    from sketchconv.errors import OutputError

    monkeypatch.setattr("sketchconv.formats.part.free_bytes", lambda _folder: 1000)
    monkeypatch.setattr("sketchconv.worker.Worker.events", lambda _self: pytest.fail("started"))
    with pytest.raises(OutputError, match="missing"):
        package.convert(llama, tmp_path / "out.sktch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_heard_and_keeps_what_is_finished(llama, tmp_path, number):
    code = (
        "import sys, time, sketchconv.job as j;"
        "j.chunk_budget = lambda _limit: 1;"
        "import sketchconv.cli.progress as p;"
        "p._LINE_EVERY_SECONDS = 0.0;"
        "import sketchconv.cli.main as m;"
        f"sys.argv = ['sketchconv', 'convert', {str(llama)!r}, 'out.sktch', '--exact'];"
        "m.run()"
    )
    command = [sys.executable, "-P", "-c", code]
    # A shell starts what it runs in the background with SIGINT ignored, and a child inherits that.
    heard = partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as child:
        assert child.stderr is not None
        while not list(tmp_path.glob(".*.sktch-state")):  # the first tensor is finished
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.01)
        child.send_signal(number)
        rest = child.stderr.read()
        assert child.wait() == 75, rest  # 0, had it been heard at the end
    assert "Interrupted" in rest
    assert "run the same command again" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "out.sktch").exists()
    assert len(list(tmp_path.iterdir())) == 2
