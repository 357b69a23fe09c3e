"""`generate` of transformers with the compiled step in it: same texts, and nothing left behind."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from transformers import GenerationConfig

from sketchconv.kernels.decoder.session import Session
from sketchconv.kernels.dispatch import choose
from sketchconv.runtime import decoder
from sketchconv.runtime.decoder import Decoder, default_threads, describe
from sketchconv.runtime.decoder_cache import DecoderCache

PROMPT = torch.randint(3, 140, (1, 9), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
SAMPLED = {"max_new_tokens": 40, "do_sample": True, "eos_token_id": None, "top_k": 30}


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


def generate(model, ids, **options):
    config = GenerationConfig(**{"pad_token_id": 0, **options})
    torch.manual_seed(3)
    return type(model).generate(model, ids, generation_config=config)  # transformers' own


def decode(model, ids, cache=None, **options):
    config = GenerationConfig(**{"pad_token_id": 0, **options})
    torch.manual_seed(3)
    with Decoder(model) as decoder:
        cache = decoder.cache() if cache is None else cache
        return model.generate(ids, generation_config=config, past_key_values=cache), cache


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_same_tokens(pair, steps, kind, options):
    model = pair(kind).model
    expected = generate(model, PROMPT, **options)
    got, cache = decode(model, PROMPT, **options)
    assert torch.equal(got, expected)
    assert steps == list(range(9, got.shape[1] - 1))
    assert cache.get_seq_length() == got.shape[1] - 1 > 15


def test_processors_stopping_and_outputs(pair, steps):
    model = pair().model
    plain = generate(model, PROMPT, **GREEDY)
    options = {**GREEDY, "eos_token_id": int(plain[0, 20]), "repetition_penalty": 1.3}
    options |= {"return_dict_in_generate": True, "output_logits": True, "no_repeat_ngram_size": 2}
    expected = generate(model, PROMPT, **options)
    got, _ = decode(model, PROMPT, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert isinstance(got.past_key_values, DecoderCache)
    assert len(steps) == len(got.logits) - 1


def test_a_conversation_goes_on_with_the_same_cache(pair, steps):
    model = pair().model
    first, cache = decode(model, PROMPT, **GREEDY)
    longer = torch.cat([first, PROMPT + 1], dim=1)
    expected = generate(model, longer, **GREEDY)
    steps.clear()
    got, _ = decode(model, longer, cache, **GREEDY)
    assert torch.equal(got, expected)
    assert steps == list(range(longer.shape[1], longer.shape[1] + 39))


def test_the_cache_as_transformers_knows_it(pair):
    model = pair().model
    with torch.no_grad(), Decoder(model) as decoder:
        cache = decoder.cache(1)
        theirs = model(PROMPT, use_cache=True).past_key_values
        model(PROMPT[:, :8], past_key_values=cache)
        model(PROMPT[:, 8:], past_key_values=cache)  # one compiled step
        for ours, other in zip(cache.layers, theirs.layers, strict=True):
            torch.testing.assert_close(ours.keys, other.keys)
            torch.testing.assert_close(ours.values, other.values)
        assert cache.get_mask_sizes(3, 0) == (12, 0)
        cache.crop(-4)
        again = model(PROMPT[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(again, model(PROMPT).logits[:, 5:])
        cache.reset()
        assert cache.get_seq_length() == 0
        with pytest.raises(ValueError, match="crop"):
            cache.crop(2)


def test_one_sequence_only(pair):
    model = pair().model
    with Decoder(model) as decoder:
        for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            config = GenerationConfig(max_new_tokens=4, pad_token_id=0, **options)
            with pytest.raises(ValueError, match="one sequence"):
                model.generate(PROMPT, generation_config=config, past_key_values=decoder.cache())


def test_other_calls_go_the_normal_way(pair, steps):
    model = pair().model
    one = PROMPT[:, -1:]

    def ready(decoder):
        cache = decoder.cache()
        model(PROMPT[:, :-1], past_key_values=cache)
        return cache

    with torch.no_grad(), Decoder(model) as decoder:
        expected = model(PROMPT).logits[:, -1]
        masked = torch.ones_like(PROMPT)
        masked[0, 2] = 0
        for options in (
            {"output_hidden_states": True},
            {"output_attentions": True},
            {"labels": one},
            {"return_dict": False},
            {"use_cache": False},
            {"logits_to_keep": torch.tensor([0])},
            {"attention_mask": torch.ones(1, 1, 1, 9)},
        ):
            answer = model(one, past_key_values=ready(decoder), **options)
            logits = answer[1] if "labels" in options else answer[0]
            torch.testing.assert_close(logits[:, -1], expected)
        hidden = model.get_input_embeddings()(one)
        answer = model(inputs_embeds=hidden, past_key_values=ready(decoder))
        torch.testing.assert_close(answer.logits[:, -1], expected)
        model(one, past_key_values=ready(decoder), attention_mask=masked)
        model(one, past_key_values=ready(decoder), position_ids=torch.tensor([[3]]))
        model(one)
        with torch.enable_grad():
            model(one, past_key_values=ready(decoder))
        assert steps == []
        model(one, past_key_values=ready(decoder), attention_mask=torch.ones_like(PROMPT))
        model(one, past_key_values=ready(decoder), position_ids=torch.tensor([[8]]))
        assert steps == [8, 8]


def test_nothing_stays_behind(pair):
    model = pair().model
    signature = inspect.signature(model.forward)
    torch.set_num_threads(2)
    with Decoder(model) as decoder, Decoder(model), torch.no_grad():
        assert inspect.signature(model.forward) == signature
        model(PROMPT[:, :1], past_key_values=decoder.cache())
        assert torch.get_num_threads() == 1
        model(PROMPT)
        assert torch.get_num_threads() == 2
        model(PROMPT[:, :1], past_key_values=decoder.cache())
    assert torch.get_num_threads() == 2
    assert "forward" not in vars(model)
    other = pair("Qwen2ForCausalLM").model
    with Decoder(model) as decoder, torch.no_grad():
        model(PROMPT[:, :1], past_key_values=decoder.cache())
        with decoder, Decoder(other) as inner:
            other(PROMPT)
            assert torch.get_num_threads() == 2
            other(PROMPT[:, :1], past_key_values=inner.cache())
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError, match="on purpose"), Decoder(model):
        raise KeyError("on purpose")
    assert "forward" not in vars(model)
    copy.deepcopy(model)


def test_a_copied_cache_goes_on_alone(pair, steps):
    model = pair().model
    with Decoder(model) as decoder, torch.no_grad():
        cache = decoder.cache(16)
        model(PROMPT, past_key_values=cache)
        twin = copy.deepcopy(cache)
        tokens = [[[7]], [[9]]]
        first = [model(torch.tensor(t), past_key_values=twin).logits for t in tokens]
        again = [model(torch.tensor(t), past_key_values=cache).logits for t in tokens]
        del cache
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert twin.get_seq_length() == PROMPT.shape[1] + 2
    assert len(steps) == 4
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(twin.session)


def test_what_changed_after_the_decoder_was_made(pair):
    model = pair().model
    decoder = Decoder(model)
    hook = model.model.layers[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="hook"), decoder:
        pass
    hook.remove()
    before = generate(model, PROMPT, **GREEDY)
    with torch.no_grad():  # neither the address nor the version tells of it
        model.model.norm.weight.data.mul_(-1)
    expected = generate(model, PROMPT, **GREEDY)
    with decoder:
        config = GenerationConfig(pad_token_id=0, **GREEDY)
        found = model.generate(PROMPT, generation_config=config, past_key_values=decoder.cache())
    assert torch.equal(found, expected)
    assert not torch.equal(before, expected)


def test_a_cache_made_in_inference_mode_serves_outside_of_it(pair):
    model = pair().model
    with Decoder(model) as decoder:
        with torch.inference_mode():
            cache = decoder.cache()
            model(PROMPT, past_key_values=cache)
        with torch.no_grad():
            model(PROMPT, past_key_values=cache)
    assert cache.get_seq_length() == 2 * PROMPT.shape[1]


def test_a_model_that_wants_another_cache_gets_it(pair):
    model = pair().model
    model.generation_config.cache_implementation = "static"
    assert "static" in describe(model)


def test_a_failure_in_the_modules_leaves_the_cache_as_it_was(pair):
    model = pair().model
    expected = generate(model, PROMPT, **GREEDY)
    with Decoder(model) as decoder, torch.no_grad():
        cache = decoder.cache()
        model(PROMPT[:, :4], past_key_values=cache)
        layer = model.model.layers[0].mlp
        layer.forward = None
        with pytest.raises(TypeError):
            model(PROMPT[:, 4:], past_key_values=cache)
        del layer.forward
        assert cache.get_seq_length() == 4
        config = GenerationConfig(pad_token_id=0, **GREEDY)
        got = model.generate(PROMPT, generation_config=config, past_key_values=cache)
    assert torch.equal(got, expected)


def test_a_step_with_a_bad_token_says_so_and_can_be_repeated(pair):
    model = pair().model
    with Decoder(model) as decoder, torch.no_grad():
        cache = decoder.cache()
        for token in (-1, 151):
            with pytest.raises(ValueError, match="token"):
                model(torch.tensor([[token]]), past_key_values=cache)
        got = model(PROMPT[:, :1], past_key_values=cache).logits
        torch.testing.assert_close(got, model(PROMPT[:, :1]).logits)


def test_weights_that_changed_between_blocks(pair):
    model = pair().model
    decoder = Decoder(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
        model.model.layers[0].mlp.up_proj.sketch_lut.data = (
            model.model.layers[0].mlp.up_proj.sketch_lut.data * 2
        )
        with decoder:
            got = model(PROMPT[:, :1], past_key_values=decoder.cache()).logits
        torch.testing.assert_close(got, model(PROMPT[:, :1]).logits)


def test_a_cache_made_for_other_weights_goes_through_the_modules(pair, steps):
    model = pair().model
    decoder = Decoder(model)
    cache = decoder.cache()
    with torch.no_grad():
        with decoder:
            model(PROMPT[:, :1], past_key_values=cache)
        other = model.model.norm.weight.detach() * 2
        model.model.norm.weight = torch.nn.Parameter(other, requires_grad=False)
        with decoder:
            got = model(PROMPT[:, 1:2], past_key_values=cache).logits
            torch.testing.assert_close(got, model(PROMPT[:, :2]).logits[:, 1:])
    assert steps == [0]


def test_description(pair):
    model = pair().model
    torch.set_num_threads(2)
    assert describe(model) == f"own decode loop, {choose().name} kernels, 1 thread"
    assert describe(model.train()) == "transformers' loop: the model is in training mode"


def test_small_models_get_one_thread(pair, monkeypatch):
    model = pair(embeddings=True, head=True).model
    torch.set_num_threads(2)
    assert default_threads(model) == 1
    used = 64 * (64 * 2 + 32 * 2) * 2 + 64 * 96 * 3 * 2 + 151 * 64 * 2  # a tied head would share
    monkeypatch.setattr(decoder, "SHARED_WEIGHTS", used)
    assert default_threads(model) == 2
    monkeypatch.setattr(decoder, "SHARED_WEIGHTS", used + 1)
    assert default_threads(model) == 1
