"""Small models to put into files: numbers, sketches, documents."""

import struct

from vectorlib.plain import digest, pack, raw


class Numbers:
    """A small fixed generator (a linear congruence), the same on every machine."""

    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % n


def float_bytes(values, dtype):
    """Values to stored bytes; BF16 by cutting a binary32 whose lower half is zero."""
    if dtype == "F16":
        return b"".join(struct.pack("<e", v) for v in values)
    if dtype == "F32":
        return b"".join(struct.pack("<f", v) for v in values)
    return b"".join(struct.pack("<f", v)[2:] for v in values)


def single_bits(value):
    """The bits of a binary32 in hexadecimal."""
    return struct.pack(">f", value).hex()


def sketch(rows, columns, bits, groups, lut="F16", seed=1, table=None):
    """A sketch: record, tensors without names, and the bits of its values, row by row."""
    numbers, size = Numbers(seed), columns // groups
    index, luts, values = b"", b"", []
    for _ in range(rows):
        row = []
        for _ in range(groups):
            entries_ = table or [(numbers.below(512) - 256) / 128 for _ in range(2**bits)]
            codes = [numbers.below(2**bits) for _ in range(size)]
            index += pack(codes, bits)
            luts += float_bytes(entries_, lut)
            row += [single_bits(entries_[c]) for c in codes]
        values.append("".join(row))
    record = {"bits": bits, "dtype": "F32", "groups": groups, "lut": lut, "shape": [rows, columns]}
    width = len(index) // (rows * groups)
    return {
        "record": record,
        "index": ("U8", [rows, groups, width], index),
        "lut": (lut, [rows, groups, 2**bits], luts),
        "values": values,
    }


CODEBOOK = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def levels(grid, bits):
    """Section 4.2: the levels of a grid."""
    if grid == "iq4_nl":
        return CODEBOOK
    first = 0 if grid == "affine" else -(2 ** (bits - 1))
    return list(range(first, first + 2**bits))


def shaped(rows, columns, grid, bits, groups, seed=1, fields=None):
    """A shaped sketch; `fields` are the scales and minima of all groups, in place of random ones.

    Values are computed in doubles, in which product and sum are exact, and rounded once.
    """
    numbers, size = Numbers(seed), columns // groups
    width = 2 if grid == "affine" else 1
    index, stored, values = b"", [], []
    for _ in range(rows):
        row = []
        for _ in range(groups):
            own = fields or [(numbers.below(2048) - 1024) / 8192 for _ in range(width)]
            codes = [numbers.below(2**bits) for _ in range(size)]
            index += pack(codes, bits)
            stored += own
            lut = [own[0] * float(level) for level in levels(grid, bits)]
            lut = [entry + own[1] for entry in lut] if width > 1 else lut
            row += [single_bits(lut[code]) for code in codes]
        values.append("".join(row))
    record = {"bits": bits, "dtype": "BF16", "grid": grid, "groups": groups, "lut": "F16"}
    nbytes = len(index) // (rows * groups)
    return {
        "record": {**record, "shape": [rows, columns]},
        "index": ("U8", [rows, groups, nbytes], index),
        "scale": ("F16", [rows, groups, width], float_bytes(stored, "F16")),
        "values": values,
    }


def model(sketches, plain=(), **members):
    """Document and tensors for sketches by stem and plain tensors by name."""
    plain = dict(plain)
    tensors = dict(plain)
    for stem, s in sketches.items():
        tensors[stem + ".sketch_index"] = s["index"]
        part = "lut" if "lut" in s else "scale"
        tensors[f"{stem}.sketch_{part}"] = s[part]
    names = sorted(stem + ".weight" for stem in sketches)
    if names:
        tensors[names[0]] = ("U8", [1], b"\0")
    document = {
        "aliases": {},
        "digests": {n: digest(*t) for n, t in tensors.items()},
        "errors": {n: raw("1.234567e-02") for n in names},
        "extensions": {},
        "files": {},
        "kind": "model",
        "packing": "planes-le",
        "recipe": {"bits": 4},
        "sentinel": names[0] if names else None,
        "sketches": {stem + ".weight": s["record"] for stem, s in sketches.items()},
        "source": {"digest": "ab" * 32, "format": "safetensors", "id": "a/b", "revision": None},
        "tool": "vectors 1",
        "version": "1.1" if any("scale" in s for s in sketches.values()) else "1.0",
    }
    return {**document, **members}, tensors


def with_files(document, tensors, files):
    """Add files to a bundle."""
    document, tensors = dict(document), dict(tensors)
    document["files"] = {}
    document["digests"] = dict(document["digests"])
    for i, path in enumerate(sorted(files)):
        name = f"sktch.file.{i:04d}" if files[path] else ""
        document["files"][path] = name
        if name:
            tensors[name] = ("U8", [len(files[path])], files[path])
            document["digests"][name] = digest(*tensors[name])
    return document, tensors
