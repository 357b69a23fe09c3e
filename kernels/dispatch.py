"""Which CPU kernels run, and why: a table of candidates, the fastest first, each with its needs.

A choice is a value that carries its reason and those of the candidates before it, for callers to
show; `tests/bench/bench_decode.py` prints it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

AVX512_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
OLDEST_LLVM = 20  # the intrinsics are emitted in the spelling of opaque pointers
OVERRIDES = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")


class Multiply(Protocol):
    """`y[t, r] = sum_c x[t, c] * lut[r, g(c), code[r, c]]` for rows `begin` to `end`.

    Addresses: `index` uint8 ``[rows, groups, bytes]``, `tables` the LUT's carrier ``[rows, groups,
    2**bits]``, `x` and `y` float32 (`half`: bfloat16) ``[tokens, groups * columns]`` and
    ``[tokens, rows]``; `columns` are those of one group. Sums are float32, in an order that
    depends on neither `begin`, `end` nor `tokens`.
    """

    def __call__(
        self,
        begin: int,
        end: int,
        index: int,
        tables: int,
        x: int,
        y: int,
        half: bool,
        tokens: int,
        rows: int,
        groups: int,
        columns: int,
        /,
    ) -> None:
        """Run the kernel."""


class Decode(Protocol):
    """Write weight rows `ids[begin:end]` to `target[begin:end]`; `ids` 0 means the rows themselves.

    `ids` is the address of int64 row numbers, already known to be in range.
    """

    def __call__(
        self,
        begin: int,
        end: int,
        index: int,
        tables: int,
        ids: int,
        target: int,
        groups: int,
        columns: int,
        /,
    ) -> None:
        """Run the kernel."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that cannot run here."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernels to use: `multiply(bits, lut)` and `decode(bits, lut, out)` make them."""

    name: str
    reason: str
    rejected: tuple[Rejected, ...]
    multiply: Callable[[int, str], Multiply]
    decode: Callable[[int, str, str], Decode]


def why_not_avx512() -> str | None:
    """Why the AVX-512 kernels cannot run here; None where they can."""
    for name in OVERRIDES:
        if name in os.environ:  # an intrinsic that the target lacks ends the process
            return f"{name} is set, and may name a CPU without AVX-512"
    import llvmlite.binding as llvm

    if llvm.llvm_version_info[0] < OLDEST_LLVM:
        return f"llvmlite carries LLVM {llvm.llvm_version_info[0]}, older than {OLDEST_LLVM}"
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:
        return "the features of this CPU are not known"
    missing = [name for name in AVX512_FEATURES if not features.get(name)]
    return f"this CPU lacks {', '.join(missing)}" if missing else None


def _avx512() -> dict[str, Any]:
    from sketchconv.kernels import gemv_avx512 as kernels

    return {
        "multiply": lambda bits, lut: kernels.multiply_kernel(bits, lut, True),
        "decode": kernels.decode_kernel,
    }


def _portable() -> dict[str, Any]:
    from sketchconv.kernels import gemv_portable as kernels

    return {"multiply": cache(kernels.multiply_kernel), "decode": cache(kernels.decode_kernel)}


@dataclass(frozen=True, slots=True)
class _Candidate:
    why_not: Callable[[], str | None]
    load: Callable[[], dict[str, Any]]
    reason: str


_CANDIDATES = {
    "avx512": _Candidate(why_not_avx512, _avx512, "look-ups in AVX-512 registers"),
    "portable": _Candidate(lambda: None, _portable, "plain Numba, for every CPU"),
}


@cache
def choose(force: str | None = None) -> Choice:
    """The first candidate that can run here, or the one named by `force`.

    Raises:
        ValueError: `force` names no candidate, or one that cannot run here.
    """
    if force is not None and force not in _CANDIDATES:
        raise ValueError(f"no kernels named {force!r}; known: {', '.join(_CANDIDATES)}")
    rejected: list[Rejected] = []
    for name, candidate in _CANDIDATES.items():
        if force is not None and name != force:
            rejected.append(Rejected(name, f"{force} was asked for"))
            continue
        reason = candidate.why_not()
        if reason is None:
            return Choice(name, candidate.reason, tuple(rejected), **candidate.load())
        rejected.append(Rejected(name, reason))
    raise ValueError("; ".join(f"{r.name}: {r.reason}" for r in rejected if r.name == force))
