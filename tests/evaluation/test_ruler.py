"""Networks and the ruler against plain calls of transformers."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from sketchconv.errors import EvaluationError
from sketchconv.evaluation import network as network_module
from sketchconv.evaluation.network import Network
from sketchconv.evaluation.reference import Reference
from sketchconv.evaluation.ruler import Ruler, Text
from sketchconv.evaluation.scores import score
from sketchconv.evaluation.windows import Cut, cut_windows
from sketchconv.positions import model_positions

CAPPED = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0}


def text(makers, windows=3, **options):
    cut = Cut(12, None, windows)
    found = cut_windows(makers.tokenizer(**options), makers.text(60), cut, "text")
    return Text("text", tuple(found))


@pytest.mark.parametrize(
    ("kind", "changes", "splits"),
    [
        ("LlamaForCausalLM", {}, True),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, True),
        ("Gemma2ForCausalLM", CAPPED, False),  # capped after the head
    ],
)
def test_logits_by_blocks_are_the_models_own(makers, kind, changes, splits):
    model = makers.model(kind, **changes)
    ids = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(1))
    network = Network(model, kind)
    with torch.inference_mode():
        states = network.states(ids)
        assert network.splits == splits
        assert len(states) == 1 + model.config.num_hidden_layers
        logits = torch.cat([network.logits(states[-1][0, b : b + 7]) for b in range(0, 20, 7)])
        assert torch.allclose(logits, model(ids).logits[0], atol=1e-5)


def test_padding_changes_nothing(makers):
    network = Network(makers.model(), "m")
    ids = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    with torch.inference_mode():
        whole = network.states(ids, mask)[-1][1, :6]
        alone = network.states(ids[1:, :6])[-1][0]
    assert torch.allclose(whole, alone, atol=1e-5)


def test_an_encoder_is_refused(makers):
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(EvaluationError, match="no causal language model"):
        Network(transformers.BertModel(config), "encoder")


@pytest.mark.parametrize(
    "changes", [("LlamaForCausalLM", {}), ("Gemma2ForCausalLM", CAPPED)], ids=["split", "whole"]
)
def test_measures_as_whole_logits_do(makers, monkeypatch, changes):
    monkeypatch.setattr(network_module, "_BLOCK_VALUES", 4 * 93)
    kind, options = changes
    dense, other = makers.model(kind, **options), makers.model(kind, seed=1, **options)
    words = text(makers)
    reference = Reference(Network(dense, "dense"), [words])
    ruler = Ruler([words], reference)
    results = [ruler.measure(Network(other, "other")) for _ in range(2)]
    losses, divergences = [], []
    for window in words.windows:
        with torch.inference_mode():
            q, p = (m(window.ids[None]).logits[0, :-1].float() for m in (other, dense))
        expected = score(q, window.ids[1:], p)
        losses.append(expected.loss)
        divergences.append(expected.divergence)
    for result in results:
        found = result.texts[0]
        assert found.loss.mean == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
        assert found.divergence.kl.mean == pytest.approx(
            torch.cat(divergences).mean().item(), rel=1e-4
        )
        assert found.tokens == 33
        assert len(result.layers) in (2, 3)
        assert min(result.layers) > 0.1
    reference.close()
    own = Ruler([words]).measure(Network(dense, "dense"))
    assert results[0].reference[0].perplexity == pytest.approx(own.texts[0].perplexity, rel=1e-5)
    assert own.layers is None
    assert own.reference is None


def test_a_model_does_not_differ_from_itself(makers):
    model = makers.model()
    words = text(makers)
    reference = Reference(Network(model, "a"), [words])
    result = Ruler([words], reference).measure(Network(model, "b"))
    assert result.texts[0].divergence.kl.mean == 0
    assert result.texts[0].divergence.agreement.mean == 1
    assert result.layers == (0, 0, 0)


def test_only_the_head_of_the_reference_stays(makers):
    model, words = makers.model(), text(makers)
    body = weakref.ref(model.model.layers[0].mlp)
    network = Network(model, "dense")
    reference = Reference(network, [words])
    del model
    gc.collect()
    assert body() is None
    assert [len(reference.states((0, w))) for w in range(len(words.windows))] == [3, 3, 1]
    assert reference.logits(reference.states((0, 2))[-1][0, :2]).shape == (2, 93)
    folder = Path(reference._folder.name)
    assert len(list(folder.iterdir())) == 7
    reference.close()
    assert not folder.exists()


def test_a_full_disk_is_an_error_of_the_evaluation(makers, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(EvaluationError, match=r"No space left.*or take fewer windows"):
        Reference(Network(makers.model(), "dense"), [text(makers)])


def test_another_vocabulary_is_refused(makers):
    words = text(makers)
    ruler = Ruler([words], Reference(Network(makers.model(), "dense"), [words]))
    with pytest.raises(EvaluationError, match="predicts 99 tokens, the reference dense 93"):
        ruler.measure(Network(makers.model(vocab_size=99), "other"))


def test_nan_is_an_error_that_names_the_model(makers):
    model = makers.model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(EvaluationError, match="broken: gives NaN"):
        Ruler([text(makers)]).measure(Network(model, "broken"))


def test_nan_of_the_reference_names_the_reference(makers):
    model, words = makers.model(), text(makers)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    ruler = Ruler([words], Reference(Network(model, "dense"), [words]))
    with pytest.raises(EvaluationError, match="dense: gives NaN"):
        ruler.measure(Network(makers.model(), "sketch"))


@pytest.mark.parametrize("measure", ["ruler", "reference"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 8}, "m: windows of 12 tokens, .* positions for 8; take --seq"),
        ({"vocab_size": 40}, r"text: token \d+, but m has an embedding of 40 rows"),
    ],
)
def test_windows_that_do_not_fit_are_refused(makers, measure, changes, message):
    network, words = Network(makers.model("GPT2LMHeadModel", **changes), "m"), text(makers)
    with pytest.raises(EvaluationError, match=message):
        Ruler([words]).measure(network) if measure == "ruler" else Reference(network, [words])


def test_rotary_positions_have_no_end(makers):
    model, words = makers.model(max_position_embeddings=8), text(makers)
    assert model_positions(model) is None
    longer = makers.model(max_position_embeddings=64)
    scores = [Ruler([words]).measure(Network(each, "m")).texts for each in (model, longer)]
    assert scores[0] == scores[1]


def test_no_limit_of_positions_and_those_behind_the_padding(makers):
    class Config:
        def __init__(self, most):
            self.max_position_embeddings = most

        def get_text_config(self):
            return self

    model = torch.nn.Module()
    for most, expected in ((-1, None), (None, None), (512, 512)):
        model.config = Config(most)
        assert model_positions(model) == expected
    model.position_embeddings = torch.nn.Embedding(514, 2, padding_idx=1)
    assert model_positions(model) == 512
