"""Metadata values of GGUF as bytes: a type number, then the value, little endian."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from sketchconv.formats.errors import OutputFailure

MAX_STRING: Final = 1 << 30
_U16, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 2, 4, 5, 6, 7, 8, 9, 10


def text_bytes(text: str) -> bytes:
    """A string as it stands anywhere in a GGUF header: its length (uint64), then UTF-8.

    Raises:
        OutputFailure: the text has no UTF-8 form (a lone surrogate) or is too long.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise OutputFailure(f"GGUF metadata: {text[:60]!r} cannot be written as UTF-8") from None
    if len(data) > MAX_STRING:
        raise OutputFailure(f"GGUF metadata: a text of {len(data)} bytes, at most {MAX_STRING}")
    return struct.pack("<Q", len(data)) + data


def string(value: str) -> bytes:
    """A string value. Raises as `text_bytes`."""
    return struct.pack("<I", _STRING) + text_bytes(value)


def boolean(value: bool) -> bytes:
    """A boolean value."""
    return struct.pack("<I?", _BOOL, value)


def uint16(value: int) -> bytes:
    """An unsigned 16-bit value."""
    return _integer("<IH", _U16, value)


def uint32(value: int) -> bytes:
    """An unsigned 32-bit value: GGUF's own choice for sizes and token ids."""
    return _integer("<II", _U32, value)


def int32(value: int) -> bytes:
    """A signed 32-bit value."""
    return _integer("<Ii", _I32, value)


def uint64(value: int) -> bytes:
    """An unsigned 64-bit value."""
    return _integer("<IQ", _U64, value)


def float32(value: float) -> bytes:
    """A float32 value.

    Raises:
        OutputFailure: beyond float32's range.
    """
    try:
        return struct.pack("<If", _F32, value)
    except OverflowError:
        raise OutputFailure(f"GGUF metadata: {value!r} does not fit a float32") from None


def strings(values: Sequence[str]) -> bytes:
    """An array of strings. Raises as `text_bytes`."""
    head = struct.pack("<IIQ", _ARRAY, _STRING, len(values))
    return head + b"".join(map(text_bytes, values))


def int32s(values: Sequence[int]) -> bytes:
    """An array of signed 32-bit integers."""
    return _numbers(_I32, np.asarray(values, "<i4"))


def float32s(values: Sequence[float]) -> bytes:
    """An array of float32."""
    return _numbers(_F32, np.asarray(values, "<f4"))


def _numbers(kind: int, values: npt.NDArray[np.int32] | npt.NDArray[np.float32]) -> bytes:
    return struct.pack("<IIQ", _ARRAY, kind, len(values)) + values.tobytes()


def _integer(code: str, kind: int, value: int) -> bytes:
    try:
        return struct.pack(code, kind, value)
    except struct.error:
        raise OutputFailure(f"GGUF metadata: {value!r} does not fit its integer type") from None
