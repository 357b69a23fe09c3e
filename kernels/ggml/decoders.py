"""Compiled decoders, one for each kind: ``(blocks, out, begin, end)`` for blocks from begin to end.

`blocks` are uint8 ``[n, bytes]``, `out` float32 ``[n, columns of a block]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from sketchconv.kernels.ggml.lift import lift, lift_five, lift_levels, lift_signed, lift_split
from sketchconv.kernels.jit import inner, jit


@inner
def half(data: Any, at: int) -> Any:
    """The float16 at byte `at` as float32."""
    word = np.uint32(data[at]) | (np.uint32(data[at + 1]) << np.uint32(8))
    sign, size = (word & np.uint32(0x8000)) << np.uint32(16), word & np.uint32(0x7FFF)
    if size < np.uint32(0x400):
        value = np.float32(size) * np.float32(2.0**-24)
        return -value if sign else value
    bias = np.uint32(224 << 23) if size >= np.uint32(0x7C00) else np.uint32(112 << 23)
    return np.uint32(((size << np.uint32(13)) + bias) | sign).view(np.float32)


@jit
def decode_q4_0(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Step, codes."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        step, none = half(data, 0), np.float32(0)
        lift(data, 2, 0, 15, 8, step, none, to, 0)
        lift(data, 2, 4, 15, 8, step, none, to, 16)


@jit
def decode_q4_1(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Step, base, codes."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        step, fall = half(data, 0), -half(data, 2)
        lift(data, 4, 0, 15, 0, step, fall, to, 0)
        lift(data, 4, 4, 15, 0, step, fall, to, 16)


@jit
def decode_q5_0(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Step, fifth bits, low bits."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        step, none = half(data, 0), np.float32(0)
        lift_five(data, 6, 0, 2, 0, 16, step, none, to, 0)
        lift_five(data, 6, 4, 2, 16, 16, step, none, to, 16)


@jit
def decode_q5_1(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Step, base, fifth bits, low bits."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        step, fall = half(data, 0), -half(data, 2)
        lift_five(data, 8, 0, 4, 0, 0, step, fall, to, 0)
        lift_five(data, 8, 4, 4, 16, 0, step, fall, to, 16)


@jit
def decode_q8_0(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Step, signed codes."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        step = half(data, 0)
        lift_signed(data, 2, step, to, 0)
        lift_signed(data, 18, step, to, 16)


@jit
def decode_q2_k(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Scales and falls, codes, units."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        unit, base = half(data, 80), half(data, 82)
        for j in range(16):
            step = unit * np.float32(data[j] & np.uint8(15))
            fall = base * np.float32(data[j] >> np.uint8(4))
            at = 16 + 32 * (j // 8) + 16 * (j % 2)
            lift(data, at, 2 * (j // 2 % 4), 3, 0, step, fall, to, 16 * j)


@jit
def decode_q3_k(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Third bits, low bits, scales of 6 bits, unit."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        unit, none = half(data, 108), np.float32(0)
        for j in range(16):
            low = (data[96 + j % 8] >> np.uint8(4 * (j // 8))) & np.uint8(15)
            top = (data[104 + j % 4] >> np.uint8(2 * (j // 4))) & np.uint8(3)
            step = unit * np.float32(np.int32(low | (top << np.uint8(4))) - np.int32(32))
            at, third, shift = 32 + 32 * (j // 8) + 16 * (j % 2), 16 * (j % 2), 2 * (j // 2 % 4)
            lift_split(data, at, shift, third, j // 2, 1, 2, 4, step, none, to, 16 * j)


@inner
def scale_and_fall(data: Any, j: int) -> Any:
    """Scale and fall j of Q4_K and Q5_K."""
    if j < 4:
        return data[4 + j] & np.uint8(63), data[8 + j] & np.uint8(63)
    scale = (data[8 + j] & np.uint8(15)) | ((data[j] >> np.uint8(6)) << np.uint8(4))
    return scale, (data[8 + j] >> np.uint8(4)) | ((data[4 + j] >> np.uint8(6)) << np.uint8(4))


@jit
def decode_q4_k(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Units, scales, codes."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        unit, base = half(data, 0), half(data, 2)
        for j in range(8):
            scale, fall = scale_and_fall(data, j)
            step, low = unit * np.float32(scale), base * np.float32(fall)
            for i in range(0, 32, 16):
                at = 16 + 32 * (j // 2) + i
                lift(data, at, 4 * (j % 2), 15, 0, step, low, to, 32 * j + i)


@jit
def decode_q5_k(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Units, scales, fifth bits, low bits."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        unit, base = half(data, 0), half(data, 2)
        for j in range(8):
            scale, fall = scale_and_fall(data, j)
            step, low = unit * np.float32(scale), base * np.float32(fall)
            for i in range(0, 32, 16):
                at, shift = 48 + 32 * (j // 2) + i, 4 * (j % 2)
                lift_split(data, at, shift, 16 + i, j, 1, 4, 0, step, low, to, 32 * j + i)


@jit
def decode_q6_k(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Low four bits, high two bits, scales of 8 bits, unit."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        unit, none = half(data, 208), np.float32(0)
        for j in range(16):
            step = unit * np.float32(np.int8(data[192 + j]))
            run, half_at = j // 2 % 4, j // 8
            at = 64 * half_at + 32 * (run % 2) + 16 * (j % 2)
            high, shift = 128 + 32 * half_at + 16 * (j % 2), 4 * (run // 2)
            lift_split(data, at, shift, high, 2 * run, 3, 4, 32, step, none, to, 16 * j)


@jit
def decode_iq4_nl(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Step, codes."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        step = half(data, 0)
        lift_levels(data, 2, 0, step, to, 0)
        lift_levels(data, 2, 4, step, to, 16)


@jit
def decode_iq4_xs(blocks: Any, out: Any, begin: int, end: int) -> None:
    """Unit, high and low bits of the scales, codes."""
    for b in range(begin, end):
        data, to = blocks[b], out[b]
        unit = half(data, 0)
        for j in range(8):
            low = (data[4 + j // 2] >> np.uint8(4 * (j % 2))) & np.uint8(15)
            top = (data[2 + j // 4] >> np.uint8(2 * (j % 4))) & np.uint8(3)
            step = unit * np.float32(np.int32(low | (top << np.uint8(4))) - np.int32(32))
            lift_levels(data, 8 + 16 * j, 0, step, to, 32 * j)
            lift_levels(data, 8 + 16 * j, 4, step, to, 32 * j + 16)


Decoder = Callable[[Any, Any, int, int], None]

DECODERS: Final[Mapping[str, Decoder]] = MappingProxyType(
    {
        "Q4_0": decode_q4_0,
        "Q4_1": decode_q4_1,
        "Q5_0": decode_q5_0,
        "Q5_1": decode_q5_1,
        "Q8_0": decode_q8_0,
        "Q2_K": decode_q2_k,
        "Q3_K": decode_q3_k,
        "Q4_K": decode_q4_k,
        "Q5_K": decode_q5_k,
        "Q6_K": decode_q6_k,
        "IQ4_NL": decode_iq4_nl,
        "IQ4_XS": decode_iq4_xs,
    }
)
"""The decoder of every kind."""
