"""The variants of our kernels that are compiled ahead of time, to gate what they cost.

Each module of kernels lists its own in `variants()`. They are what the launch code picks on a GPU,
for the shapes of a 7B model and for odd ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODULES = (
    "gemv", "fragments", "permute", "matmul", "decode", "expand", "embedding", "gradients", "tasks",
    "columns",
)  # fmt: skip
EVERY = ("cuda", "hip")


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that the compiler needs to know.

    `signature` names the type of each argument that is not a constant ("*fp16", "i32", "fp32"), in
    any order; pointers, and the integers in `aligned`, are taken as multiples of 16. `weights` are
    the indices that one program reads in one turn of its innermost loop: with the threads of a
    program they make instructions per weight out of instructions in the loop.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    weights: int | None = None
    """None: no loop to count."""
    most: Mapping[str, float] = field(default_factory=dict)
    """Most instructions per weight, by the compute capability ("80") that the gate holds on."""
    aligned: tuple[str, ...] = ()
    backends: tuple[str, ...] = EVERY


def variants() -> tuple[Variant, ...]:
    """All variants, in a fixed order with unique names."""
    found: list[Variant] = []
    for name in MODULES:
        module = importlib.import_module(f"sketchconv.kernels.gpu.{name}")
        found += module.variants()
    names = [variant.name for variant in found]
    if len(set(names)) != len(names):
        raise ValueError(f"two variants share a name: {sorted(names)}")
    return tuple(found)


def representatives() -> tuple[Variant, ...]:
    """Those with a gate, and the first, the middle and the last of each kernel.

    Few enough for six targets in every run of the tests.
    """
    by_kernel: dict[int, list[Variant]] = {}
    for variant in variants():
        by_kernel.setdefault(id(variant.kernel), []).append(variant)
    chosen: list[Variant] = []
    for found in by_kernel.values():
        places = {0, len(found) // 2, len(found) - 1}
        chosen += [each for i, each in enumerate(found) if each.most or i in places]
    return tuple(chosen)
