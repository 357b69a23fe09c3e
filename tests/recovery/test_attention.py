"""Attention by blocks of queries against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sketchconv.recovery import attention as module
from sketchconv.recovery.attention import CausalAttention, attention, quicker_attention


def parts(tokens, heads=4, keys=2, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, heads, tokens, 16), (2, keys, tokens, 16), (2, keys, tokens, 16))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def both(given, slope, call):
    y = call(*given)
    return y.detach(), *torch.autograd.grad(y, given, slope.to(y.dtype))


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_gradients(monkeypatch, tokens, keys, dtype, limit):
    monkeypatch.setattr(module, "BLOCK", 8)
    given = parts(tokens, keys=keys, dtype=dtype)
    slope = torch.randn(2, 4, tokens, 16)
    found = both(given, slope, lambda q, k, v: attention(q, k, v, 0.3))

    def reference(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)

    wide = [part.detach().double().requires_grad_() for part in given]
    for near, exact in zip(found, both(wide, slope, reference), strict=True):
        assert near.dtype is dtype
        assert (near.double() - exact).norm() <= limit * (1 + exact.norm())


@pytest.fixture
def calls(monkeypatch):
    """How often the blocks were used."""
    seen = []
    apply = CausalAttention.apply
    monkeypatch.setattr(CausalAttention, "apply", lambda *args: seen.append(1) or apply(*args))
    return seen


def test_calls_of_torch_are_replaced(calls):
    q, k, v = parts(20)
    options = {"is_causal": True, "enable_gqa": True, "scale": 0.2}
    expected = scaled_dot_product_attention(q, k, v, **options)
    assert not calls
    with quicker_attention():
        found = scaled_dot_product_attention(q, k, v, **options)
    assert calls == [1]
    assert (found - expected).norm() <= 0.02 * expected.norm()
    scaled_dot_product_attention(q, k, v, **options)
    assert calls == [1]


@pytest.mark.parametrize("case", ["mask", "dropout", "not causal", "float32", "long", "no grad"])
def test_other_calls_are_left_alone(calls, monkeypatch, case):
    monkeypatch.setattr(module, "MOST_TOKENS", 32)
    q, k, v = parts(40 if case == "long" else 20, keys=4)
    options = {"is_causal": True}
    if case == "mask":
        options = {"attn_mask": torch.ones(20, 20, dtype=torch.bool)}
    elif case == "dropout":
        options["dropout_p"] = 0.5
    elif case == "not causal":
        options = {}
    elif case == "float32":
        q, k, v = q.float(), k.float(), v.float()
    with quicker_attention(), torch.set_grad_enabled(case != "no grad"):
        assert scaled_dot_product_attention(q, k, v, **options).shape == q.shape
    assert not calls
