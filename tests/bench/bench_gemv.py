"""Products with sketched matrices on the CPU against torch's dense ones, fp32 and bf16.

Everything takes turns in this process; figures are medians of the turns, ratios are time of torch
divided by ours for activations of the same dtype. Matrices rotate, so that each call finds its own
in DRAM and not in a cache. The read loops measure the bandwidth of the same moments.

    python tests/bench/bench_gemv.py [--threads 1 2] [--shapes 4096x4096] [--tokens 1 8 64 512]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from timing import Contender, ReadLoops, Rotation, compete, copies_from_dram, ratio

SHAPES = ("4096x4096", "4096x11008", "576x1536")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Place:
    """One table: rows x columns, tokens, threads."""

    rows: int
    columns: int
    tokens: int
    threads: int

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.rows}x{self.columns}, {self.tokens} token(s), {threads}"


def sketches(rows: int, columns: int, bits: int, order: str) -> list[Any]:
    """Random sketches of one group per row, enough of them to come from DRAM.

    `order` is that of a loaded model in memory; random bytes are codes in any order.
    """
    import torch

    from sketchconv.kernels.packed import Packed
    from sketchconv.kernels.planes import packed_size

    size = packed_size(columns, bits)
    index = torch.randint(0, 256, (rows, 1, size), dtype=torch.uint8)
    lut = torch.randn(rows, 1, 2**bits).half()
    count = copies_from_dram(index.nbytes + lut.nbytes)
    return [Packed.of(index.clone(), lut.clone(), columns, order) for _ in range(count)]


def dense(rows: int, columns: int, dtype: Any) -> list[Any]:
    """Random dense weights, enough of them to come from DRAM."""
    import torch

    weight = torch.randn(rows, columns).to(dtype)
    return [weight.clone() for _ in range(copies_from_dram(weight.nbytes))]


@dataclass(frozen=True, slots=True)
class Material:
    """Matrices of one shape: dense by dtype, sketched by bits and order of the index."""

    dense: dict[str, Rotation]
    sketched: dict[tuple[int, str], Rotation]

    @staticmethod
    def make(rows: int, columns: int, bits: Sequence[int]) -> Material:
        """All of them, for one shape."""
        import torch

        from sketchconv.kernels.woven import differs

        return Material(
            {n: Rotation(dense(rows, columns, getattr(torch, t))) for n, t in DTYPES.items()},
            {
                (b, order): Rotation(sketches(rows, columns, b, order))
                for b in bits
                for order in (("planes-le", "woven") if differs(b, columns) else ("planes-le",))
            },
        )


@dataclass(frozen=True, slots=True)
class Ours:
    """One of our contenders and what it is compared with."""

    bits: int
    kernel: str
    order: str
    dtype: str
    nbytes: int
    contender: Contender


def peers(material: Material, inputs: dict[str, Any]) -> dict[str, Contender]:
    """torch in both dtypes."""
    from torch.nn.functional import linear

    def one(rotation: Rotation, x: Any) -> Any:
        return lambda: linear(x, rotation.next())

    return {n: Contender(f"torch {n}", one(material.dense[n], x)) for n, x in inputs.items()}


def ours(material: Material, inputs: dict[str, Any], kernels: Sequence[str]) -> Iterator[Ours]:
    """Every kernel, number of bits, order that it reads and dtype of activations."""
    from sketchconv.kernels import gemv
    from sketchconv.kernels.dispatch import choose

    def one(rotation: Rotation, x: Any, kernel: str) -> Any:
        return lambda: gemv.multiply(rotation.next(), x, kernel)

    for (bits, order), rotation in material.sketched.items():
        first = rotation.items[0]
        for kernel in kernels:
            if order not in choose(kernel).orders:
                continue
            for name, x in inputs.items():
                call = one(rotation, x, kernel)
                nbytes = first.index.nbytes + first.lut.nbytes
                title = f"{bits} {kernel} {order} {name}"
                yield Ours(bits, kernel, order, name, nbytes, Contender(title, call))


def measure(place: Place, material: Material, kernels: Sequence[str], rounds: int) -> None:
    """One table."""
    import torch

    torch.set_num_threads(place.threads)
    x = torch.randn(place.tokens, place.columns)
    inputs = {name: x.to(getattr(torch, dtype)) for name, dtype in DTYPES.items()}
    loops = ReadLoops(place.threads)
    theirs, mine = peers(material, inputs), list(ours(material, inputs, kernels))
    with torch.inference_mode():
        compete([*loops.contenders, *theirs.values(), *(m.contender for m in mine)], rounds)
    bandwidth = loops.bytes_per_second
    print(f"\n{place}; {loops.fastest.name}: {bandwidth / 1e9:.1f} GB/s")
    for name, peer in theirs.items():
        nbytes = material.dense[name].items[0].nbytes
        print(f"  torch {name}: {peer.median * 1e6:.0f} us; {share(nbytes, peer, bandwidth)}")
    for row in mine:
        times = ratio(theirs[row.dtype].median, row.contender.median, "us", scale=1e6, digits=0)
        title = f"{row.bits} bits, {row.kernel}, {row.order}, {row.dtype}"
        print(f"  {title:36} torch {row.dtype} / ours: {times}; "
              f"{share(row.nbytes, row.contender, bandwidth)}")  # fmt: skip


def share(nbytes: int, contender: Contender, bandwidth: float) -> str:
    """Bytes of the matrix per second, against the read loop's."""
    got = nbytes / contender.median
    return f"{got / 1e9:.2f} / {bandwidth / 1e9:.2f} GB/s = {got / bandwidth:.2f} of the bandwidth"


def available(wanted: Sequence[str] | None) -> list[str]:
    """The kernels to run; says which cannot and why."""
    from sketchconv.doctor import find_kernels

    names = []
    for kernel in find_kernels():
        print(f"kernels {kernel.name}: {kernel.state}: {kernel.reason}")
        if kernel.state != "rejected" and (not wanted or kernel.name in wanted):
            names.append(kernel.name)
    return names


def main() -> None:
    """Print one table per shape, number of tokens and number of threads."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x columns")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 8, 64, 512))
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--bits", type=int, nargs="+", default=(2, 3, 4, 8))
    parser.add_argument("--kernels", nargs="+", help="[default: all that run here]")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    kernels = available(options.kernels)
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        material = Material.make(rows, columns, options.bits)
        for tokens in options.tokens:
            for threads in options.threads:
                place = Place(rows, columns, tokens, threads)
                measure(place, material, kernels, options.rounds)


if __name__ == "__main__":
    main()
