"""Mutants of GGUF files: of a small header, number by number, and of a whole model's file."""

from __future__ import annotations

import struct

from rows import toys
from rows.odd import bytes_changed
from rows.readers import READERS, gguf_alike

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


def _small(rng):
    """The small file with a few of its numbers, texts or fields changed."""
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
    return bytes_changed(data, rng) if rng.random() < 0.1 else data


def _whole(raw, begin, rng):
    """A model's file with bytes changed in place: of its tensors, or of all that is before them."""
    data = bytearray(raw)
    low, high = (begin, len(raw)) if rng.random() < 0.4 else (0, begin)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(low, high)
        data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
    return data


def gguf(folder):
    """Half of them of each; what is taken must be what the `gguf` package reads."""
    path, raw = folder / "x.gguf", toys.model_gguf(folder).read_bytes()
    begin = raw.index(b"output_norm.weight")

    def make(rng):
        path.write_bytes(_small(rng) if rng.random() < 0.5 else _whole(raw, begin, rng))
        return path

    return make, lambda path: (READERS["gguf"](path), gguf_alike(path))
