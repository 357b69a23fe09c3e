"""Codes: LUT entries rounded to their dtype, thresholds between them, nearest indices, errors."""

from __future__ import annotations

from typing import Any

import numpy as np

from sketchconv.kernels.entries import BF16, F16
from sketchconv.kernels.jit import inner
from sketchconv.kernels.sweeps import LANES, TOGETHER, count_eight, search_fifteen, square_sums


@inner
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
                sign = words[i] & np.uint32(0x80000000)
                cast[i] = np.float32(size + np.float32(0.5)) - np.float32(0.5)
                words[i] = np.uint32(words[i] | sign)  # zero has one too
            else:
                words[i] = _round_bits(words[i], np.uint32(13))
                if abs(cast[i]) > np.float32(65504.0):
                    cast[i] = np.float32(np.inf) if cast[i] > 0 else np.float32(-np.inf)


@inner
def _round_bits(word: Any, drop: Any) -> Any:
    one = np.uint32(1)
    half = np.uint32((one << (drop - one)) - one)
    word = np.uint32(word + half + ((word >> drop) & one))
    return np.uint32((word >> drop) << drop)


@inner
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


@inner
def count_above(x: Any, thresholds: Any, codes: Any) -> None:
    """``codes[i]`` = number of thresholds below ``x[i]``; thresholds padded to a multiple of 8."""
    whole = x.size - x.size % LANES
    if thresholds.size == 16:
        search_fifteen(x, thresholds, codes, whole)
    else:
        codes[:whole] = 0
        for t in range(0, thresholds.size, TOGETHER):
            count_eight(x, thresholds[t:], codes, whole)
    for i in range(whole, x.size):
        count = 0
        for t in range(thresholds.size):
            count += x[i] > thresholds[t]
        codes[i] = np.uint8(count)


@inner
def walk_codes(x: Any, keys: Any, thresholds: Any, codes: Any) -> None:
    """The same codes by one walk through sorted `keys` (see `sort_keys`) and thresholds."""
    code = 0
    for key in keys:
        column = key & np.uint64(0xFFFFFFFF)
        while x[column] > thresholds[code]:
            code += 1
        codes[column] = np.uint8(code)


@inner
def keep_first(cast: Any, codes: Any) -> None:
    """Among equal entries, which rounding or padding makes, only the first keeps its codes."""
    equal = 0
    for i in range(1, cast.size):
        equal += cast[i] == cast[i - 1]
    if equal == 0:
        return
    for i in range(codes.size):
        code = codes[i]
        while code > 0 and cast[code] == cast[code - 1]:
            code -= 1
        codes[i] = np.uint8(code)


@inner
def squares(x: Any, cast: Any, codes: Any, gaps: Any) -> Any:
    """Sums of (x - entry)^2 and x^2 in float64, in an order that the size fixes.

    ``gaps[n]`` is scratch for the differences, which float32 holds to its last place.
    """
    for i in range(x.size):
        gaps[i] = x[i] - cast[codes[i]]
    whole = x.size - x.size % LANES
    error, norm = square_sums(x, gaps, whole)
    for i in range(whole, x.size):
        gap = np.float64(gaps[i])
        value = np.float64(x[i])
        error += gap * gap
        norm += value * value
    return error, norm
