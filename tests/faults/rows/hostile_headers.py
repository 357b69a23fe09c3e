"""Bad headers, and whole bad files, in the place of the weights of a checkpoint."""

from __future__ import annotations

import json
import struct

from rows.still_valid import framed

_ONE = b'"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
_ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def headers():
    """Headers of a foreign checkpoint, by name, with 16 bytes of data behind them."""
    bad = {
        "root-array": b"[]", "bom": b'\xef\xbb\xbf{}', "bad-utf8": b'{"\xff":1}', "nul": b'{}\0',
        "nested": b"[" * 100_000, "long-int": b'{"w":' + b"9" * 5000 + b"}", "nan": b'{"w":NaN}',
        "twice": b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        "shape-twice": b'{"w":{"dtype":"F32","shape":[4],"shape":[4],"data_offsets":[0,16]}}',
        "surrogate": b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        "escape-twice": b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        b'"\\u0077":{"dtype":"F32","shape":[0],"data_offsets":[16,16]}}',
        "metadata-twice": b'{"__metadata__":{},"__metadata__":{},' + _ONE,
        "metadata-key-twice": b'{"__metadata__":{"a":"1","a":"2"},' + _ONE,
        "metadata-null": b'{"__metadata__":null,' + _ONE, "space-first": b" {" + _ONE,
        "minus-zero": b"{" + _ONE.replace(b"[4]", b"[4,-0]"),
        "1e400": b"{" + _ONE.replace(b"4", b"1e400"),
        "rank-100000": b"{" + _ONE.replace(b"[4]", b"[4" + b",1" * 100_000 + b"]"),
        "tab-inside": b"{" + _ONE.replace(b'"w"', b'"w\t"'), "cut": b"{" + _ONE[:-1],
        "comma": b"{," + _ONE,
    }  # fmt: skip
    entries = {
        "dtype": ["f32", "F99", "", None, 4, True],
        "shape": [
            [4.0, 1], [-2, -2], [True, 4], ["2", 2], None, 4, {}, [2**64], [2**32, 2**32],
            [0, 2**63, 4], [3, 2], [1, 1], [5], [4e0],
        ],
        "data_offsets": [
            [0], [0, 8, 16], [16, 0], [-1, 16], [0, 17], [4, 16], [0, 2**63], [0, 2**64], None,
            "0,16", [0, 16.0], [True, 16], [0, None], {}, [0, 12],
        ],
    }  # fmt: skip
    for field, values in entries.items():
        for number, value in enumerate(values):
            bad[f"{field}-{number}"] = json.dumps({"w": {**_ENTRY, field: value}}).encode()
        less = {k: v for k, v in _ENTRY.items() if k != field}
        bad[f"no-{field}"] = json.dumps({"w": less}).encode()
    trees = {
        "overlap": {"w": _ENTRY, "v": {**_ENTRY, "data_offsets": [0, 16]}},
        "hole": {"w": {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}},
        "extra-field": {"w": {**_ENTRY, "stride": 1}},
        "metadata-number": {"__metadata__": {"a": 1}, "w": _ENTRY},
        "metadata-nested": {"__metadata__": {"a": {}}, "w": _ENTRY},
        "metadata-list": {"__metadata__": [], "w": _ENTRY},
        "short-data": {"w": {**_ENTRY, "shape": [2, 4], "data_offsets": [0, 32]}},
        "long-data": {"w": {**_ENTRY, "shape": [2, 1], "data_offsets": [0, 8]}},
        "entry-null": {"w": None},
        "entry-list": {"w": [1]},
    }
    return bad | {name: json.dumps(tree).encode() for name, tree in trees.items()}


def raw_files():
    """Whole files in the place of weights."""
    header = json.dumps({"w": _ENTRY}).encode()
    good = framed(header, bytes(16))
    sizes = {"n-0": 0, "n-1": 1, "n-most": 2**64 - 1, "n-cap": 100_000_001, "n-past": len(good)}
    files = {name: struct.pack("<Q", n) + good[8:] for name, n in sizes.items()}
    heads = {"elf": b"\x7fELF", "pdf": b"%PDF-1.7", "zip": b"PK\3\4", "pickle": b"\x80\x02}q\0.",
             "lfs": b"version https://git-lfs.github.com/spec/v1\n", "html": b"<!DOCTYPE html>",
             "gguf": b"GGUF\3\0\0\0"}  # fmt: skip
    files |= {name: head + bytes(100) for name, head in heads.items()}
    files |= {"empty": b"", "7-bytes": good[:7], "short": good[:-1], "tail": good + b"\0"}
    return files | {"zip-tail": good + b"PK\5\6" + bytes(18)}
