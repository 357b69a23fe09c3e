"""Codes of one place of every span out of the units of packed bits that a thread holds.

A span is the columns of one unit (a byte or a word) of the narrowest plane. The products walk the
places of all spans at once, so that a unit is loaded when its first place comes and is kept.
"""

from __future__ import annotations

import triton.language as tl

from sketchconv.kernels.gpu.jit import jit


@jit
def hold(
    held: tl.tensor,
    units: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    SLOT: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    REPACKED: tl.constexpr,
    UNIT: tl.constexpr,
    EDGE: tl.constexpr,
) -> tl.tensor:
    """The units that hold SLOT: of planes 8, 4, 2, 1; in device order the word, and the rest."""
    w8, w4, w2, w1 = held
    if REPACKED:
        if SLOT % 8 == 0 and SLOT < 24:
            w4 = _unit(units + SLOT // 8 * (GROUP // 32), place, inside, EDGE)
            fourth = w4 >> (3 - SLOT // 8) & (0x11111111 << (SLOT // 8))
            w1 = fourth if SLOT == 0 else w1 | fourth
    else:
        B8: tl.constexpr = GROUP if BITS & 8 else 0
        B4: tl.constexpr = B8 + ((GROUP + 1) // 2 if BITS & 4 else 0)
        B2: tl.constexpr = B4 + ((GROUP + 3) // 4 if BITS & 2 else 0)
        w8 = _next(w8, units, place, inside, SLOT, 8, BITS, UNIT, EDGE)
        w4 = _next(w4, units + B8 // (UNIT // 8), place, inside, SLOT, 4, BITS, UNIT, EDGE)
        w2 = _next(w2, units + B4 // (UNIT // 8), place, inside, SLOT, 2, BITS, UNIT, EDGE)
        w1 = _next(w1, units + B2 // (UNIT // 8), place, inside, SLOT, 1, BITS, UNIT, EDGE)
    return w8, w4, w2, w1


@jit
def _next(
    held: tl.tensor,
    plane: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    SLOT: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    EDGE: tl.constexpr,
) -> tl.tensor:
    """The next unit of a plane where SLOT starts one, else the one at hand."""
    if BITS & WIDTH and SLOT * WIDTH % UNIT == 0:
        per: tl.constexpr = WIDTH // (BITS & -BITS)
        start: tl.constexpr = SLOT * WIDTH // UNIT
        held = _unit(plane + start, place * per, inside, EDGE)
    return held


@jit
def _unit(start: tl.tensor, place: tl.tensor, inside: tl.tensor, EDGE: tl.constexpr) -> tl.tensor:
    place = start + place[None, :]
    unit = tl.load(place, mask=inside[None, :], other=0) if EDGE else tl.load(place)
    return unit.to(tl.uint32, bitcast=True) if unit.dtype == tl.int32 else unit.to(tl.uint32)


@jit
def code_at(
    held: tl.tensor,
    SLOT: tl.constexpr,
    BITS: tl.constexpr,
    REPACKED: tl.constexpr,
    UNIT: tl.constexpr,
) -> tl.tensor:
    """The code of SLOT out of the units at hand, int32."""
    w8, w4, w2, w1 = held
    if REPACKED:
        code = (w4 if SLOT < 24 else w1) >> (SLOT % 8 * 4) & 7
    elif BITS & 8:
        code = w8 >> (SLOT * 8 % UNIT) & 255
    else:
        code = 0
        if BITS & 4:
            code |= w4 >> (SLOT * 4 % UNIT) & 15
        if BITS & 2:
            code |= (w2 >> (SLOT * 2 % UNIT) & 3) << (BITS & 4)
        if BITS & 1:
            code |= (w1 >> (SLOT % UNIT) & 1) << (BITS & 6)
    return code
