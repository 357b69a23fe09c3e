"""What this installation runs, where, and why: the facts that `sketchconv doctor` shows."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sketchconv.machine import (
    Machine,
    Threads,
    find_machine,
    find_overrides,
    find_threads,
    find_versions,
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One set of CPU kernels: `state` is "chosen", "available" (but slower) or "rejected"."""

    name: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tiles:
    """The dtype in which many tokens meet decoded tiles, for bfloat16 activations."""

    dtype: str
    reason: str


@dataclass(frozen=True, slots=True)
class Cache:
    """Folder of the compiled kernels; None where Numba found none that it can write."""

    folder: str | None
    writable: bool


@dataclass(frozen=True, slots=True)
class GpuDevice:
    """A device that torch sees; `why_not` says why our kernels do not run there, else None."""

    name: str
    capability: str
    why_not: str | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """What torch was built for, the devices that it sees, and why none of ours runs without any."""

    torch_build: str
    devices: tuple[GpuDevice, ...]
    why_not: str | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything `sketchconv doctor` knows; `hints` are worth acting on."""

    versions: dict[str, str | None]
    machine: Machine
    kernels: tuple[Candidate, ...]
    tiles: Tiles
    threads: Threads
    overrides: dict[str, str]
    cache: Cache
    gpu: Gpu
    hints: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain dictionaries, lists, strings and numbers."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Gather the facts. Imports torch and Numba, and compiles nothing."""
    threads, cache, overrides = find_threads(), find_cache(), find_overrides()
    return Diagnosis(
        versions=find_versions(),
        machine=find_machine(),
        kernels=find_kernels(),
        tiles=find_tiles(),
        threads=threads,
        overrides=overrides,
        cache=cache,
        gpu=find_gpu(),
        hints=find_hints(threads, cache, overrides),
    )


def kernel_names() -> tuple[str, ...]:
    """Names of all sets of CPU kernels, the fastest first; the portable one runs everywhere."""
    from sketchconv.kernels import dispatch

    portable = dispatch.choose("portable")
    return (*(r.name for r in portable.rejected), portable.name)


def find_kernels() -> tuple[Candidate, ...]:
    """Every set of CPU kernels, the fastest first."""
    from sketchconv.kernels import dispatch

    chosen = dispatch.choose()
    rejected = {r.name: r.reason for r in chosen.rejected}
    found = []
    for name in kernel_names():
        if name == chosen.name:
            found.append(Candidate(name, "chosen", chosen.reason))
        elif name in rejected:
            found.append(Candidate(name, "rejected", rejected[name]))
        else:
            found.append(_slower(name))
    return tuple(found)


def _slower(name: str) -> Candidate:
    from sketchconv.kernels import dispatch

    try:
        return Candidate(name, "available", dispatch.choose(name).reason)
    except ValueError as error:
        return Candidate(name, "rejected", str(error).removeprefix(f"{name}: "))


def find_tiles() -> Tiles:
    """Whether prefill in bfloat16 uses bfloat16 tiles, and why."""
    import torch

    from sketchconv.kernels import gemv

    units = {
        "AVX512-BF16": "_is_avx512_bf16_supported",
        "AMX": "_is_amx_tile_supported",
    }
    found = [unit for unit, probe in units.items() if getattr(torch.cpu, probe, bool)()]
    if gemv._fast_bf16():
        return Tiles("bfloat16", f"this CPU multiplies bfloat16 in hardware: {', '.join(found)}")
    if found:
        return Tiles("float32", f"this CPU has {', '.join(found)}, but oneDNN does not use it")
    return Tiles("float32", f"torch finds neither {' nor '.join(units)} on this CPU")


def find_cache() -> Cache:
    """Where compiled kernels are kept."""
    from sketchconv.kernels import planes

    kernel: Any = planes._pack_span  # any kernel: all of them lie side by side
    folder = kernel.stats.cache_path
    if folder is None:
        return Cache(None, False)
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    return Cache(str(folder), os.access(place, os.W_OK | os.X_OK))


def find_gpu() -> Gpu:
    """The GPUs that torch sees, and whether our kernels run on them."""
    import torch

    from sketchconv.kernels.gpu import support

    build = "the CPU only"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif getattr(torch.version, "hip", None):
        build = f"ROCm {torch.version.hip}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = tuple(_gpu_device(number) for number in range(count))
    return Gpu(build, devices, None if devices else support.why_not(torch.device("cuda")))


def _gpu_device(number: int) -> GpuDevice:
    import torch

    from sketchconv.kernels.gpu import support

    major, minor = torch.cuda.get_device_capability(number)
    return GpuDevice(
        name=torch.cuda.get_device_name(number),
        capability=f"{major}.{minor}",
        why_not=support.why_not(torch.device("cuda", number)),
    )


def find_hints(threads: Threads, cache: Cache, overrides: dict[str, str]) -> tuple[str, ...]:
    """What a user may want to change."""
    found = []
    if (threads.wait_policy or "").upper() != "PASSIVE":
        found.append(
            "set OMP_WAIT_POLICY=PASSIVE before torch is imported where cores are few or busy: "
            "idle OpenMP threads spin on cores that the kernels need (`generate` sets it)"
        )
    if threads.quota is not None and threads.quota < threads.torch:
        found.append(
            f"torch runs {threads.torch} threads, but this container may use "
            f"{threads.quota:g} cores: set OMP_NUM_THREADS, or give --threads"
        )
    if not cache.writable:
        found.append(
            "compiled kernels cannot be kept, so each process compiles them again: set "
            "NUMBA_CACHE_DIR to a folder that can be written"
        )
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        if name in overrides:
            found.append(f"{name} is set: kernels for special CPUs are off")
    return tuple(found)
