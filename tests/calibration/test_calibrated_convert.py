"""The calibrated conversion on tiny models: what it writes, what it refuses, how it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import pytest
import torch

import sketchconv
from sketchconv.calibration.heads import final_hidden
from sketchconv.calibration.inputs import load_tokenizer
from sketchconv.calibration.options import Calibration
from sketchconv.calibration.setting import make_setting
from sketchconv.calibration.streams import Streams
from sketchconv.calibration.windows import text_windows
from sketchconv.errors import CalibrationError, OutputError, RecipeError
from sketchconv.formats.reader import SktchModel
from sketchconv.job import prepare
from sketchconv.memory import anonymous_bytes
from sketchconv.recipe import Override, Recipe, SketchSpec

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def options(*texts, **changes):
    given = {"tokens": 512, "seq_len": 32, "device": "cpu", "recover": 0, **changes}
    return Calibration(tuple(map(str, texts)), **given)


def recipe(bits=2, **changes):
    return Recipe(default=SketchSpec(bits=bits), **changes)


def convert(source, out, text, recipe=recipe(), progress=None, max_memory=None, **changes):  # noqa: B008
    return sketchconv.convert(
        source,
        out,
        recipe,
        calibration=options(text, **changes),
        threads=1,
        progress=progress,
        max_memory=max_memory,
    )


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(llama, text, tmp_path_factory):
    """A 2-bit sketch of the Llama made in one go, and its report."""
    out = tmp_path_factory.mktemp("whole") / "tiny.sktch"
    return out, convert(llama, out, text)


def job_source(folder):
    from sketchconv.sources.open import open_source

    return open_source(str(folder))


def final_error(path, llama, ids):
    """Mean squared error of the logits against the dense model's, over that of their variance."""
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        wanted, found = dense(ids).logits, sketchconv.load(path)(ids).logits
    return float((wanted - found).square().mean() / wanted.var())


def test_it_is_better_than_without_data_and_as_large(whole, llama, text, tmp_path):
    out, report = whole
    plain = tmp_path / "plain.sktch"
    sketchconv.convert(llama, plain, recipe())
    ids = text_windows(
        str(text), load_tokenizer(job_source(llama)), (64, 64), 32, seed=9, vocabulary=260
    ).gathered
    assert final_error(out, llama, ids) < 0.8 * final_error(plain, llama, ids)
    assert abs(out.stat().st_size - plain.stat().st_size) < 4096
    calibration = report.calibration
    assert calibration.method == "sketch"
    assert calibration.blocks == 3
    assert calibration.tokens == 512
    assert calibration.skipped == {}
    assert len(calibration.weights) == 21
    assert json.dumps(report.to_json())
    assert not list(out.parent.glob("*.calibration"))


def test_the_document_says_how_it_was_calibrated(whole, text):
    with SktchModel.open(whole[0]) as model:
        assert model.manifest.recipe["calibration"] == {
            "method": "sketch",
            "texts": [text.name],
            "tokens": 512,
            "seq_len": 32,
            "seed": 0,
            "recover": 0,
        }


def test_errors_in_the_document_are_those_of_the_decoded_weights(whole, llama):
    from safetensors.torch import load_file

    dense = load_file(llama / "model.safetensors")[Q_PROJ].double()
    with SktchModel.open(whole[0]) as model:
        decoded = torch.from_numpy(model.decode(Q_PROJ)).double()
        error = model.manifest.errors[Q_PROJ]
    assert error == pytest.approx(float((dense - decoded).norm() / dense.norm()), rel=1e-6)


def test_the_same_input_gives_the_same_bytes(whole, llama, text, tmp_path):
    again = tmp_path / whole[0].name
    convert(llama, again, text)
    assert digest(again) == digest(whole[0])


class Broken(Exception):
    pass


def broken_off(source, out, text, after, **changes):
    """Run until `after` blocks are done, then fail."""

    def progress(event):
        if event.action == "calibrate" and f"block {after + 1}/" in event.name:
            raise Broken

    with pytest.raises(Broken):
        convert(source, out, text, progress=progress, **changes)


def test_a_run_that_was_broken_off_goes_on_and_gives_the_same_bytes(whole, llama, text, tmp_path):
    out = tmp_path / whole[0].name
    broken_off(llama, out, text, after=2)
    state = tmp_path / (out.name + ".calibration")
    assert sorted(p.name for p in state.glob("block-*")) == [
        "block-00000.safetensors",
        "block-00001.safetensors",
    ]
    assert not out.exists()
    said = []
    convert(llama, out, text, progress=lambda event: said.append(event.name))
    assert [s for s in said if "done before" in s] == [
        "block 1/3: done before",
        "block 2/3: done before",
    ]
    assert digest(out) == digest(whole[0])
    assert not state.exists()


def test_weights_that_the_sample_missed_are_the_same_when_a_run_goes_on(
    llama, text, tmp_path, monkeypatch
):
    from sketchconv.calibration.stages import find_stages

    def misses(block, call, hidden, linears):
        stages, unseen = find_stages(
            block, call, hidden, [p for p in linears if p != "mlp.down_proj"]
        )
        return stages, [*unseen, "mlp.down_proj"]

    monkeypatch.setattr("sketchconv.calibration.block.find_stages", misses)
    first, second = tmp_path / "a" / "tiny.sktch", tmp_path / "b" / "tiny.sktch"
    for path in (first, second):
        path.parent.mkdir()
    report = convert(llama, first, text)
    assert len(report.calibration.skipped) == 3
    broken_off(llama, second, text, after=2)
    convert(llama, second, text)
    assert digest(second) == digest(first)


def test_a_disk_that_is_too_small_is_told_before_the_work(llama, text, tmp_path, monkeypatch):
    class Disk:
        f_bavail, f_frsize = 1, 1000

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    said = []
    with pytest.raises(OutputError, match=r"bytes needed, 1000 free, \d+ missing"):
        convert(llama, tmp_path / "m.sktch", text, progress=lambda event: said.append(event))
    assert not said
    assert not any(tmp_path.iterdir())


def test_the_state_of_another_calibration_is_refused_by_name(llama, text, tmp_path):
    out = tmp_path / "tiny.sktch"
    broken_off(llama, out, text, after=1)
    with pytest.raises(CalibrationError, match=r"tiny.sktch.calibration.*different: text"):
        convert(llama, out, text, seed=5)
    with pytest.raises(CalibrationError, match="different: sketches"):
        convert(llama, out, text, recipe(3))
    with pytest.raises(CalibrationError, match="different: method"):
        convert(llama, out, text, method="gptq")


def test_a_folder_that_is_no_state_is_left_alone(llama, text, tmp_path):
    folder = tmp_path / "tiny.sktch.calibration"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear diary")
    with pytest.raises(CalibrationError, match="in the way"):
        convert(llama, tmp_path / "tiny.sktch", text)
    assert (folder / "diary.txt").read_text() == "dear diary"


def test_recipes_by_pattern_and_excluded_weights(llama, text, tmp_path):
    out = tmp_path / "tiny.sktch"
    overrides = (Override("*.down_proj", bits=4, groups=2), Override("*.0.*.k_proj", action="copy"))
    report = convert(llama, out, text, recipe(2, overrides=overrides, embed_bits=4))
    with SktchModel.open(out) as model:
        records = model.manifest.sketches
    assert records["model.layers.1.mlp.down_proj.weight"].groups == 2
    assert "model.layers.0.self_attn.k_proj.weight" not in records
    assert "model.embed_tokens.weight" in records
    names = {weight.name for weight in report.calibration.weights}
    assert names == set(records) - {"model.embed_tokens.weight"}


@pytest.mark.parametrize("method", ["gptq", "kmeans"])
def test_other_methods(llama, text, tmp_path, method):
    report = convert(llama, tmp_path / "tiny.sktch", text, method=method)
    assert report.calibration.method == method


def test_a_method_that_looks_at_no_data_needs_no_text(llama, tmp_path):
    out = tmp_path / "tiny.sktch"
    report = sketchconv.convert(llama, out, recipe(), calibration=Calibration(method="rtn"))
    assert report.calibration is None
    with SktchModel.open(out) as model:
        assert model.manifest.recipe["calibration"]["method"] == "rtn"
    with pytest.raises(RecipeError, match="sketch needs a text"):
        sketchconv.convert(llama, tmp_path / "other.sktch", calibration=Calibration())


def test_an_encoder(bert, text, tmp_path):
    out = tmp_path / "bert"
    report = convert(bert, out, text)
    assert report.calibration.blocks == 2
    assert report.calibration.skipped == {"pooler.dense.weight": "outside the blocks"}
    assert len(report.calibration.weights) == 12
    ids = torch.arange(97, 107).view(1, -1)
    assert sketchconv.load(out)(ids).last_hidden_state.isfinite().all()


def test_streams_are_the_models_own_hidden_states(llama, text, tmp_path):
    """The oracle is transformers: a run that sketches nothing must reproduce it."""
    from transformers import AutoModelForCausalLM

    job = prepare(llama, tmp_path / "tiny.sktch", recipe(), calibration=options(text))
    setting = make_setting(job, job.calibration, 0)
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        streams = Streams(setting, setting.windows.gathered, tmp_path, 1 << 30)
        for index in range(3):
            name = f"model.layers.{index}"
            setting.weights.fill(name)
            block = setting.weights.model.get_submodule(name)
            streams.advance(index, name, block, block)
            setting.weights.empty(name)
        found = torch.cat([hidden for _, hidden in final_hidden(streams)])
        wanted = dense.model(setting.windows.gathered).last_hidden_state
    job.source.close()
    assert torch.allclose(found, wanted, atol=1e-4)
    assert all(p.is_meta for p in setting.weights.model.parameters())


def test_hidden_states_on_disk_change_nothing(whole, llama, text, tmp_path, monkeypatch):
    monkeypatch.setattr("sketchconv.calibration.run._HIDDEN_IN_MEMORY", 0)
    seen = []

    def progress(event):
        seen.extend(p.name for p in tmp_path.glob("*.calibration/*.hidden"))

    out = tmp_path / whole[0].name
    convert(llama, out, text, progress=progress)
    names = {"dense.hidden", "compressed.hidden"}
    assert set(seen) == names | {f"kept-{name}" for name in names}
    assert digest(out) == digest(whole[0])


def test_recovery_keeps_the_size_and_is_never_worse(whole, llama, text, tmp_path):
    out = tmp_path / whole[0].name
    report = convert(llama, out, text, recover=1024)
    recovery = report.calibration.recovery
    assert recovery.tokens >= 1024
    assert recovery.after <= recovery.before
    assert recovery.kept == (recovery.after < recovery.before)
    assert (
        out.stat().st_size == whole[0].stat().st_size
        or abs(out.stat().st_size - whole[0].stat().st_size) <= 64
    )
    assert not list(tmp_path.glob("*.calibration"))


@pytest.mark.parametrize(
    ("bits", "overrides", "recovered"),
    [
        (4, (), False),
        (3, (), True),
        (4, (Override("*.mlp.*", bits=2),), True),
        (3, (Override("*.mlp.*", bits=4),), False),
        (2, (Override("*.down_proj", bits=5),), True),
    ],
)
def test_recovery_is_on_where_most_weights_have_few_bits(
    llama, text, tmp_path, bits, overrides, recovered
):
    asked = recipe(bits, overrides=overrides, embed_bits=8)
    default = dataclasses.replace(options(text), recover=None)
    job = prepare(llama, tmp_path / "tiny.sktch", asked, calibration=default)
    job.source.close()
    assert bool(default.recovery_tokens(job.plan.steps)) == recovered
    assert bool(job.draft.recipe["calibration"]["recover"]) == recovered
    assert options(text).recovery_tokens(job.plan.steps) == 0


@pytest.mark.parametrize("calibration", [{"method": "kmeans"}, {"text": "self"}])
def test_exact_and_a_method_of_its_own_do_not_go_together(llama, tmp_path, calibration):
    with pytest.raises(RecipeError, match="exact is about k-means alone"):
        prepare(
            llama,
            tmp_path / "tiny.sktch",
            recipe(exact=True),
            calibration=Calibration(**calibration),
        )


@pytest.mark.parametrize(
    ("texts", "begun", "kept"),
    [
        ("file", "embedding", None),
        ("file", "block 2/", "1 finished block is kept"),
        ("self", "embedding", "the text that the model wrote is kept"),
    ],
)
def test_an_interrupt_says_what_is_kept(llama, text, tmp_path, texts, begun, kept):
    def stop(progress):
        if progress.name.startswith(begun):
            raise KeyboardInterrupt

    out = tmp_path / "tiny.sktch"
    with pytest.raises(KeyboardInterrupt) as stopped:
        convert(llama, out, text if texts == "file" else "self", progress=stop)
    if kept is None:
        assert type(stopped.value) is KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []
    else:
        assert str(stopped.value).startswith(f"{kept}: run the same command again")
        assert [path.name for path in tmp_path.iterdir()] == ["tiny.sktch.calibration"]


def test_windows_longer_than_learned_positions_are_refused(saved, text, tmp_path):
    source = saved("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=128)
    with pytest.raises(CalibrationError, match="positions for 128"):
        convert(source, tmp_path / "tiny.sktch", text, seq_len=256)
    assert not (tmp_path / "tiny.sktch").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "longest"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}, 96),
        ("RobertaForMaskedLM", {**TINY, "max_position_embeddings": 66}, 64),
        ("LlamaForCausalLM", {**TINY, "max_position_embeddings": 80}, 80),
    ],
)
def test_windows_are_as_long_as_the_model_is_made_for(
    saved, text, tmp_path, kind, changes, longest
):
    out = tmp_path / "tiny.sktch"
    convert(saved(kind, **changes), out, text, method="gptq", seq_len=None)
    with SktchModel.open(out) as model:
        assert model.manifest.recipe["calibration"]["seq_len"] == longest


def test_windows_longer_than_the_context_of_a_rotary_model(llama, text, tmp_path):
    out = tmp_path / "tiny.sktch"  # 128 positions
    convert(llama, out, text, method="gptq", seq_len=256)
    assert out.exists()


def test_no_such_device(llama, text, tmp_path):
    for device in ("cuda:77", "gpu", "mps"):
        with pytest.raises(CalibrationError, match=f"--device {device}"):
            convert(llama, tmp_path / "tiny.sktch", text, device=device)


def test_activations_that_overflow_are_named(fresh_llama, text, tmp_path):
    from safetensors.torch import load_file, save_file

    path = fresh_llama / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.post_attention_layernorm.weight"] *= 1e30
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.gate_proj: NaN or inf"):
        convert(fresh_llama, tmp_path / "tiny.sktch", text)
    assert not (tmp_path / "tiny.sktch").exists()


def test_weights_that_changed_since_are_refused(fresh_llama, text, tmp_path):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "tiny.sktch"
    broken_off(fresh_llama, out, text, after=1)
    path = fresh_llama / "model.safetensors"
    before = path.stat()
    tensors = load_file(path)
    tensors[Q_PROJ][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match="different: files"):
        convert(fresh_llama, out, text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # and if nothing shows it
    with pytest.raises(CalibrationError, match="block 0 was made from other weights"):
        convert(fresh_llama, out, text)


def test_a_checkpoint_without_a_tokenizer_is_refused(fresh_llama, text, tmp_path):
    for path in fresh_llama.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CalibrationError, match="tokenizer cannot be opened"):
        convert(fresh_llama, tmp_path / "tiny.sktch", text)


def test_several_texts_give_equal_shares(llama, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("z" * 2000)
    job = prepare(llama, tmp_path / "tiny.sktch", recipe(), calibration=options(text))
    both = options(text, other, tokens=128)
    windows = make_setting(job, both, 112).windows
    job.source.close()
    for rows in (windows.gathered, windows.short):
        assert [len(set(row)) == 1 for row in rows.tolist()] == [False, True, False, True]


def test_the_recovery_gets_windows_of_its_own(llama, text, tmp_path):
    job = prepare(llama, tmp_path / "tiny.sktch", recipe(), calibration=options(text, tokens=128))
    windows = make_setting(job, job.calibration, 224).windows
    job.source.close()
    assert len(windows.gathered) == 4
    assert len(windows.short) == 8
    gathered, fresh = ({tuple(row) for row in part.tolist()} for part in
                       (windows.gathered, windows.short))  # fmt: skip
    assert not gathered & fresh


def test_a_memory_limit_that_is_too_low_is_refused_before_the_work(
    llama, text, tmp_path, monkeypatch
):
    monkeypatch.setattr("sketchconv.calibration.needs.BATCH_TOKENS", 1 << 20)
    with pytest.raises(CalibrationError, match=r"--max-memory .* too little to calibrate"):
        convert(llama, tmp_path / "tiny.sktch", text, max_memory=anonymous_bytes() + (90 << 20))
    assert list(tmp_path.iterdir()) == []


def test_text_that_the_model_writes_itself(llama, tmp_path):
    out = tmp_path / "tiny.sktch"
    report = convert(llama, out, "self", tokens=128)
    assert report.calibration.tokens == 128
    with SktchModel.open(out) as model:
        assert model.manifest.recipe["calibration"]["texts"] == ["self"]


def test_text_that_the_model_wrote_is_kept_for_a_run_that_goes_on(llama, tmp_path, monkeypatch):
    out, said = tmp_path / "tiny.sktch", []
    broken_off(llama, out, "self", after=1, tokens=128)
    kept = tmp_path / "tiny.sktch.calibration" / "written.safetensors"
    assert kept.exists()

    def never(*_, **__):
        raise AssertionError("written again")

    with monkeypatch.context() as patched:
        patched.setattr("sketchconv.calibration.self_written.self_written", never)
        convert(llama, out, "self", tokens=128, progress=lambda event: said.append(event.action))
    assert "write" not in said
    fresh = tmp_path / "fresh" / "tiny.sktch"
    fresh.parent.mkdir()
    events = []
    convert(llama, fresh, "self", tokens=128, progress=events.append)
    assert digest(fresh) == digest(out)
    written = [(e.done, e.total) for e in events if e.action == "write"]
    assert len(written) > 1
    assert written == sorted(written)
    assert written[-1][0] == written[-1][1]
    assert not kept.exists()


def test_text_of_another_seed_or_model_is_written_anew(tmp_path):
    from sketchconv.calibration.own_text import OwnText

    calls = []

    def write(tick):
        calls.append(1)
        tick(1, 1)
        return torch.full((2, 4), len(calls))

    folder, asked = tmp_path / "state", {"windows": 2, "seq_len": 4, "seed": 0}
    first = OwnText(folder, {"files": "a"})
    assert int(first.windows(asked, write)[0, 0]) == 1
    assert int(first.windows(asked, write)[0, 0]) == 1
    assert int(first.windows({**asked, "seed": 1}, write)[0, 0]) == 2
    assert int(OwnText(folder, {"files": "b"}).windows(asked, write)[0, 0]) == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "diary.txt").write_text("dear diary")
    with pytest.raises(CalibrationError, match="in the way"):
        OwnText(other, {"files": "a"}).windows(asked, write)


def test_the_dense_head_is_found_where_the_students_own_is_sketched(llama, text, tmp_path):
    from transformers import AutoModelForCausalLM

    from sketchconv.calibration.recovering import _dense_head

    out = tmp_path / "tiny.sktch"
    convert(llama, out, text, recipe(embed_bits=4))
    source, student = job_source(llama), sketchconv.load(out)
    found = _dense_head(source, student)
    dense = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    assert torch.equal(found, dense.lm_head.weight)
    assert _dense_head(source, dense) is None
    source.close()
