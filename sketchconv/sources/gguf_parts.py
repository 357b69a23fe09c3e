"""The files of one GGUF model: a single one, or all parts of a split, found from any of them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from sketchconv.errors import SourceError
from sketchconv.formats.container import pread_exact
from sketchconv.formats.gguf_layout import MAX_PARTS
from sketchconv.sources.gguf_header import GgufHeader, GgufTensor, read_header

SPLIT_KEYS: Final = ("split.no", "split.count", "split.tensors.count")
"""Keys that number the parts of a split, and say how many tensors all of them have."""
_NAME: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class GgufParts:
    """A model's files in order, and their headers as one.

    Attributes:
        name: of the file, without the numbers of a part.
        paths: resolved; the first part, which has the metadata, first.
        header: metadata of the first part, tensors of all; `size` is that of all files.
        sizes: bytes of each file.
    """

    name: str
    paths: tuple[Path, ...]
    header: GgufHeader
    sizes: tuple[int, ...]


def read_parts(path: Path) -> GgufParts:
    """Read the headers of a GGUF file, and of all other parts if it is one of several.

    Raises:
        SourceError: a broken header; a part that is missing, has another number than its name
            says, or comes from another split; tensors that are there twice or not at all.
    """
    header = read_header(path)
    count = _number(header, "split.count", path.name, 1, MAX_PARTS, 1)
    if count == 1:
        return GgufParts(path.name, (path.resolve(),), header, (header.size,))
    paths = _siblings(path, count)
    headers = [header if part == path else read_header(part) for part in paths]
    tensors: dict[str, GgufTensor] = {}
    for number, (part, found) in enumerate(zip(paths, headers, strict=True)):
        _check_part(part.name, number, found, headers[0])
        for name, tensor in found.tensors.items():
            if name in tensors:
                first = paths[tensors[name].part].name
                raise SourceError(f"{part.name}: tensor {name!r} is in {first} too")
            tensors[name] = replace(tensor, part=number)
    _check_total(headers[0], len(tensors), paths[0].name)
    sizes = tuple(found.size for found in headers)
    whole = GgufHeader(headers[0].values, tensors, sum(sizes), headers[0].spans)
    name = _NAME.sub(r"\1\4", path.name)
    return GgufParts(name, tuple(part.resolve() for part in paths), whole, sizes)


def _siblings(path: Path, count: int) -> list[Path]:
    """The paths of all parts; names as they are, since links may lead to names without numbers."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise SourceError(
            f"{path.name}: one of {count} parts of a split GGUF, which are found by their names;"
            f" name it as it was, like model-00001-of-{count:05d}.gguf"
        )
    stem, _, total, suffix = match.groups()
    if int(total) != count:
        raise SourceError(
            f"{path.name}: the name says {int(total)} parts, but split.count is {count}; was it"
            " renamed?"
        )
    names = [f"{stem}-{number + 1:05d}-of-{total}{suffix}" for number in range(count)]
    # One look at the folder: 60,000 looks for parts took seconds.
    there = {found.name for found in path.absolute().parent.iterdir()}
    missing = [n for n in names if n not in there or not path.with_name(n).is_file()]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise SourceError(
            f"{path.name}: {len(missing)} of {count} parts are missing: {shown}; download them too"
        )
    return [path.with_name(name) for name in names]


def _check_part(name: str, number: int, header: GgufHeader, first: GgufHeader) -> None:
    if "split.count" not in header.values:
        raise SourceError(f"{name}: not a part of a split GGUF (no split.count); download it again")
    for key in ("split.count", "split.tensors.count"):
        if header.values.get(key) != first.values.get(key):
            raise SourceError(
                f"{name}: {key} is {header.values.get(key)}, in the first part"
                f" {first.values.get(key)}; the parts come from different splits"
            )
    found = _number(header, "split.no", name, 0, MAX_PARTS - 1)
    if found != number:
        raise SourceError(
            f"{name}: split.no is {found}, but by its name it is number {number}; was it renamed?"
        )
    for key, value in header.values.items():
        # Parts keep the alignment for themselves; arrays are only in the first one.
        other = first.values.get(key, value)
        if key not in SPLIT_KEYS and key != "general.alignment" and other != value:
            raise SourceError(
                f"{name}: {key} is {value!r}, in the first part {other!r}; the parts belong to"
                " different models"
            )


def _check_total(header: GgufHeader, found: int, name: str) -> None:
    expected = _number(header, "split.tensors.count", name, 1, 1 << 31)
    if expected != found:
        raise SourceError(
            f"{name}: split.tensors.count is {expected}, but all parts together have {found}"
            " tensors; the parts come from different splits"
        )


def _number(
    header: GgufHeader, key: str, name: str, least: int, most: int, default: int | None = None
) -> int:
    value = header.values.get(key, default)
    if key == "split.count" and value == 0:
        return 1  # so written by some for a whole file
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SourceError(f"{name}: {key} is {value!r}; expected an integer, {least} to {most}")
    return value


class GgufFiles:
    """The open files of a model, read by position; several threads may read at once."""

    def __init__(self, parts: GgufParts, where: str) -> None:
        self._where = where
        self._open: dict[int, int] | None = {}
        try:
            for number, path in enumerate(parts.paths):
                self._open[number] = os.open(path, os.O_RDONLY)
        except OSError as error:
            self.close()
            raise SourceError(f"{where}: cannot be read ({error.strerror})") from None

    def read(self, part: int, offset: int, count: int) -> bytes:
        """`count` bytes at `offset` of one file.

        Raises:
            SourceError: the files are closed, or one has become shorter.
        """
        if self._open is None:
            raise SourceError(f"{self._where}: the source is closed")
        return pread_exact(self._open[part], count, offset, self._where)

    def close(self) -> None:
        """Close all files; reads after this raise."""
        opened: Mapping[int, int] = self._open or {}
        self._open = None
        for descriptor in opened.values():
            os.close(descriptor)
