"""Invalid vectors: bundles and folders (section 7 of the specification)."""

import json

from vectorlib.breaking import base, put, with_document, with_tensors
from vectorlib.material import model, sketch, with_files
from vectorlib.plain import build
from vectorlib.valid import SHARDS, index_json, rewritten


def broken_files():
    """7.1: requirement, name, content."""
    paths = {
        "absolute": "/etc/x",
        "climbing": "../x",
        "climbing-inside": "a/../x",
        "backslash": "a\\x",
    }
    paths |= {
        "drive": "C:\\x",
        "empty": "",
        "empty-part": "a//x",
        "dot": ".x",
        "nul": "a\0",
        "device": "NUL.txt",
    }
    paths |= {"nine-parts": "a/" * 8 + "x", "trailing-dot": "x.", "long-part": "x" * 256}
    for what, path in paths.items():
        yield "SKT-090", f"path-{what}", build(*with_files(*base(), {path: b"x"}))
    tensor = {"sktch.file.0000": ("U8", [1], b"x")}
    for what, name in {"missing": "sktch.file.0001", "prefix": "p", "null": None}.items():
        yield "SKT-091", f"file-tensor-{what}", with_document(put(["files"], {"a": name}))
    shared = {"a": "sktch.file.0000", "b": "sktch.file.0000"}
    yield "SKT-091", "file-tensor-shared", with_document(put(["files"], shared), add=tensor)
    one = {"a": "sktch.file.0000"}
    wide = {"sktch.file.0000": ("U8", [1, 1], b"x")}
    yield "SKT-091", "file-tensor-rank", with_document(put(["files"], one), add=wide)
    signed = {"sktch.file.0000": ("I8", [1], b"x")}
    yield "SKT-091", "file-tensor-dtype", with_document(put(["files"], one), add=signed)
    yield "SKT-092", "reserved-name", with_tensors(tensor)
    yield "SKT-093", "path-case", build(*with_files(*base(), {"a": b"x", "A": b"y"}))
    yield "SKT-093", "path-inside-file", build(*with_files(*base(), {"a": b"x", "a/b": b"y"}))
    bad = with_files(*base(), {"config.json": b'{"quantization_config": {"quant_method": "gptq"}}'})
    yield "SKT-108", "bundle-config", build(*bad)


def broken_folders():
    """7.2: requirement, name, files."""
    a, b = sketch(1, 4, 2, 1, seed=60), sketch(1, 4, 2, 1, seed=61)
    first, second = model({"a": a}), model({"b": b})
    one, two = build(*first), build(*second)
    whole = model({"a": a, "b": b})
    name = "model.safetensors.index.json"
    good = {SHARDS[0]: one, SHARDS[1]: two, name: index_json([first[1], second[1]])}
    weight_map = json.loads(good[name])["weight_map"]

    def index(**changes):
        value = {"weight_map": {k: v for k, v in {**weight_map, **changes}.items() if v is not ...}}
        return {**good, name: json.dumps(value).encode()}

    yield "SKT-100", "folder-nothing", {"readme.txt": b"x"}
    yield "SKT-100", "folder-only-pickles", {"pytorch_model.bin": b"\x80\x02}q\0."}
    yield "SKT-100", "folder-both", {**good, "model.safetensors": build(*whole)}
    yield "SKT-101", "index-without-map", {**good, name: b"{}"}
    yield "SKT-101", "index-empty-map", {**good, name: b'{"weight_map":{}}'}
    yield "SKT-101", "index-map-array", {**good, name: b'{"weight_map":[]}'}
    yield "SKT-101", "index-integer", {**good, name: b'{"weight_map":{"a":1}}'}
    yield "SKT-008", "index-not-json", {**good, name: b"<html>"}
    for word in ("NaN", "Infinity", "-Infinity"):
        text = good[name].replace(b'"total_size": ', f'"x": {word}, "total_size": '.encode())
        yield "SKT-008", f"index-{word.replace('-', 'minus-').lower()}", {**good, name: text}
    yield "SKT-008", "index-form-feed", {**good, name: b"\f" + good[name] + b"\v"}
    yield "SKT-012", "index-17-levels", {**good, name: b'{"a":' * 17 + b"1" + b"}" * 17}
    yield "SKT-009", "index-twice", {**good, name: b'{"weight_map":{"a":"x","a":"y"}}'}
    bad = {
        "climbing": f"../{SHARDS[0]}",
        "absolute": "/tmp/a.safetensors",
        "drive": "C:\\a.safetensors",
    }
    bad |= {
        "nul": "a\0.safetensors",
        "pickle": "pytorch_model.bin",
        "sub": "a/b.safetensors",
        "empty": "",
    }
    for what, shard in bad.items():
        yield "SKT-102", f"shard-{what}", index(**{"a.weight": shard})
    yield "SKT-104", "shard-missing", {SHARDS[0]: one, name: good[name]}
    yield "SKT-105", "index-wrong-shard", index(**{"a.weight": SHARDS[1]})
    yield "SKT-105", "index-lacks-tensor", index(**{"a.weight": ...})
    yield "SKT-105", "index-has-more", index(**{"c.weight": SHARDS[0]})
    parts = [{n: whole[1][n] for n in whole[1] if n[0] == x or n == "a.sketch_lut"} for x in "ab"]
    cut = {SHARDS[i]: rewritten(whole[0], part) for i, part in enumerate(parts)}
    yield "SKT-105", "tensor-in-two-shards", {**cut, name: index_json(parts)}
    yield (
        "SKT-106",
        "recipes-differ",
        {**good, SHARDS[1]: build({**second[0], "recipe": {"bits": 5}}, second[1])},
    )
    typed = {
        SHARDS[0]: build({**first[0], "recipe": {"a": 1}}, first[1]),
        SHARDS[1]: build({**second[0], "recipe": {"a": True}}, second[1]),
    }
    yield "SKT-106", "recipes-differ-in-type", {**good, **typed}
    yield "SKT-003", "shard-is-web-page", {**good, SHARDS[1]: b"<html><body>404</body></html>"}
    yield (
        "SKT-107",
        "folder-with-files",
        {"model.safetensors": build(*with_files(*whole, {"a.txt": b"x"}))},
    )
    single = {"model.safetensors": build(*whole)}
    yield "SKT-108", "config-missing", single
    yield "SKT-108", "config-not-json", {**single, "config.json": b"{"}
    yield "SKT-108", "config-array", {**single, "config.json": b"[]"}
    yield "SKT-108", "config-without-method", {**single, "config.json": b"{}"}
    other = b'{"quantization_config": {"quant_method": "sktch", "format": "2.0"}}'
    yield "SKT-108", "config-version", {**single, "config.json": other}
