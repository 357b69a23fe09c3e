"""Which CPU kernels run, and why: a table of candidates, the fastest first, each with its needs.

A choice is a value that carries its reason and those of the candidates before it, for callers to
show; `sketchconv doctor` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Protocol

from sketchconv.kernels.orders import PLANES, WOVEN

AVX512_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
AVX2_FEATURES = ("avx2", "fma", "f16c")
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
        half: int,
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


class MakeMultiply(Protocol):
    """Makes the kernel of products; a ValueError where it cannot read the order."""

    def __call__(self, bits: int, lut: str, order: str = PLANES, /) -> Multiply:
        """The kernel for `bits`, a LUT of dtype `lut` and an index in `order`."""


class MakeDecode(Protocol):
    """Makes the kernel of rows; a ValueError where it cannot read the order."""

    def __call__(self, bits: int, lut: str, out: str, order: str = PLANES, /) -> Decode:
        """The kernel for `bits`, a LUT of dtype `lut`, rows of `out` and an index in `order`."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that cannot run here."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernels to use: `multiply(bits, lut)` and `decode(bits, lut, out)` make them.

    What they make are Numba dispatchers: compiled code can call them as well. `orders` are those
    that the kernels read, `vbmi` whether they may use AVX512-VBMI.
    """

    name: str
    reason: str
    rejected: tuple[Rejected, ...]
    multiply: MakeMultiply
    decode: MakeDecode
    orders: tuple[str, ...] = (PLANES,)
    vbmi: bool = False

    def multiply_tasks(self, bits: int, lut: str, order: str = PLANES) -> Multiply | None:
        """A kernel of tokens with LUTs of their own: `tables` is the address of one address each.

        None where there is none; `tasks` then goes from run to run of tokens of one task.
        """
        from sketchconv.kernels import gemv_tasks_avx512 as kernels

        if self.name != "avx512" or bits not in kernels.BITS:
            return None
        made: Multiply = kernels.multiply_kernel(bits, lut, self.vbmi, order)
        return made


@cache
def cpu_features() -> frozenset[str]:
    """LLVM's names of the features that this CPU has; none where they are not known."""
    import llvmlite.binding as llvm

    try:
        found = llvm.get_host_cpu_features()
    except RuntimeError:
        return frozenset()
    return frozenset(name for name, has in found.items() if has)


def why_not(needs: tuple[str, ...], features: frozenset[str] | None = None) -> str | None:
    """Why kernels that use the CPU features `needs` cannot run here; None where they can.

    `features` are those of the CPU; None asks it.
    """
    for name in OVERRIDES if needs else ():
        if name in os.environ:  # an intrinsic that the target lacks ends the process
            return f"{name} is set, and may name a CPU without {', '.join(needs)}"
    import llvmlite.binding as llvm

    if needs and llvm.llvm_version_info[0] < OLDEST_LLVM:
        return f"llvmlite carries LLVM {llvm.llvm_version_info[0]}, older than {OLDEST_LLVM}"
    has = cpu_features() if features is None else features
    missing = [name for name in needs if name not in has]
    return f"this CPU lacks {', '.join(missing)}" if missing else None


def _avx512(features: frozenset[str]) -> tuple[MakeMultiply, MakeDecode]:
    from sketchconv.kernels import gemv_avx512 as kernels

    vbmi = "avx512vbmi" in features

    def multiply(bits: int, lut: str, order: str = PLANES, /) -> Multiply:
        made: Multiply = kernels.multiply_kernel(bits, lut, vbmi, order)
        return made

    def decode(bits: int, lut: str, out: str, order: str = PLANES, /) -> Decode:
        made: Decode = kernels.decode_kernel(bits, lut, out, order)
        return made

    return multiply, decode


def _of_planes(name: str) -> tuple[MakeMultiply, MakeDecode]:
    """The kernels in the module `name`, which read the order of the disk."""
    kernels = import_module(f"sketchconv.kernels.{name}")

    def check(order: str) -> None:
        if order != PLANES:
            raise ValueError(f"{name} reads an index in the order {PLANES!r}, not {order!r}")

    def multiply(bits: int, lut: str, order: str = PLANES, /) -> Multiply:
        check(order)
        made: Multiply = kernels.multiply_kernel(bits, lut)
        return made

    def decode(bits: int, lut: str, out: str, order: str = PLANES, /) -> Decode:
        check(order)
        made: Decode = kernels.decode_kernel(bits, lut, out)
        return made

    return multiply, decode


@dataclass(frozen=True, slots=True)
class _Candidate:
    needs: tuple[str, ...]
    load: Callable[[frozenset[str]], tuple[MakeMultiply, MakeDecode]]
    reason: str
    orders: tuple[str, ...] = (PLANES,)


_CANDIDATES = {
    "avx512": _Candidate(
        AVX512_FEATURES, _avx512, "look-ups in AVX-512 registers", (PLANES, WOVEN)
    ),
    "avx2": _Candidate(
        AVX2_FEATURES, lambda _: _of_planes("gemv_avx2"), "look-ups in AVX2 registers"
    ),
    "portable": _Candidate((), lambda _: _of_planes("gemv_portable"), "plain Numba, for every CPU"),
}


@cache
def choose(force: str | None = None) -> Choice:
    """The first candidate that can run here, or the one named by `force`.

    ``"avx512-avx512vbmi"`` forces the AVX-512 kernels as they are on a CPU that lacks the feature
    after the hyphen.

    Raises:
        ValueError: `force` names no candidate, or one that cannot run here.
    """
    forced, *without = (force or "").split("-")
    if force is not None and forced not in _CANDIDATES:
        raise ValueError(f"no kernels named {force!r}; known: {', '.join(_CANDIDATES)}")
    features = cpu_features() - set(without)
    rejected: list[Rejected] = []
    for name, candidate in _CANDIDATES.items():
        if forced not in ("", name):
            rejected.append(Rejected(name, f"{forced} was asked for"))
            continue
        reason = why_not(candidate.needs, features)
        if reason is None:
            multiply, decode = candidate.load(features)
            reason = candidate.reason
            if name == "avx512" and "avx512vbmi" not in features:
                reason += ", without AVX512-VBMI"
            found = (multiply, decode, candidate.orders, "avx512vbmi" in features)
            return Choice(name, reason, tuple(rejected), *found)
        rejected.append(Rejected(name, reason))
    raise ValueError("; ".join(f"{r.name}: {r.reason}" for r in rejected if r.name == forced))
