"""A standing crew of threads for kernels that take tens of microseconds.

`threads.for_spans` starts threads for each call, which suits work of seconds. Here the threads
stand by in compiled code and the caller works too. It never waits for a thread that has not begun:
rows are taken in spans from a shared counter, and on a busy machine the caller takes them all. So
two threads are never much slower than one, where OpenMP's barrier waits out a time slice of 8 ms.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import Any

import numpy as np

from sketchconv.kernels.atomics import (
    address_of,
    call_span,
    fetch_add,
    give_way,
    pause,
    read,
    write,
    yield_address,
)
from sketchconv.kernels.jit import jit
from sketchconv.kernels.pointers import carray, pointer_to

# Words of the board, 64 bytes apart where threads write: a line of its own for each.
OPEN, INSIDE, NEXT, ASLEEP = 0, 8, 16, 24
KERNEL, COUNT, ROWS, STEP, ARGS = 32, 33, 34, 35, 40
BOARD_WORDS = 64
MULTIPLY_ARGS, DECODE_ARGS = 9, 6

SPANS_PER_THREAD = 4  # a thread that loses its core holds up a quarter of its part
SPINS = 2000  # about 0.1 ms on x86: longer than the gaps between the layers of a network


@jit
def _work(board: int) -> None:
    """Take spans of the open job until none is left."""
    words = carray(pointer_to(board, np.int64), (BOARD_WORDS,))
    kernel, count, rows, step = words[KERNEL], words[COUNT], words[ROWS], words[STEP]
    args = board + 8 * ARGS
    while True:
        begin = fetch_add(board + 8 * NEXT, step)
        if begin >= rows:
            return
        end = min(begin + step, rows)
        if count == MULTIPLY_ARGS:
            call_span(kernel, begin, end, args, 9)
        else:
            call_span(kernel, begin, end, args, 6)


@jit
def _stand_by(board: int, spins: int) -> None:
    """Help with every job that opens; return after `spins` pauses without one."""
    idle = 0
    while idle < spins:
        if read(board + 8 * OPEN):
            # Enter first, look again then: the caller closes first and then waits for the inside
            # to be empty, so that nobody reads a job that is being replaced.
            fetch_add(board + 8 * INSIDE, 1)
            if read(board + 8 * OPEN):
                _work(board)
                idle = 0
            fetch_add(board + 8 * INSIDE, -1)
        pause()
        idle += 1


@jit
def _lead(
    board: int, kernel: int, count: int, rows: int, step: int, args: Any, yield_at: int
) -> None:
    """Open a job, work on it, close it, and wait for those who still hold a span."""
    words = carray(pointer_to(board, np.int64), (BOARD_WORDS,))
    words[KERNEL], words[COUNT], words[ROWS], words[STEP] = kernel, count, rows, step
    for i in range(count):
        words[ARGS + i] = args[i]
    write(board + 8 * NEXT, 0)
    write(board + 8 * OPEN, 1)
    _work(board)
    write(board + 8 * OPEN, 0)
    spins = 0
    while read(board + 8 * INSIDE):
        spins += 1
        if spins > SPINS and yield_at:  # a helper may have lost its core in the middle of a span
            give_way(yield_at)
        else:
            pause()


class Crew:
    """`helpers` threads and the board on which their jobs are posted. One caller at a time."""

    def __init__(self, helpers: int) -> None:
        self._words = np.zeros(BOARD_WORDS + 8, np.int64)
        self._board = self._words.ctypes.data + -self._words.ctypes.data % 64
        self._bells = [threading.Lock() for _ in range(helpers)]
        self._asleep = [True] * helpers
        _stand_by(self._board, 0)  # compiled here, not in a thread
        for number in range(helpers):
            self._bells[number].acquire()
            name = f"sketchconv-{number}"
            threading.Thread(target=self._serve, args=(number,), name=name, daemon=True).start()

    def _serve(self, number: int) -> None:
        while True:
            self._bells[number].acquire()
            _stand_by(self._board, SPINS)
            self._asleep[number] = True

    def lead(self, kernel: int, rows: int, args: tuple[int, ...]) -> None:
        """Run the kernel at the address `kernel` over all rows, with whoever comes to help."""
        for number, asleep in enumerate(self._asleep):
            if asleep:
                self._asleep[number] = False
                self._bells[number].release()
        spans = SPANS_PER_THREAD * (1 + len(self._bells))
        _lead(self._board, kernel, len(args), rows, -(-rows // spans), args, yield_address())


@cache
def _crew(helpers: int) -> Crew:
    return Crew(helpers)


_busy = threading.Lock()


def _after_fork() -> None:
    """A fork has no threads but its own."""
    global _busy
    _busy = threading.Lock()
    _crew.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def share(kernel: Any, rows: int, args: tuple[int, ...], threads: int) -> None:
    """Call ``kernel(begin, end, *args)`` on spans of ``range(rows)``, on up to `threads` threads.

    Args:
        kernel: compiled, takes int64 only, and writes only to what belongs to its rows, so that
            no result depends on the spans.
        rows: number of rows.
        args: `MULTIPLY_ARGS` or `DECODE_ARGS` integers; the caller holds what they point to.
        threads: at most so many; where another thread of the caller's uses the crew, this one
            works alone.
    """
    busy = _busy
    if threads <= 1 or rows < 2 or not busy.acquire(blocking=False):
        kernel(0, rows, *args)
        return
    try:
        _crew(threads - 1).lead(address_of(kernel, 2 + len(args)), rows, args)
    finally:
        busy.release()
