"""Mutants of good inputs by kind: each a function from random numbers to a path to be read."""

from __future__ import annotations

import json
import struct

from rows import toys
from rows.odd import bytes_changed, mutated, text
from rows.readers import READERS
from sketchconv.errors import ResumeError
from sketchconv.formats.document import sealed
from sketchconv.formats.strict_json import dumps
from sketchconv.journal import Entry, Journal


def framed(header, data):
    """A header's bytes and data as one file."""
    return struct.pack("<Q", len(header)) + header + data


def unframed(raw):
    """The header as a tree, and the data."""
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def _container(raw, rng):
    """A safetensors file with its header or its document changed; at times only bytes."""
    if rng.random() < 0.15:
        return bytes_changed(raw, rng)
    tree, data = unframed(raw)
    meta = tree.get("__metadata__", {})
    if "sktch" in meta and rng.random() < 0.6:
        meta["sktch"] = _document(json.loads(meta["sktch"]), rng)
    else:
        tree = mutated(tree, rng)
    header = text(tree, rng)
    return framed(header + b" " * (-(8 + len(header)) % 64), data)


def _document(tree, rng):
    """A changed document, mostly with the seal that belongs to it, so that readers look inside."""
    tree = mutated(tree, rng)
    if rng.random() < 0.9 and isinstance(tree, dict):
        tree.pop("seal", None)
        try:
            return sealed({key: dumps(value) for key, value in tree.items()})
        except (TypeError, ValueError, KeyError):
            pass
    return json.dumps(tree, separators=(",", ":"))


def sktch(folder):
    raw = (
        toys.toys()
        .make_toy(rows=2, columns=6, groups=2, bits=(2, 3))
        .bundle(folder / "good.sktch")
        .read_bytes()
    )
    path = folder / "x.sktch"

    def make(rng):
        path.write_bytes(_container(raw, rng))
        return path

    return make, READERS["sktch"]


def delta(folder):
    raws = [toys.delta(folder / f"{i}.sktch", c).read_bytes() for i, c in enumerate(toys.CODINGS)]
    path = folder / "x.sktch"

    def make(rng):
        path.write_bytes(_container(rng.choice(raws), rng))
        return path

    return make, READERS["delta"]


def safetensors(folder):
    model = toys.llama(folder / "model")
    path = model / "model.safetensors"
    raw = path.read_bytes()

    def make(rng):
        path.write_bytes(_container(raw, rng))
        return model

    return make, READERS["checkpoint"]


def _json_beside(name, shards):
    def target(folder):
        model = toys.llama(folder / "model", shards)
        path = model / name
        tree = json.loads(path.read_text())

        def make(rng):
            path.write_bytes(text(mutated(tree, rng), rng))
            return model

        return make, READERS["checkpoint"]

    return target


_NUMBERS = (0, 1, 2, 3, 4, 5, 8, 9, 12, 31, 32, 33, 2**16, 2**24 + 1, 2**31, 2**32 - 1)
_LONG = (2**32, 2**40, 2**62, 2**63, 2**64 - 1, 2**64 - 32)


def _gguf_tokens(rng):
    """A GGUF header as (format, value) pairs: keys of every type, tensors of some."""
    tokens = [("4s", b"GGUF"), ("I", 3), ("Q", 2), ("Q", 4)]
    for key, kind, value in (
        (b"general.architecture", 8, b"llama"),
        (b"general.alignment", 4, 32),
        (b"llama.block_count", 4, 1),
        (b"tokenizer.ggml.scores", 9, (6, (0.5, 1.5))),
    ):
        tokens += [("Q", len(key)), ("s", key), ("I", kind)]
        if kind == 8:
            tokens += [("Q", len(value)), ("s", value)]
        elif kind == 9:
            tokens += [("I", value[0]), ("Q", len(value[1])), *(("f", x) for x in value[1])]
        else:
            tokens += [("I", value)]
    kinds = (0, rng.choice((0, 1, 2, 8, 30)))
    for number, kind in enumerate(kinds):
        name = (b"token_embd.weight", b"output.weight")[number]
        tokens += [("Q", len(name)), ("s", name), ("I", 2), ("Q", 32), ("Q", 4), ("I", kind)]
        tokens += [("Q", 512 * number)]
    return tokens


def _gguf_bytes(tokens):
    out = b""
    for code, value in tokens:
        out += value if code in ("s", "4s") else struct.pack("<" + code, value)
    return out + bytes(-len(out) % 32) + bytes(1024)


def gguf(folder):
    path = folder / "x.gguf"

    def make(rng):
        tokens = _gguf_tokens(rng)
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            at = rng.randrange(len(tokens))
            code, value = tokens[at]
            if code in ("I", "Q") and rng.random() < 0.8:
                value = rng.choice(_NUMBERS if code == "I" else _NUMBERS + _LONG)
            elif code in ("s", "4s"):
                value = rng.choice((b"", b"\xff" * len(value), bytes_changed(value, rng)))
            elif rng.random() < 0.5:
                tokens.insert(at, tokens[rng.randrange(len(tokens))])
            else:
                del tokens[at]
                continue
            tokens[at] = (code, value) if code == tokens[at][0] else tokens[at]
        data = _gguf_bytes(tokens)
        path.write_bytes(bytes_changed(data, rng) if rng.random() < 0.1 else data)
        return path

    return make, READERS["gguf"]


_RECIPE = """embed_bits = 6
weighting = "moments"
exclude = ["*.gate_proj"]
[default]
bits = 3
group_size = 64
[[override]]
match = "*.mlp.*"
bits = 5
lut_dtype = "BF16"
"""
_WORDS = ("0", "-1", "1e400", "nan", "true", '""', "[]", "{}", "[[a]]", "9" * 5000, '"x"', "=",
          "\n", "1979-05-27", "bits", "'\\u0000'", "[" * 3000, "4.0", '"[!"', "a")  # fmt: skip


def recipe(folder):
    path = folder / "recipe.toml"

    def make(rng):
        words = _RECIPE.replace("\n", " \n ").split(" ")
        for _ in range(rng.choice((1, 1, 2, 4))):
            words[rng.randrange(len(words))] = rng.choice((*_WORDS, rng.choice(words)))
        data = " ".join(words).encode()
        path.write_bytes(bytes_changed(data, rng) if rng.random() < 0.3 else data)
        return path

    return make, READERS["recipe"]


def journal(folder):
    """The state of an interrupted conversion: read it, and try to take each tensor from it."""
    out, print_ = folder / "m.sktch", {"a": 1, "b": {"c": [1, 2]}}
    made = Journal(out, print_, resume=False)
    for i in range(4):
        stored = {f"t{i}.sketch_index": "0" * 64, f"t{i}.sketch_lut": "1" * 64}
        made.add(Entry(f"t{i}.weight", "2" * 64, stored, (0.5, 2.0)))
    made.close()
    lines = made.path.read_bytes().splitlines()

    def make(rng):
        now = list(lines)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(now))
            now[at] = text(mutated(json.loads(lines[at]), rng), rng)
        data = b"\n".join(now) + b"\n"
        made.path.write_bytes(bytes_changed(data, rng) if rng.random() < 0.2 else data)
        return out

    def read(path):
        try:
            found = Journal(path, print_, resume=True).finished
        except ResumeError as error:
            if not str(error).startswith(str(made.path)):
                raise ValueError("the error does not name the state") from error
            raise
        for name, entry in found.items():
            if (
                Entry.from_value(json.loads(entry.to_line())) != entry
                and entry.squares[0] == (entry.squares[0])
            ):
                raise ValueError(f"{name}: not the same when it is written again")

    return make, read


TARGETS = {
    "sktch": sktch,
    "delta": delta,
    "safetensors": safetensors,
    "index": _json_beside("model.safetensors.index.json", 2),
    "config": _json_beside("config.json", 1),
    "gguf": gguf,
    "recipe": recipe,
    "journal": journal,
}
