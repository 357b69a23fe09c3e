"""Transposed copies of 16-bit matrices by blocks that stay in the cache."""

from __future__ import annotations

import numpy as np

from sketchconv.kernels.jit import jit
from sketchconv.kernels.pointers import carray, pointer_to

BLOCK = 32  # by 32 values: two lines of the cache for each row of a block


@jit
def transpose16(
    begin: int, end: int, source: int, down: int, across: int, target: int, count: int, stride: int
) -> None:
    """`target[r, t] = source[t, r]` for r from `begin` to `end` and t below `count`.

    1.4 ns a value where torch's copy takes 1 to 9: it reads a whole column after the other, and of
    49,152 columns no line of the cache is still there for the next.

    Args:
        begin: first row of the target.
        end: behind its last row.
        source: address of 16-bit values.
        down: values from one t to the next.
        across: values from one r to the next.
        target: address of 16-bit values.
        count: how many t there are.
        stride: values from one row of the target to the next.
    """
    if count == 0:
        return
    read = carray(pointer_to(source, np.uint16), ((count - 1) * down + (end - 1) * across + 1,))
    write = carray(pointer_to(target, np.uint16), ((end - 1) * stride + count,))
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        for top in range(begin, end, BLOCK):
            for row in range(top, min(top + BLOCK, end)):
                for t in range(first, last):
                    write[row * stride + t] = read[t * down + row * across]
