"""Tensor descriptions, the closed list of dtypes, and bfloat16 as carried by NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

U8Array = npt.NDArray[np.uint8]
F32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DType:
    """A safetensors dtype: its name, bits per element, NumPy carrier, and whether it is a float.

    NumPy has no bfloat16 and no 8-bit floats: BF16 is carried by uint16, F8 by uint8, bit by bit.
    Dtypes below a byte (F4, F6) have no carrier of their own and are carried as flat bytes.
    """

    name: str
    bits: int
    carrier: str
    floating: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes per element; 0 for dtypes below a byte."""
        return self.bits // 8

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype, little-endian, that carries the stored bits."""
        return np.dtype(self.carrier)


_ALL: Final = (
    DType("F64", 64, "<f8", True),
    DType("I64", 64, "<i8"),
    DType("U64", 64, "<u8"),
    DType("C64", 64, "<c8"),
    DType("F32", 32, "<f4", True),
    DType("I32", 32, "<i4"),
    DType("U32", 32, "<u4"),
    DType("F16", 16, "<f2", True),
    DType("BF16", 16, "<u2", True),
    DType("I16", 16, "<i2"),
    DType("U16", 16, "<u2"),
    DType("F8_E4M3", 8, "|u1", True),
    DType("F8_E5M2", 8, "|u1", True),
    DType("F8_E8M0", 8, "|u1"),
    DType("F8_E4M3FNUZ", 8, "|u1"),
    DType("F8_E5M2FNUZ", 8, "|u1"),
    DType("I8", 8, "|i1"),
    DType("U8", 8, "|u1"),
    DType("BOOL", 8, "|u1"),
    DType("F6_E2M3", 6, "|u1"),
    DType("F6_E3M2", 6, "|u1"),
    DType("F4", 4, "|u1"),
)

DTYPES: Final[Mapping[str, DType]] = MappingProxyType({d.name: d for d in _ALL})
"""Every dtype of safetensors 0.8; foreign checkpoints may hold any of them."""

SKTCH_DTYPES: Final[frozenset[str]] = frozenset(
    {"F64", "I64", "U64", "F32", "I32", "U32", "F16", "BF16", "I16", "U16", "I8", "U8"}
    | {"F8_E4M3", "F8_E5M2"}
)
"""The dtypes that a `.sktch` file may hold."""

DENSE_DTYPES: Final[frozenset[str]] = frozenset(
    name for name in SKTCH_DTYPES if DTYPES[name].floating
)
"""The dtypes that a sketched weight may have had in its source."""

LUT_DTYPES: Final[tuple[str, ...]] = ("F16", "BF16", "F32")
"""The dtypes that a LUT may have."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The name, safetensors dtype name and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes that the elements take, row-major and without padding."""
        return -(-self.count * DTYPES[self.dtype].bits // 8)


def bf16_to_f32(bits: npt.NDArray[np.uint16]) -> F32Array:
    """Return the exact float32 values of bfloat16 bit patterns, in the same shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: F32Array) -> npt.NDArray[np.uint16]:
    """Round float32 values to bfloat16 bits: nearest, ties to even; a NaN stays a (quiet) NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = (bits + half) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, quiet, rounded).astype(np.uint16)


def carried_to_f32(carried: npt.NDArray[Any], dtype: str) -> F32Array:
    """Return float32 values of an F32, F16 or BF16 array held in its NumPy carrier; exact.

    Raises:
        ValueError: for any other dtype.
    """
    if dtype == "BF16":
        return bf16_to_f32(carried)
    if dtype in ("F16", "F32"):
        return carried.astype(np.float32)
    raise ValueError(f"no exact float32 for dtype {dtype}")
