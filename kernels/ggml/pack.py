"""Codes and scales into the bytes of a block, compiled.

Every function writes one block. `codes` are uint8 ``[columns of a block]``; `fields` float32
``[4, 16]`` as `search` stores them, of which the block has the lanes from `lane` on; `out` its
bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels import vectors as v
from sketchconv.kernels.ggml.lanes import BYTES
from sketchconv.kernels.jit import inner


@inner
def put_half(value: Any, out: Any, at: int) -> None:
    """Store a float32 that is a float16 already."""
    word = np.float32(value).view(np.uint32)
    size = word & np.uint32(0x7FFFFFFF)
    if size >= np.uint32(113 << 23):
        bits = (size >> np.uint32(13)) - np.uint32(112 << 10)
    else:
        bits = np.uint32(abs(value) * np.float32(2.0**24))
    bits |= (word >> np.uint32(16)) & np.uint32(0x8000)
    out[at] = np.uint8(bits & np.uint32(0xFF))
    out[at + 1] = np.uint8(bits >> np.uint32(8))


@v.intrinsic
def join_halves(
    _typing: Any, codes: Any, low: Any, high: Any, out: Any, at: Any
) -> tuple[Any, Any]:
    """16 bytes at `out[at]`: low four bits of the codes from `low` on, and of those from `high`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, first, second, target, place = v.data_of(context, builder, signature, args)
        one, other = (v.load(builder, source, BYTES, start) for start in (first, second))
        one = builder.and_(one, v.constant(BYTES, 15))
        other = builder.shl(other, v.constant(BYTES, 4))
        v.store(builder, builder.or_(one, other), target, place)
        return context.get_dummy_value()

    i64 = v.types.int64
    return v.types.void(codes, i64, i64, out, i64), codegen


@inner
def put_halves(codes: Any, run: int, out: Any, at: int) -> None:
    """Low four bits of the codes: `run` of them in the low halves of bytes, `run` in the high.

    `run` is a multiple of 16. With loops over bytes packing Q4_0 took 2.8 ns a weight, not 1.0: the
    compiler cannot know that `codes` and `out` do not overlap.
    """
    for start in range(0, codes.size // 2, run):
        for i in range(start, start + run, 16):
            join_halves(codes, start + i, start + i + run, out, at + i)


@inner
def put_quarters(codes: Any, shift: int, out: Any) -> None:
    """Two bits, from `shift` on, of 256 codes: of four runs of 32 in each of 64 bytes."""
    first, mask = np.uint8(shift), np.uint8(3)
    for half in range(2):
        source, target = codes[128 * half :], out[32 * half : 32 * half + 32]
        for i in range(32):
            low = ((source[i] >> first) & mask) | (
                ((source[i + 32] >> first) & mask) << np.uint8(2)
            )
            high = (source[i + 64] >> first) & mask
            high |= ((source[i + 96] >> first) & mask) << np.uint8(2)
            target[i] = low | (high << np.uint8(4))


@inner
def put_bits(codes: Any, shift: int, out: Any) -> None:
    """Bit `shift` of 256 codes: of eight runs of 32 in each of 32 bytes."""
    for i in range(32):
        bits = np.uint8(0)
        for run in range(8):
            bits |= ((codes[32 * run + i] >> np.uint8(shift)) & np.uint8(1)) << np.uint8(run)
        out[i] = bits


@inner
def put_fifth_bits(codes: Any, out: Any, at: int) -> None:
    """Bit 4 of 32 codes in 4 bytes."""
    for i in range(4):
        bits = np.uint8(0)
        for k in range(8):
            bits |= np.uint8((codes[8 * i + k] >> np.uint8(4)) << np.uint8(k))
        out[at + i] = bits


@inner
def pack_q4_0(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Q4_0 and IQ4_NL: step, codes."""
    put_half(fields[0, lane], out, 0)
    put_halves(codes, 16, out, 2)


@inner
def pack_q4_1(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Step, base, codes."""
    put_half(fields[0, lane], out, 0)
    put_half(fields[1, lane], out, 2)
    put_halves(codes, 16, out, 4)


@inner
def pack_q5_0(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Step, fifth bits, low bits."""
    put_half(fields[0, lane], out, 0)
    put_fifth_bits(codes, out, 2)
    put_halves(codes, 16, out, 6)


@inner
def pack_q5_1(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Step, base, fifth bits, low bits."""
    put_half(fields[0, lane], out, 0)
    put_half(fields[1, lane], out, 2)
    put_fifth_bits(codes, out, 4)
    put_halves(codes, 16, out, 8)


@inner
def pack_q8_0(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Step, signed codes."""
    put_half(fields[0, lane], out, 0)
    for i in range(32):
        out[2 + i] = codes[i]


@inner
def put_scales(fields: Any, lane: int, out: Any) -> None:
    """Units, and eight scales and falls of 6 bits in 12 bytes, as Q4_K and Q5_K store them."""
    put_half(fields[2, lane], out, 0)
    put_half(fields[3, lane], out, 2)
    for j in range(4):
        scale, fall = np.uint8(fields[0, lane + j]), np.uint8(fields[1, lane + j])
        late, low = np.uint8(fields[0, lane + j + 4]), np.uint8(fields[1, lane + j + 4])
        out[4 + j] = scale | ((late >> np.uint8(4)) << np.uint8(6))
        out[8 + j] = fall | ((low >> np.uint8(4)) << np.uint8(6))
        out[12 + j] = (late & np.uint8(15)) | ((low & np.uint8(15)) << np.uint8(4))


@inner
def pack_q4_k(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Units, scales, codes."""
    put_scales(fields, lane, out)
    put_halves(codes, 32, out, 16)


@inner
def pack_q5_k(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Units, scales, fifth bits, low bits."""
    put_scales(fields, lane, out)
    put_bits(codes, 4, out[16:])
    put_halves(codes, 32, out, 48)


@inner
def pack_q2_k(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Scales and falls, codes, units."""
    for j in range(16):
        fall = np.uint8(fields[1, lane + j])
        out[j] = np.uint8(fields[0, lane + j]) | (fall << np.uint8(4))
    put_quarters(codes, 0, out[16:])
    put_half(fields[2, lane], out, 80)
    put_half(fields[3, lane], out, 82)


@inner
def pack_q3_k(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Third bits, low bits, scales of 6 bits, unit."""
    put_bits(codes, 2, out)
    put_quarters(codes, 0, out[32:])
    for j in range(4):
        top = np.uint8(0)
        for k in range(4):
            scale = np.uint8(fields[0, lane + j + 4 * k] + np.float32(32))
            top |= np.uint8((scale >> np.uint8(4)) << np.uint8(2 * k))
        out[104 + j] = top
    for j in range(8):
        scale = np.uint8(fields[0, lane + j] + np.float32(32))
        late = np.uint8(fields[0, lane + j + 8] + np.float32(32))
        out[96 + j] = np.uint8((scale & np.uint8(15)) | (late << np.uint8(4)))
    put_half(fields[1, lane], out, 108)


@inner
def pack_q6_k(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Low four bits, high two bits, scales of 8 bits, unit."""
    put_halves(codes, 64, out, 0)
    put_quarters(codes, 4, out[128:])
    for j in range(16):
        out[192 + j] = np.uint8(np.int64(fields[0, lane + j]) & 255)
    put_half(fields[1, lane], out, 208)


@inner
def pack_iq4_xs(codes: Any, fields: Any, lane: int, out: Any) -> None:
    """Unit, high and low bits of the scales, codes."""
    put_half(fields[1, lane], out, 0)
    for j in range(2, 8):
        out[j] = np.uint8(0)
    for j in range(8):
        scale = np.uint8(fields[0, lane + j] + np.float32(32))
        out[2 + j // 4] |= np.uint8((scale >> np.uint8(4)) << np.uint8(2 * (j % 4)))
        out[4 + j // 2] |= np.uint8((scale & np.uint8(15)) << np.uint8(4 * (j % 2)))
    put_halves(codes, 16, out, 8)
