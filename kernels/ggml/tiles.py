"""Sixteen sub-blocks of a matrix, turned so that element i of all of them is one vector."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels import vectors as v
from sketchconv.kernels.ggml.lanes import FLOATS, LANES, transpose
from sketchconv.kernels.jit import inner

FIELDS = 4


class Tile(NamedTuple):
    """What a thread works on."""

    x: NDArray[np.float32]  # [size, 16]
    weights: NDArray[np.float32]  # [size, 16]
    codes: NDArray[np.uint8]  # [16, size]
    fields: NDArray[np.float32]  # [FIELDS, 16]
    offsets: NDArray[np.int64]  # [16]


@v.intrinsic
def turn(_typing: Any, source: Any, offsets: Any, target: Any, size: Any) -> tuple[Any, Any]:
    """``target[i, lane] = source[offsets[lane] + i]`` for i below `size`, a multiple of 16.

    0.3 ns a weight, where a loop over single elements took 2.4.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, places, out, count = v.data_of(context, builder, signature, args)
        starts = [v.load(builder, places, v.I64, v.I64(lane)) for lane in range(LANES)]

        def body(first: Any, _none: list[Any]) -> list[Any]:
            rows = [v.load(builder, data, FLOATS, builder.add(s, first)) for s in starts]
            for i, row in enumerate(transpose(builder, rows)):
                place = builder.mul(builder.add(first, v.I64(i)), v.I64(LANES))
                v.store(builder, row, out, place)
            return []

        v.blocks(builder, count, LANES, [], body)
        return context.get_dummy_value()

    return v.types.void(source, offsets, target, v.types.int64), codegen


@inner
def make_tile(size: int) -> Any:
    """Room for sub-blocks of `size` elements."""
    return Tile(
        np.zeros((size, LANES), np.float32),
        np.ones((size, LANES), np.float32),
        np.zeros((LANES, size), np.uint8),
        np.zeros((FIELDS, LANES), np.float32),
        np.zeros(LANES, np.int64),
    )


@inner
def fill(tile: Any, x: Any, weights: Any, number: int) -> None:
    """Load tile `number`; lanes behind the last sub-block repeat it.

    Without weights (an empty array) the tile keeps its ones.
    """
    size = tile.x.shape[0]
    last = x.size // size - 1
    for lane in range(LANES):
        tile.offsets[lane] = min(number * LANES + lane, last) * size
    turn(x, tile.offsets, tile.x, size)
    if weights.size:
        for lane in range(LANES):
            tile.offsets[lane] %= weights.size
        turn(weights, tile.offsets, tile.weights, size)
