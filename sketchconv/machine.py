"""The machine and its environment as they bear on speed: packages, CPU, cores, variables."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sketchconv.kernels.threads import available_threads

PACKAGES = (
    "sketchconv",
    "torch",
    "transformers",
    "numba",
    "llvmlite",
    "triton",
    "numpy",
    "accelerate",
    "gguf",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
)
# In the spelling of LLVM; those that decide which kernels run, or how fast they can be.
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512vbmi",
    "avx512bf16",
    "amx-tile",
    "amx-bf16",
    "amx-int8",
)
# Variables that change which code runs or on how many threads.
OVERRIDES = (
    "NUMBA_",
    "OMP_",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Operating system and CPU; `features` is None where LLVM does not know this CPU."""

    system: str
    architecture: str
    cpu: str
    llvm_name: str
    features: dict[str, bool] | None


@dataclass(frozen=True, slots=True)
class Threads:
    """Cores of the machine, those this process may use, and torch's threads.

    `quota` is the CPU time that a container may use, in cores; None where there is no limit.
    """

    cores: int
    usable: int
    quota: float | None
    torch: int
    wait_policy: str | None


def find_versions() -> dict[str, str | None]:
    """Python and the packages that matter; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def find_machine() -> Machine:
    """Operating system, CPU and its features."""
    import llvmlite.binding as llvm

    try:
        known = dict(llvm.get_host_cpu_features())
        features = {name: bool(known.get(name)) for name in FEATURES}
    except RuntimeError:
        features = None
    return Machine(
        system=platform.platform(),
        architecture=platform.machine(),
        cpu=_cpu_model(),
        llvm_name=llvm.get_host_cpu_name(),
        features=features,
    )


def _cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def find_threads() -> Threads:
    """Cores and threads."""
    import torch

    return Threads(
        cores=os.cpu_count() or 1,
        usable=available_threads(),
        quota=cpu_quota(),
        torch=torch.get_num_threads(),
        wait_policy=os.environ.get("OMP_WAIT_POLICY"),
    )


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores that the control group grants: its first number per its second; "max" is no limit."""
    try:
        allowed, period = path.read_text().split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError):
        return None


def find_overrides() -> dict[str, str]:
    """Variables of the environment that change what runs."""
    return {name: text for name, text in sorted(os.environ.items()) if name.startswith(OVERRIDES)}
