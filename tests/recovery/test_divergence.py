"""The losses against torch's own gradients."""

from __future__ import annotations

import pytest
import torch

from sketchconv.recovery import divergence as module
from sketchconv.recovery.divergence import Head, divergence, hidden_error


def states(tokens=11, width=16, vocabulary=50, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(vocabulary, width, generator=generator)
    second = first + 0.1 * torch.randn(vocabulary, width, generator=generator)
    wanted = torch.randn(tokens, width, generator=generator)
    found = wanted + 0.2 * torch.randn(tokens, width, generator=generator)
    return (tensor.to(dtype) for tensor in (first, second, wanted, found))


def reference(dense, wanted, student, found):
    """The divergences and the gradient of their mean, by autograd in float64."""

    def logits(head, hidden):
        raw = hidden @ head.weight.double().T
        raw = raw if head.bias is None else raw + head.bias.double()
        raw = raw * head.scale
        return raw if head.cap is None else torch.tanh(raw / head.cap) * head.cap

    given = found.detach().double().requires_grad_()
    first = torch.log_softmax(logits(dense, wanted.double()), -1)
    loss = (first.exp() * (first - torch.log_softmax(logits(student, given), -1))).sum(-1)
    loss.mean().backward()
    return loss.detach(), given.grad


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"cap": 5.0}, {"cap": 5.0, "scale": 2.0, "bias": torch.randn(50)}],
    ids=["plain", "scale", "cap", "all"],
)
def test_gradient_in_float32(options, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    first, second, wanted, found = states()
    dense, student = Head(first, **options), Head(second, **options)
    loss, grad = divergence(dense, wanted, student, found)
    expected, slope = reference(dense, wanted, student, found)
    assert torch.allclose(loss, expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(grad.double(), slope, rtol=1e-4, atol=1e-6)
    again, none = divergence(dense, wanted, student, found, gradient=False)
    assert torch.equal(again, loss)
    assert none is None


def test_bfloat16_is_as_good_as_its_logits(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    first, second, wanted, found = states(dtype=torch.bfloat16)
    dense, student = Head(first), Head(second)
    assert dense.fast
    loss, grad = divergence(dense, wanted, student, found)
    expected, slope = reference(dense, wanted, student, found)
    assert grad.dtype is torch.bfloat16
    # Logits of size 12 are rounded by up to 2**-8 of it, in both models.
    assert torch.allclose(loss, expected, rtol=0.05, atol=0.02)
    assert (grad.double() - slope).norm() <= 0.05 * slope.norm()


def test_hidden_error():
    _, _, wanted, found = states()
    given = found.double().requires_grad_()
    size = wanted.double().square().sum(-1).mean()
    expected = (given - wanted.double()).square().sum(-1) / size
    expected.mean().backward()
    loss, grad = hidden_error(wanted, found)
    assert torch.allclose(loss, expected.detach(), rtol=1e-5)
    assert torch.allclose(grad.double(), given.grad, rtol=1e-5)
    assert hidden_error(wanted, found, gradient=False)[1] is None
