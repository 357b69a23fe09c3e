"""Values of GGUF's blocks: our own decoders where there are some, those of `gguf` for the rest."""

from __future__ import annotations

import numpy as np

from sketchconv.errors import SourceError
from sketchconv.formats.gguf_layout import GgufInfo
from sketchconv.sources.base import Float32

PLAIN = ("F32", "F16", "BF16")


def decode_rows(tensor: GgufInfo, raw: bytes, where: str) -> Float32:
    """The values of whole rows as float32 ``[rows, columns]``, bit for bit those of ggml.

    A decoder of ours runs on one thread: readers read several pieces at once.

    Raises:
        SourceError: nobody here can decode the type.
    """
    from sketchconv.kernels.ggml.blocks import decode
    from sketchconv.kernels.ggml.kinds import KINDS

    kind, columns = tensor.type.name, tensor.shape[-1]
    if kind in PLAIN:
        return _widened(kind, raw).reshape(-1, columns)
    blocks = np.frombuffer(raw, np.uint8).reshape(-1, tensor.row_bytes)
    if kind in KINDS:
        return decode(kind, blocks, columns, threads=1)
    return _by_gguf(tensor, blocks, where)


def _widened(kind: str, raw: bytes) -> Float32:
    from sketchconv.kernels.cpu import bf16_to_f32

    if kind == "BF16":
        return bf16_to_f32(np.frombuffer(raw, "<u2"))
    return np.frombuffer(raw, "<f4" if kind == "F32" else "<f2").astype(np.float32, copy=False)


def _by_gguf(tensor: GgufInfo, blocks: np.ndarray[tuple[int, int], np.dtype[np.uint8]],
             where: str) -> Float32:  # fmt: skip
    from gguf import GGMLQuantizationType, quants

    if not len(blocks):
        return np.zeros((0, tensor.shape[-1]), np.float32)
    try:
        with np.errstate(all="ignore"):
            values = quants.dequantize(blocks, GGMLQuantizationType(tensor.type.number))
    except (NotImplementedError, ValueError):
        raise SourceError(
            f"{where}: {tensor.name!r} is {tensor.type.name}, which cannot be dequantized"
        ) from None
    rows: Float32 = np.asarray(values, np.float32).reshape(len(blocks), tensor.shape[-1])
    return rows


def check_decodable(tensor: GgufInfo, where: str) -> None:
    """Find out whether a tensor can be read; what only `gguf` decodes, from one block of zeros.

    Raises:
        SourceError: it cannot, or it is a vector of blocks.
    """
    from sketchconv.kernels.ggml.kinds import KINDS

    if tensor.type.name in PLAIN:
        return
    if len(tensor.shape) == 1:
        raise SourceError(
            f"{where}: {tensor.name!r} is a vector of type {tensor.type.name}; expected F32"
        )
    if tensor.type.name not in KINDS:
        block = GgufInfo(tensor.name, (1, tensor.type.block), tensor.type)
        decode_rows(block, bytes(tensor.type.block_bytes), where)
