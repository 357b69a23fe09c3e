"""Llama 3's parameters are found again from the factors that a GGUF file keeps of them."""

from __future__ import annotations

import numpy as np
import pytest

from sketchconv.errors import ArchitectureError
from sketchconv.export.rope import llama3_factors, longrope
from sketchconv.sources.gguf_header import GgufHeader
from sketchconv.sources.gguf_metadata import Metadata
from sketchconv.sources.gguf_names import LLAMA3_FACTORS
from sketchconv.sources.gguf_rope import plain_rope


def recovered(base, head_dim, factors):
    header = GgufHeader({"llama.rope.freq_base": base}, {}, 0)
    stored = tuple(float(x) for x in np.asarray(factors, np.float32))
    metadata = Metadata(header, "llama", "x.gguf", {LLAMA3_FACTORS: stored})
    return plain_rope(metadata, head_dim)


@pytest.mark.parametrize(
    ("base", "head_dim", "factor", "high", "original"),
    [
        (500000.0, 128, 8.0, 4.0, 8192),  # Llama 3.1 and 3.3
        (500000.0, 64, 32.0, 4.0, 8192),  # Llama 3.2
        (500000.0, 128, 16.0, 4.0, 4096),
        (10000.0, 16, 8.0, 4.0, 64),
        (10000.0, 128, 2.5, 8.0, 2048),
        (1000000.0, 128, 10.0, 3.0, 5000),
        (500000.0, 128, 1.5, 2.5, 6000),
        (500000.0, 64, 4.0, 4.25, 8000),
        (10000.0, 64, 1.0, 4.0, 8192),  # stretches nothing
    ],
)
def test_the_parameters_come_back(base, head_dim, factor, high, original):
    rope = {
        "rope_theta": base,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    assert recovered(base, head_dim, llama3_factors(rope, head_dim)) == rope


def test_other_values_of_low_count_only_as_ratios():
    rope = {"rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 2.0}
    rope |= {"high_freq_factor": 8.0, "original_max_position_embeddings": 16384}
    factors = llama3_factors(rope, 128)
    found = recovered(500000.0, 128, factors)
    assert found["low_freq_factor"] == 1.0
    assert found["high_freq_factor"] == 4.0
    assert found["original_max_position_embeddings"] == 8192
    assert llama3_factors(found, 128) == factors


@pytest.mark.parametrize(
    "factors",
    [
        (),
        (1.0,) * 31,
        (0.0,) * 32,
        (-1.0,) * 32,
        (float("nan"),) * 32,
        (float("inf"),) * 32,
        tuple(1.0 + 0.3 * i for i in range(32)),
        (8.0,) * 31 + (1.0,),
        (1.0, 3.0) * 16,
    ],
)
def test_factors_of_another_rule_are_refused(factors):
    with pytest.raises(ArchitectureError, match="not Llama 3's frequency scaling"):
        recovered(10000.0, 64, factors)


def test_a_longrope_with_a_factor_of_its_own_scales_attention_by_it():
    rope = {"rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    usual, _ = longrope({**rope, "factor": 8.0}, 8, 4096, 512)
    assert usual == longrope(rope, 8, 4096, 512)[0]
    assert usual != longrope({**rope, "factor": 4.0}, 8, 4096, 512)[0]
