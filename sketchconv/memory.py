"""How much memory this process holds, and how much of it a conversion may use for its chunks."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sketchconv.errors import PlanError

DEFAULT_CHUNK_BYTES = 256 << 20
MIN_CHUNK_BYTES = 16 << 20
# Assumed where the system does not tell: Python, NumPy, Numba and torch after import.
_TYPICAL_BASELINE = 450 << 20

# Of glibc, from malloc.h. Arrays from this size on are mapped, and given back when they are freed.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MAPPED_BYTES = 1 << 20

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", start=1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", start=1)},
    **{p: 1024**i for i, p in enumerate("KMGT", start=1)},
}


def parse_size(text: str) -> int:
    """Bytes in a size such as ``5GB`` (decimal), ``512MiB`` or ``2G`` (binary).

    >>> parse_size("1.5GB")
    1500000000

    Raises:
        ValueError: not a number followed by a known unit, or not positive.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"not a size: {text!r}; write for instance 5GB, 512MiB or 2G")
    size = int(float(match.group(1)) * unit)
    if size < 1:
        raise ValueError(f"a size must be at least one byte, got {text!r}")
    return size


def anonymous_bytes() -> int:
    """Anonymous memory of this process in bytes (what cannot be dropped like file pages)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return _TYPICAL_BASELINE
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else _TYPICAL_BASELINE


@contextmanager
def watched_peak(seconds: float = 0.05) -> Iterator[Callable[[], int]]:
    """Watch `anonymous_bytes` from a thread; yields a function that tells the most seen so far."""
    peak, done = anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(seconds):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch, name="sketchconv-memory", daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        thread.join()


def left_beside(max_memory: int | None, taken: int, by: str) -> int | None:
    """The limit that is left for everything else.

    Args:
        max_memory: limit on the anonymous memory of the process in bytes, or None.
        taken: bytes that will be in use beside the chunks.
        by: what takes them, and how to do without, for the error.

    Raises:
        PlanError: not enough is left beside them, though it would be without them.
    """
    if max_memory is None:
        return None
    used, least = anonymous_bytes(), MIN_CHUNK_BYTES * 10 // 9 + 1
    if used + least <= max_memory < used + taken + least:
        raise PlanError(
            f"--max-memory {max_memory:,} bytes is too little: {used:,} are in use before the "
            f"first weight and {taken:,} go to {by}, so at least {used + taken + least:,} are "
            "needed"
        )
    return max_memory if max_memory < used + least else max_memory - taken


def give_back_at_once() -> bool:
    """Have malloc give large arrays back to the system as soon as they are freed.

    Left alone, glibc takes arrays from its heap once one of their size was freed (the threshold
    follows it, up to 32 MB), and chunks of changing sizes leave holes there: a conversion with 24
    MiB (25.2 MB) of room grew to 28.7 MB over 16 times as much data, and with this to 22.9 MB, in
    the same time. It holds for the whole process, and for good.

    Returns:
        False where malloc has no such option (musl, macOS, Windows).
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    thresholds = (_MMAP_THRESHOLD, _TRIM_THRESHOLD)
    return all([mallopt(option, _MAPPED_BYTES) == 1 for option in thresholds])


def give_back() -> bool:
    """Return what malloc keeps of freed arrays to the system, once.

    For work in stages without a limit: `give_back_at_once` maps every activation anew, a third more
    CPU time in a calibration of SmolLM2. The heap then stays near the need of one stage, and does
    not grow with its holes.

    Returns:
        False where malloc has no such call (musl, macOS, Windows), or nothing to give.
    """
    import ctypes

    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, TypeError, AttributeError):
        return False


def chunk_budget(max_memory: int | None) -> int:
    """Bytes that one row chunk and its results may take. With a limit, see `give_back_at_once`.

    Args:
        max_memory: limit on the anonymous memory of the process in bytes, or None.

    Raises:
        PlanError: the limit leaves too little beside what is already in use.
    """
    if max_memory is None:
        return DEFAULT_CHUNK_BYTES
    give_back_at_once()
    used = anonymous_bytes()
    # A tenth stays free for the solver's scratch and the allocator.
    budget = (max_memory - used) * 9 // 10
    if budget < MIN_CHUNK_BYTES:
        needed = used + MIN_CHUNK_BYTES * 10 // 9 + 1
        raise PlanError(
            f"--max-memory {max_memory:,} bytes is too little: {used:,} are in use before the "
            f"first weight, so at least {needed:,} are needed"
        )
    return min(budget, DEFAULT_CHUNK_BYTES)
