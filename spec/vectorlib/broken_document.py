"""Invalid vectors: document and sketches (sections 4 and 6 of the specification)."""

import re

from vectorlib.breaking import (
    base,
    drop_member,
    put,
    resealed,
    same,
    shaped_base,
    swap,
    with_document,
    with_tensors,
    with_text,
)
from vectorlib.material import model, sketch
from vectorlib.plain import ZERO, build, digest, raw

NAN, INF = b"\0\x7e", b"\0\x7c"


def broken_document():
    """6: requirement, name, content."""
    yield (
        "SKT-050",
        "unsorted",
        resealed(
            lambda t: t.replace(
                '"tool":"vectors 1","version":"1.0"', '"version":"1.0","tool":"vectors 1"'
            )
        ),
    )
    yield "SKT-050", "white-space", resealed(lambda t: t.replace('"kind":', '"kind": '))
    yield (
        "SKT-050",
        "needless-escape",
        resealed(lambda t: t.replace("vectors 1", r"\u0076ectors 1")),
    )
    yield "SKT-050", "upper-case-escape", resealed(lambda t: t.replace("vectors 1", r"\u00E9"))
    yield "SKT-050", "not-escaped", resealed(lambda t: t.replace("vectors 1", "é"))
    yield "SKT-051", "no-recipe", with_document(drop_member("recipe"))
    yield "SKT-051", "unknown-member", with_document(put(["more"], 1))
    yield "SKT-051", "aliases-array", with_document(put(["aliases"], []))
    yield "SKT-051", "digests-null", with_document(put(["digests"], None))
    for what, version in {
        "2": "2.0",
        "0": "0.9",
        "integer": 1,
        "short": "1",
        "zero": "01.0",
        "long": "1.0.0",
    }.items():
        yield "SKT-052", f"version-{what}", with_document(put(["version"], version))
    yield "SKT-053", "kind-delta", with_document(put(["kind"], "delta"))
    yield "SKT-053", "kind-null", with_document(put(["kind"], None))
    yield "SKT-054", "packing-other", with_document(put(["packing"], "nibbles"))
    yield (
        "SKT-055",
        "seal-zero",
        with_text(lambda t: re.sub(r'"seal":"[0-9a-f]{64}"', f'"seal":"{ZERO}"', t)),
    )
    yield "SKT-055", "seal-of-another", with_text(lambda t: t.replace('"id":"a/b"', '"id":"a/c"'))
    yield (
        "SKT-055",
        "seal-null",
        with_text(lambda t: re.sub(r'"seal":"[0-9a-f]{64}"', '"seal":null', t)),
    )
    yield "SKT-056", "tool-integer", with_document(put(["tool"], 1))
    yield "SKT-056", "recipe-array", with_document(put(["recipe"], []))
    yield "SKT-056", "source-null", with_document(put(["source"], None))
    yield "SKT-056", "source-digest-short", with_document(put(["source", "digest"], "ab"))
    yield "SKT-057", "extension-without-domain", with_document(put(["extensions"], {"x": 1}))
    yield "SKT-057", "extensions-array", with_document(put(["extensions"], []))


def broken_sketches():
    """4: requirement, name, content."""
    record = ["sketches", "m.weight"]

    def renamed(document):
        for member in ("sketches", "errors"):
            document[member] = {"m.bias": document[member]["m.weight"]}
        document["sentinel"] = "m.bias"

    yield "SKT-060", "not-a-weight", with_document(renamed)
    yield "SKT-061", "record-without-bits", with_document(drop_member(*record, "bits"))
    yield "SKT-061", "record-with-more", with_document(put([*record, "grid"], 1))
    yield "SKT-061", "record-null", with_document(put(record, None))
    for what, shape in {
        "rank-1": [4],
        "rank-3": [1, 4, 1],
        "zero": [0, 4],
        "string": "1,4",
        "true": [True, 4],
    }.items():
        yield "SKT-062", f"sketch-shape-{what}", with_document(put([*record, "shape"], shape))
    for what, bits in {"0": 0, "9": 9, "string": "2", "true": True, "null": None}.items():
        yield "SKT-063", f"bits-{what}", with_document(put([*record, "bits"], bits))
    for what, groups in {"0": 0, "3": 3, "8": 8, "null": None}.items():
        yield "SKT-064", f"groups-{what}", with_document(put([*record, "groups"], groups))
    for what, lut in {"f64": "F64", "u8": "U8", "null": None}.items():
        yield "SKT-065", f"lut-{what}", with_document(put([*record, "lut"], lut))
    for what, dtype in {"i8": "I8", "lower": "f32", "null": None}.items():
        yield "SKT-066", f"dense-dtype-{what}", with_document(put([*record, "dtype"], dtype))
    yield "SKT-067", "no-index", with_document(same, ["m.sketch_index"])
    yield "SKT-067", "index-dtype", with_tensors({"m.sketch_index": ("I8", [1, 1, 1], b"\0")})
    yield "SKT-067", "index-size", with_tensors({"m.sketch_index": ("U8", [1, 1, 2], b"\0\0")})
    yield "SKT-067", "index-rank", with_tensors({"m.sketch_index": ("U8", [1, 1], b"\0")})
    yield "SKT-067", "bits-other-than-tensors", with_document(put([*record, "bits"], 4))
    yield "SKT-068", "no-lut", with_document(same, ["m.sketch_lut"])
    yield "SKT-068", "lut-length", with_tensors({"m.sketch_lut": ("F16", [1, 1, 3], b"\0" * 6)})
    yield "SKT-068", "lut-dtype", with_tensors({"m.sketch_lut": ("BF16", [1, 1, 4], b"\0" * 8)})
    yield (
        "SKT-069",
        "index-without-record",
        with_tensors({"q.sketch_index": ("U8", [1, 1, 1], b"\0")}),
    )
    yield (
        "SKT-069",
        "lut-without-record",
        with_tensors({"q.sketch_lut": ("F16", [1, 1, 2], b"\0" * 4)}),
    )
    yield "SKT-070", "dense-too", with_tensors({"m.weight": ("F32", [1, 4], b"\0" * 16)})
    odd = model({"m": sketch(1, 3, 2, 1, seed=51)})
    _, shape, data = odd[1]["m.sketch_index"]
    odd[1]["m.sketch_index"] = ("U8", shape, bytes([data[0] | 0x80]))
    odd[0]["digests"]["m.sketch_index"] = digest(*odd[1]["m.sketch_index"])
    yield "SKT-071", "padding-bits", build(*odd)
    for what, bits in {"nan": NAN, "infinity": INF, "minus-infinity": b"\0\xfc"}.items():
        lut = ("F16", [1, 1, 4], b"\0\0" * 3 + bits)
        yield "SKT-072", f"lut-{what}", with_tensors({"m.sketch_lut": lut})


def broken_shaped():
    """4.2: requirement, name, content."""
    record = ["sketches", "m.weight"]

    def broken(change, drop=(), add=None):
        return with_document(change, drop, add, shaped_base)

    for what, grid in {"unknown": "nf4", "free": "free", "null": None, "array": []}.items():
        yield "SKT-073", f"grid-{what}", broken(put([*record, "grid"], grid))
    yield "SKT-073", "grid-without-such-bits", broken(put([*record, "grid"], "symmetric_8"))
    yield "SKT-073", "affine-of-8-bits", broken(put([*record, "bits"], 8))
    yield "SKT-073", "iq4-nl-of-5-bits", broken(_five_bits)
    yield "SKT-073", "shaped-groups-of-16", broken(put([*record, "groups"], 4))
    yield "SKT-073", "shaped-lut-bf16", broken(put([*record, "lut"], "BF16"))
    yield "SKT-063", "shaped-bits-true", broken(put([*record, "bits"], True))
    yield "SKT-061", "grid-in-1-0", broken(put(["version"], "1.0"))
    yield "SKT-061", "shaped-with-more", broken(put([*record, "zero"], 1))
    yield "SKT-061", "member-of-a-later-version", broken(_later)
    yield "SKT-051", "unknown-member-in-1-1", broken(put(["more"], 1))
    yield "SKT-068", "no-scale", broken(same, ["m.sketch_scale"])
    short = {"m.sketch_scale": ("F16", [1, 2, 1], b"\0" * 4)}
    yield "SKT-068", "scale-without-minimum", broken(same, (), short)
    yield "SKT-068", "grid-without-minimum", broken(put([*record, "grid"], "symmetric"))
    wide = {"m.sketch_scale": ("F32", [1, 2, 2], b"\0" * 16)}
    yield "SKT-068", "scale-dtype", broken(same, (), wide)
    yield "SKT-068", "scale-rank", broken(same, (), {"m.sketch_scale": ("F16", [4], b"\0" * 8)})
    table = {"m.sketch_lut": ("F16", [1, 2, 16], b"\0" * 64)}
    yield "SKT-069", "lut-beside-scale", broken(same, (), table)
    other = {"q.sketch_scale": ("F16", [1, 1, 1], b"\0\0")}
    yield "SKT-069", "scale-without-record", broken(same, (), other)
    yield "SKT-068", "lut-in-place-of-scale", broken(same, ["m.sketch_scale"], table)
    yield "SKT-086", "alias-of-scale", broken(put(["aliases"], {"x": "m.sketch_scale"}))
    for what, bits in {"nan": NAN, "infinity": INF, "minus-infinity": b"\0\xfc"}.items():
        for place in ("scale", "minimum"):
            data = bits + b"\0" * 6 if place == "scale" else b"\0" * 6 + bits
            bad = {"m.sketch_scale": ("F16", [1, 2, 2], data)}
            yield "SKT-072", f"{place}-{what}", broken(same, (), bad)


def _five_bits(document):
    document["sketches"]["m.weight"].update(grid="iq4_nl", bits=5)


def _later(document):
    document["version"] = "1.9"
    document["sketches"]["m.weight"]["zero"] = 8


def broken_rest():
    """4.1, 6.4 to 6.6: requirement, name, content."""
    yield "SKT-075", "sentinel-null", with_document(put(["sentinel"], None))
    yield "SKT-075", "sentinel-array", with_document(put(["sentinel"], []))
    yield "SKT-075", "sentinel-of-plain", with_document(put(["sentinel"], "p"))
    yield "SKT-075", "sentinel-not-stored", with_document(same, ["m.weight"])
    yield "SKT-076", "sentinel-one", with_tensors({"m.weight": ("U8", [1], b"\1")})
    yield "SKT-080", "digest-missing", with_document(drop_member("digests", "p"))
    yield "SKT-080", "digest-of-nothing", with_document(put(["digests", "q"], ZERO))
    yield (
        "SKT-080",
        "digest-upper-case",
        with_document(lambda d: d["digests"].update(p=d["digests"]["p"].upper())),
    )
    yield "SKT-080", "digest-short", with_document(put(["digests", "p"], "ab"))
    yield "SKT-080", "digest-null", with_document(put(["digests", "p"], None))
    yield "SKT-081", "digest-zero", with_document(put(["digests", "p"], ZERO))
    whole = build(*base())
    yield "SKT-081", "data-changed", whole.replace(b"12345678", b"12345679")
    yield "SKT-081", "dtype-changed", swap('"p":{"dtype":"F32"', '"p":{"dtype":"I32"')
    yield (
        "SKT-081",
        "shape-changed",
        swap('"p":{"dtype":"F32","shape":[2]', '"p":{"dtype":"F32","shape":[1,2]'),
    )
    yield "SKT-082", "error-missing", with_document(put(["errors"], {}))
    yield "SKT-082", "error-of-nothing", with_document(put(["errors", "p"], None))
    yield "SKT-082", "error-integer", with_document(put(["errors", "m.weight"], 0))
    yield "SKT-082", "error-string", with_document(put(["errors", "m.weight"], "0"))
    for what, text in {
        "small-digit": "0.500000e+00",
        "zero-exponent": "0.000000e-05",
        "minus-zero": "0.000000e-00",
        "exponent-minus-00": "1.000000e-00",
        "three-digits": "1.000000e-100",
    }.items():
        yield "SKT-010", f"error-{what}", with_document(put(["errors", "m.weight"], raw(text)))
    yield "SKT-085", "alias-is-stored", with_document(put(["aliases"], {"p": "m.weight"}))
    yield "SKT-085", "alias-is-a-sketch", with_document(put(["aliases"], {"m.weight": "p"}))
    yield "SKT-085", "alias-name", with_document(put(["aliases"], {"../x": "p"}))
    yield "SKT-085", "alias-null", with_document(put(["aliases"], {"x": None}))
    yield "SKT-086", "alias-dangling", with_document(put(["aliases"], {"x": "y"}))
    yield "SKT-086", "alias-cycle", with_document(put(["aliases"], {"x": "y", "y": "x"}))
    yield "SKT-086", "alias-of-itself", with_document(put(["aliases"], {"x": "x"}))
    yield "SKT-086", "alias-of-alias", with_document(put(["aliases"], {"x": "p", "y": "x"}))
    yield "SKT-086", "alias-of-index", with_document(put(["aliases"], {"x": "m.sketch_index"}))
