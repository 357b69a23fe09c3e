"""Valid vectors."""

import json

from vectorlib.material import model, shaped, sketch
from vectorlib.plain import SIZES, build, container, raw, seal


def expected(document, tensors, sketches, files=()):
    """What a reader must find."""
    return {
        "aliases": document["aliases"],
        "files": {p: b.hex() for p, b in dict(files).items()},
        "tensors": {
            n: {"dtype": t[0], "shape": t[1], "hex": t[2].hex()} for n, t in tensors.items()
        },
        "weights": {s + ".weight": {"rows": v["values"]} for s, v in sketches.items()},
    }


def valid_plain():
    """Files about plain tensors, names and scalars."""
    every = {
        d.lower(): (d, [3, 2], bytes(range(1, 6 * n + 1))) for d, n in SIZES.items() if d != "BOOL"
    }
    yield "plain-dtypes", {}, every, {}, {}
    shapes = {
        "scalar": ("F32", [], b"\0\0\x80\x3f"),
        "rank8": ("I16", [1, 2, 1, 1, 1, 1, 1, 1], b"abcd"),
    }
    yield "shapes", {}, shapes, {}, {}
    names = {"0": ("U8", [1], b"a"), "a-b..c_": ("U8", [1], b"b"), "x" * 512: ("U8", [1], b"c")}
    yield "names", {}, names, {}, {}
    yield "empty", {}, {}, {}, {}


def valid_sketches():
    """Files about bits, groups and LUTs."""
    yield "minimal", {"a": sketch(2, 4, 2, 1)}, {}, {}, {}
    for bits in range(1, 9):
        yield f"bits-{bits}", {"m": sketch(3, 10, bits, 2, seed=bits)}, {}, {}, {}
    yield "group-of-one", {"m": sketch(2, 6, 3, 6, seed=20)}, {}, {}, {}
    yield "one-column", {"m": sketch(3, 1, 7, 1, seed=21)}, {}, {}, {}
    yield "long-row", {"m": sketch(1, 1031, 5, 1, seed=22)}, {}, {}, {}
    yield "lut-bf16", {"m": sketch(2, 8, 4, 2, "BF16", seed=23)}, {}, {}, {}
    f32 = [0.1, -1 / 3, 1.1754943508222875e-38, 3.4028234663852886e38]
    yield "lut-f32", {"m": sketch(2, 8, 2, 1, "F32", 24, f32)}, {}, {}, {}
    special = [0.0, -0.0, 2.0**-24, -65504.0]
    yield "lut-extremes", {"m": sketch(2, 8, 2, 1, "F16", 25, special)}, {}, {}, {}
    unsorted = [1.0, 1.0, -2.0, 1.0]
    yield "lut-unsorted", {"m": sketch(2, 8, 2, 1, "F16", 26, unsorted)}, {}, {}, {}
    two = {"layers.0.up": sketch(2, 8, 4, 1, seed=27), "layers.10.up": sketch(3, 6, 3, 2, seed=28)}
    yield "two-sketches", two, {"norm.weight": ("BF16", [3], b"abcdef")}, {}, {}


def valid_shaped():
    """Files about shaped sketches (4.2)."""
    for grid, widths in {"affine": (4, 5), "iq4_nl": (4,), "symmetric": (4, 5, 8)}.items():
        for bits in widths:
            made = shaped(2, 64, grid, bits, 2, seed=60 + bits)
            yield f"shaped-{grid}-{bits}", {"m": made}, {}, {}, {}
    yield "shaped-wide-group", {"m": shaped(1, 192, "iq4_nl", 4, 2, seed=70)}, {}, {}, {}
    for what, scale in {"zero": -0.0, "least": 2.0**-24, "most": -65504.0}.items():
        made = shaped(1, 32, "symmetric", 8, 1, seed=71, fields=[scale])
        yield f"shaped-scale-{what}", {"m": made}, {}, {}, {}
    # The sum needs more than the 24 bits of a binary32: here it is rounded, half of it to even.
    rounded = shaped(1, 64, "affine", 5, 1, seed=72, fields=[-1023 * 2.0**-24, 1025 / 8])
    yield "shaped-sum-rounded", {"m": rounded}, {}, {}, {}
    both = {"a": sketch(2, 8, 4, 1, seed=73), "b": shaped(2, 32, "affine", 4, 1, seed=74)}
    yield "shaped-and-free", both, {"p.sketch_scales": ("U8", [1], b"a")}, {}, {}
    old = {"q.sketch_scale": ("U8", [1], b"a")}
    yield "scale-is-a-plain-name-in-1-0", {"m": sketch(1, 4, 2, 1, seed=75)}, old, {}, {}


def valid_documents():
    """Files about the document's members."""
    one = {"m": sketch(1, 4, 2, 1, seed=30)}
    yield "alias-of-sketch", one, {}, {"aliases": {"head.weight": "m.weight"}}, {}
    plain = {"emb.weight": ("F16", [1, 2], b"\0\x3c\0\x40")}
    yield "alias-of-plain", {}, plain, {"aliases": {"head.weight": "emb.weight"}}, {}
    yield "error-unknown", one, {}, {"errors": {"m.weight": None}}, {}
    yield "error-zero", one, {}, {"errors": {"m.weight": raw("0.000000e+00")}}, {}
    yield "extensions", one, {}, {"extensions": {"org.example.x": {"a": [1, True, None, "b"]}}}, {}
    yield "minor-version", one, {}, {"version": "1.7", "later": {"a": 1}}, {}
    recipe = {"é\U0001f600": '\x00\b\t\n\f\r\x7f"\\/', "b": [2**63 - 1, {}, []]}
    yield "escapes", one, {}, {"recipe": recipe}, {}
    # Section 4.3: `a` was transposed in the source, `m.up` a stack of two.
    three = {"a": sketch(3, 4, 2, 1, seed=31), "m.0.up": sketch(2, 4, 3, 1, seed=32)}
    three["m.1.up"] = sketch(2, 4, 3, 1, seed=33)
    forms = {"stacked": {"m.up": 2}, "transposed": ["a.weight"]}
    yield "source-forms", three, {}, {"source": {"id": "a/b", "digest": "ab" * 32, **forms}}, {}
    config = b'{"quantization_config":{"format":"1.0","quant_method":"sktch"}}'
    files = {"config.json": config, "1_Pooling/config.json": b"{}", "empty.txt": b""}
    yield "bundle", one, {}, {}, files


def rewritten(document, tensors):
    """Section 8: another order of metadata and tensors, padding to 8 bytes."""
    parts, data = [], b""
    for name in sorted(tensors, reverse=True):
        dtype, shape, content = tensors[name]
        span = [len(data), len(data) + len(content)]
        entry = {"data_offsets": span, "shape": shape, "dtype": dtype}
        parts.append(json.dumps(name) + ":" + json.dumps(entry, separators=(",", ":")))
        data += content
    meta = json.dumps({"sktch": seal(document), "format": "pt"}, separators=(",", ":"))
    text = "{" + ",".join([*parts, '"__metadata__":' + meta]) + "}"
    return container(text + " " * (-len(text) % 8), data)


CONFIG = b'{"quantization_config": {"quant_method": "sktch", "format": "1.0"}}'
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def index_json(cut):
    """The index of a folder."""
    weight_map = {n: SHARDS[i] for i, part in enumerate(cut) for n in part}
    total = sum(len(t[2]) for part in cut for t in part.values())
    value = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(value, indent=2, sort_keys=True).encode()


def folders():
    """Valid folders: own shards, one document in rewritten shards, a single file."""
    a, b = {"a": sketch(2, 8, 4, 2, seed=40)}, {"b": sketch(1, 6, 3, 1, seed=41)}
    norm = {"norm.weight": ("F32", [1], b"\0\0\x80\x3f")}
    first, second = model(a, norm), model(b, aliases={"head.weight": "b.weight"})
    document, tensors = model({**a, **b}, norm, aliases={"head.weight": "b.weight"})
    want = expected(document, tensors, {**a, **b})
    both = {"weights": want["weights"], "aliases": want["aliases"], "files": {}}
    yield "folder-single", {"model.safetensors": build(document, tensors)}, want
    shards = {SHARDS[0]: build(*first), SHARDS[1]: build(*second)}
    index = {"model.safetensors.index.json": index_json([first[1], second[1]])}
    own = {
        n: {"dtype": t[0], "shape": t[1], "hex": t[2].hex()}
        for p in (first, second)
        for n, t in p[1].items()
    }
    yield "folder-shards", {**shards, **index}, {**both, "tensors": own}
    cut = [{n: tensors[n] for n in part} for part in (sorted(tensors)[:3], sorted(tensors)[3:])]
    shards = {SHARDS[i]: rewritten(document, part) for i, part in enumerate(cut)}
    index = {"model.safetensors.index.json": index_json(cut)}
    yield "folder-rewritten", {**shards, **index}, want
