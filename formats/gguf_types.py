"""The tensor types of GGUF: number, block and bytes of each, as the ggml project defines them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One type: its name, its number in a file, values per block and bytes per block."""

    name: str
    number: int
    block: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Bits per value."""
        return 8 * self.block_bytes / self.block

    def fits(self, columns: int) -> bool:
        """Whether rows of so many values are whole blocks."""
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row.

        Raises:
            ValueError: the row is no whole number of blocks.
        """
        if not self.fits(columns):
            raise ValueError(
                f"{self.name}: rows of {columns} values are no multiple of {self.block}"
            )
        return columns // self.block * self.block_bytes


_ALL: Final = (
    GgmlType("F32", 0, 1, 4),
    GgmlType("F16", 1, 1, 2),
    GgmlType("Q4_0", 2, 32, 18),
    GgmlType("Q4_1", 3, 32, 20),
    GgmlType("Q5_0", 6, 32, 22),
    GgmlType("Q5_1", 7, 32, 24),
    GgmlType("Q8_0", 8, 32, 34),
    GgmlType("Q8_1", 9, 32, 40),
    GgmlType("Q2_K", 10, 256, 84),
    GgmlType("Q3_K", 11, 256, 110),
    GgmlType("Q4_K", 12, 256, 144),
    GgmlType("Q5_K", 13, 256, 176),
    GgmlType("Q6_K", 14, 256, 210),
    GgmlType("Q8_K", 15, 256, 292),
    GgmlType("IQ2_XXS", 16, 256, 66),
    GgmlType("IQ2_XS", 17, 256, 74),
    GgmlType("IQ3_XXS", 18, 256, 98),
    GgmlType("IQ1_S", 19, 256, 50),
    GgmlType("IQ4_NL", 20, 32, 18),
    GgmlType("IQ3_S", 21, 256, 110),
    GgmlType("IQ2_S", 22, 256, 82),
    GgmlType("IQ4_XS", 23, 256, 136),
    GgmlType("I8", 24, 1, 1),
    GgmlType("I16", 25, 1, 2),
    GgmlType("I32", 26, 1, 4),
    GgmlType("I64", 27, 1, 8),
    GgmlType("F64", 28, 1, 8),
    GgmlType("IQ1_M", 29, 256, 56),
    GgmlType("BF16", 30, 1, 2),
    GgmlType("TQ1_0", 34, 256, 54),
    GgmlType("TQ2_0", 35, 256, 66),
    GgmlType("MXFP4", 39, 32, 17),
    GgmlType("NVFP4", 40, 64, 36),
    GgmlType("Q1_0", 41, 128, 18),
)

GGML_TYPES: Final[Mapping[str, GgmlType]] = MappingProxyType({t.name: t for t in _ALL})
"""Every type by name."""

GGML_NUMBERS: Final[Mapping[int, GgmlType]] = MappingProxyType({t.number: t for t in _ALL})
"""Every type by its number in a file."""

FILE_TYPES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "F32": 0,
        "F16": 1,
        "Q4_0": 2,
        "Q4_1": 3,
        "Q8_0": 7,
        "Q5_0": 8,
        "Q5_1": 9,
        "Q2_K": 10,
        "Q3_K": 12,
        "Q4_K": 15,
        "Q5_K": 17,
        "Q6_K": 18,
        "IQ4_NL": 25,
        "IQ4_XS": 30,
        "BF16": 32,
        "TQ1_0": 36,
        "TQ2_0": 37,
        "MXFP4": 38,
    }
)
"""`general.file_type` for a file whose matrices are mostly of one type."""
