"""What a calibration keeps for a run that goes on: only what is whole counts."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

import torch

from sketchconv.calibration.kept import kept_metadata, read_json, save_tensors, write_json
from sketchconv.calibration.state import BlockResult, CalibrationState, WeightResult
from sketchconv.calibration.teacher import Teacher
from sketchconv.errors import CalibrationError, OutputError

TENSORS = {"b": torch.arange(6).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
RESULT = BlockResult("0" * 64, (WeightResult("w", 0.5, None, ("x",)),), {"v": "why"})


def test_a_file_is_taken_again_as_it_was_saved(tmp_path):
    save_tensors(tmp_path / "t.safetensors", TENSORS, {"k": "v"})
    assert kept_metadata(tmp_path / "t.safetensors") == {"k": "v"}
    write_json(tmp_path / "t.json", {"a": [1]})
    assert read_json(tmp_path / "t.json") == {"a": [1]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.safetensors"]


def test_no_byte_of_a_file_can_change_unseen(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, TENSORS, {"k": "v"})
    good = path.read_bytes()
    begin = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(8, begin, 7), *range(begin, len(good))]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        # Spaces that end a header say nothing.
        assert kept_metadata(path) is None or good[at : at + 1] == b" "
    path.write_bytes(good[:-1])
    assert kept_metadata(path) is None
    assert kept_metadata(tmp_path / "missing") is None


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "null"])
def test_what_is_no_object_is_none(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    assert read_json(tmp_path / "t.json") is None


def test_a_damaged_block_is_not_done(tmp_path):
    def opened():
        return CalibrationState(tmp_path / "m.sktch", {"a": 1})

    opened().save(0, TENSORS, RESULT)
    state = opened()
    assert state.done(0)
    assert state.result(0) == RESULT
    path = state.file(0)
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    state = opened()
    assert not state.done(0)
    with pytest.raises(CalibrationError, match="block-00000"):
        state.result(0)
    other = json.dumps({"weights": [{}]})
    save_tensors(path, TENSORS, {"results": other})
    assert not opened().done(0)


def test_a_run_that_died_before_its_first_file_was_whole_is_no_obstacle(tmp_path):
    folder = tmp_path / "m.sktch.calibration"
    folder.mkdir()
    (folder / "calibration.unfinished").write_text("{")
    assert not CalibrationState(tmp_path / "m.sktch", {"a": 1}).done(0)


def test_hidden_states_that_were_lost_are_not_done(tmp_path):
    windows = torch.zeros(2, 4, dtype=torch.int64)
    teacher = Teacher(tmp_path, windows)
    teacher.write(0, torch.ones(2, 4, 3))
    teacher.finish()
    assert Teacher(tmp_path, windows).done
    assert torch.equal(Teacher(tmp_path, windows).hidden().float(), torch.ones(2, 4, 3))
    assert not Teacher(tmp_path, windows + 1).done
    (tmp_path / "teacher.hidden").write_bytes(bytes(2 * 4 * 3 * 2))
    assert not Teacher(tmp_path, windows).done


def test_a_disk_that_fails_is_an_error_that_names_the_file(tmp_path):
    folder = tmp_path / "gone"
    with pytest.raises(OutputError, match=r"t\.safetensors"):
        save_tensors(folder / "t.safetensors", TENSORS, {})
    with pytest.raises(OutputError, match=r"t\.json"):
        write_json(folder / "t.json", {})
