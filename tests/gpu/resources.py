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

They have run on one GPU: an NVIDIA H100 80GB HBM3, with torch 2.11 (CUDA 13.0) and Triton 3.6,
where the figures under "Measured" were taken and 457 of the 459 cases in `tests/gpu/cases` passed
natively; the bound of two, which the rounding of a BLAS passed, was widened since. **On every other
target below they were compiled only, and never run**; their numerics were tested in Triton's
interpreter on the CPU, on small shapes. The tables of resources are of Triton {version}. Tests hold
what is in them: no stack, no spills, shared memory within the device, and instructions per weight
under the gate; for sm_80 and gfx942 at every change, for the others in `make test-slow`.
The document is written by `python tests/gpu/resources.py`.

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
| `fragments` | NVIDIA 8.0 and up: 1 to 4 bits, 16-bit input, up to 16 tokens (3 bits: 8), tasks |
| `permute` | the same with up to 255 tokens, and where bytes do not lie in sixteens |
| `gemv` | every other product of few tokens: AMD (8), 5 to 8 bits, float32, odd groups (4) |
| decoded tiles (`expand`, else `decode`) and BLAS | NVIDIA: more tokens; gradient of the input |
| tiles of the gradient by the BLAS, `lut-sums` | NVIDIA: gradient of the LUT |
| `matmul`, `grad-input`, `grad-lut` | AMD |
| decoded weight and the vendor's BLAS | below 8.0, and float64 |

## Measured

On the H100, float16, one group, matrices that come from memory, in microseconds; medians of
`python tests/bench/bench_gpu.py`. "torch" is the same operation on a dense float16 weight (for
decoding, a copy of it). "Roofline" is the larger of the bytes over the bandwidth of a copy (2.41
TB/s) and the operations over the rate of a large product (758 TFLOP/s).

| operation | shape | torch | roofline, 4 bits | ours, 4 bits | roofline, 3 bits | ours, 3 bits |
|---|---|---|---|---|---|---|
| product, 1 token | 4096 x 4096 | 16.3 | 3.5 | 7.5 | 2.6 | 6.5 |
| product, 8 tokens | 4096 x 4096 | 14.1 | 3.6 | 7.5 | 2.7 | 8.3 |
| product, 64 tokens | 4096 x 4096 | 14.7 | 4.0 | 14.4 | 3.1 | 16.7 |
| product, 512 tokens | 4096 x 4096 | 27.5 | 22.7 | 46.5 | 22.6 | 46.3 |
| product, 2048 tokens | 4096 x 4096 | 96.7 | 90.7 | 115.5 | 90.6 | 116.7 |
| gradient of the input, 2048 tokens | 4096 x 4096 | 99.5 | 90.7 | 126.2 | 90.6 | 120.7 |
| gradient of the LUT, 2048 tokens | 4096 x 4096 | 101.1 | 90.7 | 192.8 | 90.6 | 202.0 |
| decoding | 4096 x 4096 | 24.3 | 17.5 | 14.5 | 16.6 | 14.1 |
| look-up, 2048 tokens | 4096 x 4096 | 10.1 | 8.7 | 7.1 | 8.3 | 6.8 |
| product, 8 tokens of 4 tasks | 4096 x 4096 | 14.1 | 3.8 | 21.3 | 2.8 | 21.5 |
| product, 1 token | 11008 x 4096 | 36.2 | 9.5 | 16.3 | 7.1 | 12.0 |
| product, 8 tokens | 11008 x 4096 | 36.8 | 9.6 | 15.8 | 7.2 | 16.0 |
| product, 64 tokens | 11008 x 4096 | 35.8 | 10.3 | 29.9 | 7.9 | 36.0 |
| product, 512 tokens | 11008 x 4096 | 66.3 | 60.9 | 120.2 | 60.9 | 122.0 |
| product, 2048 tokens | 11008 x 4096 | 290.6 | 243.7 | 342.6 | 243.4 | 344.3 |
| product, 8 tokens of 4 tasks | 11008 x 4096 | 36.8 | 10.0 | 47.7 | 7.4 | 49.1 |
| product, 1 token | 4096 x 11008 | 35.5 | 9.4 | 15.7 | 7.1 | 12.6 |
| product, 8 tokens | 4096 x 11008 | 35.9 | 9.5 | 17.9 | 7.1 | 19.6 |
| product, 64 tokens | 4096 x 11008 | 38.3 | 10.2 | 29.1 | 7.9 | 32.8 |
| product, 512 tokens | 4096 x 11008 | 65.5 | 60.9 | 160.6 | 60.9 | 155.4 |
| product, 2048 tokens | 4096 x 11008 | 269.9 | 243.7 | 322.7 | 243.4 | 314.4 |
| gradient of the input, 2048 tokens | 4096 x 11008 | 281.3 | 243.7 | 392.7 | 243.4 | 393.7 |
| gradient of the LUT, 2048 tokens | 4096 x 11008 | 273.1 | 243.7 | 551.1 | 243.4 | 591.1 |
| decoding | 4096 x 11008 | 61.6 | 46.8 | 46.1 | 44.5 | 46.3 |
| look-up, 2048 tokens | 4096 x 11008 | 31.6 | 23.4 | 23.1 | 22.3 | 23.3 |
| product, 8 tokens of 4 tasks | 4096 x 11008 | 36.1 | 9.7 | 50.4 | 7.2 | 47.2 |

One token through all linear layers of LLaMA-2-7B and a dense head: 2.59 ms at 4 bits, 2.08 at 3,
2.11 at 2 (roofline 1.47, 1.13, 0.79; torch, dense, 5.5 to 5.7); at 8 bits 12.43 (3.06), where
lookups are not permutations. Products of 512 and 2048 tokens and gradients of the input were taken
with decoded tiles of up to 36 MB. The sizes chosen since were fastest in a run of sizes alone: 4096
x 11008 takes 128 with 512 tokens and 303 with 2048. Since then the sums of the LUT's gradient also
take 7 and 8 bits, and products of 5 to 8 tokens that cannot be permuted take the BLAS; neither has
been timed or run on a GPU. Other machines of the kind, or other days, differ by some per cent.

## Derived, not measured

Time of one token of LLaMA-2-7B, linear layers only, if memory were read at its nominal speed once
and nothing else took time (fp16 tables and head), in milliseconds:

| bits, groups | GB per token | A100-40 | A100-80 | H100 | RTX 4090 |
|---|---|---|---|---|---|
| fp16 | 13.21 | 8.5 | 6.5 | 3.9 | 13.1 |
| 4, 1 | 3.54 | 2.3 | 1.7 | 1.1 | 3.5 |
| 4, 8 | 3.85 | 2.5 | 1.9 | 1.15 | 3.8 |
| 3, 4 | 2.78 | 1.8 | 1.4 | 0.83 | 2.8 |

Targets on paper for the whole of that were 1.6 ms at 4 bits and 1.2 at 3 on an H100, which are not
reached (see above), and 2.4 and 1.9 on an A100, which nobody has measured. The memory of an A100
leaves time for about 4.8 instructions per weight at 4 bits, that of an H100 for 4.4.
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
    return "".join(parts + [section(target, found, known) for target, found in costs.items()])


def section(target: str, found: dict[str, Any], known: dict[str, dict[str, Any]]) -> str:
    """What the document says of one target."""
    rows = [
        _row(name, cost, known[name]["most"].get(target.removeprefix("sm_")))
        for name, cost in found.items()
    ]
    return f"\n## {target}\n\n" + _columns(target.startswith("gfx")) + "".join(rows)


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
