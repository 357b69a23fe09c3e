"""A toy model, written in every form, for the tests of the format."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from sketchconv.formats.packing import pack
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import TensorInfo
from sketchconv.formats.writer import BundleWriter, Draft, FolderWriter, Results

CONFIG = b'{"quantization_config": {"quant_method": "sktch", "format": "1.0"}}'


@dataclass
class Toy:
    """Sketches of 1 to 8 bits with odd groups, two plain tensors, an alias and two files."""

    records: list[SketchRecord]
    codes: dict[str, np.ndarray]
    luts: dict[str, np.ndarray]
    plain: dict[str, tuple[TensorInfo, bytes]]
    files: dict[str, bytes] = field(default_factory=lambda: {"config.json": CONFIG, "e.txt": b""})

    @property
    def draft(self):
        infos = tuple(info for info, _ in self.plain.values())
        return Draft(
            sketches=tuple(self.records),
            plain=infos,
            aliases={"head.weight": self.records[0].name},
            recipe={"bits": 4, "name": "tøy"},
            source={"id": "a/toy", "revision": None, "format": "safetensors"},
            tool="test 1",
        )

    @property
    def results(self):
        return Results({r.name: 0.01 * r.bits for r in self.records}, "a" * 64)

    def tensors(self):
        """Stored name -> bytes, in the draft's order."""
        out = {}
        for r in self.records:
            out[r.index_name] = pack(self.codes[r.name], r.bits).tobytes()
            out[r.lut_name] = self.luts[r.name].tobytes()
        return out | {name: data for name, (_, data) in self.plain.items()}

    def dense(self, name):
        """The float32 weight."""
        record = next(r for r in self.records if r.name == name)
        values = np.take_along_axis(self.luts[name], self.codes[name].astype(np.intp), axis=2)
        return values.astype(np.float32).reshape(record.shape)

    def fill(self, writer):
        for name, data in self.tensors().items():
            writer.append(name, data)
        writer.commit(self.results)

    def bundle(self, path: Path, **options):
        with BundleWriter(path, self.draft, self.files, **options) as writer:
            self.fill(writer)
        return path

    def folder(self, path: Path, max_shard_size=10**9, **options):
        with FolderWriter(path, self.draft, self.files, max_shard_size, **options) as writer:
            self.fill(writer)
        return path


def make_toy(rows=4, columns=21, groups=3, bits=range(1, 9)):
    rng = np.random.default_rng(5)
    size = columns // groups
    records = [
        SketchRecord(f"l.{b}.weight", (rows, columns), "BF16", b, groups, "F16") for b in bits
    ]
    codes = {
        r.name: rng.integers(0, 2**r.bits, (rows, groups, size), dtype=np.uint8) for r in records
    }
    luts = {r.name: rng.normal(size=(rows, groups, 2**r.bits)).astype(np.float16) for r in records}
    plain = {
        "norm.weight": (TensorInfo("norm.weight", "F32", (3,)), b"abcdefghijkl"),
        "scale": (TensorInfo("scale", "BF16", ()), b"\x80\x3f"),
    }
    return Toy(records, codes, luts, plain)


@pytest.fixture(scope="session")
def toy():
    return make_toy()


@pytest.fixture(scope="session")
def small_toy():
    return make_toy(rows=1, columns=3, groups=1, bits=(2,))


@pytest.fixture(scope="session")
def toy_factory():
    return make_toy


@pytest.fixture(scope="session")
def raw_file():
    """A function that puts a header text and data into one file."""

    def build(header, data=b"", pad=True):
        header = header.encode() if isinstance(header, str) else header
        header += b" " * (-(8 + len(header)) % 64) if pad else b""
        return struct.pack("<Q", len(header)) + header + data

    return build
