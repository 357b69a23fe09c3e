"""Write kernels/gpu/RESOURCES.md: `python tests/gpu/resources.py`.

What the tests compile is the same, so the tests also check that the document is up to date.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[2] / "kernels/gpu/RESOURCES.md"

HEAD = """\
# What the GPU kernels cost

**None of these kernels has ever run on a real GPU.** They were compiled ahead of time only, by
Triton {version}, for the six targets below; their numerics were tested in Triton's interpreter on
the CPU, on small shapes. Tests of every change hold what is in the tables: no stack, no spills,
shared memory within the device, and instructions per weight under the gate. The document is written
by `python tests/gpu/resources.py`.

Instructions per weight are counted in the SASS of the inner loop, all of them, addresses and loop
control included (`tests/gpu/aot.py` says how); AMD's are not counted. A name tells the kernel, the
bits, and what is special. Gates are the figures of the design for sm_80, and hold there; other
targets have none (`gemv` has sm_89), and some stand above: `permute` with tails at 4 bits on sm_90
and sm_100, 3-bit `gemv` and `matmul`. Columns that pad a tile count as weights. The tests compile a
selection; `python tests/gpu/aot.py --all` compiles the whole catalogue, which holds neither every
tile of the tuning nor every pair of types. Known spills outside of it: `matmul` in float32 with 7
bits in groups of 45, three VGPRs on gfx1100; `gather` there at 7 bits, SGPRs.

| paths | taken where |
|---|---|
| `permute` | NVIDIA 8.0 and up, 1 to 4 bits, 16-bit input, groups of whole words |
| `gemv` | every other product of up to 8 tokens: AMD, 5 to 8 bits, float32, odd groups |
| `matmul` | every other product of more tokens |
| decoded weight and the vendor's BLAS | below 8.0, and float64 |

## Derived, not measured

Time of one token of LLaMA-2-7B, linear layers only, if memory were read at its nominal speed once
and nothing else took time (fp16 tables and head), in milliseconds:

| bits, groups | GB per token | A100-40 | A100-80 | H100 | RTX 4090 |
|---|---|---|---|---|---|
| fp16 | 13.21 | 8.5 | 6.5 | 3.9 | 13.1 |
| 4, 1 | 3.54 | 2.3 | 1.7 | 1.1 | 3.5 |
| 4, 8 | 3.85 | 2.5 | 1.9 | 1.15 | 3.8 |
| 3, 4 | 2.78 | 1.8 | 1.4 | 0.83 | 2.8 |

Targets on paper for the whole of that, unmeasured until a GPU has run them: `gemv` at 4 bits 3.5 ms
on an A100 and 2.3 on an H100; `permute` at 4 bits 2.4 and 1.6, at 3 bits 1.9 and 1.2. The memory of
an A100 leaves time for about 4.8 instructions per weight at 4 bits, that of an H100 for 4.4.
"""


def catalogue() -> dict[str, dict[str, Any]]:
    """Backends and gates, by name, of the variants that the tests compile."""
    code = (
        "import json; from sketchconv.kernels.gpu.catalog import representatives; print(json.dumps("
        "{v.name: {'backends': v.backends, 'most': dict(v.most)} for v in representatives()}))"
    )
    child = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, dict[str, Any]] = json.loads(child.stdout)
    return found


def render(costs: dict[str, dict[str, Any]], known: dict[str, dict[str, Any]]) -> str:
    """The document."""
    import triton

    parts = [HEAD.format(version=triton.__version__)]
    for target, found in costs.items():
        parts.append(f"\n## {target}\n\n" + _columns(target.startswith("gfx")))
        for name, cost in found.items():
            gate = known[name]["most"].get(target.removeprefix("sm_"))
            parts.append(_row(name, cost, gate))
    return "".join(parts)


def _columns(amd: bool) -> str:
    if amd:
        return (
            "| variant | VGPRs | shared, bytes | stack, bytes | spills |\n|---|---|---|---|---|\n"
        )
    return (
        "| variant | registers | shared, bytes | stack, bytes | instructions per weight | gate |\n"
        "|---|---|---|---|---|---|\n"
    )


def _row(name: str, cost: Any, gate: float | None) -> str:
    cells = [name, cost.registers, cost.shared, cost.stack]
    if cost.spills is not None:
        cells.append(cost.spills)
    else:
        cells += ["" if cost.per_weight is None else f"{cost.per_weight:.2f}", gate or ""]
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import aot

    PATH.write_text(render(aot.in_a_child(), catalogue()), encoding="utf-8")
