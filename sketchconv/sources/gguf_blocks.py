"""A GGUF file of any architecture as it is: its own names, metadata and blocks.

For re-export: what is not asked to change passes through byte for byte.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from sketchconv.errors import SourceError
from sketchconv.formats.container import pread_exact
from sketchconv.formats.gguf_layout import ALIGNMENT, GgufInfo
from sketchconv.formats.gguf_types import GGML_NUMBERS
from sketchconv.sources.base import Float32
from sketchconv.sources.gguf_header import GgufHeader, read_header

_MAX_ALIGNMENT: Final = 1 << 16


class GgufBlocks:
    """The tensors of one GGUF file by their own names, in the file's order.

    Raises:
        SourceError: broken, cut off, split into parts, or of an unknown type.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.id = path.name
        self._path = path.resolve()
        self.paths: tuple[Path, ...] = (self._path,)
        self._header = read_header(self._path)
        self.nbytes = self._header.size
        self._refuse_parts()
        self.alignment = self._alignment()
        self._tensors = {name: self._tensor(name) for name in self._header.tensors}
        self._refuse_overlaps()
        self._fd: int | None = os.open(self._path, os.O_RDONLY)

    def _refuse_parts(self) -> None:
        parts = self._header.values.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise SourceError(
                f"{self.id}: one of {parts} parts of a split GGUF; join them first with"
                " `llama-gguf-split --merge FIRST_PART WHOLE.gguf`"
            )

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
        tensor = GgufInfo(name, found.shape, kind)
        if found.offset + tensor.nbytes > self._header.size:
            raise SourceError(
                f"{self.id}: tensor {name!r} ends at byte {found.offset + tensor.nbytes}, but the"
                f" file has {self._header.size}; the download is cut off, repeat it"
            )
        return tensor

    def _refuse_overlaps(self) -> None:
        # A small file whose tensors share their bytes would become a huge one.
        end, before = 0, ""
        for name, tensor in sorted(
            self._tensors.items(), key=lambda item: self._header.tensors[item[0]].offset
        ):
            offset = self._header.tensors[name].offset
            if offset < end:
                raise SourceError(
                    f"{self.id}: tensor {name!r} begins at byte {offset}, inside {before!r}, which"
                    f" ends at {end}; the file is broken"
                )
            end, before = offset + tensor.nbytes, name

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
        return self._pread(begin, end - begin)

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """The file's blocks of rows [begin, end); all axes but the last count as rows.

        Raises:
            SourceError: no such rows, or the file has become shorter.
        """
        tensor = self._tensors[name]
        if not 0 <= begin <= end <= math.prod(tensor.shape[:-1]):
            raise SourceError(f"{name!r}: rows {begin} to {end} of {list(tensor.shape)}")
        offset = self._header.tensors[name].offset + begin * tensor.row_bytes
        return self._pread(offset, (end - begin) * tensor.row_bytes)

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw` as float32 [rows, columns], dequantized as the `gguf` package does.

        Raises:
            SourceError: the type cannot be dequantized.
        """
        from gguf import GGMLQuantizationType, quants

        tensor = self._tensors[name]
        blocks = np.frombuffer(raw, np.uint8).reshape(-1, tensor.row_bytes)
        try:
            kind = GGMLQuantizationType(tensor.type.number)
            values = quants.dequantize(blocks, kind)
        except NotImplementedError:
            raise SourceError(
                f"{self.id}: {name!r} is {tensor.type.name}, which cannot be dequantized"
            ) from None
        rows: Float32 = np.asarray(values, np.float32).reshape(len(blocks), tensor.shape[-1])
        return rows

    def _pread(self, offset: int, count: int) -> bytes:
        if self._fd is None:
            raise SourceError(f"{self.id}: the source is closed")
        return pread_exact(self._fd, count, offset, self.id)

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
