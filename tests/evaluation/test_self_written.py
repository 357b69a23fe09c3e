"""Calibration text that the model writes itself."""

from __future__ import annotations

import pytest
import torch

from sketchconv.calibration import self_written as module
from sketchconv.calibration.self_written import self_written
from sketchconv.errors import LoadError, RecipeError


def test_shape_seed_and_the_global_random_state(makers):
    model, tokenizer = makers.model(), makers.tokenizer()
    state = torch.get_rng_state()
    first = self_written(model, tokenizer, 70, 20, 5)
    assert first.shape == (4, 20)
    assert first.dtype is torch.int64
    assert torch.equal(first, self_written(model, tokenizer, 70, 20, 5))
    assert not torch.equal(first, self_written(model, tokenizer, 70, 20, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.min() >= 1
    assert first.max() < 93


def test_sequences_of_one_window(makers, monkeypatch):
    """A window longer than a sequence holds several, each opened anew."""
    monkeypatch.setattr(module, "SEGMENT", 8)
    ids = self_written(makers.model(), makers.tokenizer(), 40, 20, 0)
    assert ids.shape == (2, 20)
    assert (ids.reshape(-1, 8)[:, 0] == 1).all()


@pytest.mark.parametrize("end", [2, 1])
def test_an_ended_document_is_followed_by_a_new_one(makers, monkeypatch, end):
    """Also where the token that opens a document is the one that ends it, as in GPT-2."""

    class Ends(torch.nn.Module):
        """A model that ends every document after the words that it does not choose itself."""

        config = makers.model().config
        device = torch.device("cpu")

        def can_generate(self):
            return True

        def forward(self, input_ids, past_key_values, use_cache):
            logits = torch.zeros(*input_ids.shape, 93)
            logits[..., end] = 100
            return type("Out", (), {"logits": logits})

    monkeypatch.setattr(module, "ends", lambda model, tokenizer: torch.tensor([end]))
    ids = self_written(Ends(), makers.tokenizer(), 24, 12, 0)
    pieces = ids.reshape(-1, 3)
    assert (pieces[:, 0] == 1).all()
    assert (pieces[:, 1] >= 3).all()
    assert (pieces[:, 2] == end).all()


def test_without_a_cache_the_text_is_the_same(makers):
    model, tokenizer = makers.model(), makers.tokenizer()
    expected = self_written(model, tokenizer, 30, 15, 1)
    forward = model.forward

    def forgetful(*arguments, **options):
        out = forward(*arguments, **options)
        out.past_key_values = None
        return out

    model.forward = forgetful
    assert torch.equal(self_written(model, tokenizer, 30, 15, 1), expected)


def test_draws_follow_the_models_distribution(makers):
    model = makers.model()
    writer = module._Writer(model, makers.tokenizer(), torch.Generator().manual_seed(0), 2.0)
    logits = torch.randn(1, 93, generator=torch.Generator().manual_seed(1)) * 3
    logits[0, 7] = -torch.inf
    expected = torch.softmax(logits[0] / 2, -1)
    drawn = writer._sampled(logits.expand(40000, 93)).bincount(minlength=93) / 40000
    assert drawn[7] == 0
    # five standard deviations of the most uncertain share
    assert (drawn - expected).abs().max() < 5 * (0.25 / 40000) ** 0.5


def test_what_cannot_write_is_refused(makers):
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(LoadError, match="does not write text"):
        self_written(transformers.BertModel(config), makers.tokenizer(), 10, 10, 0)


def test_nan_is_an_error(makers):
    model = makers.model()
    with torch.no_grad():
        model.lm_head.weight[4] = torch.nan
    with pytest.raises(LoadError, match="NaN"):
        self_written(model, makers.tokenizer(), 10, 10, 0)


@pytest.mark.parametrize("bad", [{"tokens": 0}, {"seq_len": 0}, {"temperature": 0.0}])
def test_bad_numbers(makers, bad):
    options = {"tokens": 10, "seq_len": 10, **bad}
    with pytest.raises(RecipeError, match="must be positive"):
        self_written(makers.model(), makers.tokenizer(), **options)
