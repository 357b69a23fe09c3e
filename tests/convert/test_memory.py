"""Sizes as users write them, and the memory budget."""

from __future__ import annotations

import pytest

from sketchconv.errors import PlanError
from sketchconv.memory import DEFAULT_CHUNK_BYTES, anonymous_bytes, chunk_budget, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("12B", 12),
        ("5GB", 5_000_000_000),
        ("1.5gb", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("2G", 2 << 30),
        (" 3 kB ", 3000),
        ("1TB", 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "0", "0.1", "1e9", "5 GB 3", "nan"])
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_the_budget_never_exceeds_the_limit_and_a_tiny_limit_is_refused():
    assert chunk_budget(None) == DEFAULT_CHUNK_BYTES
    assert chunk_budget(1 << 50) == DEFAULT_CHUNK_BYTES
    limit = anonymous_bytes() + (100 << 20)
    assert chunk_budget(limit) <= 100 << 20
    with pytest.raises(PlanError, match="--max-memory"):
        chunk_budget(1 << 20)


def test_anonymous_memory_grows_with_what_is_held():
    before = anonymous_bytes()
    held = bytearray(b"\1") * (64 << 20)
    assert anonymous_bytes() - before > (32 << 20)
    assert len(held) == 64 << 20
