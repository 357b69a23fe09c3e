"""Codes: LUT entries rounded to their dtype, thresholds between them, nearest indices, errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.jit import jit

F16, BF16, F32 = 0, 1, 2
LANES = 16
BLOCK = 256


@jit
def round_entries(entries: Any, kind: int, cast: Any, words: Any) -> None:
    """Sort float64 `entries` and round them to nearest even into float32 `cast`.

    `words` is the uint32 view of `cast`. Every result is a value of the dtype that `kind` names,
    or infinite where that dtype overflows.
    """
    for i in range(1, entries.size):
        value = entries[i]
        j = i
        while j > 0 and entries[j - 1] > value:
            entries[j] = entries[j - 1]
            j -= 1
        entries[j] = value
    for i in range(entries.size):
        cast[i] = np.float32(entries[i])
        if kind == BF16:
            words[i] = _round_bits(words[i], np.uint32(16))
        elif kind == F16:
            size = abs(cast[i])
            if size < np.float32(6.103515625e-05):
                # Below the smallest normal half, 0.5's last place is the half's last place.
                small = np.float32(size + np.float32(0.5)) - np.float32(0.5)
                cast[i] = small if cast[i] > 0 else -small
            else:
                words[i] = _round_bits(words[i], np.uint32(13))
                if abs(cast[i]) > np.float32(65504.0):
                    cast[i] = np.float32(np.inf) if cast[i] > 0 else np.float32(-np.inf)


@jit
def _round_bits(word: Any, drop: Any) -> Any:
    one = np.uint32(1)
    half = np.uint32((one << (drop - one)) - one)
    word = np.uint32(word + half + ((word >> drop) & one))
    return np.uint32((word >> drop) << drop)


@jit
def fill_thresholds(cast: Any, thresholds: Any) -> None:
    """``thresholds[i]``: the largest float32 not above the midpoint of entries i and i + 1.

    A weight has an index above i exactly if it is greater. The rest is filled with infinity.
    """
    k = cast.size
    for i in range(thresholds.size):
        if i >= k - 1:
            thresholds[i] = np.float32(np.inf)
            continue
        middle = (np.float64(cast[i]) + np.float64(cast[i + 1])) * 0.5
        low = np.float32(middle)
        if np.float64(low) > middle:
            low = np.nextafter(low, np.float32(-np.inf))
        thresholds[i] = low


@jit
def count_above(x: Any, thresholds: Any, codes: Any) -> None:
    """``codes[i]`` = number of thresholds below ``x[i]``; thresholds padded to a multiple of 8."""
    count = np.empty(BLOCK, np.int32)
    for begin in range(0, x.size, BLOCK):
        part = x[begin : begin + BLOCK]
        out = codes[begin : begin + BLOCK]
        size = part.size
        count[:] = 0
        for t in range(0, thresholds.size, 8):
            t0, t1, t2, t3 = thresholds[t], thresholds[t + 1], thresholds[t + 2], thresholds[t + 3]
            t4, t5, t6 = thresholds[t + 4], thresholds[t + 5], thresholds[t + 6]
            t7 = thresholds[t + 7]
            for i in range(size):
                v = part[i]
                low = np.int32(v > t0) + np.int32(v > t1) + np.int32(v > t2) + np.int32(v > t3)
                high = np.int32(v > t4) + np.int32(v > t5) + np.int32(v > t6) + np.int32(v > t7)
                count[i] += np.int32(low + high)
        for i in range(size):
            out[i] = np.uint8(count[i])


@jit
def squares(x: Any, cast: Any, codes: Any, lanes: Any) -> Any:
    """Sums of (x - entry)^2 and x^2 in float64, over 16 lanes in a fixed order."""
    error, norm = lanes[0], lanes[1]
    error[:] = 0.0
    norm[:] = 0.0
    whole = x.size // LANES
    for block in range(whole):
        part = x[block * LANES : block * LANES + LANES]
        code = codes[block * LANES : block * LANES + LANES]
        for lane in range(LANES):
            value = np.float64(part[lane])
            gap = value - np.float64(cast[code[lane]])
            error[lane] += gap * gap
            norm[lane] += value * value
    e = 0.0
    s = 0.0
    for lane in range(LANES):
        e += error[lane]
        s += norm[lane]
    for i in range(whole * LANES, x.size):
        value = np.float64(x[i])
        gap = value - np.float64(cast[codes[i]])
        e += gap * gap
        s += value * value
    return e, s
