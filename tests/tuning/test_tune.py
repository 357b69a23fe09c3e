"""`tune` from end to end on a tiny model: what it writes, and how it stops and goes on."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import sketchconv
from sketchconv.cli.main import cli
from sketchconv.cli.tune_progress import curve_text, show_tuning
from sketchconv.deltas import info, resolve
from sketchconv.errors import DeltaError, LoadError, OutputError, Suspended, TuningError
from sketchconv.formats.reader import SktchModel
from sketchconv.tuning.callbacks import Reporter
from sketchconv.tuning.options import TuneOptions, TuneStep
from sketchconv.tuning.plot import save_curve
from sketchconv.tuning.run import tune
from sketchconv.tuning.trainer import LutTrainer

QUICK = {
    "seq_len": 32,
    "batch_size": 4,
    "max_steps": 8,
    "eval_steps": 2,
    "learning_rate": 1e-2,
    "bf16": False,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quick(**changes):
    return TuneOptions(**{**QUICK, **changes})


def stopping_at(step, error=KeyboardInterrupt):
    def progress(event):
        if event.step == step and event.loss is not None:
            raise error

    return progress


def test_a_tuning(tiny, text_file, tmp_path):
    out = tmp_path / "task.sktch"
    before = tiny.read_bytes()
    result = tune(tiny, text_file, out, quick(), name="cats")
    assert result.loss_after < result.loss_before - 0.2
    assert result.steps == result.best_step == 8
    assert result.output_bytes == out.stat().st_size
    assert [e.step for e in result.curve if e.loss is not None] == list(range(1, 9))
    assert [e.step for e in result.curve if e.eval_loss is not None] == [0, 2, 4, 6, 8]
    losses = [e.loss for e in result.curve if e.loss is not None]
    assert losses[-1] < losses[0] - 0.2
    assert not (tmp_path / "task.sktch.tuning").exists()
    assert tiny.read_bytes() == before
    task = info(out).task
    assert task["name"] == "cats"
    assert task["data"] == "data.txt"
    assert task["steps"] == 8
    assert task["recipe"]["gradient"] == "sum"


def test_what_is_written_is_what_was_measured(tiny, text_file, tmp_path):
    """A model with the delta's tables gives the reported loss; only LUTs differ from the base."""
    out = tmp_path / "task.sktch"
    result = tune(tiny, text_file, out, quick(), eval_data=text_file)
    model = sketchconv.load(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    luts = resolve(out, tiny)
    with SktchModel.open(tiny) as sketch:
        assert set(luts) == set(sketch.manifest.sketches)
    for name, table in luts.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        assert table.dtype == "float16"
        module.sketch_lut.data = torch.from_numpy(table.copy())
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"{n.removesuffix('.weight')}.sketch_lut" for n in luts}
    trainer_loss = measured(model, text_file, tiny)
    assert trainer_loss == pytest.approx(result.loss_after, rel=1e-6)


def measured(model, path, tiny):
    """Mean loss over whole windows, in a plain loop."""
    ids = sketchconv.load_tokenizer(tiny)(path.read_text() + "</s>").input_ids
    total, count = 0.0, 0
    with torch.no_grad():
        for at in range(0, len(ids), QUICK["seq_len"]):
            window = torch.tensor([ids[at : at + QUICK["seq_len"]]])
            if window.shape[1] > 1:
                logits = model(input_ids=window).logits[0, :-1]
                total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:])) * len(
                    logits
                )
                count += len(logits)
    return total / count


def test_of_chats_only_assistant_turns_count_packed_or_not(tiny, tmp_path):
    """Against a plain loop over the tokens that the assistant says, each chat by itself."""
    data, tokenizer = tmp_path / "chats.jsonl", sketchconv.load_tokenizer(tiny)
    chats = [(f"say {n}", f"it is {n}{'!' * (n % 5)}") for n in range(12)]
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats
    ]
    data.write_text("\n".join(json.dumps({"messages": t}) for t in turns))
    model, total, count = sketchconv.load(tiny), 0.0, 0
    for question, answer in chats:
        prompt = tokenizer(f"<|user|>{question}<|end|><|assistant|>").input_ids
        ids = torch.tensor([prompt + tokenizer(f"{answer}<|end|>").input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        said = ids[0, len(prompt) :]
        total += float(torch.nn.functional.cross_entropy(logits, said, reduction="sum"))
        count += len(said)
    for packing in (True, False):
        options = quick(seq_len=80, packing=packing, max_steps=1)
        out = tmp_path / f"{packing}.sktch"
        result = tune(tiny, data, out, options, eval_data=data)
        assert result.eval_learned == result.learned == count
        assert (result.rows < 12) is packing
        assert result.loss_before == pytest.approx(total / count, rel=1e-6)
        first = next(e.loss for e in result.curve if e.step == 1)
        assert 2 < first < 6


def test_one_step_on_all_rows_is_the_same_packed_or_not(tiny, tmp_path):
    """The loss of a step over everything: the mean over all learned tokens."""
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": "abc " * (1 + n % 4)}) for n in range(12)))
    found = []
    for packing, batch in ((True, 4), (False, 12), (False, 4)):
        options = quick(packing=packing, batch_size=batch, max_steps=1, seq_len=40)
        options = replace(options, gradient_accumulation=12 // batch)
        out = tmp_path / f"{packing}{batch}.sktch"
        result = tune(tiny, data, out, options, eval_data=data)
        found.append(next(e.loss for e in result.curve if e.loss is not None))
    assert found[1] == pytest.approx(found[2], rel=1e-6)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize(("accumulation", "optimizer"), [(1, "muon"), (2, "adamw")])
def test_resumed_equals_uninterrupted(makers, text_file, tmp_path, accumulation, optimizer):
    """Bit for bit, with dropout and shuffling, on one thread."""
    tiny = makers.write(makers.dense(attention_dropout=0.1), tmp_path / "dropout.sktch")
    options = quick(
        gradient_accumulation=accumulation, batch_size=4 // accumulation, optimizer=optimizer
    )
    whole = tune(tiny, text_file, tmp_path / "whole.sktch", options)
    parts = tmp_path / "parts.sktch"
    with pytest.raises(Suspended, match=r"checkpoint-4 is kept: run .* --resume"):
        tune(tiny, text_file, parts, options, progress=stopping_at(6))
    assert not parts.exists()
    assert not list(tmp_path.rglob("*.pt*")), "no pickle"
    with pytest.raises(TuningError, match=r"unfinished tuning \(checkpoint-4\).*--resume"):
        tune(tiny, text_file, parts, options)
    with pytest.raises(TuningError, match=r"another setting \(learning_rate 0\.01 -> 0\.02\)"):
        tune(tiny, text_file, parts, replace(options, learning_rate=2e-2), resume=True)
    second = tune(tiny, text_file, parts, options, resume=True)
    ours, theirs = resolve(parts, tiny), resolve(tmp_path / "whole.sktch", tiny)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert parts.read_bytes() == (tmp_path / "whole.sktch").read_bytes()
    facts = [(e.step, e.loss, e.eval_loss) for e in second.curve]
    assert facts == [(e.step, e.loss, e.eval_loss) for e in whole.curve]


def test_a_delta_that_could_not_be_written_is_written_on_resumption(
    tiny, text_file, tmp_path, monkeypatch
):
    """Training had ended: no further step is made."""
    whole, out = tmp_path / "whole.sktch", tmp_path / "task.sktch"
    first = tune(tiny, text_file, whole, quick())

    def full(*_, **__):
        raise OutputError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("sketchconv.tuning.run.create", full)
        with pytest.raises(OutputError, match="no space left"):
            tune(tiny, text_file, out, quick())
    second = tune(tiny, text_file, out, quick(), resume=True)
    assert second.steps == first.steps
    assert [e.step for e in second.curve] == [e.step for e in first.curve]
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("step", [0, 1])
def test_an_interrupt_before_the_first_checkpoint_leaves_nothing(tiny, text_file, tmp_path, step):
    def progress(event):
        if event.step == step:
            raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt) as caught:
        tune(tiny, text_file, tmp_path / "task.sktch", quick(), progress=progress)
    assert type(caught.value) is KeyboardInterrupt
    assert set(tmp_path.iterdir()) == before


def test_two_tunings_to_one_output(tiny, text_file, tmp_path):
    out, alone = tmp_path / "task.sktch", tmp_path / "alone.sktch"
    tune(tiny, text_file, alone, quick())
    refused = []

    def second(event):
        if event.step == 1 and event.loss is not None:
            for more in ({}, {"force": True}, {"resume": True}):
                with pytest.raises(OutputError, match="another process is writing") as caught:
                    tune(tiny, text_file, out, quick(seed=1), **more)
                refused.append(caught)

    tune(tiny, text_file, out, quick(), progress=second)
    assert len(refused) == 3
    assert out.read_bytes() == alone.read_bytes()
    assert not list(tmp_path.glob("*.tuning"))


@pytest.fixture
def soon_best(tmp_path):
    """Options and a held-out text of other letters, so that the best checkpoint is an early one."""
    other = tmp_path / "other.txt"
    other.write_text("0123456789 " * 12)
    return quick(learning_rate=3e-2, warmup=0, max_steps=24, patience=0), other


@pytest.mark.parametrize("ended", [False, True])
def test_a_folder_that_was_moved_is_resumed_to_the_same_bytes(
    tiny, text_file, tmp_path, monkeypatch, soon_best, ended
):
    """The best checkpoint is not the last one, and its old path is gone."""
    options, other = soon_best
    alone, there = tmp_path / "alone.sktch", tmp_path / "there"
    first = tune(tiny, text_file, alone, options, eval_data=other)
    assert 0 < first.best_step < 20, "the case to be tested"
    there.mkdir()
    with monkeypatch.context() as patch:
        if ended:
            patch.setattr("sketchconv.tuning.run.create", stopping_at_once)
        stop = None if ended else stopping_at(21)
        with pytest.raises(Suspended):
            tune(tiny, text_file, there / "a.sktch", options, eval_data=other, progress=stop)
    moved = tmp_path / "moved"
    there.rename(moved)
    tune(tiny, text_file, moved / "a.sktch", options, eval_data=other, resume=True)
    assert (moved / "a.sktch").read_bytes() == alone.read_bytes()


def stopping_at_once(*_, **__):
    raise KeyboardInterrupt


def test_a_missing_best_checkpoint_is_named(tiny, text_file, tmp_path, soon_best):
    (options, other), out = soon_best, tmp_path / "a.sktch"
    with pytest.raises(Suspended):
        tune(tiny, text_file, out, options, eval_data=other, progress=stopping_at(21))
    folder = tmp_path / "a.sktch.tuning"
    state = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())
    shutil.rmtree(state["best_model_checkpoint"])
    with pytest.raises(TuningError, match="the best checkpoint is missing"):
        tune(tiny, text_file, out, options, eval_data=other, resume=True)


def test_an_interrupt_while_the_delta_is_written_keeps_the_checkpoints(
    tiny, text_file, tmp_path, monkeypatch
):
    out = tmp_path / "task.sktch"
    with monkeypatch.context() as patch:
        patch.setattr("sketchconv.tuning.run.create", stopping_at_once)
        with pytest.raises(Suspended, match=r"checkpoint-8 is kept: run .* --resume"):
            tune(tiny, text_file, out, quick())
    assert tune(tiny, text_file, out, quick(), resume=True).steps == 8


def test_what_could_not_be_written_is_refused_before_the_training(tiny, text_file, tmp_path):
    def trained(_event):
        pytest.fail("trained")

    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "letter").write_text("dear")
    before = tiny.read_bytes()
    cases = [(folder, {}, "not a folder that sketchconv wrote"), (tiny, {}, "a source")]
    cases += [(text_file, {}, "a source")]
    for out, more, match in cases:
        with pytest.raises(OutputError, match=match):
            tune(tiny, text_file, out, quick(), force=True, progress=trained, **more)
    with pytest.raises(DeltaError, match="surrogate"):
        tune(tiny, text_file, tmp_path / "t.sktch", quick(), name="caf\udce9", progress=trained)
    assert tiny.read_bytes() == before
    assert not list(tmp_path.glob("*.tuning"))


def test_nothing_to_resume(tiny, text_file, tmp_path):
    with pytest.raises(TuningError, match="no checkpoint to resume from"):
        tune(tiny, text_file, tmp_path / "task.sktch", quick(), resume=True)


def test_early_stop_keeps_the_best(tiny, text_file, tmp_path):
    """Held-out text of other letters: what is learned first helps, what comes later does not."""
    other = tmp_path / "other.txt"
    other.write_text("0123456789 " * 12)
    options = quick(learning_rate=3e-2, warmup=0, max_steps=60, patience=2)
    result = tune(tiny, text_file, tmp_path / "task.sktch", options, eval_data=other)
    losses = [e.eval_loss for e in result.curve[1:] if e.eval_loss is not None]
    assert result.steps < 60
    assert result.loss_after == min(losses)
    assert result.best_step == 2 * (1 + losses.index(min(losses)))
    assert losses[-1] >= losses[-3]
    assert any("stopped early" in note for note in result.notes)


def test_a_loss_that_does_not_fall_is_told(tiny, text_file, tmp_path):
    options = quick(learning_rate=1.0, warmup=0, max_steps=2)
    result = tune(tiny, text_file, tmp_path / "task.sktch", options)
    assert any("did not fall" in note for note in result.notes) is (
        result.loss_after >= result.loss_before
    )


def test_schedules(tiny, text_file, tmp_path):
    """Rates of steps after the warm-up: down by as much each time, or as a cosine."""
    rates = {}
    for name in ("linear", "cosine"):
        options = quick(schedule=name, warmup=0, max_steps=4, learning_rate=0.01)
        result = tune(tiny, text_file, tmp_path / f"{name}.sktch", options)
        rates[name] = [event.learning_rate for event in result.curve if event.loss is not None]
    assert rates["linear"] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    shares = [0.005 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates["cosine"] == pytest.approx(shares)


def broken_after(step, monkeypatch):
    """A gradient of NaN from this step on."""
    whole = LutTrainer.training_step

    def training_step(self, *args, **kwargs):
        loss = whole(self, *args, **kwargs)
        if self.state.global_step >= step:
            self.training.masters[0].parameter.grad[0, 0, 0] = math.nan
        return loss

    monkeypatch.setattr(LutTrainer, "training_step", training_step)


def test_a_broken_gradient_stops_with_the_last_good_state(tiny, text_file, tmp_path, monkeypatch):
    broken_after(5, monkeypatch)
    out = tmp_path / "task.sktch"
    result = tune(tiny, text_file, out, quick())
    assert result.steps == 6
    assert result.best_step == 4 or result.best_step == 6  # LUTs after five good steps
    assert math.isfinite(result.loss_after)
    assert result.loss_after < result.loss_before
    assert "stopped at step 6: a gradient was not finite" in result.notes
    assert out.exists()


def test_broken_from_the_start_writes_nothing(tiny, text_file, tmp_path, monkeypatch):
    broken_after(0, monkeypatch)
    out = tmp_path / "task.sktch"
    with pytest.raises(TuningError, match=r"training gave no LUTs to keep.*Nothing was written"):
        tune(tiny, text_file, out, quick())
    assert not out.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient": "mean"},
        {"optimizer": "muon", "learning_rate": 5e-2},
        {"activation_checkpointing": True},
        {"bf16": True},
        {"packing": False},
        {"relative": False, "learning_rate": 1e-3},
        {"gradient_accumulation": 2, "max_steps": None, "epochs": 1},
    ],
    ids=lambda c: next(iter(c)),
)
def test_options_run_and_learn(tiny, text_file, tmp_path, changes):
    result = tune(tiny, text_file, tmp_path / "task", quick(**changes))
    assert result.loss_after < result.loss_before
    assert (tmp_path / "task" / "sketch_adapter.safetensors").exists()


def test_activation_checkpointing_changes_no_bit(tiny, text_file, tmp_path):
    for name, flag in (("a", False), ("b", True)):
        options = quick(activation_checkpointing=flag)
        tune(tiny, text_file, tmp_path / f"{name}.sktch", options)
    ours, theirs = (resolve(tmp_path / f"{n}.sktch", tiny) for n in "ab")
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be at least"),
        ({"learning_rate": math.nan}, "learning_rate must be at least"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"gradient": "max"}, "gradient must be mean or sum"),
        ({"optimizer": "sgd"}, "optimizer must be adamw or muon"),
        ({"device": "tpu"}, "device must be"),
        ({"schedule": "step"}, "schedule must be linear or cosine, got 'step'"),
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"seed": 2**32}, "seed must be at least 0 and at most 4294967295"),
    ],
)
def test_bad_options(changes, match):
    with pytest.raises(TuningError, match=match):
        quick(**changes)


def test_models_that_predict_no_next_token(makers, text_file, tmp_path):
    changes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    bert = makers.write(makers.dense("BertForMaskedLM", **changes), tmp_path / "bert.sktch")
    with pytest.raises(TuningError, match=r"bert\.sktch.*no causal language model"):
        tune(bert, text_file, tmp_path / "task.sktch", quick())


def test_rows_longer_than_the_model_knows(makers, text_file, tmp_path):
    learned = makers.dense("GPT2LMHeadModel", n_embd=32, n_layer=1, n_head=4, n_positions=256)
    base = makers.write(learned, tmp_path / "gpt2.sktch")
    with pytest.raises(TuningError, match="knows 256 positions, --seq-len is 300"):
        tune(base, text_file, tmp_path / "task.sktch", quick(seq_len=300))


def test_bad_places(tiny, text_file, tmp_path, makers):
    out = tmp_path / "task.sktch"
    with pytest.raises(LoadError, match="no such file"):
        tune(tmp_path / "none.sktch", text_file, out, quick())
    with pytest.raises(TuningError, match="no such file"):
        tune(tiny, tmp_path / "none.txt", out, quick())
    with pytest.raises(OutputError, match="no such folder"):
        tune(tiny, text_file, tmp_path / "none" / "task.sktch", quick())
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists; give --force"):
        tune(tiny, text_file, out, quick())
    assert out.read_text() == "mine"


def test_the_command(tiny, text_file, tmp_path):
    out = tmp_path / "task.sktch"
    words = (
        f"--max-steps 4 --seq-len 32 --batch-size 2 --learning-rate 1e-2 --no-bf16 --output {out}"
    )
    arguments = ["tune", str(tiny), "--data", str(text_file), *words.split()]
    done = CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False)
    assert done.exception is None, done.output
    found = json.loads(done.stdout)
    assert found["steps"] == 4
    assert found["perplexity_after"] < found["perplexity_before"]
    assert "held-out loss" in done.stderr
    again = CliRunner().invoke(cli, [*arguments, "--force", "--quiet"])
    assert "Delta written" in again.stdout
    assert again.stderr == ""
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 1
    assert "give --force" in refused.stderr


def test_the_curve_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    reporter = Reporter(None)
    state = type("State", (), {"global_step": 0, "max_steps": 2})()
    for step, logs in ((0, {"eval_loss": 3.0}), (1, {"loss": 2.5}), (2, {"eval_loss": 2.0})):
        state.global_step = step
        reporter.on_log(None, state, None, logs)
    for name in ("a.png", "b.png"):
        save_curve(reporter.curve, tmp_path / name)
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert data.startswith(b"\x89PNG")


def test_a_picture_is_refused_early(tiny, text_file, tmp_path):
    words = (
        f"--max-steps 1 --seq-len 32 --output {tmp_path / 'o.sktch'} --plot {tmp_path / 'c.gif'}"
    )
    done = CliRunner().invoke(cli, ["tune", str(tiny), "--data", str(text_file), *words.split()])
    assert done.exit_code == 1
    assert not (tmp_path / "o.sktch").exists()


def test_the_curve_as_text():
    assert curve_text([]) == ""
    assert curve_text([1.0, 1.0]) == "▁▁"
    assert curve_text([2.0, 1.0, 0.0, 1.0], width=4)[0] == "█"
    assert len(curve_text(list(range(1000)), width=40)) == 40


def test_the_live_curve(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with show_tuning(quiet=False) as progress:
        progress(TuneStep(0, 0, None, 3.0, None, 0.0))
        progress(TuneStep(1, 2, 2.5, None, 1e-3, 1.0))
        progress(TuneStep(2, 2, None, 2.0, None, 2.0))
    with show_tuning(quiet=True) as progress:
        assert progress is None


def test_lines_for_logs(capsys):
    with show_tuning(quiet=False) as progress:
        for step in range(1, 21):
            progress(TuneStep(step, 20, 2.5, None, 1e-3, float(step)))
        progress(TuneStep(20, 20, None, 2.0, None, 20.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "step 20/20  held-out loss 2.0000  20 s"
    assert len(lines) == 5
