"""Self-distillation of whole tiny models, and of single blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sketchconv.recovery import blockwise, train
from sketchconv.recovery import student as student_module
from sketchconv.recovery.blockwise import reconstruct
from sketchconv.recovery.options import RecoveryOptions
from sketchconv.recovery.room import free_bytes, usual_bytes, weights_fit
from sketchconv.recovery.train import RecoveryError, recover
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear
from sketchconv.runtime.tied import TiedSketchLinear

QUICK = RecoveryOptions(learning_rate=0.03, tokens=96 * 10, step_tokens=96)


@pytest.fixture(autouse=True, params=[torch.float32])
def working(request, monkeypatch):
    """The same dtype on every machine."""
    for module in (train, blockwise):
        monkeypatch.setattr(module, "working_dtype", lambda _: request.param)
    return request.param


def divergence(dense, student, windows):
    with torch.no_grad():
        wanted = torch.log_softmax(dense(windows).logits.double(), -1)
        found = torch.log_softmax(student(windows).logits.double(), -1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def luts(model):
    return [m.sketch_lut for m in model.modules() if isinstance(m, SketchLinear)]


@pytest.mark.parametrize("working", [torch.float32, torch.bfloat16], indirect=True)
@pytest.mark.parametrize("cache", [True, False])
def test_the_divergence_falls_and_is_what_is_reported(tiny, lesson, cache):
    dense, windows, hidden = lesson
    student = tiny.sketched(dense)
    before, held_out = tiny.state(student), windows[-2:]
    expected = divergence(dense, student, held_out)
    result = recover(
        student, windows, hidden, None, dataclasses.replace(QUICK, cache_weights=cache)
    )
    assert result.kept
    assert result.steps == 10
    assert result.tokens == 960
    assert result.held_out_tokens == 48
    assert result.kl_before == pytest.approx(expected, rel=0.1)
    assert result.kl_after < 0.7 * result.kl_before
    assert divergence(dense, student, held_out) == pytest.approx(result.kl_after, rel=0.1)
    after = tiny.state(student)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(name.endswith(("sketch_lut", "sketch_index")) for name in changed)
    for lut in luts(student):
        assert lut.dtype is torch.float16
        assert (lut[..., 1:] >= lut[..., :-1]).all()


def test_the_same_again(tiny, lesson):
    dense, windows, hidden = lesson
    results = []
    for seed in (1, 1, 2):
        student = tiny.sketched(dense)
        options = dataclasses.replace(QUICK, seed=seed)
        recover(student, windows, hidden, None, options)
        results.append(tiny.state(student))
    assert tiny.same(results[0], results[1])
    assert not tiny.same(results[0], results[2])


def test_never_worse(tiny, lesson):
    dense, windows, hidden = lesson
    student = tiny.sketched(dense, bits=3)
    before = tiny.state(student)
    options = dataclasses.replace(QUICK, learning_rate=1.0)
    result = recover(student, windows, hidden, None, options)
    assert not result.kept
    assert result.kl_after == result.kl_before
    assert "did not fall" in result.note
    assert tiny.same(tiny.state(student), before)


@pytest.mark.parametrize("rows", [slice(0, 18), slice(18, 20)])
def test_nan_in_the_dense_states_changes_nothing(tiny, lesson, rows):
    dense, windows, hidden = lesson
    student, broken = tiny.sketched(dense), hidden.clone()
    broken[rows, 0, 0] = float("nan")
    before = tiny.state(student)
    result = recover(student, windows, broken, None, QUICK)
    assert not result.kept
    assert "not finite" in result.note
    assert tiny.same(tiny.state(student), before)


def test_an_error_in_the_middle_leaves_the_model_as_it_was(tiny, lesson):
    dense, windows, hidden = lesson
    student = tiny.sketched(dense).train()
    student.model.norm.weight.requires_grad_(True)
    before, flags = tiny.state(student), [p.requires_grad for p in student.parameters()]

    def stop(event):
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(student, windows, hidden, None, QUICK, stop)
    assert tiny.same(tiny.state(student), before)
    assert [p.requires_grad for p in student.parameters()] == flags
    assert all(module.training for module in student.modules())
    assert not any("forward" in vars(module) for module in student.modules())


def test_events(tiny, lesson):
    dense, windows, hidden = lesson
    events = []
    options = dataclasses.replace(QUICK, checks=2)
    result = recover(tiny.sketched(dense), windows, hidden, None, options, events.append)
    assert [event.step for event in events] == list(range(1, 11))
    assert {event.steps for event in events} == {10}
    checked = [event.held_out for event in events if event.held_out is not None]
    assert len(checked) == 2
    assert result.kl_after == min(checked)


def test_a_dense_head_beside_the_students_own(tiny, lesson):
    dense, windows, hidden = lesson
    student = tiny.sketched(dense)
    student.lm_head = tiny.linear(student.lm_head, 3, 1, torch.float16)
    own = student.lm_head.sketch_lut.detach().clone()
    head = dense.lm_head.weight.detach()
    expected = divergence(dense, student, windows[-2:])
    result = recover(student, windows, hidden, head, QUICK)
    assert result.kl_before == pytest.approx(expected, rel=1e-3)
    assert result.kept
    assert torch.equal(student.lm_head.sketch_lut, own)


@pytest.mark.parametrize("working", [torch.float32, torch.bfloat16], indirect=True)
def test_sketched_embeddings_with_a_tied_head_stay(tiny, lesson):
    dense, windows, hidden = lesson
    head = dense.lm_head.weight.detach()
    student = tiny.sketched(dense)
    rows = tiny.linear(dense.lm_head, 3, 1, torch.float16)
    embedding = SketchEmbedding(151, 64, 3, lut_dtype=torch.float16).requires_grad_(False)
    embedding.sketch_index, embedding.sketch_lut.data = rows.sketch_index, rows.sketch_lut.data
    student.model.embed_tokens = embedding
    student.lm_head = TiedSketchLinear(embedding).requires_grad_(False)
    before = tiny.state(embedding)
    result = recover(student, windows, hidden, head, QUICK)
    assert result.kl_after < result.kl_before
    assert tiny.same(tiny.state(embedding), before)
    assert student.lm_head.dtype is torch.float32


def test_a_model_without_a_head_follows_its_hidden_states(tiny):
    dense = tiny.build("BertModel")
    windows = torch.randint(3, 90, (4, 20), generator=torch.Generator().manual_seed(4))
    windows = windows.repeat(4, 1)
    with torch.no_grad():
        hidden = dense(windows).last_hidden_state
    student = tiny.sketched(dense)
    result = recover(student, windows, hidden, None, QUICK)
    assert result.measure == "error"
    assert result.kept
    with torch.no_grad():
        off = student(windows[-2:]).last_hidden_state - hidden[-2:]
    expected = off.square().sum() / hidden[-2:].square().sum()
    assert result.kl_after == pytest.approx(float(expected), rel=0.01)


def test_soft_caps_and_scales_are_known(tiny):
    for kind, changes in (("Gemma2ForCausalLM", {"head_dim": 16}), ("CohereForCausalLM", {})):
        dense = tiny.build(kind, **changes)
        seen = student_module.Student(dense)
        head = seen.head(torch.float32)
        ids = torch.arange(5, 12).view(1, -1)
        with torch.no_grad():
            assert torch.allclose(head.logits(seen.hidden(ids)[0]), dense(ids).logits[0], atol=1e-4)


def test_logits_that_are_made_in_another_way_are_refused(tiny, lesson):
    _, windows, hidden = lesson
    student = tiny.sketched(lesson[0])
    student.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(RecoveryError, match="in a way that recovery does not know"):
        recover(student, windows, hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, h: (w[:1], h[:1]), "at least 2 rows"),
        (lambda w, h: (w.float(), h), "at least 2 rows"),
        (lambda w, h: (w, h[:, :5]), "hidden must be float"),
        (lambda w, h: (w, h.long()), "hidden must be float"),
        (lambda w, h: (w + 100, h), "another tokenizer"),
        (lambda w, h: (w - 100, h), "another tokenizer"),
        (lambda w, h: (w, h[..., :9]), "hidden states have 9 values"),
    ],
)
def test_inputs_that_do_not_fit(tiny, lesson, change, message):
    dense, windows, hidden = lesson
    with pytest.raises(RecoveryError, match=message):
        recover(tiny.sketched(dense), *change(windows, hidden))


def test_a_dense_model_has_nothing_to_train(lesson):
    with pytest.raises(RecoveryError, match="no sketched linear layer"):
        recover(*lesson)


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": -1.0}, {"tokens": 0}, {"betas": (0.9, 1.0)}, {"held_out": float("nan")}],
)
def test_options_out_of_range(options):
    with pytest.raises(RecoveryError, match="must be at least"):
        RecoveryOptions(**options)


def test_a_model_on_two_devices_is_refused(tiny, lesson):
    student = tiny.sketched(lesson[0])
    student.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(RecoveryError, match="must be on one device, it is on cpu, meta"):
        recover(student, *lesson[1:])


def test_the_rate_follows_bits_and_tokens():
    options = RecoveryOptions()
    assert options.rate(2, 256) > options.rate(3, 256) > options.rate(8, 256)
    assert options.rate(3, 1024) == pytest.approx(2 * options.rate(3, 256))
    assert RecoveryOptions(learning_rate=0.1).rate(3, 1024) == 0.1


def test_a_block_learns_its_outputs(tiny, lesson):
    dense, _, _ = lesson
    student = tiny.sketched(dense)
    x = torch.randn(4, 10, 64, generator=torch.Generator().manual_seed(1)).repeat(4, 1, 1)
    places = dense.model.rotary_emb(x, torch.arange(10).view(1, -1))

    def run(block, given):
        return block(given, position_embeddings=places)

    with torch.no_grad():
        wanted = run(dense.model.layers[1], x)
    block = student.model.layers[1]
    others = tiny.state(student.model.layers[0])
    result = reconstruct(block, x, wanted, run, dataclasses.replace(QUICK, step_tokens=20))
    assert result.kept
    assert result.measure == "error"
    assert result.kl_after < 0.9 * result.kl_before
    assert tiny.same(tiny.state(student.model.layers[0]), others)
    with pytest.raises(RecoveryError, match="at least 2 windows"):
        reconstruct(block, x[:1], wanted[:1], run)
    with pytest.raises(RecoveryError, match="no sketched linear layer"):
        reconstruct(dense.model.layers[1], x, wanted, run)


def test_room(tmp_path):
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 9 kB\nMemAvailable:    1000 kB\n")
    cpu = torch.device("cpu")
    assert free_bytes(cpu, path) == 1000 << 10
    assert free_bytes(cpu, tmp_path / "none") is None
    group = tmp_path / "memory.max"
    assert usual_bytes(path, group) == 9 << 9
    group.write_text("max\n")
    assert usual_bytes(path, group) == 9 << 9
    group.write_text("4096\n")
    assert usual_bytes(path, group) == 2048
    assert usual_bytes(tmp_path / "none", tmp_path / "none") is None


def test_decoded_weights_are_kept_by_what_the_machine_has_not_by_what_is_free(
    tiny, lesson, monkeypatch
):
    modules = [m for m in tiny.sketched(lesson[0]).modules() if isinstance(m, SketchLinear)]
    needed = 3 * 4 * sum(m.rows * m.columns for m in modules)
    assert not weights_fit([], torch.float32)
    for free in (1, 1 << 50):
        monkeypatch.setattr("sketchconv.recovery.room.free_bytes", lambda _, size=free: size)
        assert weights_fit(modules, torch.float32)
        assert weights_fit(modules, torch.float32, needed)
        assert not weights_fit(modules, torch.float32, needed - 1)
    monkeypatch.setattr("sketchconv.recovery.room.usual_bytes", lambda: needed - 1)
    assert not weights_fit(modules, torch.float32)
