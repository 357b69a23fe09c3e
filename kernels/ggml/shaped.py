"""Shaped LUTs: a fixed codebook times a scale, plus a minimum, per group of columns.

The LUT of a group is ``scale * level + minimum``, with the levels of a block type of ggml, so that
the codes and scales of a sketch are those of the blocks: packing them loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.ggml.blocks import F32, LANES, U8, checked_rows, relative_weights
from sketchconv.kernels.ggml.kinds import CODEBOOK, KINDS, Kind
from sketchconv.kernels.threads import for_spans

F16 = NDArray[np.float16]
BLOCK = 32
# Codes of 8 bits count from the lowest level, -128; the blocks hold signed numbers.
_SIGN = np.uint8(128)


@dataclass(frozen=True, slots=True)
class Grid:
    """A shape of LUTs: the block type that stores it, and its levels in the order of the codes."""

    kind: str
    levels: tuple[float, ...]
    has_minimum: bool


GRIDS: Final[Mapping[str, Grid]] = MappingProxyType(
    {
        "iq4_nl": Grid("IQ4_NL", tuple(map(float, CODEBOOK)), False),
        "affine": Grid("Q4_1", tuple(map(float, range(16))), True),
        "affine_5": Grid("Q5_1", tuple(map(float, range(32))), True),
        "symmetric": Grid("Q4_0", tuple(map(float, range(-8, 8))), False),
        "symmetric_5": Grid("Q5_0", tuple(map(float, range(-16, 16))), False),
        "symmetric_8": Grid("Q8_0", tuple(map(float, range(-128, 128))), False),
    }
)
"""Every grid by its name; with the bits behind it, unless they are 4."""


def key_of(grid: str, bits: int) -> str:
    """The key in `GRIDS` of a grid for codes of so many bits.

    Raises:
        ValueError: there is none.
    """
    key = grid if bits == 4 else f"{grid}_{bits}"
    if ("_" in grid and grid != "iq4_nl") or key not in GRIDS:
        raise ValueError(f"no grid {grid!r} of {bits} bits")
    return key


@dataclass(frozen=True, slots=True)
class Shaped:
    """Rows as codes of shaped LUTs.

    `codes` are uint8 ``[n, columns]``, `scale` and `minimum` float16 ``[n, groups]``. The scale may
    be negative: of levels that are not symmetric, the side that reaches further goes to the larger
    weights. Without a minimum that array is None.
    """

    codes: U8
    scale: F16
    minimum: F16 | None


def fit(
    rows: F32, grid: str, group: int = BLOCK, weights: F32 | None = None, threads: int | None = None
) -> Shaped:
    """Scale, minimum and codes of each group that minimise the weighted squared error.

    Args:
        rows: float32 ``[n, columns]``.
        grid: name of the shape, a key of `GRIDS`.
        group: columns that share a scale, a multiple of 32 that divides `columns`.
        weights: importance of each column, as for `blocks.encode`.
        threads: None means every core that the process may use; the result is the same.

    Raises:
        ValueError: unknown grid, wrong shape, group or dtype, a value that is not finite or beyond
            the reach of float16 scales (naming the row), or weights that are no weights.
    """
    from sketchconv.kernels.ggml.fits import FITS

    x, masses = _prepared(rows, grid, group, weights)
    codes = np.empty(x.shape, np.uint8)
    fields = np.zeros((2, len(x)), np.float32)
    tiles = -(-len(x) // LANES)
    run = FITS[grid]
    if tiles:
        for_spans(
            lambda begin, end: run(x, masses, codes, fields, begin, end), tiles, x.size, threads
        )
    return _shaped(grid, rows, codes, fields)


def fit_plain(rows: F32, grid: str, group: int = BLOCK, weights: F32 | None = None) -> Shaped:
    """The same by NumPy alone: the reference of `fit`."""
    from sketchconv.kernels.ggml.plans import GRIDS as PLANS
    from sketchconv.kernels.ggml.search import search_arrays

    x, masses = _prepared(rows, grid, group, weights)
    spread = np.broadcast_to(masses.reshape(-1) if masses.size else np.float32(1), rows.shape)
    turned, heavy = (np.ascontiguousarray(a.reshape(-1, group).T) for a in (x, spread))
    codes, fields = search_arrays(turned, heavy, PLANS[grid])
    return _shaped(grid, rows, codes.T.view(np.uint8), np.stack(fields))


def values(shaped: Shaped, grid: str) -> F32:
    """Weights float32 ``[n, columns]``: those of the blocks, bit for bit."""
    levels = np.array(GRIDS[grid].levels, np.float32)[shaped.codes]
    group = shaped.codes.shape[1] // shaped.scale.shape[1]
    product: F32 = np.repeat(shaped.scale.astype(np.float32), group, axis=1) * levels
    if shaped.minimum is None:
        return product
    lifted: F32 = product + np.repeat(shaped.minimum.astype(np.float32), group, axis=1)
    return lifted


def pack(shaped: Shaped, grid: str) -> U8:
    """The blocks uint8 ``[n, bytes of a row]`` that hold the same codes and scales."""
    from sketchconv.kernels.ggml import plain

    rows, columns = shaped.codes.shape
    known = KINDS[_known(grid).kind]
    times = columns // shaped.scale.shape[1] // BLOCK
    stored = [
        np.repeat(field.astype(np.float32), times, axis=1).reshape(-1, 1)
        for field in (shaped.scale, shaped.minimum)
        if field is not None
    ]
    codes = shaped.codes ^ _SIGN if known.name == "Q8_0" else shaped.codes
    packed = plain.PACKERS[known.name](codes.reshape(-1, BLOCK), *stored)
    return packed.reshape(rows, columns // BLOCK * known.nbytes)


def unpack(data: U8, grid: str, columns: int) -> Shaped:
    """Codes and scales of blocks, by groups of 32 columns: the reverse of `pack`.

    Raises:
        ValueError: the rows do not have the bytes of `columns` columns.
    """
    known = KINDS[_known(grid).kind]
    size = columns // BLOCK * known.nbytes
    if (
        columns < 1
        or columns % BLOCK
        or data.dtype != np.uint8
        or data.ndim != 2
        or data.shape[1] != size
    ):
        raise ValueError(
            f"blocks are {data.dtype} {data.shape}, {columns} columns of {known.name} take uint8 "
            f"[n, {size}]"
        )
    parts = np.ascontiguousarray(data).reshape(-1, known.nbytes)
    count = 2 if GRIDS[grid].has_minimum else 1
    halves = np.ascontiguousarray(parts[:, : 2 * count]).view("<f2").astype(np.float16)
    codes = _codes(parts[:, 2 * count :], known.name).reshape(len(data), columns)
    scale, *minimum = (halves[:, i].reshape(len(data), -1).copy() for i in range(count))
    return Shaped(codes, scale, minimum[0] if minimum else None)


def _codes(parts: U8, kind: str) -> U8:
    """Codes ``[n, 32]`` of what follows the scales in each block."""
    if kind == "Q8_0":
        return parts ^ _SIGN
    nibbles = parts[:, -BLOCK // 2 :]
    codes = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=1)
    if kind in ("Q5_0", "Q5_1"):
        codes |= np.unpackbits(parts[:, :4], axis=1, bitorder="little") << np.uint8(4)
    return codes


def _known(grid: str) -> Grid:
    if grid not in GRIDS:
        raise ValueError(f"unknown grid {grid!r}; known are {', '.join(GRIDS)}")
    return GRIDS[grid]


def _prepared(rows: Any, grid: str, group: int, weights: F32 | None) -> tuple[F32, F32]:
    """Groups ``[n * groups, group]`` and weights ``[groups, group]`` or none."""
    known = KINDS[_known(grid).kind]
    if group < BLOCK or group % BLOCK:
        raise ValueError(f"group is {group}, must be a multiple of {BLOCK}")
    kind = Kind(known.name, known.number, group, known.nbytes, known.reach)
    rows = checked_rows(kind, rows)
    return rows.reshape(-1, group), relative_weights(kind, rows.shape[1], weights)


def _shaped(grid: str, rows: F32, codes: U8, fields: F32) -> Shaped:
    halves = fields.astype(np.float16).reshape(2 if len(fields) > 1 else 1, len(rows), -1)
    minimum = halves[1] if GRIDS[grid].has_minimum else None
    codes = np.ascontiguousarray(codes).reshape(rows.shape)
    return Shaped(codes ^ _SIGN if grid == "symmetric_8" else codes, halves[0], minimum)
