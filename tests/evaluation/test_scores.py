"""Scores against plain sums in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sketchconv.evaluation.layers import LayerErrors
from sketchconv.evaluation.scores import Spread, TextScore, TokenScores, joined, score


def plain(logits, targets, reference):
    """Loss, divergence and agreement, token by token and term by term."""
    losses, divergences, same = [], [], []
    triples = (logits.tolist(), reference.tolist(), targets.tolist())
    for q_row, p_row, target in zip(*triples, strict=True):
        q, p = log_softmax(q_row), log_softmax(p_row)
        losses.append(-q[target])
        terms = [math.exp(b) * (b - a) for a, b in zip(q, p, strict=True) if b != -math.inf]
        divergences.append(math.fsum(terms))
        same.append(float(q_row.index(max(q_row)) == p_row.index(max(p_row))))
    return losses, divergences, same


def log_softmax(row):
    top = max(row)
    total = math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - top - total for x in row]


def cases():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 40, generator=generator) * 4
    logits[1] = 0  # constant
    logits[2, :20] = 7  # ties
    logits[3, 5] = 300  # one outlier
    logits[4] = 1e4 + logits[4]
    reference = logits + torch.randn(12, 40, generator=generator)
    reference[5] = logits[5]
    reference[6, 3] = -math.inf  # a token that the reference excludes
    reference[7, 8] = 200
    targets = torch.randint(40, (12,), generator=generator)
    return logits, targets, reference


def test_against_plain_sums():
    logits, targets, reference = cases()
    scores = score(logits, targets, reference)
    losses, divergences, same = plain(logits.double(), targets, reference.double())
    # Each log-probability carries a few roundings of float32 at the size of the largest logit.
    slack = 8 * torch.finfo(torch.float32).eps * 1e4
    assert torch.allclose(scores.loss, torch.tensor(losses, dtype=torch.float64), atol=slack)
    expected = torch.tensor(divergences, dtype=torch.float64)
    assert torch.allclose(scores.divergence, expected, atol=slack)
    assert scores.agreement.tolist() == same
    assert scores.divergence[5] == 0
    own = score(reference, targets)
    assert torch.equal(scores.reference_loss, own.loss)


def test_blocks_joined_are_the_whole():
    logits, targets, reference = cases()
    whole = score(logits, targets, reference)
    blocks = [slice(0, 5), slice(5, 6), slice(6, 12)]
    parts = joined([score(logits[b], targets[b], reference[b]) for b in blocks])
    for name in ("loss", "divergence", "agreement", "reference_loss"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    alone = joined([score(logits[b], targets[b]) for b in blocks])
    assert alone.divergence is None
    assert torch.equal(alone.loss, whole.loss)


def test_figures_of_a_text():
    generator = torch.Generator().manual_seed(5)
    values = [torch.rand(n, generator=generator, dtype=torch.float64) for n in (7, 9, 8)]
    windows = [TokenScores(v, v * 2, (v > 0.5).double(), v + 1) for v in values]
    result, every = TextScore.of("t", windows), torch.cat(values)
    assert (result.windows, result.tokens) == (3, 24)
    assert result.perplexity == pytest.approx(math.exp(every.mean()))
    found = result.divergence
    assert found.median == pytest.approx(2 * every.quantile(0.5).item())
    assert found.p99 == pytest.approx(2 * every.quantile(0.99).item())
    means = torch.stack([v.mean() for v in values])
    assert found.kl.mean == pytest.approx(2 * every.mean().item())
    assert found.kl.error == pytest.approx(2 * means.std().item() / math.sqrt(3))
    assert found.agreement.mean == pytest.approx((every > 0.5).double().mean().item())
    own = TextScore.of_reference("t", windows)
    assert own.perplexity == pytest.approx(math.exp(every.mean() + 1))
    assert own.divergence is None


def test_one_window_has_no_standard_error():
    assert Spread.of([torch.ones(4, dtype=torch.float64)]) == Spread(1.0, None)


def test_a_perplexity_beyond_all_bounds():
    assert TextScore.of("t", [TokenScores(torch.full((3,), 1e4).double())]).perplexity == math.inf


def test_layer_errors():
    errors = LayerErrors()
    reference = [torch.ones(1, 2, 4), torch.full((1, 2, 4), 2.0), torch.zeros(1, 2, 4)]
    states = [torch.ones(1, 2, 4), torch.full((1, 2, 4), 3.0), torch.zeros(1, 2, 4)]
    errors.add(reference, states)
    errors.add(reference, reference)
    assert errors.values() == pytest.approx((0.0, math.sqrt(8 / 64), 0.0))


def test_logits_are_no_layer():
    errors = LayerErrors()
    errors.add([torch.ones(1, 2, 4), torch.ones(1, 2, 9)], [torch.ones(1, 2, 4)] * 2)
    assert errors.values() == (0.0,)


def test_a_probability_of_nothing_against_one_excluded_counts_nothing():
    reference = torch.tensor([[0.0, -300.0]])  # the second has probability 0 in float32
    logits = torch.tensor([[0.0, -math.inf]])
    assert score(logits, torch.tensor([0]), reference).divergence.tolist() == [0]
