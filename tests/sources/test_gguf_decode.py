"""Every block type that GGUF sources read: our values are those of `gguf`, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from sketchconv.errors import SourceError
from sketchconv.formats.gguf_layout import GgufInfo
from sketchconv.formats.gguf_types import GGML_TYPES
from sketchconv.kernels.ggml.kinds import KINDS
from sketchconv.sources.gguf_decode import PLAIN, check_decodable, decode_rows

COLUMNS, ROWS = 768, 40
UNREAD = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}


def theirs(kind):
    """The decoder of the `gguf` package, if it has one."""
    try:
        number = gguf.GGMLQuantizationType[kind]
        size = GGML_TYPES[kind].block_bytes
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), number)
    except (KeyError, NotImplementedError):
        return None
    return lambda blocks: gguf.quants.dequantize(blocks, number)


READ = [kind for kind in GGML_TYPES if theirs(kind) is not None and kind not in UNREAD]


def test_all_of_the_k_types_and_most_others_are_there():
    assert set(KINDS) | set(PLAIN) <= set(READ)
    assert {"IQ2_XXS", "IQ2_S", "IQ3_S", "IQ1_M", "TQ1_0", "MXFP4"} <= set(READ)


def hard_blocks(kind, rng):
    """Rows of random bytes; all zeros, all ones; and every scale infinite or tiny in some."""
    size = GGML_TYPES[kind].row_bytes(COLUMNS)
    blocks = rng.integers(0, 256, (ROWS, size), dtype=np.uint8)
    blocks[0], blocks[1], blocks[2] = 0, 255, 128
    # The two bytes of a float16 near 1, wherever the type has its scales.
    blocks[3:10, ::2], blocks[3:10, 1::2] = 0, 0x3C
    return blocks


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", READ)
def test_values_are_those_of_the_gguf_package(kind):
    blocks = hard_blocks(kind, np.random.default_rng(len(kind)))
    tensor = GgufInfo("blk.0.ffn_up.weight", (ROWS, COLUMNS), GGML_TYPES[kind])
    check_decodable(tensor, "x.gguf")
    found = decode_rows(tensor, blocks.tobytes(), "x.gguf")
    wanted = np.asarray(theirs(kind)(blocks), np.float32).reshape(ROWS, COLUMNS)
    assert found.dtype == np.float32
    assert found.shape == (ROWS, COLUMNS)
    numbers = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), ~numbers)
    np.testing.assert_array_equal(found[numbers].view(np.uint32), wanted[numbers].view(np.uint32))
    assert numbers.mean() > 0.5
    assert decode_rows(tensor, b"", "x.gguf").shape == (0, COLUMNS)


@pytest.mark.parametrize("kind", sorted(UNREAD))
def test_types_that_no_model_is_stored_in_are_refused(kind):
    tensor = GgufInfo("a.weight", (2, 512), GGML_TYPES[kind])
    with pytest.raises(SourceError, match=f"'a.weight' is {kind}, which cannot be dequantized"):
        check_decodable(tensor, "x.gguf")
