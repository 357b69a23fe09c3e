"""Compile catalogued variants ahead of time and read what they cost; no GPU is needed.

    python tests/gpu/aot.py [TARGET ...] > results.json         # what the tests compile
    python tests/gpu/aot.py --all [TARGET ...] > results.json   # the whole catalogue

Instructions per weight: the SASS of a kernel is cut at its backward branches. Of the loops that are
longer than a wait on a barrier (16 instructions) and have no such loop inside, the longest is the
inner loop. All of its instructions count, those of address and loop control too, times the threads
of a program, over the indices that one turn reads (`Variant.weights`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """`shared`: bytes of shared memory that a program may have at most.

    `always`: compiled by every run of the tests; the others (100 seconds of a core each) are slow.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    always: bool


TARGETS = (
    Target("sm_80", "cuda", 80, 32, 166_912, True),
    Target("sm_89", "cuda", 89, 32, 101_376, False),
    Target("sm_90", "cuda", 90, 32, 232_448, False),
    Target("sm_100", "cuda", 100, 32, 232_448, False),
    Target("gfx942", "hip", "gfx942", 64, 65_536, True),
    Target("gfx1100", "hip", "gfx1100", 32, 65_536, False),
)


@dataclass(frozen=True)
class Cost:
    """What one variant costs on one target; None is what the target's tools do not say."""

    registers: int
    shared: int
    stack: int
    spills: int | None
    per_weight: float | None


def compile_all(everything: bool, names: list[str]) -> dict[str, dict[str, Cost]]:
    """Costs by target (those named, or all) and variant, compiled in two processes."""
    from sketchconv.kernels.gpu.catalog import representatives, variants

    targets = [target for target in TARGETS if not names or target.name in names]
    tasks = [
        (target, variant.name)
        for target in targets
        for variant in (variants() if everything else representatives())
        if target.backend in variant.backends
    ]
    found: dict[str, dict[str, Cost]] = {target.name: {} for target in targets}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for (target, name), cost in zip(tasks, pool.map(_cost, tasks), strict=True):
            found[target.name][name] = cost
    return found


def load(text: str) -> dict[str, dict[str, Cost]]:
    return {
        target: {name: Cost(**cost) for name, cost in costs.items()}
        for target, costs in json.loads(text).items()
    }


def _cost(task: tuple[Target, str]) -> Cost:
    import triton
    from triton.backends.compiler import GPUTarget

    from sketchconv.kernels.gpu.catalog import variants

    target, name = task
    variant = next(each for each in variants() if each.name == name)
    compiled = triton.compile(
        _source(variant),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={
            "num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True,
        },
    )  # fmt: skip
    shared = int(compiled.metadata.shared)
    if target.backend == "hip":
        return _amd(compiled.asm["amdgcn"], shared)
    each = None
    if variant.weights is not None:
        each = variant.weights / (32 * variant.warps)
    return _nvidia(compiled.asm["cubin"], shared, each)


def _source(variant):
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    known = set(variant.signature) | set(variant.constants)
    if set(names) != known:
        raise ValueError(f"{variant.name}: {set(names) ^ known} in the kernel or the variant only")
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in variant.aligned
    }
    return ASTSource(variant.kernel, signature, constants, aligned)


def _amd(text: str, shared: int) -> Cost:
    def read(key: str) -> int:
        return int(re.search(rf"^\s*\.{key}:\s+(\d+)", text, re.MULTILINE)[1])

    stack = read("private_segment_fixed_size")
    spills = read("vgpr_spill_count") + read("sgpr_spill_count")
    return Cost(read("vgpr_count"), shared, stack, spills, None)


def _nvidia(cubin: bytes, shared: int, weights_of_a_thread: float | None) -> Cost:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def ask(what: str) -> str:
            return subprocess.run(
                [tool, what, path], capture_output=True, text=True, check=True
            ).stdout

        usage, sass = ask("--dump-resource-usage"), ask("-sass")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    each = None
    if weights_of_a_thread is not None:
        each = round(inner_loop(sass) / weights_of_a_thread, 2)
    return Cost(int(registers), shared, int(stack), None, each)


def inner_loop(sass: str) -> int:
    """Instructions of the inner loop, as the module describes it."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    places = [int(place, 16) for place, _ in lines]
    loops = []
    for place, (_, text) in zip(places, lines, strict=True):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < place:
            inside = sum(int(jump[1], 16) <= each <= place for each in places)
            loops.append((int(jump[1], 16), place, inside))
    loops = [loop for loop in loops if loop[2] > 16]
    inner = [
        size
        for begin, end, size in loops
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e, _ in loops)
    ]
    return max(inner)


def in_a_child(*names: str) -> dict[str, dict[str, Cost]]:
    """`compile_all` in a process where Triton was imported as a compiler, its cache in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TRITON_CACHE_DIR": folder, "TRITON_INTERPRET": "0"}
        child = subprocess.run(
            [sys.executable, "-P", __file__, *names],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode:
        raise RuntimeError(child.stderr[-6000:])
    return load(child.stdout)


if __name__ == "__main__":
    json.dump(
        {
            target: {name: asdict(cost) for name, cost in costs.items()}
            for target, costs in compile_all(
                "--all" in sys.argv, [name for name in sys.argv[1:] if name != "--all"]
            ).items()
        },
        sys.stdout,
    )
