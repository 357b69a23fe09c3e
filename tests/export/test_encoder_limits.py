"""Values at the edge of what a type's blocks can hold."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from sketchconv.errors import WeightError
from sketchconv.export.encoders import ENCODERS

HALF_SCALES = [n for n in ENCODERS if n not in ("F32", "F16", "BF16", "MXFP4")]


@pytest.mark.parametrize("name", HALF_SCALES)
@pytest.mark.parametrize("sign", [1, -1])
def test_scales_beyond_f16_are_refused(name, sign):
    rows = np.zeros((3, 512), np.float32)
    rows[1, 300] = sign * 1e9
    with pytest.raises(WeightError, match=r"beyond F16|takes values"):
        ENCODERS[name].encode(rows)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_a_minimum_beyond_f16_is_refused_though_the_step_fits(name):
    rows = np.full((1, 256), -70000.0, np.float32)
    with pytest.raises(WeightError, match="takes values at most"):
        ENCODERS[name].encode(rows)


def test_mxfp4_holds_the_largest_values():
    rows = np.full((1, 32), np.finfo(np.float32).max / 2, np.float32)
    back = gguf.quants.dequantize(ENCODERS["MXFP4"].encode(rows), gguf.GGMLQuantizationType.MXFP4)
    assert np.isfinite(back).all()
    assert (back > rows / 2).all()
