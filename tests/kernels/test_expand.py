"""Decoding of shaped sketches from their packed codes, against NumPy and the format's reader."""

from __future__ import annotations

import numpy as np
import pytest

from sketchconv.formats import grids
from sketchconv.kernels.ggml.expand import expand_plain, expand_rows
from sketchconv.kernels.ggml.shaped import GRIDS, key_of
from sketchconv.kernels.planes import pack_rows

FORMS = [(grid, bits) for grid, known in grids.GRIDS.items() for bits in known.bits]
every_form = pytest.mark.parametrize(("grid", "bits"), FORMS)


def sketch(grid: str, bits: int, rows: int = 7, columns: int = 192, groups: int = 3):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    fields = grids.GRIDS[grid].fields
    table = rng.standard_normal((rows, groups, fields)).astype(np.float16)
    table[0] = 0
    table[1] = -0.0
    table[2] = 2.0**-24  # the least float16
    table[3] = -65504
    return codes, table


@every_form
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_compiled_decoder_gives_the_bits_of_the_plain_ones(grid, bits, groups, threads):
    codes, table = sketch(grid, bits, groups=groups)
    wide, out = table.astype(np.float32), np.full(codes.shape, np.nan, np.float32)
    packed = pack_rows(codes, bits, groups)
    expand_rows(packed, wide, grid, bits, out, threads)
    plain = expand_plain(packed, wide, grid, bits, codes.shape[1])
    assert np.array_equal(out.view(np.uint32), plain.view(np.uint32))
    read = grids.decode(codes, table, grid, bits)
    assert np.array_equal(out.view(np.uint32), read.view(np.uint32))


@every_form
def test_levels_are_those_of_the_blocks(grid, bits):
    assert grids.levels(grid, bits).tolist() == list(GRIDS[key_of(grid, bits)].levels)
    assert GRIDS[key_of(grid, bits)].has_minimum == grids.GRIDS[grid].has_minimum


@every_form
def test_a_lut_of_scales_decodes_to_the_same(grid, bits):
    codes, table = sketch(grid, bits)
    lut = grids.expand(table, grid, bits)
    parts = codes.reshape(*table.shape[:2], -1).astype(np.intp)
    found = np.take_along_axis(lut, parts, axis=2).reshape(codes.shape)
    assert np.array_equal(found, grids.decode(codes, table, grid, bits))


def test_shapes_that_do_not_fit_are_refused():
    out, table = np.empty((2, 64), np.float32), np.ones((2, 2, 1), np.float32)
    with pytest.raises(ValueError, match="differ"):
        expand_rows(np.zeros((2, 2, 15), np.uint8), table, "iq4_nl", 4, out)
    with pytest.raises(ValueError, match="differ"):
        expand_rows(np.zeros((2, 2, 16), np.uint8), table, "affine", 4, out)
    with pytest.raises(ValueError, match="no grid 'affine' of 8 bits"):
        expand_rows(np.zeros((2, 2, 32), np.uint8), table, "affine", 8, out)
    with pytest.raises(ValueError, match="no grid 'affine_5' of 4 bits"):
        expand_rows(np.zeros((2, 2, 16), np.uint8), table, "affine_5", 4, out)
