"""Compiled fits of shaped LUTs, one for each grid: tiles of 16 groups through `search_grid`.

All have one signature: `x` float32 ``[groups of all rows, columns of a group]``, `weights` float32
``[groups of a row, columns of a group]`` or empty, `codes` uint8 shaped as `x`, `fields` float32
``[2, groups of all rows]`` for scales and minima, and the first and last tile to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from sketchconv.kernels.ggml.lanes import LANES
from sketchconv.kernels.ggml.search import search_grid
from sketchconv.kernels.ggml.tiles import fill, make_tile
from sketchconv.kernels.jit import inner, jit


@inner
def spill(tile: Any, codes: Any, fields: Any, number: int) -> None:
    """Put what was found in tile `number` where it belongs."""
    first = number * LANES
    for lane in range(min(LANES, codes.shape[0] - first)):
        target = codes[first + lane]
        for i in range(target.size):
            target[i] = tile.codes[lane, i]
        for k in range(2):
            fields[k, first + lane] = tile.fields[k, lane]


@jit
def fit_iq4_nl(x: Any, weights: Any, codes: Any, fields: Any, begin: int, end: int) -> None:
    """Levels of IQ4_NL times a scale."""
    tile = make_tile(x.shape[1])
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search_grid(tile.x, tile.weights, tile.codes, tile.fields, x.shape[1], "iq4_nl")
        spill(tile, codes, fields, number)


@jit
def fit_symmetric(x: Any, weights: Any, codes: Any, fields: Any, begin: int, end: int) -> None:
    """Whole numbers from -8 to 7 times a scale."""
    tile = make_tile(x.shape[1])
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search_grid(tile.x, tile.weights, tile.codes, tile.fields, x.shape[1], "symmetric")
        spill(tile, codes, fields, number)


@jit
def fit_affine(x: Any, weights: Any, codes: Any, fields: Any, begin: int, end: int) -> None:
    """Whole numbers from 0 to 15 times a scale, plus a minimum."""
    tile = make_tile(x.shape[1])
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search_grid(tile.x, tile.weights, tile.codes, tile.fields, x.shape[1], "affine")
        spill(tile, codes, fields, number)


@jit
def fit_affine_5(x: Any, weights: Any, codes: Any, fields: Any, begin: int, end: int) -> None:
    """Whole numbers from 0 to 31 times a scale, plus a minimum."""
    tile = make_tile(x.shape[1])
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search_grid(tile.x, tile.weights, tile.codes, tile.fields, x.shape[1], "affine_5")
        spill(tile, codes, fields, number)


@jit
def fit_symmetric_5(x: Any, weights: Any, codes: Any, fields: Any, begin: int, end: int) -> None:
    """Whole numbers from -16 to 15 times a scale."""
    tile = make_tile(x.shape[1])
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search_grid(tile.x, tile.weights, tile.codes, tile.fields, x.shape[1], "symmetric_5")
        spill(tile, codes, fields, number)


@jit
def fit_symmetric_8(x: Any, weights: Any, codes: Any, fields: Any, begin: int, end: int) -> None:
    """Whole numbers from -127 to 127 times a scale; signed codes."""
    tile = make_tile(x.shape[1])
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search_grid(tile.x, tile.weights, tile.codes, tile.fields, x.shape[1], "symmetric_8")
        spill(tile, codes, fields, number)


FITS: Final[Mapping[str, Callable[..., None]]] = MappingProxyType(
    {
        "iq4_nl": fit_iq4_nl,
        "affine": fit_affine,
        "affine_5": fit_affine_5,
        "symmetric": fit_symmetric,
        "symmetric_5": fit_symmetric_5,
        "symmetric_8": fit_symmetric_8,
    }
)
"""The fit of every grid."""
