"""Products with shaped sketches for few tokens, against float64 and against themselves."""

from __future__ import annotations

import numpy as np
import pytest

from sketchconv.formats import grids
from sketchconv.kernels.dispatch import AVX2_FEATURES, why_not
from sketchconv.kernels.ggml.expand import expand_plain
from sketchconv.kernels.ggml.gemv import multiply_kernel, multiply_plain
from sketchconv.kernels.planes import pack_rows

FORMS = [(grid, bits) for grid, known in grids.GRIDS.items() for bits in known.bits]
ROWS, COLUMNS = 37, 192
fast_way = pytest.param(
    True, marks=pytest.mark.skipif(why_not(AVX2_FEATURES) is not None, reason="no AVX2 here")
)
every_form = pytest.mark.parametrize(("grid", "bits"), FORMS)
every_way = pytest.mark.parametrize("fast", [fast_way, False])


def sketch(grid, bits, groups):
    """Rows of random codes and scales; the first ones are hard."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (ROWS, COLUMNS), dtype=np.uint8)
    codes[0], codes[1], codes[2] = 0, (1 << bits) - 1, 1 << (bits - 1)
    table = rng.standard_normal((ROWS, groups, grids.GRIDS[grid].fields)).astype(np.float16)
    table[3], table[4], table[5], table[6] = 0, -0.0, 2.0**-24, -65504
    table[7, 0] = 2.0**-15
    return pack_rows(codes, bits, groups), table


def run(kernel, packed, table, x, half=0, spans=((0, ROWS),)):
    """The kernel over spans of rows; x and y are float32, or the bits of bfloat16 if `half`."""
    groups = table.shape[1]
    y = np.full((len(x), ROWS), 0x7FC0 if half else np.nan, np.uint16 if half else np.float32)
    x = np.ascontiguousarray(x)
    for begin, end in spans:
        kernel(
            *(begin, end, packed.ctypes.data, table.ctypes.data, x.ctypes.data, y.ctypes.data),
            *(half, len(x), ROWS, groups, COLUMNS // groups),
        )
    return y


def activations(tokens):
    return np.random.default_rng(1).standard_normal((tokens, COLUMNS)).astype(np.float32)


@every_form
@every_way
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_products_are_those_of_the_decoded_rows(grid, bits, fast, groups):
    packed, table = sketch(grid, bits, groups)
    kernel = multiply_kernel(grid, bits, fast, groups * 32 == COLUMNS)
    x = activations(7)
    found = run(kernel, packed, table, x)
    expected = multiply_plain(x, packed, table, grid, bits)
    # Every sum has fewer than twice as many terms as there are columns, each rounded once.
    zero = np.abs(table.astype(np.float32))
    reach = np.abs(grids.levels(grid, bits)).max()
    sizes = zero[..., 0] * reach + (zero[..., 1] if zero.shape[2] > 1 else 0)
    room = np.abs(x) @ np.repeat(sizes, COLUMNS // groups, axis=1).T * 2 * COLUMNS * 2.0**-24
    assert (np.abs(found - expected) <= room).all()
    weights = expand_plain(packed, table.astype(np.float32), grid, bits, COLUMNS)
    assert (found[:, ~weights.any(axis=1)] == 0).all()
    assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


@every_form
@every_way
def test_no_result_depends_on_its_company(grid, bits, fast):
    packed, table = sketch(grid, bits, 6)
    kernel = multiply_kernel(grid, bits, fast, True)
    x = activations(7)
    together = run(kernel, packed, table, x)
    for token in range(len(x)):
        alone = run(kernel, packed, table, x[token : token + 1])
        np.testing.assert_array_equal(alone[0], together[token])
    for spans in (((0, 1), (1, 20), (20, 37)), ((17, 37), (0, 17))):
        np.testing.assert_array_equal(run(kernel, packed, table, x, spans=spans), together)
    assert run(kernel, packed, table, x[:0]).shape == (0, ROWS)


@every_form
@every_way
def test_bfloat16_goes_in_and_comes_out(grid, bits, fast):
    packed, table = sketch(grid, bits, 6)
    kernel = multiply_kernel(grid, bits, fast, True)
    short = (activations(5).view(np.uint32) >> 16).astype(np.uint16)
    wide = (short.astype(np.uint32) << 16).view(np.float32)
    exact = run(kernel, packed, table, wide).view(np.uint32)
    odd = (exact >> 16) & 1
    rounded = ((exact + 0x7FFF + odd) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(run(kernel, packed, table, short, half=1), rounded)


@every_way
def test_what_is_not_finite_stays_with_its_token(fast):
    packed, table = sketch("iq4_nl", 4, 6)
    kernel = multiply_kernel("iq4_nl", 4, fast, True)
    x = activations(5)
    good = run(kernel, packed, table, x)
    x[2, 70] = np.nan
    found = run(kernel, packed, table, x)
    assert np.isnan(found[2]).all()
    rest = [0, 1, 3, 4]
    np.testing.assert_array_equal(found[rest], good[rest])


def test_grids_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match="no grid 'iq4_nl' of 5 bits"):
        multiply_kernel("iq4_nl", 5, False, True)
