"""The header of a GGUF file (versions 2 and 3, little endian): metadata and tensor table.

Read from the front with bounded steps: no mapping of the file, and no array is kept, so that a
large vocabulary costs a walk over its strings and nothing else. Layout: the GGUF specification of
the ggml project (magic, version, counts, key-value pairs, tensor infos, aligned data).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from sketchconv.errors import SourceError

_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_STRING = 64 << 20
_MAX_ITEMS = 1 << 24
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array in the metadata that was walked over: item type, item count, offset of item 0."""

    kind: int
    count: int
    offset: int


GgufValue = int | float | bool | str | GgufArray


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its shape with rows first (the file has them last), ggml type, file offset.

    `part` is the number of the file, counted from 0, of a model that is split into several.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata by key and tensors by name, both in the file's order; offsets are absolute.

    `spans` has where each value lies in the file, its type number included, for verbatim copies.
    """

    values: Mapping[str, GgufValue]
    tensors: Mapping[str, GgufTensor]
    size: int
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class _Cursor:
    """Reads little-endian values from a file, and never past its end."""

    def __init__(self, file: BinaryIO, label: str) -> None:
        self.file = file
        self.label = label
        self.size = os.fstat(file.fileno()).st_size
        self.offset = 0

    def fail(self, message: str) -> SourceError:
        return SourceError(f"{self.label}: {message}")

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size - self.offset else b""
        if len(data) != count:
            raise self.fail(f"the GGUF header is cut off at byte {self.size}; download it again")
        self.offset += count
        return data

    def seek(self, offset: int) -> None:
        self.file.seek(offset)
        self.offset = offset

    def number(self, code: str) -> int:
        value: int = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return value

    def scalar(self, kind: int) -> int | float | bool:
        code = _SCALARS[kind]
        value: int | float | bool = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return value

    def string(self) -> str:
        length = self.number("<Q")
        if length > _MAX_STRING:
            raise self.fail(f"a string of {length} bytes in the GGUF header")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"text before byte {self.offset} is not UTF-8") from None


def read_header(path: Path) -> GgufHeader:
    """Read metadata and tensor table.

    Raises:
        SourceError: no GGUF file, an unsupported version or byte order, a broken or cut header.
    """
    try:
        with path.open("rb") as file:
            return _parse(_Cursor(file, path.name))
    except OSError as error:
        raise SourceError(f"{path.name}: cannot be read ({error.strerror})") from None


def read_strings(path: Path, array: GgufArray) -> list[str]:
    """The items of a string array.

    Raises:
        SourceError: the array holds something else, or the file has changed.
    """
    with path.open("rb") as file:
        cursor = _Cursor(file, path.name)
        if array.kind != _STRING:
            raise cursor.fail(f"an array of strings was expected, found type {array.kind}")
        cursor.seek(array.offset)
        return [cursor.string() for _ in range(array.count)]


def read_numbers(path: Path, array: GgufArray) -> list[float]:
    """The items of a numeric array.

    Raises:
        SourceError: the array holds something else, or the file has changed.
    """
    with path.open("rb") as file:
        cursor = _Cursor(file, path.name)
        if array.kind not in _SCALARS:
            raise cursor.fail(f"an array of numbers was expected, found type {array.kind}")
        cursor.seek(array.offset)
        code = _SCALARS[array.kind]
        return [item[0] for item in struct.iter_unpack(code, cursor.take(_item_bytes(array)))]


def _item_bytes(array: GgufArray) -> int:
    return array.count * struct.calcsize(_SCALARS[array.kind])


def _parse(cursor: _Cursor) -> GgufHeader:
    if cursor.size < 24 or cursor.take(4) != b"GGUF":
        raise cursor.fail("not a GGUF file (it does not begin with 'GGUF'); download it again")
    version = cursor.number("<I")
    if version and version & 0xFFFF == 0:
        raise cursor.fail("a big-endian GGUF file, which is not supported")
    if version not in (2, 3):
        raise cursor.fail(f"GGUF version {version}; expected 2 or 3")
    tensors, keys = cursor.number("<Q"), cursor.number("<Q")
    if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
        raise cursor.fail(f"the header announces {tensors} tensors and {keys} metadata keys")
    values: dict[str, GgufValue] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(keys):
        key = cursor.string()
        if key in values:
            raise cursor.fail(f"metadata key {key!r} twice")
        begin = cursor.offset
        values[key] = _value(cursor, key)
        spans[key] = begin, cursor.offset
    table = _tensor_table(cursor, tensors, _alignment(cursor, values))
    return GgufHeader(values, table, cursor.size, spans)


def _value(cursor: _Cursor, key: str) -> GgufValue:
    kind = cursor.number("<I")
    if kind in _SCALARS:
        return cursor.scalar(kind)
    if kind == _STRING:
        return cursor.string()
    if kind != _ARRAY:
        raise cursor.fail(f"metadata key {key!r} has the unknown type {kind}")
    item, count = cursor.number("<I"), cursor.number("<Q")
    array = GgufArray(item, count, cursor.offset)
    if item in _SCALARS:
        if _item_bytes(array) > cursor.size - cursor.offset:
            raise cursor.fail(f"array {key!r} of {count} items goes past the end of the file")
        _check_count(cursor, key, count)
        cursor.seek(cursor.offset + _item_bytes(array))
    elif item == _STRING:
        if count > (cursor.size - cursor.offset) // 8:
            raise cursor.fail(f"array {key!r} of {count} strings goes past the end of the file")
        _check_count(cursor, key, count)
        for _ in range(count):
            cursor.take(cursor.number("<Q"))
    else:
        raise cursor.fail(f"array {key!r} has items of the unsupported type {item}")
    return array


def _check_count(cursor: _Cursor, key: str, count: int) -> None:
    # Far beyond any vocabulary; a walk over more would only take time and memory.
    if count > _MAX_ITEMS:
        raise cursor.fail(f"array {key!r} of {count} items; at most {_MAX_ITEMS} are read")


def _alignment(cursor: _Cursor, values: Mapping[str, GgufValue]) -> int:
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}; expected a power of two")
    return alignment


def _tensor_table(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    found = []
    for _ in range(count):
        name = cursor.string()
        rank = cursor.number("<I")
        if not 1 <= rank <= 4:
            raise cursor.fail(f"tensor {name!r} has {rank} dimensions; expected 1 to 4")
        shape = tuple(reversed([cursor.number("<Q") for _ in range(rank)]))
        found.append((name, shape, cursor.number("<I"), cursor.number("<Q")))
    data = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in found:
        if name in tensors or offset % alignment or 0 in shape:
            raise cursor.fail(f"tensor {name!r} is listed twice, misaligned or empty")
        tensors[name] = GgufTensor(name, shape, kind, data + offset)
    return tensors
