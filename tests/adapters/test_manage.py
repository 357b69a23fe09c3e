"""Adapters of a loaded sketch: loading, choosing, dropping, memory, what peft keeps."""

from __future__ import annotations

import pytest
import torch

import sketchconv
from sketchconv.adapters.base import base_of, is_sketch
from sketchconv.adapters.batch import BASE
from sketchconv.errors import AdapterError


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def test_the_last_loaded_adapter_is_active_until_another_is_chosen(model, luts, ids):
    base = logits(model, ids)
    assert model.active_adapters() == []
    done = model.load_adapter(luts(model, 1), "one")
    first = logits(model, ids)
    model.load_adapter(luts(model, 2), adapter_name="two")
    second = logits(model, ids)
    assert done.name == "one"
    assert model.active_adapters() == ["two"]
    assert not torch.allclose(first, base)
    assert not torch.allclose(second, first)
    model.set_adapter("one")
    assert torch.equal(logits(model, ids), first)
    model.set_adapter(["two"])
    assert torch.equal(logits(model, ids), second)
    model.disable_adapters()
    assert torch.equal(logits(model, ids), base)
    assert model.active_adapters() == ["two"]
    model.set_adapter("one")
    assert torch.equal(logits(model, ids), base)
    model.enable_adapters()
    assert torch.equal(logits(model, ids), first)
    model.delete_adapter("one")
    assert torch.equal(logits(model, ids), base)
    assert model.active_adapters() == []
    model.set_adapter("two")
    assert torch.equal(logits(model, ids), second)


def test_that_adapters_are_disabled_ends_with_the_last_of_them(model, luts, ids):
    for number, name in enumerate(("a", "b")):
        model.load_adapter(luts(model, number), name)
    base = logits(sketchconv.load(model.name_or_path), ids)
    model.disable_adapters()
    model.delete_adapter("a")
    model.load_adapter(luts(model, 2), "c")
    assert torch.equal(logits(model, ids), base)  # as in peft
    model.delete_adapter(["b", "c"])
    model.load_adapter(luts(model, 2), "d")
    assert model.active_adapters() == ["d"]
    found = logits(model, ids)
    assert not torch.allclose(found, base)
    model.enable_adapters()
    assert torch.equal(logits(model, ids), found)


def test_an_adapter_equals_a_base_with_its_luts(model, folder, luts, ids):
    given = luts(model, 3)
    twin = sketchconv.load(model.name_or_path)
    for name, lut in given.items():
        base_of(twin).module(twin, name).sketch_lut.data.copy_(lut)
    model.load_adapter(given)
    assert model.active_adapters() == ["default"]
    assert torch.equal(logits(model, ids), logits(twin, ids))


def test_what_is_given_is_copied_and_what_equals_the_base_is_shared(model, luts, ids):
    base = base_of(model)
    given = luts(model, 1, part=2)
    other = next(name for name in base.paths if name not in given)
    given[other] = base.module(model, other).sketch_lut.detach().clone()
    before = {name: base.module(model, name).sketch_lut for name in base.paths}
    done = model.load_adapter(given, "half")
    assert other not in done.weights
    assert done.nbytes == sum(given[name].nbytes for name in done.weights)
    for name in base.paths:
        shared = base.module(model, name).sketch_lut is before[name]
        assert shared == (name not in done.weights)
    expected = logits(model, ids)
    for lut in given.values():
        lut.zero_()
    assert torch.equal(logits(model, ids), expected)
    found = model.get_adapter_state_dict("half")
    assert sorted(found) == sorted(done.weights)


def test_arrays_are_taken_as_tensors_are(model, luts, ids):
    given = luts(model, 1)
    model.load_adapter(given, "tensors")
    expected = logits(model, ids)
    model.load_adapter({name: lut.numpy() for name, lut in given.items()}, "arrays")
    assert torch.equal(logits(model, ids), expected)


def test_bfloat16_luts_come_as_bits(folder, luts, ids):
    model = sketchconv.load(folder(lut=torch.bfloat16))
    given = luts(model, 1)
    model.load_adapter(given, "tensors")
    expected = logits(model, ids)
    bits = {name: lut.view(torch.uint16).numpy() for name, lut in given.items()}
    model.load_adapter(bits, "arrays")
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given, name: given.update({name: given[name].float()}), "float32"),
        (lambda given, name: given.update({name: given[name][:-1]}), "expected that of the base"),
        (lambda given, name: given[name].view(-1)[3:5].fill_(torch.nan), "2 values that are not"),
        (lambda given, name: given.update({"model.other.weight": given[name]}), "model.other"),
        (lambda given, name: given.update({name: [1.0]}), "is a list"),
        (lambda given, name: given.update({7: given[name]}), "key 7"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(model, luts, ids, change, message):
    before = logits(model, ids)
    given = luts(model, 1)
    change(given, list(given)[2])
    with pytest.raises(AdapterError, match=message):
        model.load_adapter(given, "bad")
    assert model.active_adapters() == []
    assert not any(m.tables().parked for m in model.modules() if hasattr(m, "tables"))
    assert torch.equal(logits(model, ids), before)


def test_names_are_checked(model, luts):
    with pytest.raises(AdapterError, match="no adapter 'a'"):
        model.set_adapter("a")
    model.load_adapter(luts(model, 1), "a")
    for name in (BASE, "", " ", 7):
        with pytest.raises(AdapterError, match="cannot be called"):
            model.load_adapter(luts(model, 1), name)
    with pytest.raises(AdapterError, match="already"):
        model.load_adapter(luts(model, 1), "a")
    with pytest.raises(ValueError, match="loaded: a"):  # as in transformers
        model.set_adapter("b")
    with pytest.raises(AdapterError, match="merge"):
        model.set_adapter(["a", "b"])
    with pytest.raises(AdapterError, match="no adapter 'b'"):
        model.delete_adapter(["a", "b"])
    assert model.active_adapters() == ["a"]


def test_an_active_trainable_adapter_is_trained_and_the_base_is_not(model, luts, ids):
    base = {k: v.clone() for k, v in model.state_dict().items() if "sketch_luts" not in k}
    model.load_adapter({}, "mine", is_trainable=True)
    model.load_adapter(luts(model, 5), "other")
    model.set_adapter("mine")
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(base_of(model).paths)
    optimizer = torch.optim.SGD(trained, 0.05)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in base.items())
    made = model.get_adapter_state_dict("mine")
    assert set(made) == set(base_of(model).paths)
    assert all(
        not torch.equal(lut, base_of(model).module(model, n).lut_of(BASE))
        for n, lut in made.items()
        if "embed" not in n
    )
    fresh = sketchconv.load(model.name_or_path)
    fresh.load_adapter(made, "mine")
    assert torch.equal(logits(fresh, ids), logits(model, ids))


def test_a_mapping_gives_the_gradient_of_the_active_adapter_alone(model, luts, ids):
    model.load_adapter(luts(model, 1), "frozen")
    assert not any(p.requires_grad for p in model.parameters())
    model.load_adapter({}, "mine", is_trainable=True)
    model.set_adapter("frozen")
    assert not model(ids, labels=ids).loss.requires_grad


def test_other_models_keep_the_methods_of_peft():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=20,
    )  # fmt: skip
    dense = LlamaForCausalLM(config)
    assert not is_sketch(dense)
    with pytest.raises(ValueError, match="No adapter loaded"):
        dense.set_adapter("a")
    with pytest.raises(ValueError, match="No adapter loaded"):
        dense.disable_adapters()
    with pytest.raises(ValueError, match="adapter_names"):
        dense.generate(torch.tensor([[1, 2]]), max_new_tokens=1, adapter_names=["a"])
    peft = pytest.importorskip("peft")
    dense.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]), "lora")
    dense.set_adapter("lora")
    assert dense.active_adapters() == ["lora"]
    dense.delete_adapter("lora")


def test_adapters_of_peft_work_on_a_sketch_beside_deltas(folder, luts, ids, tmp_path):
    peft = pytest.importorskip("peft")
    model = sketchconv.load(folder())  # its head is dense
    base = logits(model, ids)
    model.load_adapter(luts(model, 1), "delta")
    with_delta = logits(model, ids)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["lm_head"]), "lora")
    assert model.active_adapters() == ["delta", "lora"]
    model.set_adapter("lora")
    assert torch.equal(logits(model, ids), with_delta)  # a new LoRA is zero
    assert "lm_head.lora_A.weight" in model.get_adapter_state_dict()
    assert set(model.get_adapter_state_dict("delta")) == set(luts(model, 1))
    model.disable_adapters()
    assert torch.equal(logits(model, ids), base)
    model.enable_adapters()
    model.delete_adapter("delta")
    assert model.active_adapters() == ["lora"]
    model.delete_adapter("lora")
    assert torch.equal(logits(model, ids), base)
