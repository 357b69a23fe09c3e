"""Plain `model.generate` of a loaded sketch: compiled where it can be, transformers' elsewhere."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from sketchconv.kernels.decoder.session import Session
from sketchconv.runtime.compiled_generate import why_not_call
from sketchconv.runtime.decoder_cache import DecoderCache

PROMPT = torch.randint(3, 140, (1, 9), generator=torch.Generator().manual_seed(1))
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FEWER = {**OPTIONS, "max_new_tokens": 4}


@pytest.fixture
def steps(monkeypatch):
    """Positions of the compiled steps that ran."""
    made = []
    step = Session.step

    def counted(self, token, position):
        made.append(position)
        return step(self, token, position)

    monkeypatch.setattr(Session, "step", counted)
    return made


@pytest.fixture
def model(pair):
    return pair("LlamaForCausalLM").model


def plain(model, *args, **kwargs):
    return type(model).generate(model, *args, **kwargs)


@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_a_plain_call_is_compiled(model, steps, name):
    expected = plain(model, PROMPT, **OPTIONS)
    assert not steps
    assert torch.equal(model.generate(**{name: PROMPT}, **OPTIONS), expected)
    assert steps == list(range(9, 20))
    assert "forward" not in vars(model)


def test_a_config_and_a_mask(model, steps):
    config = GenerationConfig(**OPTIONS)
    expected = plain(model, PROMPT, generation_config=config)
    mask = torch.ones_like(PROMPT)
    found = model.generate(PROMPT, attention_mask=mask, generation_config=config)
    assert torch.equal(found, expected)
    assert len(steps) == 11


def test_padding_goes_through_the_modules(model, steps):
    mask = torch.ones_like(PROMPT)
    mask[0, :2] = 0
    expected = plain(model, PROMPT, attention_mask=mask, **FEWER)
    assert torch.equal(model.generate(PROMPT, attention_mask=mask, **FEWER), expected)
    assert not steps


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static"},
        {"generation_config": GenerationConfig(**{**FEWER, "num_beams": 2})},
    ],
    ids=lambda given: "-".join(given),
)
def test_what_the_step_does_not_know(model, steps, given):
    options = {} if "generation_config" in given else FEWER
    assert why_not_call(model, PROMPT, {**options, **given}) is not None
    torch.manual_seed(0)
    expected = plain(model, PROMPT, **{**options, **given})
    torch.manual_seed(0)
    assert torch.equal(model.generate(PROMPT, **{**options, **given}), expected)
    assert not steps


def test_several_prompts(model, steps):
    both = PROMPT.repeat(2, 1)
    assert torch.equal(model.generate(both, **FEWER), plain(model, both, **FEWER))
    assert not steps


def test_an_assistant(model, steps):
    helper = copy.deepcopy(model)
    expected = plain(model, PROMPT, **FEWER)
    assert torch.equal(model.generate(PROMPT, assistant_model=helper, **FEWER), expected)


def test_a_cache_of_ones_own(model, steps):
    first = model.generate(PROMPT, return_dict_in_generate=True, **FEWER)
    assert isinstance(first.past_key_values, DecoderCache)
    done = len(steps)
    again = model.generate(first.sequences, past_key_values=first.past_key_values, **FEWER)
    assert torch.equal(again, plain(model, first.sequences, **FEWER))
    assert len(steps) == done  # outside of a block a cache goes through the modules


def test_a_copy_decodes_by_itself(model, steps):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.neg_()
    assert other.generate.__self__ is other
    expected = plain(other, PROMPT, **FEWER)
    assert not torch.equal(expected, plain(model, PROMPT, **FEWER))
    assert torch.equal(other.generate(PROMPT, **FEWER), expected)
    assert len(steps) == 3


def test_pickling_keeps_the_model_whole(model):
    back = pickle.loads(pickle.dumps(model))
    assert torch.equal(back.generate(PROMPT, **FEWER), plain(model, PROMPT, **FEWER))


def test_hooks_are_seen(model, steps):
    seen = []
    handle = model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    model.generate(PROMPT, **FEWER)
    handle.remove()
    assert len(seen) == 4
    assert not steps


def test_an_error_leaves_nothing_behind(model):
    class Stop(BaseStreamer):
        def put(self, value):
            raise KeyError("stop")

        def end(self):
            """Never reached."""

    with pytest.raises(KeyError, match="stop"):
        model.generate(PROMPT, streamer=Stop(), **FEWER)
    assert "forward" not in vars(model)


def test_other_models_keep_theirs(pair):
    assert "generate" not in vars(pair("GPT2LMHeadModel").model)
