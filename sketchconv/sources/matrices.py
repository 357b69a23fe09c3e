"""A source seen as matrices: every sketched weight as ``[out, in]``, however it is stored there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sketchconv.errors import SourceError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.base import Float32, Source
from sketchconv.sources.forms import Forms, expanded, turned

# Bytes of a transposed tensor that are read at a time.
_PIECE = 16 << 20


class Matrices:
    """Rows of the matrices that are sketched, and all other tensors as the source has them.

    Rows of a transposed or stacked weight are columns, or parts, of the source's tensor: `rows`
    reads what it needs of it and gives float32 values as its raw bytes. A transposed tensor is read
    once per run of rows, in pieces; of a stack one member is read.

    Args:
        source: where the tensors are.
        forms: how its matrices are stored.

    Raises:
        SourceError: a tensor of `forms` is missing or has another number of dimensions.
    """

    def __init__(self, source: Source, forms: Forms) -> None:
        self.source, self.forms = source, forms
        self._members = forms.members
        self._infos = (
            dict(source.infos) if not (forms.transposed or forms.stacked) else self._seen()
        )

    def _seen(self) -> dict[str, TensorInfo]:
        known = self.source.infos
        for name, rank in {**dict.fromkeys(self.forms.transposed, 2),
                           **dict.fromkeys(self.forms.stacked, 3)}.items():  # fmt: skip
            info = known.get(name)
            count = self.forms.stacked.get(name)
            if info is None or len(info.shape) != rank or count not in (None, info.shape[0]):
                found = "no such tensor" if info is None else f"shape {list(info.shape)}"
                raise SourceError(f"{self.source.id}: {name}: expected {rank} axes, got {found}")
        infos = expanded(known.values(), self.forms.stacked)
        return {n: turned(i) if n in self.forms.transposed else i for n, i in infos.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name: weights as matrices ``[out, in]``."""
        return self._infos

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """Raw rows [begin, end) of a tensor, for `float32` and `stored`.

        Raises:
            SourceError: no such tensor or rows.
        """
        if name in self.forms.transposed:
            return self.columns(name, begin, end).tobytes()
        member = self._members.get(name)
        if member is None:
            return self.source.rows(name, begin, end)
        tensor, number = member
        whole = self.source.float32(tensor, self.source.rows(tensor, number, number + 1))
        return whole[0, begin:end].tobytes()

    def columns(self, name: str, begin: int, end: int) -> Float32:
        """Columns [begin, end) of the source's ``[in, out]``, as rows."""
        info = self.source.infos[name]
        height, width = info.shape
        out = np.empty((end - begin, height), np.float32)
        step = max(1, _PIECE // (4 * width))
        for at in range(0, height, step):
            last = min(at + step, height)
            piece = self.source.float32(name, self.source.rows(name, at, last))
            out[:, at:last] = piece[:, begin:end].T
        return out

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw` (from `rows`) as float32 ``[rows, ...]``."""
        if name not in self.forms.transposed and name not in self._members:
            return self.source.float32(name, raw)
        return np.frombuffer(raw, np.float32).reshape(-1, self._infos[name].shape[1])

    def stored(self, name: str, raw: bytes) -> bytes:
        """`raw` of a tensor that is copied, in the dtype of its copy."""
        return self.source.stored(name, raw)
