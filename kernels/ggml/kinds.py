"""The block types of ggml that this package writes and reads: sizes, numbers and reach.

The layouts are those of `ggml-common.h` in llama.cpp; GGUF files name a type by its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

HALF_MAX: Final = 65504.0  # the largest finite float16

CODEBOOK: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The levels of IQ4_NL and IQ4_XS, in the order of their codes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One block type.

    `columns` consecutive weights of a row make one block of `nbytes` bytes; `number` is the type
    in a GGUF file. `reach` is the largest magnitude that a finite float16 scale certainly covers.
    """

    name: str
    number: int
    columns: int
    nbytes: int
    reach: float

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight takes, scales included."""
        return 8 * self.nbytes / self.columns


_KINDS = (
    Kind("Q4_0", 2, 32, 18, 7 * HALF_MAX),
    Kind("Q4_1", 3, 32, 20, HALF_MAX),
    Kind("Q5_0", 6, 32, 22, 15 * HALF_MAX),
    Kind("Q5_1", 7, 32, 24, HALF_MAX),
    Kind("Q8_0", 8, 32, 34, 127 * HALF_MAX),
    Kind("Q2_K", 10, 256, 84, 15 * HALF_MAX),
    Kind("Q3_K", 11, 256, 110, 3 * 31 * HALF_MAX),
    Kind("Q4_K", 12, 256, 144, 63 * HALF_MAX),
    Kind("Q5_K", 13, 256, 176, 63 * HALF_MAX),
    Kind("Q6_K", 14, 256, 210, 31 * 127 * HALF_MAX),
    Kind("IQ4_NL", 20, 32, 18, 113 * HALF_MAX),
    Kind("IQ4_XS", 23, 256, 136, 31 * 113 * HALF_MAX),
)

KINDS: Final[Mapping[str, Kind]] = MappingProxyType({kind.name: kind for kind in _KINDS})
"""Every kind by its name."""


def kind_of(name: str) -> Kind:
    """The kind called `name`.

    Raises:
        ValueError: there is no such kind.
    """
    if name not in KINDS:
        raise ValueError(f"unknown block type {name!r}; known are {', '.join(KINDS)}")
    return KINDS[name]
