"""A GGUF file of any architecture as it is: its own names, metadata and blocks.

For re-export: what is not asked to change passes through byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from sketchconv.errors import SourceError
from sketchconv.formats.gguf_layout import ALIGNMENT, GgufInfo
from sketchconv.formats.gguf_types import GGML_NUMBERS
from sketchconv.sources.base import Float32
from sketchconv.sources.gguf_decode import decode_rows
from sketchconv.sources.gguf_header import GgufHeader
from sketchconv.sources.gguf_parts import GgufFiles, read_parts

_MAX_ALIGNMENT: Final = 1 << 16


class GgufBlocks:
    """The tensors of one GGUF model, in one file or in parts, by their own names and in order.

    Raises:
        SourceError: broken, cut off, parts that do not fit together, or of an unknown type.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = read_parts(path)
        self.id = parts.name
        self.paths: tuple[Path, ...] = parts.paths
        self._header, self._sizes = parts.header, parts.sizes
        self.nbytes = self._header.size
        self.alignment = self._alignment()
        self._tensors = {name: self._tensor(name) for name in self._header.tensors}
        self._refuse_overlaps()
        self._files = GgufFiles(parts, self.id)

    def _alignment(self) -> int:
        found = self._header.values.get("general.alignment", ALIGNMENT)
        if not isinstance(found, int) or found > _MAX_ALIGNMENT:
            raise SourceError(
                f"{self.id}: general.alignment is {found!r}, at most {_MAX_ALIGNMENT}"
            )
        return found

    def _tensor(self, name: str) -> GgufInfo:
        found = self._header.tensors[name]
        kind = GGML_NUMBERS.get(found.kind)
        if kind is None:
            raise SourceError(f"{self.id}: {name!r} has the unknown type {found.kind}")
        if not kind.fits(found.shape[-1]):
            raise SourceError(
                f"{self.id}: rows of {name!r} have {found.shape[-1]} values, no multiple of"
                f" {kind.block}"
            )
        tensor, size = GgufInfo(name, found.shape, kind), self._sizes[found.part]
        if found.offset + tensor.nbytes > size:
            raise SourceError(
                f"{self.paths[found.part].name}: tensor {name!r} ends at byte"
                f" {found.offset + tensor.nbytes}, but the file has {size}; the download is cut"
                " off, repeat it"
            )
        return tensor

    def _refuse_overlaps(self) -> None:
        # A small file whose tensors share their bytes would become a huge one.
        end, before, part = 0, "", -1
        table = self._header.tensors
        for name in sorted(self._tensors, key=lambda n: (table[n].part, table[n].offset)):
            found = table[name]
            if found.part == part and found.offset < end:
                raise SourceError(
                    f"{self.paths[part].name}: tensor {name!r} begins at byte {found.offset},"
                    f" inside {before!r}, which ends at {end}; the file is broken"
                )
            end, before = found.offset + self._tensors[name].nbytes, name
            part = found.part

    @property
    def header(self) -> GgufHeader:
        """The file's metadata and its tensor table."""
        return self._header

    @property
    def tensors(self) -> Mapping[str, GgufInfo]:
        """Every tensor by name."""
        return MappingProxyType(self._tensors)

    def value_bytes(self, key: str) -> bytes:
        """One metadata value exactly as the file has it: type and value."""
        begin, end = self._header.spans[key]
        return self._files.read(0, begin, end - begin)

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """The file's blocks of rows [begin, end); all axes but the last count as rows.

        Raises:
            SourceError: no such rows, or the file has become shorter.
        """
        tensor = self._tensors[name]
        if not 0 <= begin <= end <= math.prod(tensor.shape[:-1]):
            raise SourceError(f"{name!r}: rows {begin} to {end} of {list(tensor.shape)}")
        found = self._header.tensors[name]
        offset = found.offset + begin * tensor.row_bytes
        return self._files.read(found.part, offset, (end - begin) * tensor.row_bytes)

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw` as float32 [rows, columns], bit for bit those of ggml.

        Raises:
            SourceError: the type cannot be dequantized.
        """
        return decode_rows(self._tensors[name], raw, self.id)

    def close(self) -> None:
        """Close all files."""
        self._files.close()
