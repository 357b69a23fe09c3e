"""Layouts of the blocks in NumPy: packers and decoders, the reference of the compiled ones.

A packer takes codes uint8 ``[n, columns of a block]`` and the float32 fields of `search`, each
``[n, sub-blocks]``; a decoder takes blocks uint8 ``[n, bytes]``. The float operations are those of
ggml, in its order, so that the weights agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels.ggml.kinds import CODEBOOK

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

LEVELS = np.array(CODEBOOK, np.float32)


def _half_bytes(values: F32) -> U8:
    halves: U8 = np.ascontiguousarray(values[:, :1]).astype("<f2").view(np.uint8)
    return halves


def _half(blocks: U8, at: int) -> F32:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _join(fields: U8, width: int) -> U8:
    """Fields ``[..., k, run]`` of `width` bits, the first k in the lowest bits of each byte."""
    shifts = np.arange(fields.shape[-2], dtype=np.uint8)[:, None] * np.uint8(width)
    joined: U8 = np.bitwise_or.reduce(fields << shifts, axis=-2).astype(np.uint8)
    return joined


def _split(data: U8, width: int, run: int) -> U8:
    """The reverse: bytes ``[n, m]`` to fields ``[n, m * 8 / width]``, by runs of `run` bytes."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    parts = data.reshape(len(data), -1, 1, run) >> shifts
    return (parts & np.uint8(2**width - 1)).reshape(len(data), -1)


def _join_runs(codes: U8, width: int, run: int) -> U8:
    """Low `width` bits of codes ``[n, columns]`` in bytes, by runs of `run` bytes."""
    fields = (codes & np.uint8(2**width - 1)).reshape(len(codes), -1, 8 // width, run)
    return _join(fields, width).reshape(len(codes), -1)


def _times(scales: F32, codes: Any, size: int) -> F32:
    product: F32 = np.repeat(scales, size, axis=1) * codes.astype(np.float32)
    return product


def _pack_simple(*parts: U8) -> U8:
    return np.concatenate(parts, axis=1)


def _fifth(codes: U8) -> U8:
    return np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")


def _five(blocks: U8, at: int) -> U8:
    high = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return _split(blocks[:, at + 4 :], 4, 16) | (high << np.uint8(4))


def _pack_scales(scales: F32, falls: F32) -> U8:
    """Eight scales and eight falls of 6 bits in 12 bytes."""
    s, f = scales.astype(np.uint8), falls.astype(np.uint8)
    top = np.uint8(4), np.uint8(6)
    first, second = (a[:, :4] | ((a[:, 4:] >> top[0]) << top[1]) for a in (s, f))
    third = (s[:, 4:] & np.uint8(15)) | ((f[:, 4:] & np.uint8(15)) << top[0])
    return np.concatenate([first, second, third], axis=1)


def _scales(data: U8) -> tuple[U8, U8]:
    """The reverse."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:12]
    low, mask = third & np.uint8(15), np.uint8(0x30)
    scales = np.concatenate([first & np.uint8(63), low | ((first >> np.uint8(2)) & mask)], axis=1)
    low = third >> np.uint8(4)
    falls = np.concatenate([second & np.uint8(63), low | ((second >> np.uint8(2)) & mask)], axis=1)
    return scales, falls


def _affine(blocks: U8, at: int, scales: U8, falls: U8, codes: U8, size: int) -> F32:
    """`step * code - fall` with float16 units at byte `at`."""
    steps = _half(blocks, at) * scales.astype(np.float32)
    lows = _half(blocks, at + 2) * falls.astype(np.float32)
    return _times(steps, codes, size) - np.repeat(lows, size, axis=1)


def _pack_q5_k(codes: U8, scale: F32, fall: F32, unit: F32, base: F32) -> U8:
    high = _join((codes >> np.uint8(4)).reshape(-1, 8, 32), 1)
    parts = _half_bytes(unit), _half_bytes(base), _pack_scales(scale, fall), high
    return _pack_simple(*parts, _join_runs(codes, 4, 32))


def _pack_q3_k(codes: U8, scale: F32, unit: F32) -> U8:
    s = (scale + np.float32(32)).astype(np.uint8)
    low = (s[:, :8] & np.uint8(15)) | ((s[:, 8:] & np.uint8(15)) << np.uint8(4))
    high = _join((s >> np.uint8(4)).reshape(-1, 4, 4), 2)
    third = _join((codes >> np.uint8(2)).reshape(-1, 8, 32), 1)
    return _pack_simple(third, _join_runs(codes, 2, 32), low, high, _half_bytes(unit))


def _decode_q3_k(b: U8) -> F32:
    scales = _split(b[:, 96:104], 4, 8) | (_split(b[:, 104:108], 2, 4) << np.uint8(4))
    steps = _half(b, 108) * (scales.astype(np.float32) - np.float32(32))
    codes = _split(b[:, 32:96], 2, 32) | (_split(b[:, :32], 1, 32) << np.uint8(2))
    return _times(steps, codes.astype(np.int8) - np.int8(4), 16)


def _pack_q6_k(codes: U8, scale: F32, unit: F32) -> U8:
    high = _join_runs(codes >> np.uint8(4), 2, 32)
    stored = scale.astype(np.int8).view(np.uint8)
    return _pack_simple(_join_runs(codes, 4, 64), high, stored, _half_bytes(unit))


def _decode_q6_k(b: U8) -> F32:
    steps = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    codes = _split(b[:, :128], 4, 64) | (_split(b[:, 128:192], 2, 32) << np.uint8(4))
    return _times(steps, codes.astype(np.int8) - np.int8(32), 16)


def _pack_iq4_xs(codes: U8, scale: F32, unit: F32) -> U8:
    s = (scale + np.float32(32)).astype(np.uint8)
    high = _join((s >> np.uint8(4)).reshape(-1, 2, 4, 1), 2).reshape(-1, 2)
    low = _join((s & np.uint8(15)).reshape(-1, 4, 2, 1), 4).reshape(-1, 4)
    return _pack_simple(_half_bytes(unit), high, low, _join_runs(codes, 4, 16))


def _decode_iq4_xs(b: U8) -> F32:
    scales = _split(b[:, 4:8], 4, 1) | (_split(b[:, 2:4], 2, 1) << np.uint8(4))
    steps = _half(b, 0) * (scales.astype(np.float32) - np.float32(32))
    return _times(steps, LEVELS[_split(b[:, 8:], 4, 16)], 32)


def _pack_halves(codes: U8, step: F32) -> U8:
    return _pack_simple(_half_bytes(step), _join_runs(codes, 4, 16))


PACKERS: Final[Mapping[str, Callable[..., U8]]] = MappingProxyType(
    {
        "Q4_0": _pack_halves,
        "Q4_1": lambda c, d, m: _pack_simple(_half_bytes(d), _half_bytes(m), _join_runs(c, 4, 16)),
        "Q5_0": lambda c, d: _pack_simple(_half_bytes(d), _fifth(c), _join_runs(c, 4, 16)),
        "Q5_1": lambda c, d, m: _pack_simple(
            _half_bytes(d), _half_bytes(m), _fifth(c), _join_runs(c, 4, 16)
        ),
        "Q8_0": lambda c, d: _pack_simple(_half_bytes(d), c),
        "Q2_K": lambda c, s, f, d, m: _pack_simple(
            s.astype(np.uint8) | (f.astype(np.uint8) << np.uint8(4)),
            _join_runs(c, 2, 32),
            _half_bytes(d),
            _half_bytes(m),
        ),
        "Q3_K": _pack_q3_k,
        "Q4_K": lambda c, s, f, d, m: _pack_simple(
            _half_bytes(d), _half_bytes(m), _pack_scales(s, f), _join_runs(c, 4, 32)
        ),
        "Q5_K": _pack_q5_k,
        "Q6_K": _pack_q6_k,
        "IQ4_NL": _pack_halves,
        "IQ4_XS": _pack_iq4_xs,
    }
)
"""The packer of every kind."""

DECODERS: Final[Mapping[str, Callable[[U8], F32]]] = MappingProxyType(
    {
        "Q4_0": lambda b: _times(
            _half(b, 0), _split(b[:, 2:], 4, 16).view(np.int8) - np.int8(8), 32
        ),
        "Q4_1": lambda b: _times(_half(b, 0), _split(b[:, 4:], 4, 16), 32) + _half(b, 2),
        "Q5_0": lambda b: _times(_half(b, 0), _five(b, 2).view(np.int8) - np.int8(16), 32),
        "Q5_1": lambda b: _times(_half(b, 0), _five(b, 4), 32) + _half(b, 2),
        "Q8_0": lambda b: _times(_half(b, 0), b[:, 2:].view(np.int8), 32),
        "Q2_K": lambda b: _affine(
            b,
            80,
            b[:, :16] & np.uint8(15),
            b[:, :16] >> np.uint8(4),
            _split(b[:, 16:80], 2, 32),
            16,
        ),
        "Q3_K": _decode_q3_k,
        "Q4_K": lambda b: _affine(b, 0, *_scales(b[:, 4:16]), _split(b[:, 16:], 4, 32), 32),
        "Q5_K": lambda b: _affine(
            b,
            0,
            *_scales(b[:, 4:16]),
            _split(b[:, 48:], 4, 32) | (_split(b[:, 16:48], 1, 32) << np.uint8(4)),
            32,
        ),
        "Q6_K": _decode_q6_k,
        "IQ4_NL": lambda b: _times(_half(b, 0), LEVELS[_split(b[:, 2:], 4, 16)], 32),
        "IQ4_XS": _decode_iq4_xs,
    }
)
"""The decoder of every kind."""
