"""8-bit floats: every code, blocks that do not divide a row, values beyond float32."""

from __future__ import annotations

import numpy as np
import pytest

from sketchconv.kernels.float8 import E4M3, scaled, scaled_reference


def test_every_code():
    torch = pytest.importorskip("torch")
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy())


@pytest.mark.parametrize(("width", "columns"), [(256, 128), (300, 128), (5, 128), (7, 1), (9, 9)])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_is_the_reference_bit_for_bit(width, columns, threads):
    rng = np.random.default_rng(width)
    rows = rng.integers(0, 256, (300, width + 8), dtype=np.uint8)
    scales = rng.standard_normal((300, -(-width // columns))).astype(np.float32)
    scales[0], scales[1], scales[2], scales[3] = 0.0, 3e38, 1e-45, np.nan
    found = scaled(rows, width, scales, columns, threads=threads)
    expected = scaled_reference(rows[:, :width], scales, columns)
    np.testing.assert_array_equal(found, expected)
    assert np.isnan(found[3]).all()


def test_sizes_that_do_not_fit_are_refused():
    rows, scales = np.zeros((4, 10), np.uint8), np.zeros((4, 1), np.float32)
    for width, columns in ((11, 128), (10, 5)):
        with pytest.raises(ValueError, match="do not fit"):
            scaled(rows, width, scales, columns)
