"""What happens to adapters when the model is copied, moved, saved, forked or shared by threads."""

from __future__ import annotations

import copy
import io
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sketchconv
from sketchconv.adapters.base import base_of
from sketchconv.adapters.batch import BASE
from sketchconv.runtime.decoder import Decoder, why_not


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@pytest.fixture
def loaded(model, luts):
    """A model with the adapters "one" and "two", of which "one" is active."""
    model.load_adapter(luts(model, 2), "two")
    model.load_adapter(luts(model, 1), "one")
    return model


def test_copies_are_complete_and_independent(loaded, ids):
    expected = {name: logits(loaded, ids, adapter_names=[name] * 4) for name in ("one", "two")}
    twin = copy.deepcopy(loaded)
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    stored = torch.load(file, weights_only=False)
    loaded.delete_adapter("one")
    for other in (twin, stored):
        assert other.active_adapters() == ["one"]
        assert torch.equal(logits(other, ids), expected["one"])
        other.set_adapter("two")
        assert torch.equal(logits(other, ids), expected["two"])
        other.delete_adapter(["one", "two"])
    loaded.set_adapter("two")
    assert torch.equal(logits(loaded, ids), expected["two"])


def test_casts_and_moves_take_adapters_along(loaded, ids):
    one = {n: t.clone() for n, t in loaded.get_adapter_state_dict("one").items()}
    loaded.to(torch.bfloat16)
    assert logits(loaded, ids).dtype is torch.bfloat16
    for name in ("one", "two"):
        loaded.set_adapter(name)
        assert {t.dtype for t in loaded.get_adapter_state_dict(name).values()} == {torch.float16}
    assert all(torch.equal(one[n], t) for n, t in loaded.get_adapter_state_dict("one").items())
    loaded.to("meta")
    module = base_of(loaded).module(loaded, next(iter(one)))
    assert {module.lut_of(name).device.type for name in ("one", "two", BASE)} == {"meta"}


def test_a_state_dict_holds_the_base_and_every_adapter(loaded, model, luts, ids, folder):
    expected = {name: logits(loaded, ids, adapter_names=[name] * 4) for name in ("one", BASE)}
    state = {key: tensor.clone() for key, tensor in loaded.state_dict().items()}
    base = sketchconv.load(loaded.name_or_path).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in base.items())
    assert {key.split("sketch_luts.")[1] for key in state.keys() - base.keys()} == {"one", "two"}
    other = sketchconv.load(loaded.name_or_path)
    other.load_adapter(luts(other, 8), "two")
    other.load_adapter(luts(other, 9), "one")
    other.set_adapter("two")
    other.load_state_dict(state)
    assert other.active_adapters() == ["two"]
    for name, wanted in expected.items():
        assert torch.equal(logits(other, ids, adapter_names=[name] * 4), wanted)
    plain = sketchconv.load(loaded.name_or_path)
    with pytest.raises(RuntimeError, match=r"sketch_luts\.one"):
        plain.load_state_dict(state)
    other.load_state_dict(base)  # the base alone leaves the adapters as they are
    assert torch.equal(logits(other, ids, adapter_names=["one"] * 4), expected["one"])


def test_save_pretrained_saves_the_base(loaded, ids, tmp_path):
    loaded.save_pretrained(tmp_path / "saved")
    fresh = sketchconv.load(tmp_path / "saved")
    assert torch.equal(logits(fresh, ids), logits(loaded, ids, adapter_names=[BASE] * 4))
    before = base_of(loaded).binding
    assert base_of(fresh).binding == before  # what fits the one fits the other


def test_a_dense_copy_has_the_active_adapter(loaded, ids):
    expected = logits(loaded, ids)
    dense = copy.deepcopy(loaded).dequantize()
    assert torch.allclose(logits(dense, ids), expected, atol=1e-5)


def _first_logits(model, ids, queue):
    model.set_adapter("two")
    queue.put(logits(model, ids).numpy())


@pytest.fixture
def one_thread():
    """A fork has no threads of OpenMP."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_fork_can_switch(loaded, ids, one_thread):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_first_logits, args=(loaded, ids, queue))
    child.start()
    found = torch.from_numpy(queue.get(timeout=60))
    child.join()
    assert loaded.active_adapters() == ["one"]
    assert torch.equal(found, logits(loaded, ids, adapter_names=["two"] * 4))


def test_threads_have_batches_of_their_own(loaded, ids):
    names = [["one", "two", BASE, "one"], [BASE, BASE, "two", "two"], ["two"] * 4, None]
    expected = [logits(loaded, ids, adapter_names=each) for each in names]

    def work(number):
        for _ in range(6):
            found = logits(loaded, ids, adapter_names=names[number])
            if not torch.equal(found, expected[number]):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4


def test_the_compiled_decoder_follows_the_active_adapter(loaded, ids):
    assert why_not(loaded) is None
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    wanted = {}
    for name in ("one", "two"):
        loaded.set_adapter(name)
        wanted[name] = loaded.generate(ids[:1], **options)
        with Decoder(loaded) as decoder:
            found = loaded.generate(ids[:1], past_key_values=decoder.cache(), **options)
        assert torch.equal(found, wanted[name])
    assert not torch.equal(wanted["one"], wanted["two"])
    with Decoder(loaded) as decoder:
        mixed = loaded.generate(
            ids[:1], past_key_values=decoder.cache(), adapter_names=["one"], **options
        )
        loaded.set_adapter("one")
        switched = loaded.generate(ids[:1], past_key_values=decoder.cache(), **options)
    assert torch.equal(mixed, wanted["one"])
    assert torch.equal(switched, wanted["one"])
