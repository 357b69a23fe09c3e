"""Interrupted conversions: what is finished is kept, and the result is the same to the byte."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sketchconv.journal as journal_module
from sketchconv import worker
from sketchconv.errors import OutputError, ResumeError, Suspended, WeightError
from sketchconv.pipeline import convert
from sketchconv.recipe import Recipe, SketchSpec

COVARIANCES = Recipe(SketchSpec(bits=3), weighting="covariances")
FORMS = ("m.sktch", "m")


def content(path):
    """Every byte of an output, by name."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Stop:
    """A progress callback that interrupts at an event, and counts the others."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def __call__(self, event):
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def fits(monkeypatch):
    """Names of the weights that were fitted."""
    made = []
    fit = worker.Worker._fit

    def noted(self, chunk, record, rows):
        made.append(record.name)
        return fit(self, chunk, record, rows)

    monkeypatch.setattr(worker.Worker, "_fit", noted)
    return made


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """Uninterrupted outputs by form and recipe."""
    folder = tmp_path_factory.mktemp("whole")
    made = {}
    for key, recipe in (("moments", None), ("covariances", COVARIANCES)):
        for form in FORMS:
            (folder / key).mkdir(exist_ok=True)
            path = folder / key / form
            convert(llama, path, recipe, max_shard_size=40_000)
            made[key, form] = content(path)
    return made


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["moments", "covariances"])
def test_the_same_bytes_after_interrupts(llama, tmp_path, whole, fits, form, key):
    recipe = COVARIANCES if key == "covariances" else None
    out, attempts, kept = tmp_path / form, 0, 0
    for at in (5, 9, 14, 19):
        with pytest.raises(Suspended, match="tensors are finished and kept"):
            convert(llama, out, recipe, max_shard_size=40_000, progress=Stop(at))
        attempts += 1
        assert not out.exists()
        assert names(tmp_path) == [f".{form}.sktch-partial", f".{form}.sktch-state"]
        lines = (tmp_path / f".{form}.sktch-state").read_bytes().count(b"\n")
        assert lines > kept
        kept = lines
    convert(llama, out, recipe, max_shard_size=40_000)
    assert content(out) == whole[key, form]
    assert names(tmp_path) == [form]
    assert len(fits) - len(set(fits)) <= attempts  # none is fitted twice but those cut short


def test_before_the_first_tensor_nothing_is_kept(llama, tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        convert(llama, tmp_path / "m.sktch", progress=Stop(2))
    assert not isinstance(caught.value, Suspended)
    assert names(tmp_path) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_as_the_first_tensor_is_noted(llama, tmp_path, monkeypatch, jobs):
    """Its line is on the disk, and nothing in memory tells of it yet."""
    real = journal_module.write_all

    def struck(fd, data):
        real(fd, data)
        raise KeyboardInterrupt

    def renamed(self, target, replace=Path.replace):
        replace(self, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "write_all", struck)  # and not yet in its place
        with pytest.raises(KeyboardInterrupt) as caught:
            convert(llama, tmp_path / "m.sktch", jobs=jobs)
    assert not isinstance(caught.value, Suspended)
    assert names(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", renamed)
        with pytest.raises(Suspended, match=r"^[12] of 20 tensors are finished"):
            convert(llama, tmp_path / "m.sktch", jobs=jobs)
    assert names(tmp_path) == [".m.sktch.sktch-partial", ".m.sktch.sktch-state"]
    convert(llama, tmp_path / "m.sktch", jobs=jobs)
    assert names(tmp_path) == ["m.sktch"]


def interrupted(llama, out, at=12, recipe=None):
    with pytest.raises(Suspended):
        convert(llama, out, recipe, max_shard_size=40_000, progress=Stop(at))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("harm", ["data", "tail", "middle", "first", "gone"])
def test_what_is_damaged_is_made_again(llama, tmp_path, whole, form, harm):
    out = tmp_path / form
    interrupted(llama, out)
    partial, state = tmp_path / f".{form}.sktch-partial", tmp_path / f".{form}.sktch-state"
    if harm == "data":
        for path in [partial] if partial.is_file() else list(partial.glob("*.safetensors")):
            data = bytearray(path.read_bytes())
            rng = random.Random(3)
            for _ in range(200):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
    elif harm == "gone":
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    else:
        lines = state.read_bytes().splitlines(keepends=True)
        if harm == "tail":
            lines[-1] = lines[-1][:-9]
        else:
            lines[len(lines) // 2 if harm == "middle" else 0] = b'{"half": \n'
        state.write_bytes(b"".join(lines))
    convert(llama, out, max_shard_size=40_000)
    assert content(out) == whole["moments", form]
    assert names(tmp_path) == [form]


def test_another_conversion_is_refused_by_name(llama, tmp_path, whole):
    out = tmp_path / "m.sktch"
    interrupted(llama, out)
    with pytest.raises(ResumeError, match=r"differs in files, form, options; .* --no-resume"):
        convert(llama, out, Recipe(SketchSpec(bits=3), weighting="moments"), max_shard_size=40_000)
    convert(llama, out, max_shard_size=40_000)  # the refusal has harmed nothing
    assert content(out) == whole["moments", "m.sktch"]


def test_starting_anew(llama, tmp_path, whole, fits):
    out = tmp_path / "m.sktch"
    interrupted(llama, out)
    done = len(fits)
    convert(llama, out, max_shard_size=40_000, resume=False)
    assert content(out) == whole["moments", "m.sktch"]
    assert len(fits) - done == len(set(fits))
    assert names(tmp_path) == ["m.sktch"]


def test_a_changed_source_is_refused_by_name(fresh_llama, tmp_path):
    out = tmp_path / "m.sktch"
    interrupted(fresh_llama, out)
    weights = next(fresh_llama.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    state = (tmp_path / ".m.sktch.sktch-state").read_text().splitlines()
    name = json.loads(state[3])["name"]
    at = 8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]
    data[at] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ResumeError, match=f"{name}: the source has other values"):
        convert(fresh_llama, out, max_shard_size=40_000)
    assert not out.exists()
    data[at] ^= 1
    weights.write_bytes(data)
    convert(fresh_llama, out, max_shard_size=40_000)
    assert out.exists()


def test_a_bad_weight_leaves_nothing(llama, tmp_path, monkeypatch):
    check = worker.check_finite

    def refuse(chunk, rows, threads):
        if "layers.1" in chunk.step.name:
            raise WeightError(f"{chunk.step.name}: is bad")
        check(chunk, rows, threads)

    monkeypatch.setattr(worker, "check_finite", refuse)
    with pytest.raises(WeightError):
        convert(llama, tmp_path / "m.sktch")
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_keeps_what_is_finished(llama, tmp_path, whole, monkeypatch, code):
    out, count, real = tmp_path / "m.sktch", 0, os.pwrite

    def failing(*args):
        nonlocal count
        count += 1
        if count > 30:
            raise OSError(code, os.strerror(code))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(OutputError, match=r"tensors are finished and kept: run the same"):
            convert(llama, out, max_shard_size=40_000)
    convert(llama, out, max_shard_size=40_000)
    assert content(out) == whole["moments", "m.sktch"]
    assert names(tmp_path) == ["m.sktch"]


KILLED = """
import os, signal, sys
calls = 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in ("pwrite", "write", "fsync", "replace", "rename"):
    setattr(os, name, counted(getattr(os, name)))
from sketchconv.pipeline import convert
convert({source!r}, {out!r}, max_shard_size=40_000)
print(calls)
"""


@pytest.mark.parametrize("form", [FORMS[0], pytest.param(FORMS[1], marks=pytest.mark.slow)])
def test_killed_at_any_call_then_resumed(llama, tmp_path, whole, form):
    out, rng = tmp_path / form, random.Random(7)
    killed = 0
    for at in (rng.randrange(8, 70), rng.randrange(8, 40), rng.randrange(8, 30)):
        code = KILLED.format(at=at, source=str(llama), out=str(out))
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        killed += done.returncode != 0
        if out.exists():
            break
    assert killed
    if not out.exists():
        convert(llama, out, max_shard_size=40_000)
    assert content(out) == whole["moments", form]
    assert names(tmp_path) == [form]


def test_a_journal_on_a_full_disk_is_our_error(tmp_path, monkeypatch):
    made = journal_module.Journal(tmp_path / "m", {"a": 1}, resume=True)
    entry = journal_module.Entry("x", "00", {"x": "11"}, (0.1, 3.5))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OutputError, match="full"):
            made.add(entry)
    made.close()
    assert not journal_module.Journal(tmp_path / "m", {"a": 1}, resume=True).finished


@pytest.mark.parametrize("line", ["[" * 100_000, '{"squares": ["0x1p99999", "0x0p0"]}'])
def test_a_damaged_line_of_the_journal_is_dropped(tmp_path, line):
    made = journal_module.Journal(tmp_path / "m", {"a": 1}, resume=True)
    made.add(journal_module.Entry("x", "00", {"x": "11"}, (0.1, 3.5)))
    made.close()
    text = made.path.read_text()
    whole = json.loads(text.splitlines()[1])
    if line.startswith("{"):
        line = json.dumps({**whole, **json.loads(line)})
    made.path.write_text(f"{text}{line}\n")
    assert list(journal_module.Journal(tmp_path / "m", {"a": 1}, resume=True).finished) == ["x"]
    made.path.write_text(f"{line}\n")
    if line.startswith("["):
        assert not journal_module.Journal(tmp_path / "m", {"a": 1}, resume=True).resumes


def test_the_journal_knows_only_whole_lines(tmp_path):
    made = journal_module.Journal(tmp_path / "m", {"a": 1}, resume=True)
    entry = journal_module.Entry("x", "00", {"x": "11"}, (0.1, 3.5))
    made.add(entry)
    made.close()
    again = journal_module.Journal(tmp_path / "m", {"a": 1}, resume=True)
    assert again.finished == {"x": entry}
    assert again.resumes
    with pytest.raises(ResumeError, match="differs in a"):
        journal_module.Journal(tmp_path / "m", {"a": 2}, resume=True)
    assert not journal_module.Journal(tmp_path / "m", {"a": 2}, resume=False).resumes
