"""Invalid vectors: bytes, JSON, tensors and metadata (section 3 of the specification)."""

import re
import struct
from functools import partial

from vectorlib.breaking import base, resealed, shaped, swap, with_header, with_text
from vectorlib.plain import build, container, entries, header_of, seal
from vectorlib.valid import rewritten

P = '"p":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def broken_bytes():
    """3.1: requirement, name, content."""
    whole = build(*base())
    yield "SKT-002", "no-bytes", b""
    yield "SKT-002", "7-bytes", whole[:7]
    yield "SKT-003", "length-0", struct.pack("<Q", 0) + whole[8:]
    yield "SKT-003", "length-1", struct.pack("<Q", 1) + whole[8:]
    yield "SKT-003", "length-over-the-limit", struct.pack("<Q", 67108865) + whole[8:]
    yield "SKT-003", "length-all-ones", b"\xff" * 8 + whole[8:]
    yield (
        "SKT-003",
        "git-lfs-pointer",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    )
    yield "SKT-003", "web-page", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "SKT-003", "gguf", b"GGUF\x03\0\0\0" + b"\0" * 64
    yield "SKT-003", "zip", b"PK\x03\x04\x14\0\0\0\x08\0" + b"\0" * 64
    yield "SKT-003", "elf", b"\x7fELF\x02\x01\x01\0" + b"\0" * 64
    yield "SKT-004", "length-past-the-end", struct.pack("<Q", len(whole)) + whole[8:]
    yield "SKT-004", "header-cut", whole[:200]
    yield "SKT-005", "byte-order-mark", with_header(lambda t: "\ufeff" + t)
    yield "SKT-005", "leading-space", with_header(lambda t: " " + t)
    yield "SKT-005", "array-root", with_header(lambda t: "[" + t + "]")
    yield "SKT-006", "not-utf-8", with_header(lambda t: t.encode().replace(b'"p"', b'"\xff"'))
    for name, pad in (("tab", "\t"), ("newline", "\n"), ("nul", "\0")):
        yield "SKT-007", f"padding-{name}", with_header(lambda t, pad=pad: t + pad)
    yield "SKT-007", "inner-space", swap('"dtype":"F32"', '"dtype": "F32"')
    yield "SKT-029", "one-byte-short", whole[:-1]
    yield "SKT-029", "one-byte-more", whole + b"\0"
    yield "SKT-029", "zip-tail", whole + b"PK\x05\x06" + b"\0" * 18


def broken_json():
    """3.2: requirement, name, content."""
    yield "SKT-008", "no-colon", swap('"dtype":"F32"', '"dtype""F32"')
    yield "SKT-008", "two-roots", with_header(lambda t: t + "{}")
    yield "SKT-008", "nan", shaped('"shape":[NaN]')
    yield "SKT-008", "leading-zero", shaped('"shape":[02]')
    yield "SKT-008", "unterminated-string", with_header(lambda t: t[:-1] + ',"x}')
    yield "SKT-009", "tensor-twice", swap(P, P + "," + P)
    yield "SKT-009", "tensor-twice-escaped", swap(P, P + "," + P.replace('"p"', r'"\u0070"'))
    yield "SKT-009", "tensor-twice-elsewhere", swap(P, P + "," + P.replace("[0,8]", "[8,16]"))
    yield "SKT-009", "shape-twice", shaped('"shape":[2],"shape":[2]')
    yield "SKT-009", "format-twice", swap('"format":"pt"', '"format":"pt","format":"pt"')
    yield "SKT-009", "metadata-twice", swap(P, P + ',"__metadata__":{"format":"pt"}')
    digits = {"minus": "-2", "minus-zero": "-0", "fraction": "2.0", "exponent": "2e0"}
    digits |= {"2-to-63": str(2**63), "2-to-64": str(2**64), "5000-digits": "1" * 5000}
    digits |= {"beyond-double": "1e400"}
    for name, text in digits.items():
        yield "SKT-010", f"number-{name}", shaped(f'"shape":[{text}]')
    yield "SKT-011", "lone-surrogate", swap('"p"', r'"\ud800"')
    yield "SKT-012", "header-4-levels", shaped('"shape":[[2]]')
    yield "SKT-012", "header-9000-levels", shaped(f'"shape":{"[" * 9000}{"]" * 9000}')
    twice = '"tool":"vectors 1","tool":"vectors 1"'
    yield (
        "SKT-009",
        "document-member-twice",
        with_text(lambda t: t.replace('"tool":"vectors 1"', twice)),
    )
    yield "SKT-008", "document-array", with_text(lambda t: "[" + t + "]")
    yield "SKT-008", "document-cut", with_text(lambda t: t[:-1])
    yield (
        "SKT-008",
        "document-infinity",
        resealed(lambda t: t.replace('"bits":4', '"bits":Infinity')),
    )
    yield "SKT-010", "document-minus", resealed(lambda t: t.replace('"bits":4', '"bits":-4'))
    yield "SKT-010", "document-fraction", resealed(lambda t: t.replace('"bits":4', '"bits":4.5'))
    yield (
        "SKT-011",
        "document-lone-surrogate",
        resealed(lambda t: t.replace("vectors 1", r"\udc00")),
    )
    deep = '"recipe":' + '{"a":' * 16 + "1" + "}" * 16
    yield (
        "SKT-012",
        "document-17-levels",
        resealed(lambda t: t.replace('"recipe":{"bits":4}', deep)),
    )


def broken_tensors():
    """3.3: requirement, name, content."""
    names = {"empty": "", "climbing": "../p", "slash": "a/b", "nul": r"p\u0000", "dash": "-p"}
    names |= {"long": "p" * 513, "space": "p p", "accent": "é", "dot": ".p"}
    for what, name in names.items():
        yield "SKT-021", f"name-{what}", swap('"p":{"dtype"', f'"{name}":{{"dtype"')
    yield "SKT-022", "entry-without-dtype", swap('"dtype":"F32",', "")
    yield "SKT-022", "entry-with-more", swap('"dtype":"F32",', '"dtype":"F32","x":1,')
    yield "SKT-022", "entry-array", swap(P, '"p":[1]')
    yield "SKT-022", "entry-null", swap(P, '"p":null')
    for dtype in ("f32", "BOOL", "F4", "F6_E2M3", "F128", "C64", ""):
        yield "SKT-023", f"dtype-{dtype or 'empty'}-", swap('"dtype":"F32"', f'"dtype":"{dtype}"')
    yield "SKT-023", "dtype-number", swap('"dtype":"F32"', '"dtype":32')
    shapes = {"rank-9": "[2,1,1,1,1,1,1,1,1]", "true": "[true]", "string": '["2"]', "null": "null"}
    for what, shape in shapes.items():
        yield "SKT-024", f"shape-{what}", shaped(f'"shape":{shape}')
    yield (
        "SKT-025",
        "dimension-0",
        swap('"shape":[2],"data_offsets":[0,8]', '"shape":[0],"data_offsets":[0,0]'),
    )
    offsets = {
        "three": "[0,8,8]",
        "one": "[0]",
        "null": "null",
        "string": '["0",8]',
        "reversed": "[8,0]",
    }
    for what, text in offsets.items():
        yield "SKT-026", f"offsets-{what}", swap("[0,8]", text)
    for what, shape in {
        "3": "[3]",
        "2-to-64": "[4294967296,4294967296]",
        "wrap": "[4,4611686018427387904]",
    }.items():
        yield "SKT-027", f"size-{what}", shaped(f'"shape":[{shape[1:-1]}]')
    document, tensors = base()
    parts, data = entries(tensors)
    text = seal(document)
    moved = [
        re.sub(r"\[(\d+),(\d+)\]}", lambda m: f"[{int(m[1]) + 8},{int(m[2]) + 8}]}}", p)
        for p in parts
    ]
    yield "SKT-028", "first-not-at-0", container(header_of(text, moved), bytes(8) + data)
    yield (
        "SKT-028",
        "hole",
        container(header_of(text, parts[:1] + moved[1:]), data[:8] + bytes(8) + data[8:]),
    )
    double = [*parts, '"q":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}']
    yield "SKT-028", "overlap", container(header_of(text, double), data)


def metadata_to(value, text):
    """A header's text in which `__metadata__` has another value."""
    return re.sub(r'"__metadata__":{.*?"},"p"', f'"__metadata__":{value},"p"', text)


def broken_metadata():
    """3.4 and 3.5: requirement, name, content."""
    for what, value in {"null": "null", "string": '"x"', "array": "[]"}.items():
        yield "SKT-040", f"metadata-{what}", with_header(partial(metadata_to, value))
    yield "SKT-040", "metadata-integer-inside", swap('"format":"pt"', '"format":1')
    yield "SKT-040", "metadata-nested", swap('"format":"pt"', '"format":{}')
    yield "SKT-041", "no-format", swap('"format":"pt",', "")
    yield "SKT-041", "format-tf", swap('"format":"pt"', '"format":"tf"')
    yield (
        "SKT-041",
        "no-metadata",
        with_header(lambda t: re.sub(r'"__metadata__":{.*?"},"p"', '"p"', t)),
    )
    parts, data = entries(base()[1])
    yield "SKT-042", "no-document", container(header_of(None, parts), data)
    yield "SKT-043", "more-metadata", swap('"format":"pt"', '"format":"pt","more":"x"')
    document, tensors = base()
    yield "SKT-030", "order", rewritten(document, tensors)
    text = header_of(seal(document), parts)
    yield "SKT-031", "padding-of-128", container(text + " " * 64, data)
    yield "SKT-031", "padding-one-more", container(text + " ", data)
