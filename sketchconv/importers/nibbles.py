"""Tables per row or group with indices in nibbles: what LeanQuant and SketchTune share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sketchconv.errors import SourceError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import U8Array, carried_to_f32, f32_to_bf16
from sketchconv.importers.base import Carrier, Checkpoint, bits_of, record_of


@dataclass(frozen=True, slots=True)
class NibbleWeight:
    """A grid [out, 2^b] or [out, G, 2^b], and codes uint8 [out, in/2] or [out, G, in/G/2]: two
    indices in a byte whatever their width, the first in the high nibble.

    Attributes:
        grid, codes: names of the two tensors.
    """

    checkpoint: Checkpoint
    record: SketchRecord
    grid: str
    codes: str

    @property
    def parts(self) -> tuple[str, ...]:
        """Both tensors."""
        return (self.grid, self.codes)

    def rows(self, begin: int, end: int) -> tuple[U8Array, Carrier]:
        """Indices and tables of rows [begin, end); see `importers.base.Weight`.

        Raises:
            SourceError: an index beyond its table.
        """
        packed = self.checkpoint.rows(self.codes, begin, end).reshape(end - begin, -1)
        codes = np.empty((end - begin, self.record.shape[1]), np.uint8)
        codes[:, 0::2] = packed >> 4
        codes[:, 1::2] = packed & 15
        if codes.size and int(codes.max()) >> self.record.bits:
            raise SourceError(
                f"{self.checkpoint.id}: {self.codes}: index {int(codes.max())} in a table of"
                f" {1 << self.record.bits} entries"
            )
        return codes, self._tables(begin, end)

    def _tables(self, begin: int, end: int) -> Carrier:
        tables = self.checkpoint.rows(self.grid, begin, end)
        stored, wanted = self.checkpoint.store.infos[self.grid].dtype, self.record.lut_dtype
        if stored != wanted:
            tables = f32_to_bf16(carried_to_f32(tables, stored))
        return tables.reshape(end - begin, self.record.groups, 1 << self.record.bits)


def nibble_weight(
    checkpoint: Checkpoint, stem: str, grid: str, codes: str, dtypes: tuple[str, ...], dtype: str
) -> NibbleWeight:
    """Check the two tensors of one weight.

    Args:
        checkpoint: where they are.
        stem: the module.
        grid, codes: their names.
        dtypes: which dtypes a grid may have.
        dtype: the dtype of the values: that of the grid (empty), or BF16.

    Raises:
        SourceError: a wrong dtype or shape.
    """
    table = checkpoint.info(grid, dtypes=dtypes)
    packed = checkpoint.info(codes, dtypes=("U8",))
    if len(table.shape) not in (2, 3) or len(packed.shape) != len(table.shape):
        raise SourceError(
            f"{checkpoint.id}: {stem}: a grid of shape {list(table.shape)} and codes of"
            f" {list(packed.shape)}; expected [out, entries] and [out, in/2], or three axes each"
        )
    if table.shape[:-1] != packed.shape[:-1] or 0 in packed.shape or 0 in table.shape:
        raise SourceError(
            f"{checkpoint.id}: {stem}: a grid of shape {list(table.shape)} does not fit codes of"
            f" {list(packed.shape)}"
        )
    bits = bits_of(table.shape[-1], f"{checkpoint.id}: {grid}")
    if bits > 4:
        raise SourceError(f"{checkpoint.id}: {grid}: {bits} bits, but codes are nibbles")
    groups = table.shape[1] if len(table.shape) == 3 else 1
    shape = (table.shape[0], groups * packed.shape[-1] * 2)
    record = record_of(stem, shape, bits, groups, dtype or table.dtype)
    return NibbleWeight(checkpoint, record, grid, codes)
