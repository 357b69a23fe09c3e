"""What is trained, in which form, and with which gradient."""

from __future__ import annotations

import copy

import pytest
import torch

import sketchconv
from sketchconv.errors import TuningError
from sketchconv.kernels import plain
from sketchconv.tuning.masters import (
    finish_lut_training,
    rounded_luts,
    training_of,
    tuned_luts,
)
from sketchconv.tuning.optimizer import LutAdamW, lut_optimizer

IDS = torch.arange(24).view(2, 12) + 6


def loss(model, ids=IDS):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def ours_of(model):
    return training_of(model).masters


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_only_luts_are_trainable_and_they_are_float32(tiny):
    model = sketchconv.load(tiny)
    before = state(model)
    assert sketchconv.prepare_for_lut_training(model) is model
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    linears = [n for n in before if n.endswith("proj.sketch_lut")]
    assert sorted(trained) == sorted(linears)
    assert len(linears) == 14
    assert {p.dtype for p in trained.values()} == {torch.float32}
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name].to(tensor.dtype), tensor)
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable


def test_names_are_those_of_the_document(tiny):
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    assert set(tuned_luts(model)) == set(model.hf_quantizer.manifest.sketches)


@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_gradient_of_an_entry_against_the_dense_weight(tiny, gradient):
    """Sum or mean over the weights that share it; an entry that none shares has none."""
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny), gradient=gradient)
    for _ in range(2):  # accumulated, as a hook on the gradient must allow
        loss(model).backward()
    twin = sketchconv.load(tiny).dequantize(torch.float32).requires_grad_(True)
    loss(twin).backward()
    path = "model.layers.1.mlp.down_proj"
    module, dense = model.get_submodule(path), twin.get_submodule(path).weight.grad
    codes = plain.unpack(module.disk_index(), module.bits, module.columns // module.groups).long()
    total = torch.zeros(module.sketch_lut.shape)
    total.scatter_add_(2, codes, dense.view(codes.shape))
    count = torch.zeros(module.sketch_lut.shape).scatter_add_(2, codes, torch.ones(codes.shape))
    assert (count == 0).any()
    expected = 2 * (total if gradient == "sum" else total / count.clamp(min=1))
    found = module.sketch_lut.grad
    assert (found[count == 0] == 0).all()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_embeddings_and_head_on_request(makers, tmp_path):
    path = makers.write(makers.dense(), tmp_path / "all.sktch", everything=True)
    usual = sketchconv.prepare_for_lut_training(sketchconv.load(path))
    names = set(tuned_luts(usual))
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & names
    head = sketchconv.prepare_for_lut_training(sketchconv.load(path), head=True)
    assert set(tuned_luts(head)) == names | {"lm_head.weight"}
    both = sketchconv.prepare_for_lut_training(sketchconv.load(path), head=True, embeddings=True)
    assert set(tuned_luts(both)) == names | {"lm_head.weight", "model.embed_tokens.weight"}
    loss(both).backward()
    for master in training_of(both).masters:
        assert float(master.parameter.grad.abs().max()) > 0


def test_a_tied_head_follows_the_embedding(makers, tmp_path):
    dense = makers.dense(tie_word_embeddings=True)
    path = makers.write(dense, tmp_path / "tied.sktch", everything=True)
    tied = {"lm_head.weight", "model.embed_tokens.weight"}
    with_head = sketchconv.prepare_for_lut_training(sketchconv.load(path), head=True)
    assert not tied & set(tuned_luts(with_head))
    model = sketchconv.prepare_for_lut_training(sketchconv.load(path), embeddings=True)
    assert len(tied & set(tuned_luts(model))) == 1
    loss(model).backward()
    assert all(float(m.parameter.grad.abs().max()) > 0 for m in training_of(model).masters)


def test_refusals(tiny, makers):
    model = sketchconv.load(tiny)
    with pytest.raises(TuningError, match="mean or sum"):
        sketchconv.prepare_for_lut_training(model, gradient="max")
    with pytest.raises(TuningError, match="not prepared"):
        tuned_luts(model)
    sketchconv.prepare_for_lut_training(model)
    with pytest.raises(TuningError, match="prepared already"):
        sketchconv.prepare_for_lut_training(model)
    with pytest.raises(TuningError, match="no sketched layer"):
        sketchconv.prepare_for_lut_training(makers.dense())


def test_a_shaped_sketch_is_refused_by_name(makers, tmp_path):
    folder = tmp_path / "dense"
    makers.dense(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    recipe = sketchconv.Recipe()
    spec = type(recipe.default)(bits=4, grid="affine")
    path = tmp_path / "shaped.sktch"
    sketchconv.convert(folder, path, sketchconv.Recipe(default=spec, weighting="equal"))
    with pytest.raises(TuningError, match=r"q_proj is a shaped sketch.*without --grid"):
        sketchconv.prepare_for_lut_training(sketchconv.load(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_once_at_the_end(makers, tmp_path, dtype):
    path = makers.write(makers.dense(), tmp_path / "lut.sktch", lut=dtype)
    model = sketchconv.prepare_for_lut_training(sketchconv.load(path))
    masters = training_of(model).masters
    with torch.no_grad():
        for master in masters:
            master.parameter.mul_(1 + 1e-6)
    exact = [m.parameter.detach().clone() for m in masters]
    with rounded_luts(model):
        for master, values in zip(masters, exact, strict=True):
            assert torch.equal(master.parameter, values.to(dtype).float())
    assert all(torch.equal(m.parameter, v) for m, v in zip(masters, exact, strict=True))
    luts = tuned_luts(model)
    finish_lut_training(model)
    for master, values in zip(masters, exact, strict=True):
        assert luts[master.name].dtype is dtype
        assert torch.equal(luts[master.name], values.to(dtype))
        assert torch.equal(master.module.sketch_lut, values.to(dtype))
    assert not any(p.requires_grad for p in model.parameters())
    sketchconv.prepare_for_lut_training(model)  # and again


def test_a_lut_beyond_its_dtype_is_refused(tiny):
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    with torch.no_grad():
        training_of(model).masters[3].parameter[0, 0, 0] = 1e6
    with pytest.raises(TuningError, match=r"proj\.weight.*not finite in torch\.float16"):
        tuned_luts(model)


def test_a_copy_is_trained_by_itself(tiny):
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    twin = copy.deepcopy(model)
    optimizer = lut_optimizer(twin, 1e-2)
    loss(twin).backward()
    optimizer.step()
    first = sketchconv.load(tiny).state_dict()
    assert all(torch.equal(v.to(first[n].dtype), first[n]) for n, v in model.state_dict().items())
    assert not torch.equal(
        training_of(twin).masters[0].parameter, training_of(model).masters[0].parameter
    )


def test_steps_are_shares_of_the_size_of_a_group(tiny):
    """Adam's first step is its learning rate, whatever the gradient."""
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    masters = training_of(model).masters
    before = [m.parameter.detach().clone() for m in masters]
    optimizer = lut_optimizer(model, 1e-2)
    loss(model).backward()
    optimizer.step()
    for master, former in zip(masters, before, strict=True):
        moved = (master.parameter.detach() - former).abs() / master.unit
        touched = master.parameter.grad.abs() > 1e-9
        assert torch.allclose(moved[touched], torch.tensor(1e-2), rtol=2e-2)
        assert (moved[master.parameter.grad == 0] == 0).all()


def test_absolute_steps_are_adamw(tiny):
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    twin = copy.deepcopy(model)
    ours = lut_optimizer(model, 1e-3, relative=False, cautious=False)
    trained = [m.parameter for m in training_of(twin).masters]
    theirs = torch.optim.AdamW(trained, 1e-3, eps=1e-12, weight_decay=0.0)
    for _ in range(3):
        gradients = torch.autograd.grad(loss(model), [m.parameter for m in ours_of(model)])
        for network in (model, twin):
            for master, gradient in zip(ours_of(network), gradients, strict=True):
                master.parameter.grad = gradient.clone()
        ours.step()
        theirs.step()
    for mine, other in zip(training_of(model).masters, trained, strict=True):
        assert torch.equal(mine.parameter, other)


@pytest.mark.parametrize("relative", [True, False])
def test_a_cautious_step_never_climbs(tiny, relative):
    """Its moves are those of AdamW where they go down this gradient, stretched by their share."""
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    twin = copy.deepcopy(model)
    ours = lut_optimizer(model, 1e-2, relative=relative)
    theirs = lut_optimizer(twin, 1e-2, relative=relative, cautious=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        pairs = list(zip(training_of(model).masters, training_of(twin).masters, strict=True))
        before = []
        for mine, other in pairs:
            noise = torch.randn(mine.parameter.shape, generator=generator)
            mine.parameter.grad, other.parameter.grad = noise, noise.clone()
            other.parameter.data.copy_(mine.parameter.data)
            before.append(mine.parameter.detach().clone())
        ours.step()
        theirs.step()
        for (mine, other), former in zip(pairs, before, strict=True):
            moved = mine.parameter.detach() - former
            plain = other.parameter.detach() - former
            down = plain * mine.parameter.grad < 0
            assert bool(down.all()) is (step == 0)
            assert (moved[~down] == 0).all()
            expected = plain / down.float().mean()
            assert torch.allclose(moved[down], expected[down], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_gradient_changes_nothing(tiny, value):
    model = sketchconv.prepare_for_lut_training(sketchconv.load(tiny))
    optimizer = LutAdamW(training_of(model).masters, 1e-2)
    before = state(model)
    loss(model).backward()
    training_of(model).masters[5].parameter.grad[0, 0, 1] = value
    optimizer.step()
    assert optimizer.broken
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
