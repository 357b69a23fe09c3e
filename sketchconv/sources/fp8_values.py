"""float8_e4m3fn weights and the scales of their blocks as float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sketchconv.formats.tensors import DTYPES, U8Array, carried_to_f32
from sketchconv.sources.base import Float32

_COLUMNS: Final = 4  # bytes behind a row's scales: how many columns share one


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of one weight ``[out, in]``.

    Attributes:
        name: of their tensor.
        dtype: F32, BF16 or F16.
        block: rows and columns that share one.
        width: columns of the weight.
    """

    name: str
    dtype: str
    block: tuple[int, int]
    width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of the scales of one row."""
        return -(-self.width // self.block[1]) * DTYPES[self.dtype].itemsize

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """The bytes of the scales that rows [begin, end) of the weight need."""
        return begin // self.block[0] * self.row_bytes, -(-end // self.block[0]) * self.row_bytes

    def beside(self, raw: bytes, scales: bytes, begin: int) -> bytes:
        """Each row's codes, its scales, and how many columns share one: all that decides it.

        So a digest of rows depends neither on how they are cut, nor misses another block size that
        makes as many scales.

        Args:
            raw: codes of rows that begin with row `begin` of the weight.
            scales: the bytes of `span`.
            begin: number of the first row.
        """
        codes = np.frombuffer(raw, np.uint8).reshape(-1, self.width)
        rows = (begin + np.arange(len(codes))) // self.block[0] - begin // self.block[0]
        own = np.frombuffer(scales, np.uint8).reshape(-1, self.row_bytes)[rows]
        columns = np.full((len(codes), 1), min(self.block[1], self.width), "<u4").view(np.uint8)
        return np.concatenate([codes, own, columns], axis=1).tobytes()

    def values(self, raw: bytes) -> Float32:
        """float32 ``[rows, in]`` of what `beside` gives: code times scale, rounded once."""
        from sketchconv.kernels.float8 import scaled

        end = self.width + self.row_bytes
        rows: U8Array = np.frombuffer(raw, np.uint8).reshape(-1, end + _COLUMNS)
        own = np.ascontiguousarray(rows[:, self.width : end]).view(DTYPES[self.dtype].numpy)
        return scaled(rows, self.width, carried_to_f32(own, self.dtype), self.block[1])
