"""A sketch as the checkpoint that it was made from: transposed and stacked tensors as they were."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.base import Float32
from sketchconv.sources.forms import Forms, turned
from sketchconv.sources.sketch import SketchSource, dense_bytes
from sketchconv.sources.values import row_bytes, to_float32

# Decoded values that are held at a time.
_VALUES = 1 << 22


class SketchCheckpoint(SketchSource):
    """A `SketchSource` with the tensors of its source.

    A weight whose document says that it was transposed there is ``[in, out]`` again, and the
    members of a stack are one tensor again. `rows` of such tensors are decoded, in the dtype of
    their LUTs.

    Raises:
        FormatError: it breaks a rule of the format.
        SourceError: it cannot be read, or the document's `source` makes no sense.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._forms = Forms.of(self.origin, self._records, self.id)
            self._tensors = self._checkpoint_infos()
        except BaseException:
            self.close()
            raise

    def _checkpoint_infos(self) -> dict[str, TensorInfo]:
        members, found = self._forms.members, dict[str, TensorInfo]()
        for name, info in self._infos.items():
            if name in members:
                tensor = members[name][0]
                found.setdefault(tensor, self._stack(tensor))
            else:
                found[name] = turned(info) if name in self._forms.transposed else info
        return found

    def _stack(self, tensor: str) -> TensorInfo:
        parts = [self._infos[name] for name in self._forms.parts(tensor)]
        dtypes = {part.dtype for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        return TensorInfo(tensor, dtype, (len(parts), *parts[0].shape))

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint that is not an alias."""
        return MappingProxyType(self._tensors)

    def source_dtype(self, name: str) -> str:
        """The dtype that a tensor had in the source of the sketch."""
        weight = self._forms.parts(name)[0] if name in self._forms.stacked else name
        record = self.records.get(weight)
        return self._tensors[name].dtype if record is None else record.dtype

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """Rows [begin, end) of a tensor; those of a transposed or stacked one are decoded."""
        if name in self._forms.transposed:
            values = self._turned_rows(name, begin, end)
        elif name in self._forms.stacked:
            row_bytes(self._tensors[name], begin, end)
            values = np.stack([self._matrix(part) for part in self._forms.parts(name)[begin:end]])
        else:
            return super().rows(name, begin, end)
        return dense_bytes(values, self._tensors[name].dtype)

    def _turned_rows(self, name: str, begin: int, end: int) -> Float32:
        height, width = self._infos[name].shape
        row_bytes(self._tensors[name], begin, end)
        out = np.empty((end - begin, height), np.float32)
        step = max(1, _VALUES // width)
        for at in range(0, height, step):
            last = min(at + step, height)
            piece = super().float32(name, super().rows(name, at, last))
            out[:, at:last] = piece[:, begin:end].T
        return out

    def _matrix(self, name: str) -> Float32:
        return super().float32(name, super().rows(name, 0, self._infos[name].shape[0]))

    def _is_decoded(self, name: str) -> bool:
        return name in self._forms.transposed or name in self._forms.stacked

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw` (from `rows`) as float32."""
        if self._is_decoded(name):
            return to_float32(raw, self._tensors[name])
        return super().float32(name, raw)

    def stored(self, name: str, raw: bytes) -> bytes:
        """Dense bytes of `raw`, in the dtype of `infos`."""
        return raw if self._is_decoded(name) else super().stored(name, raw)
