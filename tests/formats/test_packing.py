"""planes-le: against the definition, at every number of bits and many group sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchconv.formats.packing import PLANES, nonzero_padding, pack, packed_size, unpack

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 64, 101]


def by_definition(group, bits):
    out, shift = [], 0
    for width in PLANES[bits]:
        plane = [0] * -(-len(group) * width // 8)
        for c, index in enumerate(group):
            plane[c * width // 8] |= ((int(index) >> shift) & (2**width - 1)) << (c * width % 8)
        out += plane
        shift += width
    return bytes(out)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("size", SIZES)
def test_pack_is_the_definition_and_unpack_its_inverse(bits, size):
    codes = np.random.default_rng(bits * 1000 + size).integers(0, 2**bits, (3, 2, size), np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, packed_size(size, bits))
    assert packed.tobytes() == b"".join(by_definition(g, bits) for g in codes.reshape(-1, size))
    assert (unpack(packed, bits, size, strict=True) == codes).all()
    assert nonzero_padding(packed, bits, size) == 0


def test_worked_example_of_the_specification():
    assert pack(np.array([5, 0, 7, 2, 4], np.uint8), 3).tobytes() == bytes.fromhex("b10015")


def test_planes_sum_to_the_bits():
    assert {bits: sum(widths) for bits, widths in PLANES.items()} == {b: b for b in range(1, 9)}


@pytest.mark.parametrize("bits", range(1, 9))
def test_noncontiguous_input(bits):
    codes = np.random.default_rng(1).integers(0, 2**bits, (12, 10), np.uint8)
    assert (pack(codes[::2, ::-1], bits) == pack(codes[::2, ::-1].copy(), bits)).all()
    packed = pack(codes, bits)
    wide = np.repeat(packed, 2, axis=0)
    assert (unpack(wide[::2], bits, 10) == codes).all()


@pytest.mark.parametrize(("bits", "size"), [(1, 7), (2, 3), (3, 5), (4, 1), (5, 3), (6, 7), (7, 9)])
def test_strict_unpack_refuses_padding(bits, size):
    packed = pack(np.zeros(size, np.uint8), bits)
    packed[-1] |= 0x80
    with pytest.raises(ValueError, match="padding"):
        unpack(packed, bits, size, strict=True)
    assert nonzero_padding(packed, bits, size) == 1
    assert (unpack(packed, bits, size) == 0).all()


@pytest.mark.parametrize("bits", range(1, 8))
def test_pack_refuses_an_index_beyond_the_bits(bits):
    with pytest.raises(ValueError, match="does not fit"):
        pack(np.array([0, 2**bits], np.uint8), bits)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="bits"):
        packed_size(4, bits)
    with pytest.raises(ValueError, match="bits"):
        pack(np.zeros(4, np.uint8), bits)


def test_wrong_dtype_and_size():
    with pytest.raises(ValueError, match="uint8"):
        pack(np.zeros(4, np.int64), 2)
    with pytest.raises(ValueError, match="uint8"):
        unpack(np.zeros(3, np.uint8), 2, 4)


@settings(deadline=None)  # a busy machine takes longer than its 200 ms for nothing
@given(st.integers(1, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_any_group(bits, values):
    codes = np.array(values, np.uint8) & np.uint8(2**bits - 1)
    assert pack(codes, bits).tobytes() == by_definition(codes, bits)
    assert (unpack(pack(codes, bits), bits, len(codes)) == codes).all()
