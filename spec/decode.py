"""Decode a tensor of a `.sktch` file to float32; from `sktch.md` alone, standard library only.

    python spec/decode.py FILE TENSOR [--source] [--rows A:B] [--hex | --out RAW]

FILE is a bundle or one weight file of a folder; TENSOR is a sketched weight, an alias, or a plain
tensor of F32, F16 or BF16. With --source it is a tensor of the source, transposed or stacked as it
was there (4.3). It is the specification's second opinion: plain and slow, it checks what
decoding needs and the digests of what it reads, and leaves the rest to a full reader.
"""

import argparse
import hashlib
import json
import struct
import sys
from array import array
from pathlib import Path

SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
SIZES |= {"I16": 2, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
CODEBOOK = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
GRIDS = {"affine": {4, 5}, "iq4_nl": {4}, "symmetric": {4, 5, 8}}
RECORD = {"bits", "dtype", "groups", "lut", "shape"}
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
MAX_HEADER = 67108864


class DecodeError(Exception):
    """The file cannot be decoded."""


class File:
    """One file: its entries, its document and its data."""

    def __init__(self, path):
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise DecodeError(f"header length {length} [SKT-003]")
            header = json.loads(file.read(length).decode("utf-8"))
        metadata = header.pop("__metadata__", {})
        if "sktch" not in metadata:
            raise DecodeError("no document [SKT-042]")
        self.entries, self.data = header, 8 + length
        self.document = json.loads(metadata["sktch"])
        self.check(metadata["sktch"])
        if sum(end - begin for begin, end in self.spans()) != size - self.data:
            raise DecodeError("data and header do not fit [SKT-029]")

    def check(self, text):
        """The document must be one that this file can be decoded by."""
        check_document(self.document, text)

    def spans(self):
        """The byte range of every tensor."""
        return [tuple(entry["data_offsets"]) for entry in self.entries.values()]

    def read(self, name, begin=0, end=None):
        """Bytes `[begin, end)` of a stored tensor."""
        first, last = self.entries[name]["data_offsets"]
        end = last - first if end is None else end
        with self.path.open("rb") as file:
            file.seek(self.data + first + begin)
            data = file.read(end - begin)
        if len(data) != end - begin:
            raise DecodeError(f"{name}: the file is too short [SKT-013]")
        return data

    def check_digest(self, name):
        """SKT-081 for one stored tensor."""
        entry = self.entries[name]
        shape = ",".join(str(d) for d in entry["shape"])
        found = hashlib.sha256(f"{entry['dtype']} {shape}\n".encode() + self.read(name))
        if found.hexdigest() != self.document["digests"][name]:
            raise DecodeError(f"{name}: digest mismatch [SKT-081]")

    def shape(self, name):
        """Rows and columns of a tensor as `rows` gives them; a vector or scalar is one row."""
        name = self.document["aliases"].get(name, name)
        if name in self.document["sketches"]:
            return tuple(self.document["sketches"][name]["shape"])
        if name not in self.entries:
            raise DecodeError(f"no tensor {name}")
        shape = self.entries[name]["shape"]
        columns = shape[-1] if shape else 1
        count = 1
        for d in shape:
            count *= d
        return count // columns, columns

    def rows(self, name, begin=0, end=None):
        """Yield the rows `[begin, end)` of a tensor as `array('f')`."""
        total, columns = self.shape(name)
        end = total if end is None else min(end, total)
        name = self.document["aliases"].get(name, name)
        record = self.document["sketches"].get(name)
        for row in range(begin, end):
            if record is not None:
                yield self.sketch_row(name.removesuffix(".weight"), record, row)
            else:
                dtype = self.entries[name]["dtype"]
                width = columns * SIZES[dtype]
                yield array("f", floats(self.read(name, row * width, (row + 1) * width), dtype))

    def source_rows(self, name, begin=0, end=None):
        """Section 4.3: rows `[begin, end)` of a tensor of the source; a stack's one by one."""
        source = self.document["source"]
        parts = [name]
        if name in source.get("stacked", {}):
            stem, _, leaf = name.rpartition(".")
            parts = [f"{stem}.{n}.{leaf}.weight" for n in range(source["stacked"][name])]
        rows = [row for part in parts for row in self.rows(part)]
        if name in source.get("transposed", []):
            rows = [array("f", column) for column in zip(*rows, strict=True)]
        yield from rows[begin:end]

    def sketch_row(self, stem, record, row):
        """Section 4: W[r, c] = lut[r, c // GS, index[r, c]]; 4.2 for a shaped sketch."""
        bits, groups, grid = record["bits"], record["groups"], record.get("grid")
        size = record["shape"][1] // groups
        packed = sum(-(-size * width // 8) for width in PLANES[bits]) * groups
        stored = {None: 2**bits, "affine": 2}.get(grid, 1)
        table = stored * SIZES[record["lut"]] * groups
        index = self.read(stem + ".sketch_index", row * packed, (row + 1) * packed)
        name = stem + (".sketch_lut" if grid is None else ".sketch_scale")
        lut = floats(self.read(name, row * table, (row + 1) * table), record["lut"])
        out, step = array("f"), packed // groups
        for g in range(groups):
            entries = lut[g * stored : (g + 1) * stored]
            if grid is not None:
                entries = shaped(grid, bits, *entries)
            codes = unpack(index[g * step : (g + 1) * step], bits, size)
            out.extend([entries[code] for code in codes])
        return out


def check_document(document, text):
    """What decoding rests on: version, kind, packing and the seal (SKT-052 to SKT-055)."""
    if document["version"].split(".")[0] != "1":
        raise DecodeError(f"version {document['version']} [SKT-052]")
    if document["kind"] != "model" or document["packing"] != "planes-le":
        raise DecodeError("unknown kind or packing [SKT-053, SKT-054]")
    known = RECORD if document["version"] == "1.0" else RECORD | {"grid"}
    for name, record in document["sketches"].items():
        if not RECORD <= set(record) <= known:
            raise DecodeError(f"{name}: members {sorted(record)} [SKT-061]")
        if record.get("grid", "affine") not in GRIDS:
            raise DecodeError(f"{name}: unknown grid {record['grid']} [SKT-073]")
        if "grid" in record and (record["lut"], record["bits"] in GRIDS[record["grid"]]) != (
            "F16",
            True,
        ):
            raise DecodeError(f"{name}: no such shape [SKT-073]")
    check_seal(document, text)


def check_seal(document, text):
    """SKT-055."""
    # Only the root's member can stand there as an unescaped key with this very value.
    blank = text.replace(f'"seal":"{document["seal"]}"', f'"seal":"{"0" * 64}"')
    if hashlib.sha256(blank.encode()).hexdigest() != document["seal"]:
        raise DecodeError("the document does not match its seal [SKT-055]")


def shaped(grid, bits, scale, minimum=None):
    """Section 4.2: the LUT of a group. In doubles all is exact; `array` rounds the sum once."""
    if grid == "iq4_nl":
        levels = CODEBOOK
    else:
        first = 0 if grid == "affine" else -(2 ** (bits - 1))
        levels = range(first, first + 2**bits)
    lut = [scale * float(level) for level in levels]
    return lut if minimum is None else [entry + minimum for entry in lut]


def unpack(group, bits, count):
    """Section 5: the indices of one group."""
    out, begin, shift = [0] * count, 0, 0
    for width in PLANES[bits]:
        mask = 2**width - 1
        for c in range(count):
            at = c * width
            out[c] |= (group[begin + at // 8] >> at % 8 & mask) << shift
        begin += -(-count * width // 8)
        shift += width
    return out


def floats(data, dtype):
    """Stored bytes of F32, F16 or BF16 to Python floats, all exact."""
    if dtype == "F16":
        return struct.unpack(f"<{len(data) // 2}e", data)
    if dtype == "BF16":
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    elif dtype != "F32":
        raise DecodeError(f"dtype {dtype} is not decoded to float32")
    return struct.unpack(f"<{len(data) // 4}f", data)


def row_range(text):
    """`A:B` to two integers, either of which may be absent."""
    begin, _, end = text.partition(":")
    return int(begin or 0), int(end) if end else None


def raw_bytes(row):
    """A row as little-endian float32 bytes."""
    return struct.pack(f"<{len(row)}f", *row)


def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="decode a tensor of a .sktch file to float32")
    parser.add_argument("file")
    parser.add_argument("tensor")
    parser.add_argument("--rows", type=row_range, default=(0, None), metavar="A:B")
    parser.add_argument("--source", action="store_true", help="a tensor of the source, see 4.3")
    parser.add_argument("--hex", action="store_true", help="print the bits of each float32")
    parser.add_argument("--out", help="write raw little-endian float32 to this file instead")
    options = parser.parse_args(arguments)
    try:
        file = File(options.file)
        read = file.source_rows if options.source else file.rows
        rows = read(options.tensor, *options.rows)
        if options.out:
            with Path(options.out).open("wb") as out:
                for row in rows:
                    out.write(raw_bytes(row))
            return 0
        for row in rows:
            texts = [struct.pack(">f", v).hex() if options.hex else f"{v:.9g}" for v in row]
            print(" ".join(texts))
    except (DecodeError, OSError, ValueError, KeyError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
