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


class Broken(Exception):
    pass


def stop(event):
    if "block 3/3" in event.name:
        raise Broken


@pytest.mark.parametrize(("free", "measure"), [(1 << 50, "kl"), (1 << 10, "error")])
def test_a_run_that_goes_on_recovers_as_it_began_whatever_is_free_then(
    llama, text, tmp_path, monkeypatch, free, measure
):
    def set_free(size):
        monkeypatch.setattr("sketchconv.calibration.needs.free_bytes", lambda _: size)

    set_free(free)
    whole = tmp_path / "whole" / "tiny.sktch"
    whole.parent.mkdir()
    convert(llama, whole, text, by="auto", recover=256)
    out = tmp_path / "tiny.sktch"
    with pytest.raises(Broken):
        convert(llama, out, text, by="auto", recover=256, progress=stop)
    set_free((1 << 60) // free)
    report = convert(llama, out, text, by="auto", recover=256)
    assert report.calibration.recovery.measure == measure
    assert digest(out) == digest(whole)
    fresh = convert(llama, tmp_path / "fresh.sktch", text, by="auto", recover=256)
    assert fresh.calibration.recovery.measure != measure


@pytest.mark.parametrize("by", ["blocks", "model", "auto"])
def test_too_few_windows_to_recover_on_are_told_and_nothing_is_lost(llama, text, tmp_path, by):
    out = tmp_path / "tiny.sktch"
    report = convert(llama, out, text, by=by, recover=28)
    assert report.calibration.recovery.note == (
        "not run: it needs 2 windows of 32 tokens, to train on and to measure, and has 1; take "
        "--recover 29 or more"
    )
    assert out.exists()
    report = convert(llama, out.with_name("more.sktch"), text, by=by, recover=29)
    assert report.calibration.recovery.before is not None


def test_a_text_of_one_short_window_is_too_short_to_recover_on(llama, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z")
    changes = {"calibration": {"tokens": None}}
    report = convert(llama, tmp_path / "tiny.sktch", short, recover=4096, **changes)
    assert report.calibration.recovery.note.endswith("has 1; take a longer text")


@pytest.mark.parametrize(
    ("recover", "said"), [(0, "--recover is 0"), (None, "only sketches of 3 bits and fewer")]
)
def test_a_way_to_recover_without_a_recovery_is_told(llama, text, tmp_path, recover, said):
    asked = Calibration(
        str(text), tokens=512, seq_len=32, device="cpu", recover=recover, recover_by="blocks"
    )
    out = tmp_path / "tiny.sktch"
    report = sketchconv.convert(llama, out, Recipe(SketchSpec(bits=4)), calibration=asked)
    note = report.calibration.recovery.note
    assert note.startswith("not run: --recover-by blocks was given, but ")
    assert said in note
    assert note.endswith("pass --recover 32768")


@pytest.mark.parametrize("by", ["blocks", "model"])
def test_the_limit_decides_whether_decoded_weights_are_kept(llama, text, tmp_path, monkeypatch, by):
    limits = []

    def fit(modules, dtype, limit):
        limits.append(limit)
        return True

    monkeypatch.setattr("sketchconv.recovery.loop.weights_fit", fit)
    convert(llama, tmp_path / "tiny.sktch", text, by=by, recover=256, max_memory=1 << 40)
    assert set(limits) == {1 << 40}


def test_no_such_way():
    with pytest.raises(RecipeError, match="recover_by must be one of auto, model, blocks"):
        Calibration(recover_by="magic")
