"""Mixtures of experts: one tensor per matrix on disk, or stacks; without data and calibrated."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import sketchconv
from sketchconv.calibration.mixtures import in_passes, same_routes, with_siblings
from sketchconv.calibration.options import Calibration
from sketchconv.calibration.stages import Group, Stage
from sketchconv.errors import ArchitectureError, LoadError, PlanError
from sketchconv.export.dense import export_dense
from sketchconv.formats.reader import SktchModel
from sketchconv.recipe import Override, Recipe, SketchSpec
from sketchconv.runtime.experts import Experts
from sketchconv.runtime.modules import SketchLinear
from sketchconv.verify import verify

MIXTURES = ["mixtral", "qwen3_moe", "qwen2_moe"]
FORMS = [(kind, stacked) for kind in MIXTURES for stacked in (False, True)]


def recipe(bits=3, **changes):
    return Recipe(SketchSpec(bits), **changes)


def calibration(text, **changes):
    given = {"tokens": 1024, "seq_len": 64, "device": "cpu", "recover": 0, **changes}
    return Calibration((str(text),), **given)


def dense_of(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def shapes(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {
            k: (file.get_slice(k).get_shape(), file.get_slice(k).get_dtype())
            for k in file.keys()  # noqa: SIM118
        }


@pytest.fixture(scope="module")
def mixtral(families, tmp_path_factory):
    """A bundle of Mixtral."""
    out = tmp_path_factory.mktemp("mixtral") / "tiny.sktch"
    sketchconv.convert(families("mixtral"), out, recipe())
    return out


@pytest.mark.parametrize(("kind", "stacked"), FORMS)
def test_in_and_out_again(families, kind, stacked, ids, tmp_path):
    source, out = families(kind, stacked=stacked), tmp_path / "tiny.sktch"
    report = sketchconv.convert(source, out, recipe())
    assert report.plan.coverage.fraction == 1
    assert not verify(out, against=str(source)).findings
    export_dense(out, tmp_path / "dense")
    assert shapes(tmp_path / "dense") == shapes(source)
    model, dense = sketchconv.load(out), dense_of(tmp_path / "dense")
    with torch.no_grad():
        wanted, found, before = (m(ids).logits for m in (dense, model, dense_of(source)))
    assert torch.allclose(wanted, found, atol=2e-5 * float(wanted.abs().max()))
    assert (wanted - before).abs().max() > 0.01
    model.save_pretrained(tmp_path / "saved")
    assert not verify(tmp_path / "saved", against=str(source)).findings
    assert torch.equal(sketchconv.load(tmp_path / "saved")(ids).logits, found)
    model.dequantize().save_pretrained(tmp_path / "plain")
    assert torch.allclose(dense_of(tmp_path / "plain")(ids).logits, wanted, atol=1e-5)


def test_eager_experts_compute_the_same(families, mixtral, ids, tmp_path):
    """Not only the implementation that transformers takes by default."""
    export_dense(mixtral, tmp_path / "dense")
    dense = dense_of(tmp_path / "dense", experts_implementation="eager")
    with torch.no_grad():
        wanted, found = dense(ids).logits, sketchconv.load(mixtral)(ids).logits
    assert torch.allclose(wanted, found, atol=2e-5 * float(wanted.abs().max()))


def test_routers_stay_dense(families, tmp_path):
    plan = sketchconv.convert(families("qwen2_moe"), tmp_path / "q.sktch", recipe()).plan
    fates = {step.name: step.action for step in plan.steps}
    assert fates["model.layers.1.mlp.gate.weight"] == "copy"
    assert fates["model.layers.1.mlp.shared_expert_gate.weight"] == "copy"
    assert fates["model.layers.1.mlp.shared_expert.up_proj.weight"] == "sketch"
    assert fates["model.layers.1.mlp.experts.3.up_proj.weight"] == "sketch"
    assert fates["model.layers.0.mlp.up_proj.weight"] == "sketch"


def test_only_experts_that_are_hit_run(mixtral):
    experts = sketchconv.load(mixtral).model.layers[0].mlp.experts
    ran = []
    for path, module in experts.named_modules():
        if isinstance(module, SketchLinear):
            module.register_forward_pre_hook(lambda _m, x, p=path: ran.append((p, len(x[0]))))
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    experts(x, torch.tensor([[2, 0], [0, 4], [4, 2]]), weights)  # 4 stands for no expert
    assert ran == [(f"{n}.{w}", 2) for n in (0, 2) for w in ("w1", "w3", "w2")]


def test_a_route_to_no_expert_adds_nothing(mixtral):
    experts = sketchconv.load(mixtral).model.layers[0].mlp.experts
    x, weights = torch.randn(5, 64), torch.rand(5, 2)
    index = torch.randint(0, 4, (5, 2))
    full = experts(x, index, weights)
    parts = [experts(x, torch.stack([index[:, k], torch.full((5,), 4)], 1), weights[:, [k, k]])
             for k in range(2)]  # fmt: skip
    assert torch.allclose(full, parts[0] + parts[1], atol=1e-5)
    assert not experts(x, torch.full((5, 2), 4), weights).any()
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, 64)


def test_generate_and_other_classes(mixtral, ids):
    from transformers import AutoConfig  # noqa: F401

    model = sketchconv.load(mixtral)
    made = model.generate(ids[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 16)
    body = sketchconv.load(mixtral, AutoModel)
    assert isinstance(body.layers[1].mlp.experts, Experts)
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_luts_of_experts_can_be_trained(mixtral, ids):
    model = sketchconv.load(mixtral)
    luts = {n: p for n, p in model.named_parameters() if n.endswith("sketch_lut")}
    for lut in luts.values():
        lut.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    hit = [n for n, p in luts.items() if "experts" in n and p.grad is not None]
    assert hit
    assert all(luts[n].grad.abs().sum() > 0 for n in hit)
    # The gradient of one entry, by differences.
    name = hit[0]
    at = luts[name].grad.abs().flatten().argmax()
    lut = luts[name]
    lost = []
    with torch.no_grad():
        wide = lut.float()
        for step in (0.02, -0.02):
            changed = wide.clone()
            changed.view(-1)[at] += step
            lut.copy_(changed)
            lost.append(float(model(ids, labels=ids).loss))
    slope = (lost[0] - lost[1]) / 0.04
    assert slope == pytest.approx(float(lut.grad.flatten()[at]), rel=0.1)


def test_experts_are_sketched_all_or_none(families, tmp_path):
    """One expert kept dense: transformers fuses those of its layer, so all of them stay."""
    for stacked, name in ((False, "*layers.0*experts.1.w1"), (True, "*0.mlp*experts.1.down_proj")):
        source = families("mixtral", stacked=stacked)
        out = tmp_path / f"{stacked}.sktch"
        report = sketchconv.convert(source, out, recipe(exclude=(name,)))
        kept = [s for s in report.plan.steps if s.action == "copy" and "experts" in s.name]
        assert len(kept) == (2 if stacked else 12)
        assert all("layers.0" in step.name for step in kept)
        assert any("all or none" in step.reason for step in kept)
        assert not verify(out, against=str(source)).findings
        model = sketchconv.load(out)
        assert not isinstance(model.model.layers[0].mlp.experts, Experts)
        assert isinstance(model.model.layers[1].mlp.experts, Experts)
        export_dense(out, tmp_path / f"dense-{stacked}")
        assert shapes(tmp_path / f"dense-{stacked}") == shapes(source)
        x = torch.randint(3, 200, (1, 9))
        wanted = dense_of(tmp_path / f"dense-{stacked}")(x).logits
        assert torch.allclose(model(x).logits, wanted, atol=1e-4)


def test_bits_of_single_experts(families, tmp_path):
    bits = Override("*experts.0.down_proj", bits=6)
    out = tmp_path / "m.sktch"
    sketchconv.convert(families("qwen3_moe", stacked=True), out, recipe(2, overrides=(bits,)))
    experts = sketchconv.load(out).model.layers[1].mlp.experts
    assert [experts.linear(n, "down").bits for n in range(4)] == [6, 2, 2, 2]
    with pytest.raises(PlanError, match="names no tensor"):
        sketchconv.convert(
            families("qwen3_moe"), tmp_path / "n.sktch", recipe(exclude=("*experts.9.*",))
        )


@pytest.mark.parametrize("stacked", [False, True])
def test_a_missing_expert_is_found_out(families, stacked, tmp_path):
    folder = families.make("mixtral", tmp_path / "m", stacked=stacked)
    state = load_file(folder / "model.safetensors")
    if stacked:
        state["model.layers.0.mlp.experts.down_proj"] = state[
            "model.layers.0.mlp.experts.down_proj"
        ][:3].contiguous()
    else:
        del state["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArchitectureError, match=r"layers\.0\.mlp\.experts"):
        sketchconv.convert(folder, tmp_path / "m.sktch", recipe())


def test_a_sketch_that_lacks_an_expert_is_not_loaded(mixtral, families, tmp_path):
    sketchconv.convert(families("mixtral"), tmp_path / "m", recipe())
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["num_local_experts"] = 5
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError):
        sketchconv.load(tmp_path / "m")


@pytest.mark.parametrize("stacked", [False, True])
def test_plain_transformers_does_not_load_it_quietly(families, stacked, tmp_path):
    sketchconv.convert(families("mixtral", stacked=stacked), tmp_path / "m", recipe())
    config = json.loads((tmp_path / "m/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_experts_of_another_structure_are_refused_by_name(tmp_path):
    """GPT-OSS's are transposed, interleaved and have biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
        vocab_size=260,
        pad_token_id=None,
        eos_token_id=2,
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path / "m")
    with pytest.raises(PlanError, match=r"model\.layers\.0\.mlp\.experts\.\w+: part of a module"):
        sketchconv.convert(tmp_path / "m", tmp_path / "m.sktch", recipe())


@pytest.mark.parametrize(("kind", "stacked"), [("mixtral", True), ("qwen2_moe", False)])
def test_calibration_reaches_every_expert(families, kind, stacked, text, tmp_path):
    """Experts with few tokens are left to k-means, and named; all others come closer."""
    source = families(kind, stacked=stacked)
    fitted, plain = tmp_path / "fitted.sktch", tmp_path / "plain.sktch"
    report = sketchconv.convert(source, fitted, recipe(2), calibration=calibration(text), threads=1)
    sketchconv.convert(source, plain, recipe(2))
    found = {w.name for w in report.calibration.weights} | set(report.calibration.skipped)
    with SktchModel.open(fitted) as model:
        assert found == set(model.manifest.sketches)
    done = [w for w in report.calibration.weights if "experts" in w.name]
    assert len(done) >= 6
    assert all(w.error is not None for w in done)
    assert not verify(fitted, against=str(source)).findings
    from sketchconv.runtime.load import load_tokenizer

    ids = torch.tensor(load_tokenizer(fitted)(text.read_text()[:3200])["input_ids"]).view(-1, 64)
    with torch.no_grad():
        wanted = dense_of(source)(ids).logits
        lost = [(sketchconv.load(p)(ids).logits - wanted).square().mean() for p in (plain, fitted)]
    assert lost[1] < 0.8 * lost[0]


def test_experts_with_too_few_tokens_fall_back_and_are_named(families, text, tmp_path):
    given = calibration(text, tokens=96, seq_len=32)
    source, out = families("mixtral"), tmp_path / "m.sktch"
    report = sketchconv.convert(source, out, recipe(2), calibration=given, threads=1).calibration
    few = {n: why for n, why in report.skipped.items() if "experts" in n}
    assert few
    assert all("calibration tokens reached it" in why for why in few.values())
    assert f"{len(report.skipped)} weights not calibrated" in report.notes[0]
    assert any(next(iter(few)) in note for note in report.notes)
    assert not verify(out, against=str(source)).findings
    # What fell back has the bytes of the conversion without data.
    plain = tmp_path / "plain.sktch"
    sketchconv.convert(source, plain, recipe(2))
    with SktchModel.open(out) as ours, SktchModel.open(plain) as theirs:
        for name in few:
            index = ours.manifest.sketches[name].index_name
            assert ours.manifest.digests[index] == theirs.manifest.digests[index]


def test_a_broken_off_calibration_goes_on(families, text, tmp_path):
    """Experts that fell back are the same in the blocks that are only run through again."""

    def stop(event):
        if event.name.startswith("block 2/2"):
            raise KeyboardInterrupt

    given = calibration(text, tokens=192, seq_len=32)
    source, whole, again = families("mixtral"), tmp_path / "whole.sktch", tmp_path / "again.sktch"
    report = sketchconv.convert(source, whole, recipe(2), calibration=given, threads=1)
    assert any("layers.0.block_sparse_moe" in name for name in report.calibration.skipped)
    assert any("layers.1.block_sparse_moe" in w.name for w in report.calibration.weights)
    with pytest.raises(KeyboardInterrupt):
        sketchconv.convert(source, again, recipe(2), calibration=given, threads=1, progress=stop)
    assert not again.exists()
    sketchconv.convert(source, again, recipe(2), calibration=given, threads=1)
    assert whole.read_bytes() == again.read_bytes()


def test_recovery_trains_experts(families, text, tmp_path):
    given = calibration(text, recover=2048)
    report = sketchconv.convert(
        families("mixtral"), tmp_path / "m.sktch", recipe(2), calibration=given, threads=1
    )
    recovery = report.calibration.recovery
    assert recovery.after <= recovery.before
    assert not verify(tmp_path / "m.sktch", against=str(families("mixtral"))).findings


def test_passes_hold_no_more_sums_than_they_may():
    stage = Stage(tuple(Group((f"e.{n}.up", f"e.{n}.gate"), {}) for n in range(7)))
    sizes = dict.fromkeys((p for g in stage.groups for p in g.linears), (8, 100))
    cut = in_passes([stage], sizes, limit=3 * 12 * 100**2)
    assert [len(s.groups) for s in cut] == [3, 3, 1]
    assert tuple(g for s in cut for g in s.groups) == stage.groups
    assert len(in_passes([stage], sizes, limit=1)) == 7


def test_experts_that_the_sample_missed_get_the_groups_of_the_others():
    seen = [Stage((Group(("q",), {}),)), Stage((Group(("m.e.1.up", "m.e.1.gate"), {}),))]
    stages, left = with_siblings(seen, ["m.e.0.gate", "m.e.0.up", "m.e.12.up", "other"])
    assert stages[0] == seen[0]
    assert [g.linears for g in stages[1].groups] == [
        ("m.e.1.up", "m.e.1.gate"),
        ("m.e.0.up", "m.e.0.gate"),
    ]
    assert left == ["m.e.12.up", "other"]


def test_the_dense_block_routes_as_the_compressed_one_did(mixtral):
    """So that both show an expert the same tokens, in the same order."""
    first, second = (sketchconv.load(mixtral).model.layers[0] for _ in range(2))
    seen = {}
    for key, block in (("a", first), ("b", second)):
        block.mlp.experts.linear(1, "gate").register_forward_pre_hook(
            lambda _m, x, k=key: seen.setdefault(k, x[0].clone())
        )
    hidden = torch.randn(1, 30, 64)
    other = hidden + 1e-3 * torch.randn_like(hidden)
    experts = Stage((Group(("mlp.experts.1.w1",), {}),))
    with torch.no_grad():
        second.mlp.gate.weight.neg_()  # it would route otherwise
        with same_routes(first, second, experts):
            first.mlp(hidden), second.mlp(other)
    assert seen["a"].shape == seen["b"].shape
    assert (seen["a"] - seen["b"]).abs().max() < 0.01
    seen.clear()
    with torch.no_grad(), same_routes(first, second, Stage((Group(("self_attn.q_proj",), {}),))):
        first.mlp(hidden), second.mlp(other)
    assert seen["a"].shape != seen["b"].shape
