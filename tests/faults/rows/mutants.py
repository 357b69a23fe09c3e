"""Mutants of good inputs by kind: each a function from random numbers to a path to be read."""

from __future__ import annotations

import json

from rows import toys
from rows.gguf_mutants import gguf
from rows.odd import bytes_changed, mutated, text
from rows.readers import READERS, same_as_decoder
from rows.state_mutants import calibration, journal
from rows.still_valid import VALID, document_of, foreign, framed, unframed, valid, with_result
from sketchconv.errors import FormatError
from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.document import sealed
from sketchconv.formats.strict_json import dumps


def _container(raw, rng):
    """A safetensors file with its header or its document changed; at times only bytes."""
    if rng.random() < 0.15:
        return bytes_changed(raw, rng)
    tree, data = unframed(raw)
    meta = tree.get("__metadata__", {})
    if "sktch" in meta and rng.random() < 0.6:
        meta["sktch"] = _document(document_of(tree), rng)
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
    made = toys.toys().make_toy(rows=2, columns=6, groups=2, bits=(2, 3))
    raw = made.bundle(folder / "good.sktch").read_bytes()
    path = folder / "x.sktch"

    def make(rng):
        path.write_bytes(valid(raw, rng) if rng.random() < VALID else _container(raw, rng))
        return path

    return make, same_as_decoder


def delta(folder):
    raws = [toys.delta(folder / f"{i}.sktch", c).read_bytes() for i, c in enumerate(toys.CODINGS)]
    path = folder / "x.sktch"

    def make(rng):
        raw = rng.choice(raws)
        if rng.random() < VALID:
            path.write_bytes(valid(raw, rng))
            tuned = _tuned_digest(path)  # of other data another one, or the mutant is refused
            if tuned is not None and rng.random() < 0.9:
                path.write_bytes(with_result(path.read_bytes(), "m.weight", tuned))
        else:
            path.write_bytes(_container(raw, rng))
        return path

    return make, READERS["delta"]


def _tuned_digest(path):
    """The digest of the table that a delta of one weight gives, if it is not the recorded one."""
    try:
        with DeltaFile.open(path) as file:
            file.tuned("m.weight", toys.delta_base())
    except FormatError as error:
        if error.requirement == "DLT-042":
            return error.message.rpartition(" ")[2]
    return None


def safetensors(folder):
    model = toys.llama(folder / "model")
    path = model / "model.safetensors"
    raw = path.read_bytes()

    def make(rng):
        path.write_bytes(foreign(raw, rng) if rng.random() < VALID else _container(raw, rng))
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


TARGETS = {
    "sktch": sktch,
    "delta": delta,
    "safetensors": safetensors,
    "index": _json_beside("model.safetensors.index.json", 2),
    "config": _json_beside("config.json", 1),
    "gguf": gguf,
    "recipe": recipe,
    "journal": journal,
    "calibration": calibration,
}
