"""Bad inputs by kind, beside those of `spec/vectors`: each a kind, a name and a path."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from rows import toys
from rows.hostile_headers import headers, raw_files
from rows.still_valid import framed


@dataclass(frozen=True, slots=True)
class Variant:
    """A bad input: the reader's kind, a name to repeat it by, where it lies, a word that its error
    must hold (of a vector the number of the broken requirement), and the base of a delta."""

    kind: str
    name: str
    path: Path
    word: str = ""
    base: Path | None = None


def vectors():
    """The invalid vectors of the format and of deltas."""
    for kind, folder in (("sktch", toys.VECTORS), ("delta", toys.VECTORS / "delta")):
        for case in json.loads((folder / "invalid.json").read_text()):
            base = case.get("base")
            at = None if base is None else folder / "bases" / f"{base}.sktch"
            path = folder / "invalid" / case["file"]
            yield Variant(kind, case["file"], path, case["requirement"], at)


def checkpoints(room):
    """Folders of a Llama with bad weights, index or config."""
    files = {f"header-{n}": framed(h, bytes(16)) for n, h in headers().items()} | raw_files()
    for name, data in files.items():
        folder = toys.llama(room / name)
        (folder / "model.safetensors").write_bytes(data)
        yield Variant("checkpoint", name, folder, "model.safetensors")
    for name, data in _configs().items():
        folder = toys.llama(room / f"config-{name}")
        (folder / "config.json").write_bytes(data)
        yield Variant("checkpoint", f"config-{name}", folder)
    for name, data in _indexes().items():
        folder = toys.llama(room / f"index-{name}", 2)
        (folder / "model.safetensors.index.json").write_bytes(data)
        yield Variant("checkpoint", f"index-{name}", folder)
    for name in ("model.safetensors", "config.json"):
        yield from _odd_files(room, name)
    yield from _odd_folders(room)


def _odd_folders(room):
    """Folders whose files do not make a model, by what is done to one in two shards."""
    shards = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    index = "model.safetensors.index.json"

    def both(folder):  # every tensor of the first is in the second too
        arrays = toys.llama_arrays()
        toys.save_file(arrays, folder / shards[1])

    def pickles(folder):
        for name in (*shards, index):
            (folder / name).unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\0.")

    def sparse(folder):
        os.truncate(folder / index, 1 << 40)

    def device(folder):
        (folder / shards[0]).unlink()
        (folder / shards[0]).symlink_to("/dev/zero")

    def case(folder):
        (folder / shards[0]).rename(folder / shards[0].upper())

    for break_it in (both, pickles, sparse, device, case):
        folder = toys.llama(room / f"folder-{break_it.__name__}", 2)
        break_it(folder)
        yield Variant("checkpoint", f"folder-{break_it.__name__}", folder)


def _odd_files(room, name):
    for kind in ("pipe", "folder", "sparse", "loop", "outside"):
        folder = toys.llama(room / f"{kind}-{name}")
        path = folder / name
        kept = path.read_bytes()
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "sparse":
            path.touch()
            os.truncate(path, 1 << 40)
        elif kind == "loop":
            path.symlink_to(name)
        else:
            (room / f"out-{name}").write_bytes(kept)
            path.symlink_to(room / f"out-{name}")
        yield Variant("checkpoint", f"{kind}-{name}", folder)


def _configs():
    bad = {"empty": b"", "cut": b"{", "array": b"[1]", "null": b"null", "nested": b"[" * 100_000,
           "utf8": b'{"a":"\xff"}', "int": b'{"hidden_size":' + b"9" * 5000 + b"}"}  # fmt: skip
    for key, values in {
        "hidden_size": [10**18, -32, 0, "32", 4.5, [32], 33, True],
        "num_hidden_layers": [3, 1, 0, -1, "2", 10**12],
        "vocab_size": [0, 51, 10**15, "50"],
        "intermediate_size": [63, 0, -64, "64"],
        "num_key_value_heads": [3, 4, 0, -2, "2"],
        "model_type": ["", "bert", None, 7, "../x"],
        "quantization_config": [{"quant_method": "fp8"}, {"quant_method": "mxfp4"}],
    }.items():
        for number, value in enumerate(values):
            bad[f"{key}-{number}"] = json.dumps({**toys.CONFIG, key: value}).encode()
    return bad


def _indexes():
    names = list(toys.llama_arrays())
    shards = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    good = {name: shards[i % 2] for i, name in enumerate(names)}
    bad = {"empty": b"", "array": b"[]", "no-map": b"{}", "nested": b"[" * 100_000, "cut": b"{"}
    maps = {"empty-map": {}, "list": [], "null": None,
            "extra": {**good, "more": shards[0]}, "less": dict(list(good.items())[1:]),
            "swapped": {n: shards[1 - i % 2] for i, n in enumerate(names)}}  # fmt: skip
    targets = ("../x.safetensors", "/x.safetensors", "C:\\x.safetensors", "a\\..\\b.safetensors",
               "x\0.safetensors", "model-00003-of-00002.safetensors", "x.bin", "", 7, None, [],
               {}, True, "a/../../b.safetensors")  # fmt: skip
    maps |= {f"shard-{i}": {**good, names[0]: value} for i, value in enumerate(targets)}
    return bad | {n: json.dumps({"weight_map": m}).encode() for n, m in maps.items()}


_RECIPES = (
    "bits = 3", "[default]\nbits = 9", "[default]\nbits = 0", "[default]\nbits = true",
    "[default]\nbits = 4.0", "[default]\nbits = '4'", "[default]\ngroups = 0",
    "[default]\ngroups = 2\ngroup_size = 2", "[default]\nlut_dtype = 'F64'", "default = 4",
    "[default]\nlut_dtype = 3", "[default]\ngrid = 'x'", "[default]\ngrid = []", "[default]\nx = 1",
    "embed_bits = 12", "embed_bits = '4'", "weighting = 'magic'", "weighting = 4", "exact = 1",
    "include = 'x'", "include = [1]", "exclude = {}", "override = 3", "override = [3]",
    "[[override]]\nbits = 4", "[[override]]\nmatch = 'x'\nbit = 4", "[[override]]\nmatch = ''",
    "[[override]]\nmatch = 3", "[[override]]\nmatch = 'x'\naction = 'melt'", "= 3", "\0", "[",
    "[[override]]\nmatch = 'x'\ngroups = 2\ngroup_size = 2", "a = " + "[" * 5000, "a = 1979-99-99",
    "[default]\nbits = " + "9" * 5000, "bits = nan", "weighting = 'moments'\nweighting = 'equal'",
    "[[override]]\nmatch = 'x'\nlut_dtype = {}", "[[override]]\nmatch = 'x'\nbits = []",
)  # fmt: skip


def recipes(room):
    """TOML files, and one that is not UTF-8."""
    for number, text in enumerate(_RECIPES):
        path = room / f"{number}.toml"
        path.write_text(text)
        yield Variant("recipe", f"{number}.toml", path, path.name)
    (room / "latin.toml").write_bytes(b'weighting = "\xff"')
    yield Variant("recipe", "latin.toml", room / "latin.toml", "latin.toml")


def ggufs(room):
    """A good GGUF file with one field broken, cut at many places, or of another kind."""
    good = toys.gguf(room / "good.gguf", 2).read_bytes()
    bad = {f"cut-{at}": good[:at] for at in (*range(0, 200, 9), len(good) - 1)}
    fields = {"magic": (0, "4s", b"GGML"), "version-1": (4, "I", 1), "version-9": (4, "I", 9),
              "big-endian": (4, "I", 3 << 24), "tensors": (8, "Q", 2**63), "tensors-1": (8, "Q", 3),
              "keys": (16, "Q", 2**63), "keys-1": (16, "Q", 3), "key-size": (24, "Q", 2**62),
              "value-kind": (52, "I", 99)}  # fmt: skip
    for name, (at, code, value) in fields.items():
        data = bytearray(good)
        struct.pack_into("<" + code, data, at, value)
        bad[name] = bytes(data)
    at = good.index(b"t0.weight") + 9
    for name, (off, code, value) in {
        "rank-0": (0, "I", 0), "rank-9": (0, "I", 9), "columns-0": (4, "Q", 0),
        "columns-most": (4, "Q", 2**63), "rows-most": (12, "Q", 2**62), "type-99": (20, "I", 99),
        "type-4": (20, "I", 4), "offset-odd": (24, "Q", 1), "offset-past": (24, "Q", 2**40),
        "offset-shared": (24, "Q", 4096 + 64),
    }.items():  # fmt: skip
        data = bytearray(good)
        struct.pack_into("<" + code, data, at + off, value)
        bad[name] = bytes(data)
    for name, data in bad.items():
        path = room / f"{name}.gguf"
        path.write_bytes(data)
        yield Variant("gguf", name, path, path.name)


def variants(setting):
    """All of them; the seeded part: weight files of a Llama that are cut somewhere."""
    yield from vectors()
    yield from checkpoints(setting.room("checkpoints"))
    yield from recipes(setting.room("recipes"))
    yield from ggufs(setting.room("ggufs"))
    rng = setting.rng("S1")
    for number in range(setting.pick(5, 30, 100)):
        folder = toys.llama(setting.folder / "cuts" / str(number))
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        raw = raw[: rng.randrange(len(raw))]
        path.write_bytes(raw)
        yield Variant("checkpoint", f"cut-{len(raw)}", folder, path.name)
