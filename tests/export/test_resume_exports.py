"""An export that was interrupted goes on tensor by tensor, and ends in the same bytes."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
from functools import partial

import pytest
from click.testing import CliRunner

import sketchconv.export.folder as dense_module
import sketchconv.export.rows as rows_module
from sketchconv.cli.main import cli
from sketchconv.errors import OutputError, ResumeError, Suspended, WeightError
from sketchconv.export.dense import export_dense
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.run import export_gguf

FORMS = ("gguf", "dense")


def export(form, source, out, **options):
    """Several parts, or several shards; the only place where the two forms differ."""
    if form == "gguf":
        recipe = options.pop("recipe", ExportRecipe("Q8_0"))
        options.setdefault("max_shard_size", 40_000)
        return export_gguf(source, out / "m.gguf", recipe, **options)
    return export_dense(source, out / "m", options.pop("recipe", "F16"), max_shard_size=80_000,
                        **options)  # fmt: skip


def content(out):
    files = (p for p in sorted(out.rglob("*")) if p.is_file())
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


class Stop:
    """Interrupts at an event."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def __call__(self, event):
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def model(models):
    return models("llama")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    made = {}
    for form in FORMS:
        out = tmp_path_factory.mktemp(form)
        export(form, model, out, threads=1)
        made[form] = content(out)
    return made


@pytest.fixture
def encoded(monkeypatch):
    """Names of the tensors that were encoded."""
    seen = []
    for module in (rows_module, dense_module):
        inner = module._encoded

        def noted(*args, inner=inner):
            seen.append(args[-3].name)
            return inner(*args)

        monkeypatch.setattr(module, "_encoded", noted)
    return seen


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bytes_after_interrupts(model, tmp_path, whole, encoded, form):
    stops = (4, 8, 13)
    for at in stops:
        with pytest.raises(Suspended, match="tensors are finished and kept: run the same command"):
            export(form, model, tmp_path, threads=1, progress=Stop(at))
        assert not [name for name in content(tmp_path) if not name.startswith(".")]
    export(form, model, tmp_path, threads=3)
    assert content(tmp_path) == whole[form]
    # None is encoded twice but those that were in work.
    assert len(encoded) - len(set(encoded)) <= 3 * len(stops)


@pytest.mark.parametrize("form", FORMS)
def test_another_export_or_source_is_refused_by_name(model, tmp_path, whole, form):
    import shutil

    own = shutil.copytree(model, tmp_path / model.name)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(Suspended):
        export(form, own, out, threads=1, progress=Stop(9))
    other = ExportRecipe("Q4_0") if form == "gguf" else "F32"
    with pytest.raises(ResumeError, match=r"differs in .*options.*--no-resume"):
        export(form, own, out, recipe=other, threads=1)
    weights = own / "model.safetensors"
    data = bytearray(weights.read_bytes())
    kept = bytes(data)
    for at in range(len(data) // 4, len(data), 64):  # what is finished lies anywhere
        data[at] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ResumeError, match="the source has other values than when"):
        export(form, own, out, threads=1)
    weights.write_bytes(kept)
    export(form, own, out, threads=1)
    assert content(out) == whole[form]


@pytest.mark.parametrize("form", FORMS)
def test_starting_anew(model, tmp_path, whole, encoded, form):
    with pytest.raises(Suspended):
        export(form, model, tmp_path, threads=1, progress=Stop(9))
    before = len(encoded)
    export(form, model, tmp_path, threads=1, resume=False)
    assert content(tmp_path) == whole[form]
    assert len(encoded) - before >= len(set(encoded))


@pytest.mark.parametrize("form", FORMS)
def test_starting_anew_forgets_at_once(model, tmp_path, whole, form):
    """What was dropped is in nobody's way, though the new run finished nothing."""
    other = ExportRecipe("Q4_0") if form == "gguf" else "F32"
    with pytest.raises(Suspended):
        export(form, model, tmp_path, recipe=other, threads=1, progress=Stop(9))
    with pytest.raises(KeyboardInterrupt):
        export(form, model, tmp_path, threads=1, resume=False, progress=Stop(1))
    assert not content(tmp_path)
    export(form, model, tmp_path, threads=1)
    assert content(tmp_path) == whole[form]


@pytest.mark.parametrize("first", [40_000, None], ids=["parts", "one file"])
def test_starting_anew_in_other_parts_leaves_nothing(model, tmp_path, first):
    sizes = [first, None if first else 40_000]
    with pytest.raises(Suspended):
        export("gguf", model, tmp_path, threads=1, max_shard_size=sizes[0], progress=Stop(9))
    others = (".m-00001-of-00009.gguf.sktch-partial", ".m-00001-of-00008.gguf.sktch-partial",
              ".m2.gguf.sktch-partial", ".m-00001-of-00008.gguf.sktch-state")  # fmt: skip
    for name in others:
        (tmp_path / name).write_bytes(b"other")
    with (tmp_path / others[0]).open() as held:  # by another writer
        fcntl.flock(held, fcntl.LOCK_EX)
        export("gguf", model, tmp_path, threads=1, max_shard_size=sizes[1], resume=False)
    assert {name for name in content(tmp_path) if name.startswith(".")} == set(others)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_leftovers_are_made_again(model, tmp_path, whole, form):
    with pytest.raises(Suspended):
        export(form, model, tmp_path, threads=1, progress=Stop(13))
    rng = random.Random(3)
    for path in tmp_path.rglob("*"):
        if path.is_file() and "partial" in str(path):
            data = bytearray(path.read_bytes())
            for _ in range(20):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data[: -rng.randrange(1, 60)] if rng.random() < 0.5 else data)
    export(form, model, tmp_path, threads=1)
    assert content(tmp_path) == whole[form]


@pytest.mark.parametrize("form", FORMS)
def test_a_bad_weight_leaves_nothing(model, tmp_path, monkeypatch, form):
    module = rows_module if form == "gguf" else dense_module
    check = module.check_finite

    def refuse(name, rows, begin):
        if "layers.1" in name:
            raise WeightError(f"{name}: is bad")
        check(name, rows, begin)

    monkeypatch.setattr(module, "check_finite", refuse)
    with pytest.raises(WeightError):
        export(form, model, tmp_path, threads=1)
    assert not content(tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_keeps_what_is_finished(model, tmp_path, whole, monkeypatch, form, code):
    count, real = 0, os.pwrite

    def failing(*args):
        nonlocal count
        count += 1
        if count > 14:
            raise OSError(code, os.strerror(code))
        return real(*args)

    def full(*args):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(OutputError, match=r"tensors are finished and kept: run the same"):
            export(form, model, tmp_path, threads=1)
    kept = content(tmp_path)
    with monkeypatch.context() as patch:  # nor does a disk that is full from the start lose them
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OutputError):
            export(form, model, tmp_path, threads=1)
    assert content(tmp_path).keys() == kept.keys()
    export(form, model, tmp_path, threads=1)
    assert content(tmp_path) == whole[form]


def killed_while_publishing(model, out, monkeypatch, **options):
    """Two parts are in place, the others are temporaries."""
    from pathlib import Path

    from sketchconv.formats.staging import staging_path

    class Killed(BaseException):
        pass

    done, real, kept = [], Path.replace, {}

    def replace(path, target):
        if target.suffix == ".gguf":
            if len(done) == 2:
                kept.update({p: p.read_bytes() for p in out.iterdir()})
                raise Killed
            done.append(target)
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):
            export("gguf", model, out, threads=1, **options)
    for path in out.iterdir():
        path.unlink()
    for path, data in kept.items():  # as a kill would have left them
        path.write_bytes(data)
    assert not staging_path(done[0]).exists()
    return done[0]


def test_parts_that_were_in_place_already_are_taken_back(model, tmp_path, whole, monkeypatch):
    killed_while_publishing(model, tmp_path, monkeypatch)
    export("gguf", model, tmp_path, threads=1)
    assert content(tmp_path) == whole["gguf"]


def test_old_parts_do_not_stay_aside_after_a_kill(model, tmp_path, whole, monkeypatch):
    export("gguf", model, tmp_path, threads=1)
    killed_while_publishing(model, tmp_path, monkeypatch, force=True)
    assert any(name.endswith(".sktch-old") for name in content(tmp_path))
    export("gguf", model, tmp_path, threads=1, force=True)
    assert content(tmp_path) == whole["gguf"]


def test_another_file_of_a_parts_name_is_left_alone(model, tmp_path, whole, monkeypatch):
    part = killed_while_publishing(model, tmp_path, monkeypatch)
    data = part.read_bytes()
    other = data[:-40] + bytes(40)
    part.write_bytes(other)
    for resume in (True, False):
        with pytest.raises(OutputError, match="exists already; pass --force to replace it"):
            export("gguf", model, tmp_path, threads=1, resume=resume)
    assert part.read_bytes() == other
    part.write_bytes(data)
    export("gguf", model, tmp_path, threads=1)
    assert content(tmp_path) == whole["gguf"]


KILLED = """
import os, signal, sys
calls = 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == {at}:
            os.kill(os.getpid(), signal.{signal})
        return real(*args, **kwargs)
    return call
for name in ("pwrite", "write", "fsync", "replace", "rename"):
    setattr(os, name, counted(getattr(os, name)))
sys.argv = ["sketchconv", "convert", {source!r}, {out!r}, "--quiet", *{more!r}]
from sketchconv.cli.main import run
run()
"""
MORE = {
    "gguf": ["--type", "Q8_0", "--max-shard-size", "40kB"],
    "dense": ["--dense", "--type", "F16", "--max-shard-size", "80kB"],
}


@pytest.mark.parametrize(
    ("form", "name", "status"),
    [
        pytest.param("gguf", "SIGTERM", 75, marks=pytest.mark.slow),
        ("dense", "SIGKILL", -9),
        ("dense", "SIGINT", 75),
    ],
)
def test_a_command_that_is_killed_or_stopped_goes_on(model, tmp_path, whole, form, name, status):
    out = str(tmp_path / ("m.gguf" if form == "gguf" else "m"))
    code = KILLED.format(at=30, signal=name, source=str(model), out=out, more=MORE[form])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        check=False,
        # A shell starts what it runs in the background with SIGINT ignored; a child inherits that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == status, done.stderr
    if status == 75:
        assert b"finished and kept: run the same command again to go on" in done.stderr
    result = CliRunner().invoke(cli, ["convert", str(model), out, "--quiet", *MORE[form]])
    assert result.exit_code == 0, result.output
    assert content(tmp_path) == whole[form]
