"""Invalid vectors of `delta.md`: requirement, name, content (or files), base if one is needed."""

import copy
import re

from vectorlib.deltas import adapter, base_of, delta, patterns, valid_deltas
from vectorlib.material import float_bytes, model, sketch
from vectorlib.plain import ZERO, build, container, digest, entries, header_of, seal

W = ["weights", "m.weight"]
NAN = b"\0\x7e"


def good(**options):
    """Base and a valid delta of 3 of its 9 groups."""
    base = base_of()
    rows = patterns(base, (0, 3, 8), 95, 5)
    if options.get("mode", "xor") != "xor":
        rows = {g: [v / 4 for v in row] for g, row in rows.items()}
    if options.get("values") == "I8":
        rows = {g: [1, 2, 3, -4] for g in rows}
    return base, delta(base, {"m": rows}, **options)


def broken(change=None, drop=(), add=None, **options):
    """A file with a changed document, sealed again, and tensors taken away or put in."""
    document, tensors, _ = good(**options)[1]
    document = copy.deepcopy(document)
    for name, tensor in (add or {}).items():
        tensors[name] = tensor
        document["digests"][name] = digest(*tensor)
    for name in drop:
        del tensors[name]
        del document["digests"][name]
    if change is not None:
        change(document)
    return build(document, tensors)


def put(path, value):
    """The member at a path gets a value."""

    def change(document):
        *above, last = path
        for key in above:
            document = document[key]
        document[last] = value

    return change


def drop_member(*path):
    """The member at a path goes away."""

    def change(document):
        *above, last = path
        for key in above:
            document = document[key]
        del document[last]

    return change


def renamed(name):
    """The weight bears another name."""

    def change(document):
        document["weights"] = {name: document["weights"]["m.weight"]}

    return change


def broken_documents():
    """Section 5."""
    yield "DLT-001", "kind-model", build(*base_of())
    for what, kind in {"null": None, "other": "patch", "case": "Delta"}.items():
        yield "DLT-001", f"kind-{what}", broken(put(["kind"], kind))
    yield "DLT-001", "kind-missing", broken(drop_member("kind"))
    for what, version in {"2": "2.0", "integer": 1, "short": "1", "zero": "01.0"}.items():
        yield "DLT-002", f"version-{what}", broken(put(["version"], version))
    yield "DLT-003", "no-task", broken(drop_member("task"))
    yield "DLT-003", "no-span", broken(drop_member("span"))
    yield "DLT-003", "unknown-member", broken(put(["more"], 1))
    yield "DLT-003", "member-of-a-model", broken(put(["files"], {}))
    yield "DLT-003", "weights-array", broken(put(["weights"], []))
    yield "DLT-003", "digests-null", broken(put(["digests"], None))
    for what, mode in {"other": "mul", "null": None, "case": "XOR", "array": []}.items():
        yield "DLT-004", f"mode-{what}", broken(put(["mode"], mode))
    for what, values in {"f32": "F32", "null": None, "lower": "f16", "i8-in-xor": "I8"}.items():
        yield "DLT-005", f"values-{what}", broken(put(["values"], values))
    yield "DLT-005", "values-f16-in-xor", broken(put(["values"], "F16"))
    yield "DLT-005", "values-i8-in-replace", broken(put(["values"], "I8"), mode="replace")
    eight = {"mode": "add", "values": "I8", "span": 2, "scales": [1.0, 0.5]}
    for what, span in {"0": 0, "true": True, "null": None, "string": "1"}.items():
        yield "DLT-006", f"span-{what}", broken(put(["span"], span), **eight)
    yield "DLT-006", "span-without-i8", broken(put(["span"], 1))
    yield "DLT-007", "tool-integer", broken(put(["tool"], 1))
    yield "DLT-007", "task-null", broken(put(["task"], None))
    yield "DLT-007", "base-string", broken(put(["base"], "a/b"))
    yield "SKT-057", "extension-without-domain", broken(put(["extensions"], {"x": 1}))


def broken_records():
    """Section 5, the records."""
    for what, name in {"bias": "m.bias", "bare": ".weight", "climbing": "../m.weight"}.items():
        yield "DLT-010", f"name-{what}", broken(renamed(name))
    yield "DLT-010", "name-too-long", broken(renamed("m" * 500 + ".weight"))
    yield "DLT-011", "record-without-index", broken(drop_member(*W, "index"))
    yield "DLT-011", "record-with-more", broken(put([*W, "scale"], 1))
    yield "DLT-011", "record-of-a-later-version", broken(later)
    yield "DLT-011", "record-null", broken(put(W, None))
    shapes = {"rank-2": [9, 4], "zero": [0, 3, 4], "string": "3,3,4", "true": [True, 3, 4]}
    for what, shape in shapes.items():
        yield "DLT-012", f"shape-{what}", broken(put([*W, "shape"], shape))
    for what, width in {"3": 3, "1": 1, "512": 512}.items():
        yield "DLT-013", f"lut-of-{what}", broken(put([*W, "shape"], [3, 3, width]))
    for what, table in {"index": "sketch_index", "null": None, "other": "lut"}.items():
        yield "DLT-013", f"table-{what}", broken(put([*W, "table"], table))
    yield "DLT-013", "scales-of-4", broken(put([*W, "table"], "sketch_scale"))
    for what, lut in {"f64": "F64", "u8": "U8", "null": None}.items():
        yield "DLT-014", f"lut-{what}", broken(put([*W, "lut"], lut))
    for what, count in {"0": 0, "10": 10, "true": True, "null": None, "huge": 2**62}.items():
        yield "DLT-015", f"changed-{what}", broken(put([*W, "changed"], count))
    for member in ("base", "index", "tuned"):
        yield "DLT-016", f"{member}-short", broken(put([*W, member], "ab"))
    yield "DLT-016", "tuned-null", broken(put([*W, "tuned"], None))
    yield "DLT-016", "tuned-upper-case", broken(put([*W, "tuned"], "AB" * 32))
    yield "DLT-016", "tuned-is-base", broken(lambda d: same_digest(d["weights"]["m.weight"]))


def later(document):
    document["version"] = "1.9"
    document["weights"]["m.weight"]["scale"] = 1


def same_digest(record):
    record["tuned"] = record["base"]


def broken_tensors():
    """Section 4."""
    yield "DLT-020", "no-lut", broken(drop=["m.delta_lut"])
    short, wide = ("U16", [2, 4], b"\1" * 16), ("U16", [3, 5], b"\1" * 30)
    yield "DLT-020", "lut-of-fewer-groups", broken(add={"m.delta_lut": short})
    yield "DLT-020", "lut-of-more-entries", broken(add={"m.delta_lut": wide})
    yield "DLT-020", "lut-rank", broken(add={"m.delta_lut": ("U16", [12], b"\1" * 24)})
    yield "DLT-020", "lut-dtype", broken(add={"m.delta_lut": ("F16", [3, 4], b"\1" * 24)})
    yield "DLT-020", "mode-other-than-tensors", broken(put(["mode"], "add"))
    yield "DLT-020", "changed-other-than-tensors", broken(put([*W, "changed"], 4))
    yield "DLT-021", "no-groups", broken(drop=["m.delta_groups"])
    yield "DLT-021", "groups-of-3-bytes", broken(add={"m.delta_groups": ("U8", [3], b"\x09\1\0")})
    yield "DLT-021", "groups-as-numbers", broken(add={"m.delta_groups": ("I32", [3], bytes(12))})
    base = base_of()
    made = delta(base, {"m": {g: [1, 2, 3, 4] for g in range(9)}})
    made[1]["m.delta_groups"] = ("U8", [2], b"\xff\1")
    made[0]["digests"]["m.delta_groups"] = digest("U8", [2], b"\xff\1")
    yield "DLT-021", "groups-though-all-changed", build(*made[:2])
    eight = {"mode": "add", "values": "I8", "span": 2, "scales": [1.0, 0.5]}
    yield "DLT-022", "no-scale", broken(drop=["m.delta_scale"], **eight)
    long = {"m.delta_scale": ("F16", [3], float_bytes([1.0] * 3, "F16"))}
    yield "DLT-022", "scale-for-each-group", broken(add=long, **eight)
    yield "DLT-022", "scale-f32", broken(add={"m.delta_scale": ("F32", [2], bytes(8))}, **eight)
    yield "DLT-022", "scale-without-i8", broken(add=long)
    others = {"norm": "norm.weight", "dense": "m.weight", "index": "m.sketch_index"}
    others |= {"lut": "m.sketch_lut", "file": "sktch.file.0000", "orphan": "q.delta_lut"}
    for what, name in others.items():
        yield "DLT-023", f"tensor-{what}", broken(add={name: ("U16", [2], b"abcd")})
    yield "DLT-023", "weight-without-record", broken(put(["weights"], {}))
    yield "SKT-080", "digest-missing", broken(drop_member("digests", "m.delta_lut"))
    yield "SKT-080", "digest-of-nothing", broken(put(["digests", "q"], ZERO))
    yield "SKT-080", "digest-null", broken(put(["digests", "m.delta_lut"], None))


def broken_data():
    """Sections 3, 4 and 6: what Validators find in the data, and in the header's form."""
    for what, bits in {"padding": b"\x09\x03", "padding-high": b"\x09\x81"}.items():
        yield "DLT-030", f"groups-{what}", broken(add={"m.delta_groups": ("U8", [2], bits)})
    for what, bits in {"two": b"\x09\0", "four": b"\x0b\1", "none": b"\0\0"}.items():
        yield "DLT-031", f"groups-{what}", broken(add={"m.delta_groups": ("U8", [2], bits)})
    for mode in ("replace", "add"):
        for what, bits in {"nan": NAN, "infinity": b"\0\x7c", "minus-infinity": b"\0\xfc"}.items():
            bad = {"m.delta_lut": ("F16", [3, 4], bytes(22) + bits)}
            yield "DLT-032", f"{mode}-{what}", broken(add=bad, mode=mode)
    eight = {"mode": "add", "values": "I8", "span": 2, "scales": [1.0, 0.5]}
    scales = {"nan": NAN, "infinity": b"\0\x7c", "negative": b"\0\xbc", "minus-zero": b"\0\x80"}
    for what, bits in scales.items():
        bad = {"m.delta_scale": ("F16", [2], b"\0\x3c" + bits)}
        yield "DLT-032", f"scale-{what}", broken(add=bad, **eight)
    blank = {"m.delta_lut": ("U16", [3, 4], b"\1\0" * 4 + bytes(8) + b"\1\0" * 4)}
    yield "DLT-033", "xor-of-zeros", broken(add=blank)
    yield "SKT-081", "digest-zero", broken(put(["digests", "m.delta_lut"], ZERO))
    document, tensors, _ = good()[1]
    parts, data = entries(tensors)
    text = header_of(seal(document), parts)
    yield "SKT-031", "padding-of-128", container(text + " " * 64, data)
    more = text.replace('"format":"pt"', '"format":"pt","more":"x"', 1).rstrip(" ")
    yield "SKT-043", "more-metadata", container(more + " " * (-(8 + len(more)) % 64), data)
    zero = re.sub(r'"seal":"[0-9a-f]{64}"', f'"seal":"{ZERO}"', seal(document))
    yield "SKT-055", "seal-zero", container(header_of(zero, parts), data)
    spaced = seal(document).replace('"kind":', '"kind": ')
    yield "SKT-050", "white-space", container(header_of(spaced, parts), data)
    yield "SKT-042", "no-document", container(header_of(None, parts), data)
    yield "SKT-029", "one-byte-short", build(document, tensors)[:-1]


def broken_bindings():
    """Section 6 and 7: requirement, name, content, the base (a model) that it is applied to."""
    base, made = good()
    whole = build(*made[:2])
    yield "DLT-040", "other-luts", whole, base_of(seed=87)
    other = copy.deepcopy(base)
    _, shape, index = other[1]["m.sketch_index"]
    other[1]["m.sketch_index"] = ("U8", shape, bytes([index[0] ^ 1]) + index[1:])
    other[0]["digests"]["m.sketch_index"] = digest(*other[1]["m.sketch_index"])
    yield "DLT-040", "other-indices", whole, other
    yield "DLT-040", "no-such-weight", whole, model({"n": sketch(3, 12, 2, 3, "F16", 80)})
    yield "DLT-040", "other-dtype", whole, base_of("BF16")
    yield "DLT-040", "other-shape", broken(put([*W, "shape"], [9, 1, 4])), base
    yield "DLT-040", "other-table", broken(as_scales, add=narrow()), base
    # 0x7C00 is infinity in F16; the digest is that of the table with it.
    _, shape, table = base[1]["m.sketch_lut"]
    (first,) = (int.from_bytes(table[:2], "little"),)
    rows = {0: [first ^ 0x7C00, 0, 0, 0]}
    yield "DLT-041", "result-infinite", build(*delta(base, {"m": rows})[:2]), base
    huge = {4: [65504.0] * 4}
    top = model({"m": sketch(3, 12, 2, 3, "F16", 80, [65504.0, 65504.0, 1.0, 2.0])})
    yield "DLT-041", "sum-infinite", build(*overflowing(top, huge)), top
    yield "DLT-042", "other-result", broken(put([*W, "tuned"], "cd" * 32)), base


def as_scales(document):
    record = document["weights"]["m.weight"]
    record.update(table="sketch_scale", shape=[3, 3, 2])


def narrow():
    return {"m.delta_lut": ("U16", [3, 2], b"\1" * 12)}


def overflowing(base, rows):
    """A delta whose sum does not exist in F16; made as `replace`, which has the same tensors."""
    document, tensors, _ = delta(base, {"m": rows}, "replace", "same")
    return {**document, "mode": "add"}, tensors


def broken_adapters():
    """Section 8: requirement, name, files by path."""
    made = next(d for name, _, _, d in valid_deltas() if name == "minimal")
    files = adapter(made)
    weights, config = "sketch_adapter.safetensors", "sketch_adapter_config.json"
    yield "DLT-050", "adapter-without-weights", {config: files[config]}
    yield "DLT-051", "adapter-without-config", {weights: files[weights]}
    yield "DLT-051", "adapter-config-array", {**files, config: b"[]"}
    yield "DLT-051", "adapter-config-not-json", {**files, config: b"{"}
    yield "DLT-051", "adapter-of-another-seal", adapter(made, seal=ZERO)
    yield "DLT-051", "adapter-of-another-mode", adapter(made, mode="add")
