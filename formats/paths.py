"""Paths of the files inside a bundle: relative, plain, portable (SKT-090 to SKT-093)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from sketchconv.formats import rules
from sketchconv.formats.errors import refuse, shown

_PART: Final = re.compile(rules.PATH_PART_PATTERN)
_TENSOR: Final = re.compile(re.escape(rules.FILE_PREFIX) + r"[A-Za-z0-9_.-]{1,501}")
_DEVICES: Final = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")


def check_path(path: str, where: str) -> None:
    """Check one relative POSIX path.

    Raises:
        FormatError: SKT-090 for a path that is absolute, climbs, or is not portable.
    """
    parts = path.split("/")
    if not 1 <= len(parts) <= rules.MAX_PATH_PARTS:
        refuse("SKT-090", where, f"bad file path {shown(path)}")
    for part in parts:
        if not _PART.fullmatch(part) or part.endswith(".") or _DEVICES.fullmatch(part.lower()):
            refuse("SKT-090", where, f"bad file path {shown(path)}")


def check_paths(files: Mapping[str, Any], where: str) -> None:
    """Check the member `files` of a document by itself.

    Raises:
        FormatError: SKT-090 for a path, SKT-091 for a tensor name, SKT-093 for a collision.
    """
    seen: dict[str, str] = {}
    for path, tensor in files.items():
        check_path(path, where)
        if not isinstance(tensor, str) or (tensor and not _TENSOR.fullmatch(tensor)):
            refuse("SKT-091", where, f"file {shown(path)} has the bad tensor name {shown(tensor)}")
        other = seen.setdefault(path.lower(), path)
        if other != path:
            refuse("SKT-093", where, f"files {shown(other)} and {shown(path)} collide")
    for path in seen:
        parts = path.split("/")
        for n in range(1, len(parts)):
            if "/".join(parts[:n]) in seen:
                refuse("SKT-093", where, f"{shown(seen[path])} lies inside another file")
    used = [t for t in files.values() if t]
    if len(set(used)) != len(used):
        refuse("SKT-091", where, "two files share one tensor")
