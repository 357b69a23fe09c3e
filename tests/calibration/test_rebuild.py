"""Recovery block by block, as a part of the calibration."""

from __future__ import annotations

import hashlib

import pytest
import torch

import sketchconv
from sketchconv.calibration.options import Calibration
from sketchconv.errors import RecipeError
from sketchconv.formats.reader import SktchModel
from sketchconv.recipe import Recipe, SketchSpec


def convert(source, out, text, *, by="blocks", recover=1024, max_memory=None, **changes):
    given = {"tokens": 512, "seq_len": 32, "device": "cpu", "recover": recover, "recover_by": by}
    return sketchconv.convert(
        source,
        out,
        Recipe(SketchSpec(bits=2), exclude=("*.0.*.k_proj",)),
        calibration=Calibration(str(text), **{**given, **changes.pop("calibration", {})}),
        threads=1,
        max_memory=max_memory,
        **changes,
    )


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def rebuilt(llama, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("rebuilt") / "tiny.sktch"
    return out, convert(llama, out, text)


def last_hidden(path, ids):
    with torch.no_grad():
        return sketchconv.load(path, dtype="float32").model(ids).last_hidden_state


def test_blocks_are_nearer_to_the_dense_ones(rebuilt, llama, text, tmp_path):
    from transformers import AutoModelForCausalLM

    out, report = rebuilt
    recovery = report.calibration.recovery
    assert recovery.measure == "error"
    assert recovery.kept
    assert recovery.after < recovery.before
    assert recovery.note.startswith("block by block, better in")
    plain = tmp_path / "plain.sktch"
    convert(llama, plain, text, recover=0)
    assert out.stat().st_size - plain.stat().st_size < 512
    ids = torch.tensor([list(text.read_bytes()[-128:])]) - 10
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        wanted = dense.model(ids.clamp(0, 259)).last_hidden_state
    lost = [float((last_hidden(p, ids.clamp(0, 259)) - wanted).norm()) for p in (out, plain)]
    assert lost[0] < lost[1]
    assert not list(out.parent.glob("*.calibration"))


def test_a_sketch_that_was_rebuilt_is_valid(rebuilt):
    from sketchconv.verify import verify

    verify(rebuilt[0])
    with SktchModel.open(rebuilt[0]) as model:
        assert model.manifest.recipe["calibration"]["recover"] == 1024
        for record in model.manifest.sketches.values():
            assert torch.isfinite(torch.from_numpy(model.decode(record.name))).all()


def test_a_run_that_was_broken_off_gives_the_same_bytes(rebuilt, llama, text, tmp_path):
    class Broken(Exception):
        pass

    def stop(event):
        if "block 3/3" in event.name:
            raise Broken

    out = tmp_path / rebuilt[0].name
    with pytest.raises(Broken):
        convert(llama, out, text, progress=stop)
    report = convert(llama, out, text)
    assert digest(out) == digest(rebuilt[0])
    wanted = rebuilt[1].calibration.recovery
    assert report.calibration.recovery.after == wanted.after


def test_it_is_chosen_where_the_whole_model_does_not_fit(llama, text, tmp_path, monkeypatch):
    report = convert(llama, tmp_path / "whole.sktch", text, by="auto", recover=256)
    assert report.calibration.recovery.measure == "kl"
    monkeypatch.setattr("sketchconv.calibration.needs.training_memory", lambda *_: 1 << 50)
    report = convert(llama, tmp_path / "blocks.sktch", text, by="auto", recover=256)
    assert report.calibration.recovery.measure == "error"
    report = convert(llama, tmp_path / "model.sktch", text, by="model", recover=256)
    assert report.calibration.recovery.measure == "kl"


def test_hidden_states_beyond_the_limit_go_to_disk_and_change_nothing(
    rebuilt, llama, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("sketchconv.calibration.run._HIDDEN_IN_MEMORY", 0)
    out = tmp_path / rebuilt[0].name
    convert(llama, out, text)
    assert digest(out) == digest(rebuilt[0])


def test_an_encoder_too(bert, text, tmp_path):
    report = sketchconv.convert(
        bert,
        tmp_path / "bert.sktch",
        Recipe(SketchSpec(bits=2)),
        calibration=Calibration(
            str(text), tokens=512, seq_len=32, device="cpu", recover=512, recover_by="blocks"
        ),
        threads=1,
    )
    assert report.calibration.recovery.after <= report.calibration.recovery.before


def test_no_such_way():
    with pytest.raises(RecipeError, match="recover_by must be one of auto, model, blocks"):
        Calibration(recover_by="magic")
