"""`.gitattributes`: weight files must be stored by Git LFS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

NAME: Final = ".gitattributes"
_RULE: Final = "filter=lfs diff=lfs merge=lfs -text"
_SUFFIXES: Final = (".sktch", ".safetensors", ".gguf")


def with_lfs(existing: bytes, names: Iterable[str]) -> bytes:
    """The attributes with a rule for `.sktch` and for each kind of weight file among `names`.

    Lines that are there stay as they are; without a missing rule the bytes do not change.

    >>> with_lfs(b"*.bin filter=lfs", ["a.sktch"]).decode().splitlines()[1]
    '*.sktch filter=lfs diff=lfs merge=lfs -text'
    """
    wanted = {".sktch"} | {s for s in _SUFFIXES for name in names if name.endswith(s)}
    lines = [line.split() for line in existing.splitlines()]
    there = {line[0] for line in lines if b"filter=lfs" in line[1:]}
    missing = [
        f"*{s} {_RULE}\n" for s in _SUFFIXES if s in wanted and f"*{s}".encode() not in there
    ]
    if not missing:
        return existing
    joint = b"" if not existing or existing.endswith(b"\n") else b"\n"
    return existing + joint + "".join(missing).encode()
