"""GGUF files made to mislead: refused from their headers, by re-export too."""

from __future__ import annotations

import struct

import pytest

from sketchconv.errors import SourceError
from sketchconv.formats import gguf_values as v
from sketchconv.sources.gguf_blocks import GgufBlocks
from sketchconv.sources.gguf_header import read_header


def gguf_file(path, offsets, values=b"", keys=0):
    """One F32 tensor of 16 values per offset."""
    table = b"".join(
        v.text_bytes(f"t{i}") + struct.pack("<IQIQ", 1, 16, 0, offset)
        for i, offset in enumerate(offsets)
    )
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(offsets), keys) + values + table
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(max(offsets) + 64))
    return path


@pytest.mark.parametrize("offsets", [(0, 0), (0, 32), (96, 32, 64)])
def test_tensors_that_share_bytes_are_refused(offsets, tmp_path):
    with pytest.raises(SourceError, match=r"tensor 't\d' begins at byte \d+, inside 't\d'"):
        GgufBlocks(gguf_file(tmp_path / "x.gguf", offsets))


def test_tensors_in_any_order_with_gaps_are_taken(tmp_path):
    blocks = GgufBlocks(gguf_file(tmp_path / "x.gguf", (192, 0, 64)))
    assert list(blocks.tensors) == ["t0", "t1", "t2"]
    blocks.close()


@pytest.mark.parametrize("kind", [0, 8])
def test_arrays_of_too_many_items_are_refused_before_they_are_walked(kind, tmp_path):
    count = (1 << 24) + 1
    path = tmp_path / "x.gguf"
    array = v.text_bytes("k") + struct.pack("<IIQ", 9, kind, count)
    gguf_file(path, (0,), array, keys=1)
    with path.open("r+b") as file:
        file.truncate(1 << 28)  # sparse: room for as many empty strings
    with pytest.raises(SourceError, match=f"array 'k' of {count} items; at most {1 << 24}"):
        read_header(path)
