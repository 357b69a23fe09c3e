"""Every changed byte is found, wherever it is."""

import numpy as np
import pytest

from sketchconv.formats.reader import SktchFile
from sketchconv.formats.validate import validate


def test_flipped_bytes_of_a_bundle(tmp_path, small_toy):
    """Every second byte of the header and the data, one random other value each."""
    path = small_toy.bundle(tmp_path / "a.sktch")
    good, rng, missed = path.read_bytes(), np.random.default_rng(3), []
    for at in range(0, len(good), 2):
        raw = bytearray(good)
        raw[at] ^= int(rng.integers(1, 256))
        path.write_bytes(raw)
        if not list(validate(path)):
            missed.append(at)
    assert missed == []
    path.write_bytes(good)
    assert list(validate(path)) == []


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, 0xFF])
def test_flipped_bytes_of_shards(tmp_path, toy_factory, mask):
    toy = toy_factory(rows=1, columns=3, groups=1, bits=(2, 3))
    folder = toy.folder(tmp_path / "m", 10)
    paths = sorted(folder.glob("*.safetensors"))
    assert len(paths) > 1
    missed = []
    for path in paths:
        good = path.read_bytes()
        for at in range(mask % 7, len(good), 17):
            raw = bytearray(good)
            raw[at] ^= mask
            path.write_bytes(raw)
            if not list(validate(folder)):
                missed.append((path.name, at))
        path.write_bytes(good)
    assert missed == []
    assert list(validate(folder)) == []


def test_cut_and_longer_files(tmp_path, small_toy):
    path = small_toy.bundle(tmp_path / "a.sktch")
    good = path.read_bytes()
    for size in range(0, len(good), 31):
        path.write_bytes(good[:size])
        assert list(validate(path)), size
    for tail in (b"\0", b" ", b"\n", good):
        path.write_bytes(good + tail)
        assert list(validate(path)), tail[:3]


def test_all_findings_and_progress(tmp_path, toy):
    path = toy.bundle(tmp_path / "a.sktch")
    raw = bytearray(path.read_bytes())
    with SktchFile.open(path) as file:
        spots = [file.container.entries[name].begin for name in ("norm.weight", "l.8.sketch_index")]
    for at in spots:
        raw[at] ^= 1
    path.write_bytes(raw)
    calls = []
    found = list(validate(path, lambda done, total: calls.append((done, total))))
    assert [f.requirement for f in found] == ["SKT-081", "SKT-081"]
    assert "recorded" in str(found[0])
    assert calls[-1][0] == calls[-1][1]
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)
