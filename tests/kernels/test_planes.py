"""Packing into bit planes, against a bit-by-bit oracle and the package's own `formats`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchconv.formats import packing
from sketchconv.kernels import cpu

PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def pack_slowly(indices: list[int], bits: int) -> bytes:
    """One group, by way of one long integer per plane."""
    packed, shift = b"", 0
    for width in PLANES[bits]:
        whole = 0
        for column, index in enumerate(indices):
            whole |= ((index >> shift) & ((1 << width) - 1)) << (column * width)
        packed += whole.to_bytes((len(indices) * width + 7) // 8, "little")
        shift += width
    return packed


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 17, 64, 65])
def test_same_bytes_as_the_oracle_and_as_formats(size, groups, bits):
    rng = np.random.default_rng(size * 8 + bits)
    indices = rng.integers(0, 1 << bits, (4, groups * size), dtype=np.uint8)
    packed = cpu.pack_rows(indices, bits, groups)
    grouped = indices.reshape(4, groups, size)
    expected = [[pack_slowly(g.tolist(), bits) for g in row] for row in grouped]
    assert [[g.tobytes() for g in row] for row in packed] == expected
    np.testing.assert_array_equal(packed, packing.pack(grouped, bits))
    np.testing.assert_array_equal(packing.unpack(packed, bits, size), grouped)


@given(bits=st.integers(1, 8), size=st.integers(1, 70), groups=st.integers(1, 4), data=st.data())
@settings(max_examples=60, deadline=None)
def test_round_trip(bits, size, groups, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, 1 << bits, (2, groups * size), dtype=np.uint8)
    packed = cpu.pack_rows(indices, bits, groups)
    assert packed.shape == (2, groups, packing.packed_size(size, bits))
    unpacked = packing.unpack(packed, bits, size, strict=True)
    np.testing.assert_array_equal(unpacked.reshape(indices.shape), indices)


def test_many_rows_on_many_threads():
    indices = np.random.default_rng(0).integers(0, 8, (301, 700), dtype=np.uint8)
    packed = cpu.pack_rows(indices, 3, 2)
    np.testing.assert_array_equal(packed, packing.pack(indices.reshape(301, 2, 350), 3))
    for threads in (1, 3):
        assert packed.tobytes() == cpu.pack_rows(indices, 3, 2, threads=threads).tobytes()


def test_views_are_packed_like_copies():
    indices = np.random.default_rng(0).integers(0, 16, (6, 80), dtype=np.uint8)
    view = indices[::2, ::-1]
    np.testing.assert_array_equal(
        cpu.pack_rows(view, 4, 1), cpu.pack_rows(np.ascontiguousarray(view), 4, 1)
    )


def test_what_does_not_fit_is_refused():
    indices = np.full((1, 6), 4, np.uint8)
    with pytest.raises(ValueError, match="index 4 does not fit 2 bits"):
        cpu.pack_rows(indices, 2, 1)
    with pytest.raises(ValueError, match="4 groups do not divide 6"):
        cpu.pack_rows(indices, 3, 4)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"bits is {bits}"):
            cpu.pack_rows(np.zeros((1, 6), np.uint8), bits, 1)
    with pytest.raises(ValueError, match="threads is 0"):
        cpu.pack_rows(indices, 3, 1, threads=0)
