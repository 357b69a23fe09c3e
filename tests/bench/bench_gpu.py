"""The GPU kernels against cuBLAS (or its like), as fractions of the roofline of this GPU.

Shapes are those of LLaMA-2-7B. The roofline of an operation is the larger of the bytes that it must
move over the measured copy bandwidth, and its operations over the measured rate of a large dense
product. Passes over rotating matrices are captured in CUDA graphs, so that no Python runs while the
clock does; ours and torch take turns, and figures are medians.

Every operation is first compared with plain torch on the same sketch: a wrong result ends the run.

    python tests/bench/bench_gpu.py [--bits 4 3 2 8] [--dtypes float16 bfloat16] [--groups 1]

Without a CUDA or ROCm device it measures nothing and exits with 1. It has run on one H100 (float16;
2, 3, 4 and 8 bits); kernels/gpu/RESOURCES.md has the figures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from gpu_cases import LAYERS, SHAPES, Case, Setting, cases, dense_model, whole_model
from timing import ratio

COPY_BYTES = 1 << 30
TURN_MILLISECONDS = 20.0
PRODUCT_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Roofline:
    """Bytes per second of a large copy (read and written), and operations per second."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, nbytes: int, flops: int) -> float:
        """The least time for so much traffic and work."""
        return max(nbytes / self.bytes_per_second, flops / self.flops_per_second)


def no_gpu() -> str | None:
    """Why nothing can be measured here."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU: nothing was measured"
    from sketchconv.kernels.gpu.support import why_not

    reason = why_not(torch.device("cuda", 0))
    return f"{reason}: nothing was measured" if reason else None


class Pass:
    """A captured pass, replayed; times are those of the device."""

    def __init__(self, work: Callable[[], None]) -> None:
        """Warm up on a side stream, as capture asks for, then capture."""
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles and tunes
                work()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            work()
        self.replays = max(1, round(TURN_MILLISECONDS / max(self._milliseconds(1), 1e-3)))

    def _milliseconds(self, replays: int) -> float:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def seconds(self) -> float:
        """Seconds per pass in one turn."""
        return self._milliseconds(self.replays) / self.replays / 1e3


def medians(passes: list[Pass], rounds: int) -> list[float]:
    """Median seconds of passes that take turns."""
    turns = [[each.seconds() for each in passes] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*turns, strict=True)]


def roofline(dtype: Any, rounds: int) -> Roofline:
    """Measure this GPU."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=dtype) for _ in "ab")
    out = torch.empty_like(a)
    copying = Pass(lambda: target.copy_(source))
    multiplying = Pass(lambda: torch.mm(a, b, out=out))
    copy, product = medians([copying, multiplying], rounds)
    return Roofline(2 * COPY_BYTES / copy, 2 * PRODUCT_SIZE**3 / product)


def difference(case: Case) -> float:
    """Largest difference from plain torch, relative to the largest value there."""
    ours, expected = case.check()
    wanted = expected.double()
    return float((ours.double() - wanted).abs().max() / wanted.abs().max())


def tolerance(dtype: Any, columns: int) -> float:
    """Results are rounded to `dtype` (twice at most); sums of `columns` products are float32."""
    import torch

    return 2 * float(torch.finfo(dtype).eps) + columns * 2.0**-24


def looped(call: Callable[[int], Any], copies: int) -> Callable[[], None]:
    """A pass: one call for each copy."""

    def work() -> None:
        for number in range(copies):
            call(number)

    return work


def copies_beyond_cache(rows: int, columns: int, bits: int) -> int:
    """Copies that together are four times the L2 cache."""
    import torch

    cached = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, -(-4 * cached // (rows * columns * bits // 8))))


def measure(case: Case, columns: int, roof: Roofline, setting: Setting, rounds: int) -> str:
    """One line of the table.

    Raises:
        RuntimeError: our result is not that of plain torch.
    """
    found, allowed = difference(case), tolerance(setting.dtype, columns)
    if not found <= allowed:
        raise RuntimeError(
            f"{case.title}: differs by {found:.2e} of the largest, not {allowed:.1e}"
        )
    passes = [Pass(looped(call, case.copies)) for call in (case.ours, case.theirs)]
    ours, theirs = (total / case.copies for total in medians(passes, rounds))
    least = roof.seconds(case.nbytes, case.flops)
    return (
        f"  {case.title:34} torch / ours: {ratio(theirs, ours, 'us', scale=1e6)}; "
        f"roofline / ours: {ratio(least, ours, 'us', scale=1e6)}; difference {found:.1e}"
    )


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Every dtype and number of bits."""
    import torch

    for dtype in options.dtypes:
        for bits in options.bits:
            yield Setting("cuda", getattr(torch, dtype), bits, options.groups, options.layout)


def measure_model(roof: Roofline, setting: Setting, rounds: int) -> None:
    """All linear layers of LLaMA-2-7B for one token: ours, then dense where memory allows."""
    import torch

    token, nbytes = whole_model(LAYERS, setting)
    (ours,) = medians([Pass(token)], rounds)
    print(
        f"  LLaMA-2-7B, all linears and a dense head: {ours * 1e3:.2f} ms/token; roofline / ours: "
        f"{ratio(nbytes / roof.bytes_per_second, ours, 'ms', scale=1e3, digits=2)}"
    )
    del token
    torch.cuda.empty_cache()
    try:
        token, nbytes = dense_model(LAYERS, setting)
        (theirs,) = medians([Pass(token)], rounds)
    except torch.cuda.OutOfMemoryError:
        print("  the dense model does not fit into the memory of this GPU")
        return
    print(f"  torch / ours: {ratio(theirs, ours, 'ms', scale=1e3, digits=2)}")


def main() -> None:
    """Print one table per dtype, bits and shape."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--bits", type=int, nargs="+", default=(4, 3, 2, 8))
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=("float16", "bfloat16"))
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 8, 64, 512, 2048))
    parser.add_argument("--layout", choices=("device", "planes-le"), default="device")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    reason = no_gpu()
    if reason:
        sys.exit(reason)

    import torch

    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    for setting in settings(options):
        roof = roofline(setting.dtype, options.rounds)
        print(
            f"\n{setting.dtype}, {setting.bits} bits, {setting.groups} group(s), "
            f"{setting.layout}: copy {roof.bytes_per_second / 1e9:.0f} GB/s, "
            f"dense product {roof.flops_per_second / 1e12:.0f} TFLOP/s"
        )
        for rows, columns in SHAPES:
            copies = copies_beyond_cache(rows, columns, setting.bits)
            print(f" {rows}x{columns}, {copies} copies")
            for case in cases(rows, columns, tuple(options.tokens), copies, setting):
                print(measure(case, columns, roof, setting, options.rounds), flush=True)
            torch.cuda.empty_cache()
        measure_model(roof, setting, options.rounds)


if __name__ == "__main__":
    main()
