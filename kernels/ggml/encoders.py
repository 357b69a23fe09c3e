"""Compiled encoders, one for each kind: tiles of 16 sub-blocks through `search`, then packed.

All have one signature: `x` float32 ``[blocks, columns of a block]``, `weights` float32
``[blocks of a row, columns of a block]`` or empty, `out` uint8 ``[blocks, bytes]``, and the first
and last tile to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from sketchconv.kernels.ggml import pack
from sketchconv.kernels.ggml.search import search
from sketchconv.kernels.ggml.tiles import fill, make_tile
from sketchconv.kernels.jit import jit


@jit
def encode_q4_0(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """Q4_0."""
    tile = make_tile(32)
    codes = tile.codes.reshape(16, 32)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "Q4_0")
        first = number * 16
        for k in range(min(16, out.shape[0] - first)):
            pack.pack_q4_0(codes[k], tile.fields, k, out[first + k])


@jit
def encode_q4_1(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """Q4_1."""
    tile = make_tile(32)
    codes = tile.codes.reshape(16, 32)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "Q4_1")
        first = number * 16
        for k in range(min(16, out.shape[0] - first)):
            pack.pack_q4_1(codes[k], tile.fields, k, out[first + k])


@jit
def encode_q5_0(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """Q5_0."""
    tile = make_tile(32)
    codes = tile.codes.reshape(16, 32)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "Q5_0")
        first = number * 16
        for k in range(min(16, out.shape[0] - first)):
            pack.pack_q5_0(codes[k], tile.fields, k, out[first + k])


@jit
def encode_q5_1(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """Q5_1."""
    tile = make_tile(32)
    codes = tile.codes.reshape(16, 32)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "Q5_1")
        first = number * 16
        for k in range(min(16, out.shape[0] - first)):
            pack.pack_q5_1(codes[k], tile.fields, k, out[first + k])


@jit
def encode_q8_0(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """Q8_0."""
    tile = make_tile(32)
    codes = tile.codes.reshape(16, 32)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "Q8_0")
        first = number * 16
        for k in range(min(16, out.shape[0] - first)):
            pack.pack_q8_0(codes[k], tile.fields, k, out[first + k])


@jit
def encode_iq4_nl(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """IQ4_NL."""
    tile = make_tile(32)
    codes = tile.codes.reshape(16, 32)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "IQ4_NL")
        first = number * 16
        for k in range(min(16, out.shape[0] - first)):
            pack.pack_q4_0(codes[k], tile.fields, k, out[first + k])


@jit
def encode_q2_k(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """Q2_K."""
    tile = make_tile(16)
    codes = tile.codes.reshape(1, 256)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "Q2_K")
        pack.pack_q2_k(codes[0], tile.fields, 0, out[number])


@jit
def encode_q3_k(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """Q3_K."""
    tile = make_tile(16)
    codes = tile.codes.reshape(1, 256)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "Q3_K")
        pack.pack_q3_k(codes[0], tile.fields, 0, out[number])


@jit
def encode_q6_k(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """Q6_K."""
    tile = make_tile(16)
    codes = tile.codes.reshape(1, 256)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "Q6_K")
        pack.pack_q6_k(codes[0], tile.fields, 0, out[number])


@jit
def encode_q4_k(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """Q4_K."""
    tile = make_tile(32)
    codes = tile.codes.reshape(2, 256)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "Q4_K")
        first = number * 2
        for k in range(min(2, out.shape[0] - first)):
            pack.pack_q4_k(codes[k], tile.fields, k * 8, out[first + k])


@jit
def encode_q5_k(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """Q5_K."""
    tile = make_tile(32)
    codes = tile.codes.reshape(2, 256)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "Q5_K")
        first = number * 2
        for k in range(min(2, out.shape[0] - first)):
            pack.pack_q5_k(codes[k], tile.fields, k * 8, out[first + k])


@jit
def encode_iq4_xs(x: Any, weights: Any, out: Any, begin: int, end: int) -> None:
    """IQ4_XS."""
    tile = make_tile(32)
    codes = tile.codes.reshape(2, 256)
    for number in range(begin, end):
        fill(tile, x, weights, number)
        search(tile.x, tile.weights, tile.codes, tile.fields, "IQ4_XS")
        first = number * 2
        for k in range(min(2, out.shape[0] - first)):
            pack.pack_iq4_xs(codes[k], tile.fields, k * 8, out[first + k])


Encoder = Callable[[Any, Any, Any, int, int], None]

ENCODERS: Final[Mapping[str, Encoder]] = MappingProxyType(
    {
        "Q4_0": encode_q4_0,
        "Q4_1": encode_q4_1,
        "Q5_0": encode_q5_0,
        "Q5_1": encode_q5_1,
        "Q8_0": encode_q8_0,
        "IQ4_NL": encode_iq4_nl,
        "Q2_K": encode_q2_k,
        "Q3_K": encode_q3_k,
        "Q6_K": encode_q6_k,
        "Q4_K": encode_q4_k,
        "Q5_K": encode_q5_k,
        "IQ4_XS": encode_iq4_xs,
    }
)
"""The encoder of every kind."""
