"""Indices as MLX packs them: one stream of bits per row, from the lowest bit of 32-bit words up."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from sketchconv.formats.tensors import U8Array

WIDTHS: Final = (2, 3, 4, 5, 6, 8)
"""Bits of an index in every version of MLX that has them all."""
GROUP_SIZES: Final = (128, 64, 32)
"""Columns that share a scale and a bias, largest first."""
_RUN: Final = 8


def pack_words(codes: U8Array, bits: int) -> npt.NDArray[np.uint32]:
    """Pack indices uint8 ``[rows, columns]`` into words ``<u4 [rows, columns * bits / 32]``.

    Every 8 indices make `bits` bytes, of any width; that is what `mlx.core.quantize` writes
    (MLX 0.32), where indices of 3, 5 and 6 bits reach over the borders of bytes and words.

    Args:
        codes: each below ``2**bits``; a multiple of 32 columns.
        bits: one of `WIDTHS`.

    Raises:
        ValueError: another width, number of columns or dtype, or an index that does not fit.
    """
    rows, columns = codes.shape
    if codes.dtype != np.uint8 or bits not in WIDTHS or columns % GROUP_SIZES[-1]:
        raise ValueError(f"cannot pack {codes.dtype} {codes.shape} in words of {bits} bits")
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"index {int(codes.max())} does not fit in {bits} bits")
    runs = codes.reshape(rows, columns // _RUN, _RUN)
    stream = np.zeros(runs.shape[:2], "<u8")
    for place in range(_RUN):
        stream |= runs[..., place].astype("<u8") << np.uint64(bits * place)
    data = np.ascontiguousarray(stream[..., None].view(np.uint8)[..., :bits])
    return data.reshape(rows, -1).view("<u4")
