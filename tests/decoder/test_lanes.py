"""The pieces of the compiled step against NumPy: tails, odd sizes, extreme values."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch

from sketchconv.kernels.decoder import attention, lanes
from sketchconv.kernels.decoder.halves import round_half
from sketchconv.kernels.decoder.memory import Memory
from sketchconv.kernels.decoder.network import floats, padded

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
UNIT = 2.0**-24  # half a unit in the last place of 1


def aligned(values):
    """Float32 with zeros up to whole vectors."""
    return floats(torch.as_tensor(np.asarray(values, np.float32))).numpy()


@pytest.fixture(scope="module")
def compiled():
    """The intrinsics as functions of arrays' addresses, compiled as they are asked for."""
    made = {}

    def make(name, kind=None):
        if (name, kind) not in made:
            function = getattr(attention if name in ("scores", "mix", "softmax") else lanes, name)
            counts = {"dense_dot": 3, "dense_row": 3, "scores": 5, "mix": 5, "softmax": 3}
            counts |= {"normalise": 5, "gate": 4, "add_to": 3}
            names = ", ".join("abcde"[: counts[name]])
            first = f"'{kind}', " if kind else ""
            space = {"function": function}
            exec(f"def call({names}): return function({first}{names})", space)
            made[name, kind] = numba.njit(space["call"], error_model="numpy")
        return made[name, kind]

    return make


def values_of(kind, shape, seed=0):
    """Random values of a dtype: the tensor, and the same as float64."""
    rng = np.random.default_rng(seed)
    tensor = torch.from_numpy(rng.standard_normal(shape)).to(TORCH[kind])
    return tensor, tensor.double().numpy()


@pytest.mark.parametrize("kind", TORCH)
def test_dense_dot_at_every_length(compiled, kind):
    dot = compiled("dense_dot", kind)
    weights, exact = values_of(kind, 200)
    x = np.random.default_rng(1).standard_normal(200).astype(np.float32)
    for count in range(201):
        got = dot(weights.data_ptr(), x.ctypes.data, count)
        products = exact[:count] * x[:count].astype(np.float64)
        assert abs(got - products.sum()) <= (count + 2) * UNIT * np.abs(products).sum()


def test_every_half_is_read_exactly(compiled):
    halves = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(halves.size, np.float32)
    compiled("dense_row", "F16")(halves.ctypes.data, out.ctypes.data, halves.size)
    np.testing.assert_array_equal(out, halves.view(np.float16).astype(np.float32))
    # ... and 16 at a time: a dot product with a unit vector
    dot = compiled("dense_dot", "F16")
    one = np.zeros(16, np.float32)
    one[3] = 1
    finite = np.isfinite(halves.view(np.float16))
    for first in range(0, 1 << 16, 16):
        if finite[first : first + 16].all():
            value = dot(halves[first:].ctypes.data, one.ctypes.data, 16)
            assert value == halves.view(np.float16)[first + 3]


def test_halves_are_rounded_as_numpy_rounds():
    rounded = numba.njit(lambda value: round_half(value))
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = halves[:-1].astype(np.float64)
    middle = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)  # ties, exact in float32
    around = [np.nextafter(middle, np.float32(sign) * np.inf) for sign in (-1, 1)]
    edges = np.float32([65519, 65519.996, 65520, 65536, 1e30, np.inf, 2**-25, 2.0**-26, 1e-40])
    sample = np.concatenate([halves, middle[::7], around[0][::7], around[1][::7], edges])
    for value in np.concatenate([sample, -sample]).astype(np.float32):
        bits, back = rounded(value)
        with np.errstate(over="ignore"):
            expected = value.astype(np.float16)
        assert np.uint16(bits) == expected.view(np.uint16)
        assert np.float32(back) == np.float32(expected)
    assert np.isnan(rounded(np.float32(np.nan))[1])


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 64, 100, 576])
def test_normalise(compiled, count):
    rng = np.random.default_rng(count)
    x, weight = (aligned(rng.standard_normal(count) * 3) for _ in range(2))
    out = np.full(padded(count), 7, np.float32)
    run = compiled("normalise")
    run(x.ctypes.data, weight.ctypes.data, out.ctypes.data, count, np.float32(1e-5))
    exact = x.astype(np.float64)
    exact = exact / np.sqrt((exact**2).sum() / count + 1e-5) * weight
    # the sum of squares, halved by the root, then root, quotient and two products
    np.testing.assert_allclose(out, exact, rtol=(count / 2 + 6) * UNIT, atol=0)
    assert (out[count:] == 0).all()


def exact_silu(x):
    return x / (1 + np.exp(-x.astype(np.float64)))


def test_gate_over_the_whole_range(compiled):
    gates = np.concatenate([np.linspace(-86.9, 86.9, 200_003), [0, -0.0, 1e-30, -1e-30]])
    gates = aligned(gates)
    ups = aligned(np.random.default_rng(0).standard_normal(gates.size))
    out = np.empty_like(gates)
    address = (gates.ctypes.data, ups.ctypes.data, out.ctypes.data)
    compiled("gate")(*address, gates.size)
    # exp within 2 units in the last place = 4 UNIT, then sum, quotient, product
    exact = exact_silu(gates) * ups
    np.testing.assert_allclose(out, exact, rtol=8 * UNIT, atol=1e-44)


def test_gate_beyond_the_range(compiled):
    gates = aligned([-1e30, -1000, -89, 89, 1000, 1e30, np.inf, np.nan])
    ups = np.ones_like(gates)
    out = np.empty_like(gates)
    compiled("gate")(gates.ctypes.data, ups.ctypes.data, out.ctypes.data, gates.size)
    np.testing.assert_allclose(out[:3], 0, atol=1e-36)
    np.testing.assert_array_equal(out[3:7], gates[3:7])
    assert np.isnan(out[7])


@pytest.mark.parametrize("size", [16, 32, 4096])
def test_softmax(compiled, size):
    rng = np.random.default_rng(size)
    scores = np.concatenate([rng.uniform(-86, 0, size - 3), [0, -200, -np.inf]])
    scores = (scores + 40).astype(np.float32)
    exact = np.exp(0.5 * (scores.astype(np.float64) - scores.max()))
    total = compiled("softmax")(scores.ctypes.data, size // 16, np.float32(0.5))
    # the difference and the product are off by half a unit each, relative to at most 43
    np.testing.assert_allclose(scores, exact, rtol=4 * UNIT + 2 * 43 * UNIT, atol=1e-37)
    assert scores[-1] == 0
    assert total == pytest.approx(scores.astype(np.float64).sum(), rel=(size / 16 + 4) * UNIT)


def test_softmax_hands_on_a_nan(compiled):
    scores = np.zeros(32, np.float32)
    scores[20] = np.nan
    assert np.isnan(compiled("softmax")(scores.ctypes.data, 2, np.float32(1)))


@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize(("dim", "length"), [(2, 1), (6, 16), (16, 17), (64, 50), (80, 33)])
def test_scores_and_mix_on_the_memory(compiled, kind, dim, length):
    memory = Memory(1, 2, dim, TORCH[kind], length)
    keys, exact_keys = values_of(kind, (2, length, dim))
    values, exact_values = values_of(kind, (2, length, dim), seed=1)
    memory.put(0, 0, keys, values)
    blocks = -(-length // 16)
    query = np.random.default_rng(2).standard_normal(dim).astype(np.float32)
    out = np.empty(blocks * 16, np.float32)
    at = memory.keys[0, 1].data_ptr()
    compiled("scores", kind)(at, query.ctypes.data, out.ctypes.data, dim, blocks)
    products = exact_keys[1] * query.astype(np.float64)
    bound = (dim + 2) * UNIT * np.abs(products).sum(1)
    assert (np.abs(out[:length] - products.sum(1)) <= bound).all()

    weights = np.random.default_rng(3).uniform(0, 1, length).astype(np.float32)
    mixed = np.empty(padded(dim), np.float32)
    at = memory.values[0, 1].data_ptr()
    run = compiled("mix", kind)
    run(at, weights.ctypes.data, mixed.ctypes.data, padded(dim), length)
    products = exact_values[1] * weights[:, None].astype(np.float64)
    bound = (length + 2) * UNIT * np.abs(products).sum(0)
    assert (np.abs(mixed[:dim] - products.sum(0)) <= bound).all()


def test_add_to_keeps_to_its_range(compiled):
    for count in (0, 1, 15, 16, 17, 40):
        source, target = np.arange(48, dtype=np.float32), np.full(48, 5, np.float32)
        compiled("add_to")(source.ctypes.data, target.ctypes.data, count)
        assert (target[:count] == source[:count] + 5).all()
        assert (target[count:] == 5).all()


def test_memory_keeps_what_it_had_when_it_grows():
    memory = Memory(2, 3, 6, torch.float32, 10)
    assert memory.capacity == 16
    keys, values = torch.randn(3, 9, 6), torch.randn(3, 9, 6)
    memory.put(1, 0, keys[:, :4], values[:, :4])
    memory.put(1, 4, keys[:, 4:], values[:, 4:])
    memory.grow(100)
    assert memory.capacity == 112
    for got, expected in zip(memory.get(1, 9), (keys, values), strict=True):
        assert torch.equal(got, expected)
    memory.grow(5)
    assert memory.capacity == 112
