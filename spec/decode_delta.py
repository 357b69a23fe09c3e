"""Apply a delta to its base, weight by weight; from `delta.md` alone, standard library only.

    python spec/decode_delta.py DELTA BASE [WEIGHT] [--hex]

DELTA is a file of kind delta, BASE the bundle (or weight file) that it was made for. Without WEIGHT
the weights are listed. It prints each group of the tuned table on a line of its own. As `decode.py`
it is a second opinion: it checks binding, digests and result, and leaves all else to a full reader.
"""

import argparse
import hashlib
import struct
import sys

from decode import DecodeError, File, check_seal, floats

BITS = {"F16": "U16", "BF16": "U16", "F32": "U32"}


class Delta(File):
    """One delta file."""

    def check(self, text):
        """Kind, version and seal (DLT-001, DLT-002, SKT-055)."""
        if self.document["kind"] != "delta":
            raise DecodeError(f"kind {self.document['kind']} is not delta [DLT-001]")
        if self.document["version"].split(".")[0] != "1":
            raise DecodeError(f"version {self.document['version']} [DLT-002]")
        check_seal(self.document, text)

    def check_base(self, base):
        """DLT-040 for all records."""
        for name, record in self.document["weights"].items():
            stem = name.removesuffix(".weight")
            digests = base.document["digests"]
            table = base.entries.get(f"{stem}.{record['table']}", {})
            if (table.get("dtype"), table.get("shape")) != (record["lut"], record["shape"]):
                raise DecodeError(f"{name}: the base has no such table [DLT-040]")
            if digests[f"{stem}.{record['table']}"] != record["base"]:
                raise DecodeError(f"{name}: the base has another table [DLT-040]")
            if digests[f"{stem}.sketch_index"] != record["index"]:
                raise DecodeError(f"{name}: the base has other indices [DLT-040]")

    def changed(self, name):
        """Section 4: the numbers of the changed groups, in order."""
        record, stem = self.document["weights"][name], name.removesuffix(".weight")
        rows, groups, _ = record["shape"]
        if stem + ".delta_groups" not in self.entries:
            return list(range(rows * groups))
        bits = self.read(stem + ".delta_groups")
        return [i for i in range(rows * groups) if bits[i // 8] >> i % 8 & 1]

    def tuned(self, name, base):
        """Section 6: the bytes of the tuned table; DLT-041 and DLT-042."""
        record, stem = self.document["weights"][name], name.removesuffix(".weight")
        for tensor in [t for t in self.entries if t.rpartition(".")[0] == stem]:
            self.check_digest(tensor)
        base.check_digest(f"{stem}.{record['table']}")
        dtype, width = record["lut"], record["shape"][2]
        size = width * (4 if dtype == "F32" else 2)
        out = bytearray(base.read(f"{stem}.{record['table']}"))
        for row, group in enumerate(self.changed(name)):
            part = slice(group * size, (group + 1) * size)
            out[part] = self.group(stem, row, width, bytes(out[part]), dtype)
        shape = ",".join(str(d) for d in record["shape"])
        if any(v - v != 0 for v in floats(bytes(out), dtype)):
            raise DecodeError(f"{name}: not finite [DLT-041]")
        if hashlib.sha256(f"{dtype} {shape}\n".encode() + out).hexdigest() != record["tuned"]:
            raise DecodeError(f"{name}: another result than recorded [DLT-042]")
        return bytes(out)

    def group(self, stem, row, width, base, dtype):
        """One changed group: the bytes of the base's to the bytes of the tuned one."""
        mode, values = self.document["mode"], self.document["values"]
        stored = BITS[dtype] if mode == "xor" else dtype if values == "same" else values
        if self.entries[stem + ".delta_lut"]["dtype"] != stored:
            raise DecodeError(f"{stem}: expected {stored} [DLT-020]")
        size = width * {"I8": 1, "F32": 4, "U32": 4}.get(stored, 2)
        raw = self.read(stem + ".delta_lut", row * size, (row + 1) * size)
        if mode == "xor":
            return bytes(a ^ b for a, b in zip(base, raw, strict=True))
        if values == "I8":
            at = row // self.document["span"] * 2
            (scale,) = floats(self.read(stem + ".delta_scale", at, at + 2), "F16")
            numbers = [c * scale / 128 for c in struct.unpack(f"<{width}b", raw)]
        else:
            numbers = floats(raw, stored)
        if mode == "add":
            # In doubles, then to binary32: section 6 says that this is the same.
            pairs = zip(floats(base, dtype), numbers, strict=True)
            numbers = [single(b + v) for b, v in pairs]
        return b"".join(rounded(v, dtype) for v in numbers)


def single(value):
    """A double rounded to binary32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def rounded(value, dtype):
    """A binary32 number rounded to F16, BF16 or F32: nearest, ties to even."""
    if dtype == "F16":
        return struct.pack("<e", value)
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    if dtype == "F32":
        return struct.pack("<I", bits)
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="apply a delta to its base")
    parser.add_argument("delta")
    parser.add_argument("base")
    parser.add_argument("weight", nargs="?")
    parser.add_argument("--hex", action="store_true", help="print the stored bytes of each group")
    options = parser.parse_args(arguments)
    try:
        delta, base = Delta(options.delta), File(options.base)
        delta.check_base(base)
        if options.weight is None:
            print("\n".join(sorted(delta.document["weights"])))
            return 0
        record = delta.document["weights"][options.weight]
        table = delta.tuned(options.weight, base)
        size = record["shape"][2] * (4 if record["lut"] == "F32" else 2)
        for begin in range(0, len(table), size):
            part = table[begin : begin + size]
            numbers = floats(part, record["lut"])
            print(part.hex() if options.hex else " ".join(f"{v:.9g}" for v in numbers))
    except (DecodeError, OSError, ValueError, KeyError, OverflowError, struct.error) as error:
        print(f"{options.delta}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
