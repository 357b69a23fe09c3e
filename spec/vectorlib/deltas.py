"""Deltas: how they are put together, and the valid vectors of `delta.md`."""

import hashlib
import json
import struct

from vectorlib.material import Numbers, float_bytes, model, shaped, sketch
from vectorlib.plain import build, digest, dump

LETTERS = {"F16": "e", "F32": "f", "U16": "H", "U32": "I", "I8": "b"}
WIDTH = {"F16": 2, "BF16": 2, "F32": 4}
BITS = {"F16": "U16", "BF16": "U16", "F32": "U32"}


def base_of(lut="F16", seed=80, rows=3, bits=2, groups=3):
    """A base with one sketch `m` of 9 groups of 4 entries (two bytes of bitmap)."""
    return model({"m": sketch(rows, 12, bits, groups, lut, seed)})


def single(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def unpacked(data, dtype):
    """Stored bytes to numbers."""
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    letter = LETTERS[dtype]
    return list(struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data))


def packed(numbers, dtype):
    """Numbers to stored bytes; floats rounded to nearest, ties to even."""
    if dtype != "BF16":
        return struct.pack(f"<{len(numbers)}{LETTERS[dtype]}", *numbers)
    bits = [struct.unpack("<I", struct.pack("<f", v))[0] for v in numbers]
    return struct.pack(f"<{len(bits)}H", *[(b + 0x7FFF + (b >> 16 & 1)) >> 16 for b in bits])


def stored_dtype(mode, values, lut):
    """Section 6: the dtype of `delta_lut`."""
    return BITS[lut] if mode == "xor" else lut if values == "same" else values


def tuned_group(group, row, mode, values, lut, scale):
    """Section 6: one group of the base (bytes) and its stored row (numbers) to the tuned bytes."""
    if mode == "xor":
        before = unpacked(group, BITS[lut])
        return packed([b ^ v for b, v in zip(before, row, strict=True)], BITS[lut])
    numbers = unpacked(
        packed(row, stored_dtype(mode, values, lut)), stored_dtype(mode, values, lut)
    )
    if values == "I8":
        numbers = [c * scale / 128 for c in numbers]
    if mode == "add":
        pairs = zip(unpacked(group, lut), numbers, strict=True)
        numbers = [single(b + v) for b, v in pairs]
    return packed(numbers, lut)


def weight(base, stem, rows, mode, values, span, scales):
    """Record, tensors by suffix and the tuned table of one weight; rows by group number."""
    document, tensors = base
    table = "sketch_lut" if f"{stem}.sketch_lut" in tensors else "sketch_scale"
    lut, shape, data = tensors[f"{stem}.{table}"]
    dtype, size = stored_dtype(mode, values, lut), shape[2] * WIDTH[lut]
    scales = unpacked(float_bytes(scales, "F16"), "F16")
    out, stored = bytearray(data), b""
    for j, group in enumerate(sorted(rows)):
        part = slice(group * size, group * size + size)
        scale = scales[j // span] if span else None
        out[part] = tuned_group(bytes(out[part]), rows[group], mode, values, lut, scale)
        stored += packed(rows[group], dtype)
    parts = {".delta_lut": (dtype, [len(rows), shape[2]], stored)}
    if span:
        parts[".delta_scale"] = ("F16", [-(-len(rows) // span)], float_bytes(scales, "F16"))
    groups = shape[0] * shape[1]
    if len(rows) < groups:
        bits = sum(1 << g for g in rows).to_bytes(-(-groups // 8), "little")
        parts[".delta_groups"] = ("U8", [len(bits)], bits)
    record = {
        "base": document["digests"][f"{stem}.{table}"],
        "changed": len(rows),
        "index": document["digests"][f"{stem}.sketch_index"],
        "lut": lut,
        "shape": shape,
        "table": table,
        "tuned": digest(lut, shape, bytes(out)),
    }
    return record, parts, bytes(out)


def delta(on, changes, mode="xor", values="same", span=0, scales=(), **members):
    """Document, tensors and tuned tables of a delta on a base; `changes` by stem and group."""
    weights, tensors, tuned = {}, {}, {}
    for stem, rows in changes.items():
        record, parts, table = weight(on, stem, rows, mode, values, span, list(scales))
        weights[f"{stem}.weight"], tuned[f"{stem}.weight"] = record, table
        tensors |= {stem + suffix: tensor for suffix, tensor in parts.items()}
    document = {
        "base": {"digest": "ab" * 32, "format": "safetensors", "id": "a/b", "revision": None},
        "digests": {n: digest(*t) for n, t in tensors.items()},
        "extensions": {},
        "kind": "delta",
        "mode": mode,
        "span": span,
        "task": {"name": "t"},
        "tool": "vectors 1",
        "values": values,
        "version": "1.0",
        "weights": weights,
    }
    return {**document, **members}, tensors, tuned


def patterns(base, groups, seed, bits):
    """Random bit patterns below `bits` bits for some groups of the sketch `m`."""
    numbers, width = Numbers(seed), base[1]["m.sketch_lut"][1][2]
    return {g: [1 + numbers.below((1 << bits) - 1) for _ in range(width)] for g in groups}


def some(base, groups, seed, unit):
    """Random numbers, multiples of `unit`, for some groups of the sketch `m`."""
    numbers, width = Numbers(seed), base[1]["m.sketch_lut"][1][2]
    return {g: [(numbers.below(511) - 255) * unit for _ in range(width)] for g in groups}


def valid_deltas():
    """Name, name of the base, base, delta."""
    small = model({"a": sketch(2, 4, 2, 1)})
    yield "minimal", "small", small, delta(small, {"a": {1: [1, 0, 0x8000, 3]}})
    yield "nothing", "small", small, delta(small, {})
    bases = {lut: base_of(lut) for lut in WIDTH}
    for lut, base in bases.items():
        name = lut.lower()
        few, every = (0, 3, 8), range(9)
        for what, groups in (("some", few), ("all", every)):
            rows = patterns(base, groups, 90, 9)
            yield f"xor-{name}-{what}", name, base, delta(base, {"m": rows})
        for mode in ("replace", "add"):
            for values in ("same", "F16", "BF16"):
                unit = 2.0**-8 if values == "BF16" or mode == "replace" else 2.0**-12
                made = delta(base, {"m": some(base, few, 91, unit)}, mode, values)
                yield f"{mode}-{name}-{values.lower()}", name, base, made
        rows = some(base, (0, 1, 4, 5, 8), 92, 1 / 2)
        rows = {g: [int(v) for v in row] for g, row in rows.items()}
        scales = [0.125, 2.0**-24, 0.01]
        made = delta(base, {"m": rows}, "add", "I8", 2, scales)
        yield f"i8-{name}-two-per-scale", name, base, made
    yield from valid_numbers(bases["F16"])
    yield from valid_rest(bases["F16"])


def valid_numbers(base):
    """Rounding and extremes, all on the base `f16`."""
    add = {"mode": "add", "values": "I8"}
    codes = {0: [-128, 127, 0, 1], 7: [1, -1, 127, -127]}
    yield "i8-codes", "f16", base, delta(base, {"m": codes}, **add, span=1, scales=[1.0, 0.5])
    most = 2**63 - 1
    yield "i8-span-most", "f16", base, delta(base, {"m": codes}, **add, span=most, scales=[0.3])
    zero = delta(base, {"m": codes}, **add, span=1, scales=[0.0, 0.5])
    yield "i8-scale-zero", "f16", base, zero
    # Entries are multiples of 1/128 below 2: these sums lie half-way between two numbers.
    ties = {0: [2.0**-12, 3 * 2.0**-12, -(2.0**-12), 2.0**-25]}
    table = [1.0, 1.0009765625, -1.0, 0.0]
    even = model({"m": sketch(3, 12, 2, 3, "F16", 80, table)})
    yield "add-ties-to-even", "even", even, delta(even, {"m": ties}, "add", "same")
    extremes = {1: [65504.0, -65504.0, 2.0**-24, -0.0]}
    made = delta(base, {"m": extremes}, "replace", "same")
    yield "replace-extremes", "f16", base, made
    # 1 + 2^-24 + 2^-50 would round up to binary32; its parts do not exist there.
    single_ = model({"m": sketch(3, 12, 2, 3, "F32", 80, [1.0, -1.0, 2.0**-149, 3.0])})
    tiny = {2: [2.0**-24, 2.0**-25, 2.0**-149, 2.0**-23]}
    yield "add-in-binary32", "single", single_, delta(single_, {"m": tiny}, "add", "same")


def valid_rest(base):
    """Forms of tables, and the document's members."""
    eight = base_of(rows=4, groups=2, seed=81)
    rows = patterns(eight, (0, 7), 93, 4)
    yield "bitmap-of-8", "eight", eight, delta(eight, {"m": rows})
    wide = model({"m": sketch(1, 4, 8, 1, seed=82)})
    yield "lut-of-256", "wide", wide, delta(wide, {"m": patterns(wide, (0,), 94, 3)})
    scales = {"a": shaped(2, 64, "affine", 4, 2, seed=83)}
    both = model({**scales, "s": shaped(1, 64, "symmetric", 8, 2, seed=84)})
    made = delta(both, {"a": {1: [5, 6], 3: [0, 1]}, "s": {0: [9], 1: [1]}})
    yield "shaped", "shaped", both, made
    two = model({k: sketch(2, 8, 4, 2, seed=s) for k, s in (("l.0.q", 85), ("l.1.q", 86))})
    some_ = {"l.0.q": {g: [1] * 16 for g in range(4)}, "l.1.q": {2: [2] * 16}}
    yield "two-weights", "two", two, delta(two, some_)
    yield "one-of-two-weights", "two", two, delta(two, {"l.1.q": some_["l.1.q"]})
    one = {"m": {0: [1, 2, 3, 4]}}
    extra = {"org.example.x": {"a": [1, True, None, "b"]}}
    yield "extensions", "f16", base, delta(base, one, extensions=extra)
    yield "minor-version", "f16", base, delta(base, one, version="1.7", later={"a": 1})
    task = {"name": 'é"\\', "training": {"lr": "0.0003", "steps": 100, "seeds": [1, None]}}
    yield "task", "f16", base, delta(base, one, task=task, base={})


def expected(made, base):
    """What a reader must find: the tuned table of every weight, in hexadecimal."""
    document, tensors, tuned = made
    return {
        "base": base,
        "tensors": {
            n: {"dtype": t[0], "shape": t[1], "hex": t[2].hex()} for n, t in tensors.items()
        },
        "tuned": {name: table.hex() for name, table in tuned.items()},
        "changed": {name: r["changed"] for name, r in document["weights"].items()},
    }


def seal_of(document):
    """SKT-055."""
    return hashlib.sha256(dump({**document, "seal": "0" * 64}).encode()).hexdigest()


def config_of(document):
    """Section 8: the config of an adapter folder."""
    return {
        "adapter_type": "sktch-delta",
        "base_model_name_or_path": document["base"].get("id"),
        "base_model_revision": document["base"].get("revision"),
        "format": document["version"],
        "mode": document["mode"],
        "seal": seal_of(document),
        "task": document["task"],
        "values": document["values"],
        "weights": len(document["weights"]),
    }


def adapter(made, **changed):
    """The files of an adapter folder."""
    document, tensors, _ = made
    config = {**config_of(document), **changed}
    return {
        "sketch_adapter.safetensors": build(document, tensors),
        "sketch_adapter_config.json": json.dumps(config, indent=2).encode(),
    }
