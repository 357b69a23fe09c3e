"""What the benchmarks share: turns, medians, ratios, and matrices that come from DRAM."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

CALL_SECONDS = 0.05  # a turn lasts about this long, and at least one call
COLD_BYTES = 256 << 20


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core sees; 64 MB where that is not known."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=64 << 20)


def copies_from_dram(nbytes: int) -> int:
    """How many matrices of `nbytes` to rotate so that each has left every cache in between."""
    return max(2, -(-max(COLD_BYTES, 2 * last_level_cache()) // nbytes) + 1)


@dataclass
class Rotation:
    """Calls `run` with each of `items` in turn, going on where the last turn stopped."""

    items: Sequence[Any]
    place: int = 0

    def next(self) -> Any:
        """The item whose last use is longest ago."""
        self.place = (self.place + 1) % len(self.items)
        return self.items[self.place]


@dataclass
class Contender:
    """A function to time: `call` is one call, `seconds` the time per call of each turn."""

    name: str
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    calls: int = 1

    def warm_up(self, call_seconds: float = CALL_SECONDS) -> None:
        """Call twice, which compiles what needs it, and settle how many calls make a turn."""
        self.call()
        started = time.perf_counter()
        self.call()
        spent = max(time.perf_counter() - started, 1e-9)
        self.calls = max(1, min(10_000, round(call_seconds / spent)))

    def turn(self) -> None:
        """Time one turn."""
        started = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        self.seconds.append((time.perf_counter() - started) / self.calls)

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)


def compete(contenders: Sequence[Contender], rounds: int) -> None:
    """Warm all up, then let all take one turn per round."""
    for contender in contenders:
        contender.warm_up()
    for _ in range(rounds):
        for contender in contenders:
            contender.turn()


def ratio(top: float, bottom: float, unit: str, *, scale: float = 1.0, digits: int = 1) -> str:
    """Numerator, denominator and their ratio."""
    return f"{top * scale:.{digits}f} / {bottom * scale:.{digits}f} {unit} = {top / bottom:.2f}"


@cache
def _prefetch() -> Any:
    """Ask for the cache line at an address."""
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    @intrinsic
    def prefetch(_context: Any, address: Any) -> Any:
        def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            byte, word = ir.PointerType(ir.IntType(8)), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
            ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            flags = [ir.Constant(word, value) for value in (0, 3, 1)]  # to read, to keep, data
            builder.call(ask, [builder.inttoptr(values[0], byte), *flags])
            return context.get_dummy_value()

        return types.void(types.intp), emit

    return prefetch


@cache
def _read_loops() -> dict[str, Any]:
    """Loops that only read, and give the XOR of all words; which is fastest depends on the CPU."""
    import numba

    prefetch = _prefetch()

    @numba.njit(nogil=True)
    def one(words: Any, begin: int, end: int) -> Any:
        total = np.uint64(0)
        for i in range(begin, end):
            total ^= words[i]
        return total

    @numba.njit(nogil=True)
    def four(words: Any, begin: int, end: int) -> Any:
        step = (end - begin) // 4
        a = b = c = d = np.uint64(0)
        for i in range(begin, begin + step):
            a ^= words[i]
            b ^= words[i + step]
            c ^= words[i + 2 * step]
            d ^= words[i + 3 * step]
        for i in range(begin + 4 * step, end):
            a ^= words[i]
        return a ^ b ^ c ^ d

    @numba.njit(nogil=True)
    def ahead(words: Any, begin: int, end: int) -> Any:
        total = np.uint64(0)
        first = words.ctypes.data
        for block in range(begin, end, 64):
            for line in range(block, block + 64, 8):
                prefetch(first + 8 * line + 4096)
            for i in range(block, min(block + 64, end)):
                total ^= words[i]
        return total

    return {"1 stream": one, "4 streams": four, "prefetched": ahead}


class ReadLoops:
    """Read bandwidth of this machine, measured as contenders among the others."""

    def __init__(self, threads: int, nbytes: int | None = None) -> None:
        """A buffer larger than the caches, read from start to end by `threads` threads."""
        size = nbytes or max(COLD_BYTES, 2 * last_level_cache())
        words = np.arange(size // 8, dtype=np.uint64)
        self.nbytes = words.nbytes

        edges = [words.size * i // threads for i in range(threads + 1)]
        pool = ThreadPoolExecutor(threads)  # a pass takes milliseconds, waking them microseconds

        def reader(loop: Any) -> Callable[[], object]:
            if threads == 1:
                return lambda: loop(words, 0, words.size)
            return lambda: list(pool.map(loop, [words] * threads, edges[:-1], edges[1:]))

        self.contenders = tuple(
            Contender(f"read loop, {name}", reader(loop)) for name, loop in _read_loops().items()
        )

    @property
    def fastest(self) -> Contender:
        """The loop with the smallest median."""
        return min(self.contenders, key=lambda contender: contender.median)

    @property
    def bytes_per_second(self) -> float:
        """Of the fastest loop."""
        return self.nbytes / self.fastest.median
