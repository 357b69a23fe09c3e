"""From a source's bytes to float32 values and to stored bytes, by safetensors dtype."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.base import FLOATS, Float32

_COPIED = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
_CARRIERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def stored_info(info: TensorInfo, where: str) -> TensorInfo:
    """The tensor as a copy of it is stored: F64 as F32, all else as it is.

    Raises:
        SourceError: complex values, and 8-bit and smaller floats: alone they are no values.
    """
    if info.dtype == "F64":
        return TensorInfo(info.name, "F32", info.shape)
    if info.dtype in FLOATS or info.dtype in _COPIED:
        return info
    if info.dtype.startswith(("F8", "F6", "F4", "E8M0")):
        raise SourceError(
            f"{where}: tensor {info.name!r} is {info.dtype}; of such small floats only F8_E4M3 with"
            " scales that config.json tells of is read, convert the bf16 checkpoint of this model"
            " instead"
        )
    raise SourceError(f"{where}: tensor {info.name!r} has the unsupported dtype {info.dtype}")


def row_count(info: TensorInfo) -> int:
    """Rows along the first axis; a scalar has one."""
    return info.shape[0] if info.shape else 1


def row_bytes(info: TensorInfo, begin: int, end: int) -> int:
    """Bytes of one row of the tensor.

    Raises:
        SourceError: [begin, end) is not a range of its rows.
    """
    count = row_count(info)
    if not 0 <= begin <= end <= count:
        raise SourceError(f"{info.name!r}: rows {begin} to {end}, but the tensor has {count}")
    return info.nbytes // count if count else 0


def to_float32(raw: bytes, info: TensorInfo) -> Float32:
    """Values of whole rows as float32 [rows, ...]; the array may be a read-only view of `raw`.

    Raises:
        SourceError: the tensor holds integers or booleans.
    """
    from sketchconv.kernels.cpu import bf16_to_f32

    if info.dtype not in FLOATS:
        raise SourceError(f"{info.name!r}: {info.dtype} values can be copied but not compressed")
    flat = np.frombuffer(raw, dtype=_CARRIERS[info.dtype])
    if info.dtype == "BF16":
        values = bf16_to_f32(flat)
    elif info.dtype == "F64":
        values = _narrowed(flat, info.name)
    else:
        values = flat.astype(np.float32, copy=False)
    width = math.prod(info.shape[1:])
    rows = values.size // width if width else 0
    return values.reshape(rows, *info.shape[1:])


def to_stored(raw: bytes, info: TensorInfo) -> bytes:
    """Bytes of whole rows in the dtype of `stored_info`."""
    if info.dtype == "F64":
        return _narrowed(np.frombuffer(raw, dtype="<f8"), info.name).tobytes()
    return raw


def _narrowed(values: npt.NDArray[np.float64], name: str) -> Float32:
    try:
        with np.errstate(over="raise"):
            return values.astype("<f4")
    except FloatingPointError:
        raise SourceError(f"{name!r}: F64 values beyond float32; repair the checkpoint") from None
