"""Mutants of sketches and deltas that mostly stay valid: other data, other words, sealed again.

A mutant that is refused says nothing about what is done with one that is taken: `readers` decodes
these a second time, independently.
"""

from __future__ import annotations

import json
import struct

from sketchconv.formats.digest import tensor_digest
from sketchconv.formats.document import LIMITS, sealed
from sketchconv.formats.header import canonical_header
from sketchconv.formats.strict_json import dumps, loads
from sketchconv.formats.tensors import TensorInfo

VALID = 0.3  # of the mutants of a target
_WORDS = ("", "a", "x" * 300, "\u00e9\u4e2d", "tool 2", "../x", "a/b", "line\n", '"', "\\")


def framed(header, data):
    """A header's bytes and data as one file."""
    return struct.pack("<Q", len(header)) + header + data


def unframed(raw):
    """The header as a tree, and the data."""
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def document_of(tree):
    """The document in a header; its metrics keep their text, without which none can be sealed."""
    return loads(tree["__metadata__"]["sktch"].encode(), "document", LIMITS)


def valid(raw, rng):
    """A file with some data or words changed, its digests and its seal made anew."""
    tree, data = unframed(raw)
    document, data = document_of(tree), bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.6:
            _other_data(tree, document, data, rng)
        else:
            _other_words(document, rng)
    return _sealed(tree, document, bytes(data))


def foreign(raw, rng):
    """A checkpoint with other data, words and order of its header, or spaces after it."""
    tree, data = unframed(raw)
    data, names = bytearray(data), list(tree)
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if rng.random() < 0.5:
        tree["__metadata__"] = {"format": "pt", "note": rng.choice(_WORDS)}
    if rng.random() < 0.5:
        rng.shuffle(names)
    header = json.dumps({n: tree[n] for n in names}, ensure_ascii=rng.random() < 0.5).encode()
    return framed(header + b" " * rng.choice((0, 1, 8, 500)), bytes(data))


def with_result(raw, weight, digest):
    """A delta with another digest of a tuned table."""
    tree, data = unframed(raw)
    document = document_of(tree)
    document["weights"][weight]["tuned"] = digest
    return _sealed(tree, document, data)


def _sealed(tree, document, data):
    text = sealed({k: dumps(v) for k, v in document.items() if k != "seal"})
    metadata = tree["__metadata__"] | {"sktch": text}
    infos = [_info(tree, name) for name in tree if name != "__metadata__"]
    return canonical_header(metadata, infos) + data


def _info(tree, name):
    return TensorInfo(name, tree[name]["dtype"], tuple(tree[name]["shape"]))


def _other_data(tree, document, data, rng):
    names = [n for n in tree if n in document["digests"]]
    name = rng.choice([n for n in names if rng.random() < 0.2 or n.endswith("_lut")] or names)
    begin, end = tree[name]["data_offsets"]
    if begin == end:
        return
    for _ in range(rng.choice((1, 2, 8))):
        at = rng.randrange(begin, end)
        data[at] = data[at] ^ 1 << rng.randrange(8)
    document["digests"][name] = tensor_digest(_info(tree, name), bytes(data[begin:end]))


def _other_words(document, rng):
    places = {"tool": document, "id": document.get("source") or document.get("base"),
              "name": document.get("recipe") or document.get("task")}  # fmt: skip
    key = rng.choice(list(places))
    places[key][key] = rng.choice(_WORDS) + str(rng.randrange(100))
