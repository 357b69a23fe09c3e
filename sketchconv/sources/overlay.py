"""A sketch with the tables of a task in place of its own, as the dense model that this makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.formats.tensors import DTYPES, TensorInfo
from sketchconv.sources.checkpoint_view import SketchCheckpoint
from sketchconv.sources.values import row_bytes


class OverlaidSketch(SketchCheckpoint):
    """A `SketchCheckpoint` whose weights are decoded with other tables, bit-exact.

    Args:
        path: the sketch, a file or a folder.
        tables: weight -> its whole table (LUTs ``[out, G, 2**bits]``, or scales of a shaped sketch)
            in the carrier of the stored dtype. Weights that are not named keep theirs.
        label: what the tables are, for the id of the result.

    Raises:
        FormatError: the sketch breaks a rule of the format.
        SourceError: it cannot be read, or a table does not fit it.
    """

    def __init__(self, path: Path, tables: Mapping[str, npt.NDArray[Any]], label: str) -> None:
        super().__init__(path)
        self._tables: dict[str, npt.NDArray[Any]] = {}
        try:
            for name, table in tables.items():
                self._put(name, table)
        except BaseException:
            self.close()
            raise
        self.id = f"{self.id} with {label}"

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the weights with another table."""
        return tuple(n for n, r in self.records.items() if r.lut_name in self._tables)

    def _put(self, name: str, table: npt.NDArray[Any]) -> None:
        record = self.records.get(name)
        if record is None:
            raise SourceError(f"{self.id}: no sketched weight {name!r}")
        info = record.lut_info
        if table.shape != info.shape or table.dtype != DTYPES[info.dtype].numpy:
            raise SourceError(
                f"{self.id}: {name}: the table is {info.dtype} {list(info.shape)}, got "
                f"{table.dtype} {list(table.shape)}"
            )
        self._tables[info.name] = np.ascontiguousarray(table)

    def _read(self, info: TensorInfo, begin: int, end: int) -> bytes:
        table = self._tables.get(info.name)
        if table is None:
            return super()._read(info, begin, end)
        row_bytes(info, begin, end)
        return table[begin:end].tobytes()

    def __enter__(self) -> OverlaidSketch:
        return self
