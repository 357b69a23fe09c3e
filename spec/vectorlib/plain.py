"""The format in its plainest form: packing, digests, document, header."""

import hashlib
import json
import re
import struct

SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2}
SIZES |= {"I16": 2, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
ZERO = "0" * 64


def pack(group, bits):
    """Section 5: one group of indices to bytes."""
    out, shift = b"", 0
    for width in PLANES[bits]:
        plane = bytearray(-(-len(group) * width // 8))
        for c, index in enumerate(group):
            plane[c * width // 8] |= ((index >> shift) & (2**width - 1)) << (c * width % 8)
        out += bytes(plane)
        shift += width
    return out


def digest(dtype, shape, data):
    """SKT-081."""
    prefix = f"{dtype} {','.join(str(d) for d in shape)}\n".encode()
    return hashlib.sha256(prefix + data).hexdigest()


def dump(value):
    """SKT-050; a float must already be a `Raw` text."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return re.sub(r'"<raw ([^"]*)>"', r"\1", text)


def raw(text):
    """A number of fixed form, smuggled through `json.dumps`."""
    return f"<raw {text}>"


def seal(document):
    """SKT-055: the canonical text with its seal."""
    text = dump({**document, "seal": ZERO})
    return dump({**document, "seal": hashlib.sha256(text.encode()).hexdigest()})


def container(header, data):
    """A header's text (padded already) and data to a file."""
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def entries(tensors):
    """Data order (SKT-030), entries' texts and the data."""
    parts, data = [], b""
    for name in sorted(tensors, key=lambda n: (-SIZES[tensors[n][0]], n)):
        dtype, shape, content = tensors[name]
        dims = ",".join(str(d) for d in shape)
        span = f"{len(data)},{len(data) + len(content)}"
        parts.append(f'"{name}":{{"dtype":"{dtype}","shape":[{dims}],"data_offsets":[{span}]}}')
        data += content
    return parts, data


def header_of(text, parts, align=64):
    """SKT-031: the header for a document's text (or for none) and entries, padded."""
    meta = {"format": "pt"} if text is None else {"format": "pt", "sktch": text}
    inner = json.dumps(meta, sort_keys=True, separators=(",", ":"))
    out = "{" + ",".join([f'"__metadata__":{inner}', *parts]) + "}"
    return out + " " * (-(8 + len(out)) % align)


def build(document, tensors):
    """A canonical file."""
    parts, data = entries(tensors)
    return container(header_of(seal(document), parts), data)
