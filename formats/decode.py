"""A sketch in memory, and its exact decoding: `W[r, c] = lut[r, c // GS, index[r, c]]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sketchconv.formats import grids
from sketchconv.formats.container import Container
from sketchconv.formats.errors import refuse
from sketchconv.formats.grids import FREE
from sketchconv.formats.packing import unpack
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import F32Array, U8Array, carried_to_f32

_DECODE_WEIGHTS: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class SketchTensor:
    """A sketch in memory: indices uint8 `[out, in]`, LUT `[out, G, 2^bits]` in its carrier.

    Of a shaped sketch `lut` holds scales and minima, `[out, G, fields]`, see `formats.grids`.
    """

    indices: U8Array
    lut: npt.NDArray[Any]
    bits: int
    lut_dtype: str
    grid: str = FREE

    def decode(self) -> F32Array:
        """Return float32 `W[r, c] = lut[r, c // GS, index[r, c]]`, bit-exact."""
        if self.grid != FREE:
            return grids.decode(self.indices, self.lut, self.grid, self.bits)
        rows, columns = self.indices.shape
        groups, entries = self.lut.shape[1:]
        lut = carried_to_f32(self.lut, self.lut_dtype).reshape(rows * groups, entries)
        codes = self.indices.reshape(rows * groups, columns // groups)
        out = np.empty(codes.shape, np.float32)
        step = max(_DECODE_WEIGHTS // codes.shape[1], 1)
        for at in range(0, len(codes), step):
            block = slice(at, at + step)
            out[block] = np.take_along_axis(lut[block], codes[block].astype(np.intp), axis=1)
        return out.reshape(rows, columns)


def read_sketch(index: Container, lut: Container, record: SketchRecord) -> SketchTensor:
    """Read and unpack one sketch from the files that hold its two tensors.

    Raises:
        FormatError: SKT-071 for padding bits that are not zero, SKT-013.
    """
    packed = index.array(record.index_name)
    try:
        codes = unpack(packed, record.bits, record.group_size, strict=True)
    except ValueError as error:
        refuse("SKT-071", f"{index.path.name}: {record.index_name}", str(error))
    codes = codes.reshape(record.shape)
    table = lut.array(record.lut_name)
    return SketchTensor(codes, table, record.bits, record.lut_dtype, record.grid)
