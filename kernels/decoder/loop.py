"""One token of a whole network, in one compiled call per thread.

Every thread runs through all phases; a phase's chunks go to whoever comes first. A phase is over
when its chunks are done, not when all threads have been there: a thread that wakes late, or whose
core is taken away, holds the others up by one chunk at most. Which thread does a chunk changes
nothing in its result.
"""

from __future__ import annotations

from typing import Any

from sketchconv.kernels.atomics import fetch_add, give_way, pause, read, write
from sketchconv.kernels.decoder import layout as at
from sketchconv.kernels.decoder.lanes import normalise
from sketchconv.kernels.decoder.phases import attend, embed, linear
from sketchconv.kernels.jit import inner, jit

SPINS = 2000  # about 100 microseconds; then the system may give the core to another thread


@inner
def _wait(address: int, goal: int, yield_at: int) -> None:
    """Wait until the counter at `address` has reached `goal`."""
    spins = 0
    while read(address) < goal:
        spins += 1
        if spins > SPINS and yield_at:
            give_way(yield_at)
        else:
            pause()


@jit
def open_token(cells: Any, token: int, position: int) -> None:
    """Reset the counters for `token` at `position` and let threads in; none may be inside."""
    cells[at.COUNTERS :] = 0
    cells[at.TOKEN], cells[at.POSITION] = token, position
    write(cells.ctypes.data + 8 * at.OPEN, 1)


@jit
def close_token(cells: Any, yield_at: int) -> None:
    """Let no thread in any more, and wait for those inside to leave."""
    here = cells.ctypes.data
    write(here + 8 * at.OPEN, 0)
    spins = 0
    while read(here + 8 * at.ACTIVE) > 0:
        spins += 1
        if spins > SPINS and yield_at:
            give_way(yield_at)
        else:
            pause()


@jit
def run(phases: Any, reals: Any, cells: Any, own: Any, yield_at: int) -> None:
    """Work on the open token until it is done; return at once if none is open.

    Args:
        phases: int64 ``[phases, layout.FIELDS]``.
        reals: float32 ``[phases, layout.REALS]``.
        cells: int64, shared by the threads of the token.
        own: float32, this thread's memory.
        yield_at: address of the system's `sched_yield`, 0 where there is none.
    """
    here = cells.ctypes.data
    fetch_add(here + 8 * at.ACTIVE, 1)
    if read(here + 8 * at.OPEN):
        for number in range(phases.shape[0]):
            counter = here + 8 * (at.COUNTERS + number * at.PER_PHASE)
            _phase(phases[number], reals[number], cells, own, counter)
            _wait(counter + 8 * at.LINE, phases[number, at.CHUNKS], yield_at)
    fetch_add(here + 8 * at.ACTIVE, -1)


@inner
def _phase(phase: Any, real: Any, cells: Any, own: Any, counter: int) -> None:
    """Take chunks of one phase until there are none."""
    kind, chunks = phase[at.KIND], phase[at.CHUNKS]
    memory = own.ctypes.data
    x = phase[at.X]
    chunk = fetch_add(counter, 1)
    if chunk < chunks and kind == at.LINEAR and phase[at.NORM]:
        normalise(x, phase[at.NORM], memory, phase[at.COLUMNS], real[at.EPS])
        x = memory
    while chunk < chunks:
        if kind == at.LINEAR:
            linear(phase, chunk, x)
        elif kind == at.ATTEND:
            attend(phase, real, chunk, cells[at.POSITION], memory)
        else:
            embed(phase, cells[at.TOKEN], cells.ctypes.data + 8 * at.TOKEN)
        fetch_add(counter + 8 * at.LINE, 1)
        chunk = fetch_add(counter, 1)
