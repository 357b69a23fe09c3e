"""A GGUF file to the byte before a weight is read: header, offsets, size; and how it is split.

Version 3 of the format, little endian: magic, version, counts, metadata, tensor table, then the
tensors' data, each at a multiple of the alignment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sketchconv.formats.errors import OutputFailure
from sketchconv.formats.gguf_types import GgmlType
from sketchconv.formats.gguf_values import int32, text_bytes, uint16
from sketchconv.formats.laid_file import FileLayout

SUFFIX: Final = ".gguf"
ALIGNMENT: Final = 32
MAX_NAME_BYTES: Final = 63
MAX_RANK: Final = 4
MAX_PARTS: Final = 65535
_VERSION: Final = 3


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """A tensor to write: its name, its shape with rows first, its type."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType

    @property
    def row_bytes(self) -> int:
        """Bytes along the last axis, the one that is cut into blocks."""
        return self.type.row_bytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the data without padding."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * self.row_bytes


def gguf_layout(
    values: Mapping[str, bytes], tensors: Iterable[GgufInfo], alignment: int = ALIGNMENT
) -> FileLayout:
    """Lay out one file.

    Args:
        values: metadata by key, each value as `gguf_values` encodes it; the order is kept.
        tensors: in the order of their data.
        alignment: of the data, a power of two; the caller's `general.alignment` must say the same.

    Raises:
        OutputFailure: a name is too long or used twice, or a shape cannot be written.
    """
    wanted = list(tensors)
    _check(wanted)
    offsets, at = [], 0
    for tensor in wanted:
        offsets.append(at)
        at += -(-tensor.nbytes // alignment) * alignment
    parts = [struct.pack("<4sIQQ", b"GGUF", _VERSION, len(wanted), len(values))]
    parts += [text_bytes(key) + value for key, value in values.items()]
    parts += [_table_entry(t, o) for t, o in zip(wanted, offsets, strict=True)]
    header = b"".join(parts)
    header += bytes(-len(header) % alignment)
    begin = {t.name: len(header) + o for t, o in zip(wanted, offsets, strict=True)}
    return FileLayout(header, begin, {t.name: t.nbytes for t in wanted}, len(header) + at)


def part_layouts(
    name: str,
    values: Mapping[str, bytes],
    tensors: Sequence[GgufInfo],
    max_part_bytes: int | None = None,
    alignment: int = ALIGNMENT,
) -> dict[str, FileLayout]:
    """Lay out a model by file name: `name`, or parts of it as llama.cpp names and reads them.

    Every part but the first holds nothing but its tensors and the three keys that number it. Parts
    take tensors until their data would pass `max_part_bytes`; a larger tensor gets its own part.

    Raises:
        OutputFailure: as `gguf_layout`, nothing stands before the suffix in `name`, or there
            would be more than 65535 parts.
    """
    stem = name[: -len(SUFFIX)] if name.lower().endswith(SUFFIX) else name
    if not stem:
        raise OutputFailure(f"{name}: a GGUF file needs a name before its suffix")
    _check(tensors)
    groups = _groups(tensors, max_part_bytes)
    if len(groups) == 1:
        return {name: gguf_layout(values, tensors, alignment)}
    if len(groups) > MAX_PARTS:
        raise OutputFailure(f"{len(groups)} parts, at most {MAX_PARTS}; choose larger ones")
    layouts = {}
    for number, group in enumerate(groups):
        numbering = {
            "split.no": uint16(number),
            "split.count": uint16(len(groups)),
            "split.tensors.count": int32(len(tensors)),
        }
        held = {**values, **numbering} if number == 0 else numbering
        if number and alignment != ALIGNMENT:
            held = {"general.alignment": values["general.alignment"], **numbering}
        part = f"{stem}-{number + 1:05d}-of-{len(groups):05d}{SUFFIX}"
        layouts[part] = gguf_layout(held, group, alignment)
    return layouts


def _groups(tensors: Sequence[GgufInfo], limit: int | None) -> list[list[GgufInfo]]:
    groups: list[list[GgufInfo]] = [[]]
    used = 0
    for tensor in tensors:
        if limit is not None and groups[-1] and used + tensor.nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.nbytes
    return groups


def _table_entry(tensor: GgufInfo, offset: int) -> bytes:
    rank = len(tensor.shape)
    sizes = struct.pack(f"<I{rank}Q", rank, *reversed(tensor.shape))
    return text_bytes(tensor.name) + sizes + struct.pack("<IQ", tensor.type.number, offset)


def _check(tensors: Sequence[GgufInfo]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        name, shape = tensor.name, tensor.shape
        if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
            raise OutputFailure(f"GGUF tensor {name!r}: at most {MAX_NAME_BYTES} bytes in a name")
        if name in seen:
            raise OutputFailure(f"GGUF tensor {name!r}: the name is used twice")
        if not 1 <= len(shape) <= MAX_RANK or min(shape) < 1:
            raise OutputFailure(f"GGUF tensor {name!r}: the shape {list(shape)} cannot be written")
        if not tensor.type.fits(shape[-1]):
            raise OutputFailure(
                f"GGUF tensor {name!r}: rows of {shape[-1]} values are no multiple of"
                f" {tensor.type.block}, the block of {tensor.type.name}"
            )
        seen.add(name)
