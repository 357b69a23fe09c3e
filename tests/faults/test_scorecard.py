"""The scorecard at its smallest size; and that its rows find what is planted."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # test folders are no packages

pytest.importorskip("torch")
pytest.importorskip("transformers")

from rows import bad_inputs, fuzz, kills, valid  # noqa: E402
from rows.base import Count, Setting, in_turn  # noqa: E402
from rows.full_disk import _unclear  # noqa: E402
from rows.harness import Job  # noqa: E402
from rows.hostile import Variant  # noqa: E402
from rows.mutants import TARGETS  # noqa: E402

from sketchconv.errors import SketchconvError  # noqa: E402
from sketchconv.formats.container import Container  # noqa: E402
from sketchconv.formats.delta import DeltaFile  # noqa: E402
from sketchconv.formats.reader import SktchModel  # noqa: E402


@pytest.fixture
def setting(tmp_path):
    return Setting("test", 1, tmp_path)


def test_every_row_at_its_smallest_size(tmp_path):
    out = tmp_path / "card.md"
    # In a process of its own: an alarm, and forks of a process that has no threads yet.
    command = [sys.executable, "-P", HERE / "scorecard.py", "--test", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        line.split(" | ") for line in out.read_text().splitlines() if line[:3] in ("| S", "| R")
    ]
    assert len(rows) == 11
    for row in rows:
        assert int(row[3]) == int(row[4]) > 0


def test_a_reader_that_takes_too_much_is_found(setting, monkeypatch):
    """A validator that finds nothing: every vector, and every flipped byte, is a failure."""
    monkeypatch.setattr(bad_inputs, "validate", lambda path: [])
    case = next(v for v in bad_inputs.variants(setting) if v.kind == "sktch")
    assert "accepted" in bad_inputs.problem_of(case)
    monkeypatch.setattr(valid, "verify", lambda path: type("V", (), {"findings": ()}))
    outcome = valid.run_flips(setting)
    assert outcome.good == 0
    assert "unseen" in outcome.failures[0]


def test_errors_that_are_not_ours_and_hangs_are_found(setting, monkeypatch):
    def careless(path):
        raise KeyError("shape")

    make, _ = TARGETS["sktch"](setting.room("one"))
    outcome = fuzz.run(setting, {"sktch": lambda folder: (make, careless)})
    assert outcome.good == 0
    assert outcome.failures[0] == "sktch mutant 0: KeyError: 'shape'"
    assert "not one short line" in bad_inputs.problem_of(_refused(setting, monkeypatch, "a\nb"))
    assert "expected x.sktch" in bad_inputs.problem_of(_refused(setting, monkeypatch, "bad"))


def test_a_wrong_reading_is_found(setting, monkeypatch):
    make, read = TARGETS["sktch"](setting.room("one"))
    right = SktchModel.decode
    monkeypatch.setattr(SktchModel, "decode", lambda self, name: -right(self, name))
    outcome = fuzz.run(setting, {"sktch": lambda folder: (make, read)})
    assert any("independent decoder" in failure for failure in outcome.failures)
    monkeypatch.undo()
    right = DeltaFile.tuned
    setting = Setting("test", 1, setting.folder / "delta")
    make, read = TARGETS["delta"](setting.room("one"))
    monkeypatch.setattr(DeltaFile, "tuned", lambda self, *args: right(self, *args) * 2)
    outcome = fuzz.run(setting, {"delta": lambda folder: (make, read)})
    assert any("independent decoder" in failure for failure in outcome.failures)


def test_cases_that_time_does_not_allow_are_left_out_and_counted(tmp_path):
    count = Count()
    assert list(count.until(Setting("test", 1, tmp_path, until=0.0), range(5), 2)) == [0, 1]
    assert count.notes == ["3 cases left out: no time"]
    assert list(count.until(Setting("test", 1, tmp_path), range(3))) == [0, 1, 2]
    assert list(in_turn("ab", "c", "")) == ["a", "c", "b"]


def _refused(setting, monkeypatch, text):
    def reader(path):
        raise SketchconvError(text)

    monkeypatch.setitem(bad_inputs.READERS, "sktch", reader)
    return Variant("sktch", "x.sktch", setting.folder / "x.sktch", "x.sktch")


def test_a_reader_that_skips_a_length_is_found(setting, monkeypatch):
    """Data that a header does not describe, read by us and not by safetensors."""
    path = setting.folder / "a.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}" + b"tail")
    assert valid._differs(path) == "-"

    class Careless:
        entries, read = {}, None

        @classmethod
        def open(cls, path, profile):
            return cls()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(valid, "Container", Careless)
    assert "accepted by us, not by safetensors" in valid._differs(path)
    assert Container is not valid.Container


def test_wrong_outputs_and_unclear_errors_are_found(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"s")
    origin = {source: {"source": b"s"}}
    job = Job("toy", "convert", {}, "m", {"m": b"right"}, origin, 1, 1.0)
    folder = tmp_path / "out"
    folder.mkdir()
    assert job.wrong(folder) is None
    assert job.unfinished(folder, {"error": None}) == "no output"
    (folder / "m").write_bytes(b"wrong")
    assert "not the right one" in job.wrong(folder)
    (folder / "m").write_bytes(b"right")
    assert job.unfinished(folder, {"error": None}) is None
    (folder / ".m-partial").touch()
    assert "left behind" in job.unfinished(folder, {"error": None})
    source.write_bytes(b"t")
    assert "was changed" in job.wrong(folder)
    assert _unclear({"error": None}, job, folder) == "no error"
    reply = {"error": "OSError", "ours": False, "message": str(OSError(errno.EIO, "x"))}
    assert "not ours" in _unclear(reply, job, folder)
    reply = {"error": "OutputFailure", "ours": True, "message": "no"}
    assert "unclear" in _unclear(reply, job, folder)


def test_lost_blocks_are_not_of_the_finished_output(tmp_path, setting):
    for name in ("m", "n"):
        (tmp_path / name).write_bytes(b"\1" * 20_000)
    kills._zero_blocks(tmp_path, "m", setting.rng("x"))
    assert (tmp_path / "m").read_bytes() == b"\1" * 20_000
    assert 0 in (tmp_path / "n").read_bytes()
