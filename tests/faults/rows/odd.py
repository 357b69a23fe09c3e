"""Odd values, and trees of JSON with one of them in a random place."""

from __future__ import annotations

import copy
import json

ODD = (
    None, True, False, 0, 1, -1, 2, 3, 9, 255, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30,
    -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", "a", "A", "F16", "BF16", "f32", "U8",
    "../x", "/etc/passwd", "C:\\x", "a\0b", "\ud800", "é", "e\u0301", "x" * 5000, "4", "xor", "add",
    [], [0], [1, 2], [2**32, 2**32], [0, 2**63, 4], [-1], [1] * 9, [[]], {}, {"a": 1}, {"": None},
)  # fmt: skip


def places(tree, at=()):
    """The path of every node of a tree."""
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items if isinstance(tree, dict | list) else ():
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))
        else:
            yield (*at, key)


def mutated(tree, rng):
    """A copy with one to three nodes replaced, left out, renamed, swapped or copied elsewhere."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        every = [at for at in places(tree) if at]
        if not every:
            return tree
        *above, key = rng.choice(every)
        parent = tree
        for step in above:
            parent = parent[step]
        action = rng.random()
        if action < 0.55:
            parent[key] = (
                _near(parent[key], rng) if rng.random() < 0.4 else copy.deepcopy(rng.choice(ODD))
            )
        elif action < 0.7:
            del parent[key]
        elif action < 0.85 and isinstance(parent, dict):
            parent[rng.choice(("", "a", "../x", str(key) + "x", str(key).upper(), "e\u0301"))] = (
                parent.pop(key)
            )
        else:
            parent[key] = copy.deepcopy(_at(tree, rng.choice(every)))
        if len(json.dumps(tree, default=str)) > 1 << 20:
            return tree
    return tree


def _near(value, rng):
    if isinstance(value, bool) or not isinstance(value, int):
        return copy.deepcopy(rng.choice(ODD))
    return value + rng.choice((-1, 1, 2, 64, value))


def _at(tree, path):
    for step in path:
        try:
            tree = tree[step]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def text(tree, rng):
    """JSON text of a tree, at times with a flaw of the text itself."""
    out = json.dumps(tree, separators=(",", ":"), ensure_ascii=rng.random() < 0.7)
    data = out.encode("utf-8", "surrogatepass")
    flaw = rng.random()
    if flaw < 0.05:
        at = rng.randrange(len(data) + 1)
        extra = (b"\xff", b"\0", b"[" * 5000, b"9" * 5000, b"1e400", b'"', b"\xef\xbb\xbf", b"\t")
        data = data[:at] + rng.choice(extra) + data[at:]
    elif flaw < 0.07:
        data = b"[" * 100_000 + data
    elif flaw < 0.1:
        data = data[: rng.randrange(len(data) + 1)]
    return data


def bytes_changed(data, rng):
    """Bytes with some replaced, cut out or put in."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        put = bytes(rng.randrange(256) for _ in range(rng.randrange(5)))
        data[at : at + rng.randrange(5)] = put
    return bytes(data)
