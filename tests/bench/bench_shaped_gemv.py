"""Products with shaped sketches for few tokens, against torch's dense ones and decoded tiles.

Everything takes turns in this process, each call on a matrix that comes from DRAM; figures are
medians of the turns in microseconds, ratios theirs over ours. `tiles` is what sketchconv does for
many tokens: rows decoded to float32, then torch's product.

    python tests/bench/bench_shaped_gemv.py [--threads 1] [--shapes 4096x4096] [--tokens 1 4 8]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from timing import Contender, Rotation, compete, copies_from_dram

SHAPES = ("576x1536", "2048x2048", "4096x4096")
FORMS = (("iq4_nl", 4), ("affine", 4), ("affine", 5), ("symmetric", 4), ("symmetric", 8))


def sketches(rows: int, columns: int, grid: str, bits: int) -> Rotation:
    """Random codes and scales per 32 columns, enough of them to come from DRAM."""
    import torch

    from sketchconv.formats.grids import GRIDS

    groups = columns // 32
    index = torch.randint(0, 256, (rows, groups, 4 * bits), dtype=torch.uint8)
    scale = torch.randn(rows, groups, GRIDS[grid].fields).mul(0.01).half()
    count = copies_from_dram(index.nbytes + scale.nbytes * 2)
    return Rotation([(index.clone(), scale.clone()) for _ in range(count)])


def dense(rows: int, columns: int, dtype: Any) -> Rotation:
    """Random dense weights."""
    import torch

    weight = torch.randn(rows, columns).to(dtype)
    return Rotation([weight.clone() for _ in range(copies_from_dram(weight.nbytes))])


def contenders(
    sketched: dict[tuple[str, int], Rotation], weights: dict[str, Rotation], x: Any
) -> Iterator[Contender]:
    """torch in both dtypes, then tiles and the fused product of each form."""
    import torch
    from torch.nn.functional import linear

    from sketchconv.runtime import products

    def plain(rotation: Rotation, given: Any) -> Callable[[], Any]:
        return lambda: linear(given, rotation.next())

    def tiled(rotation: Rotation, form: tuple[str, int]) -> Callable[[], Any]:
        def call() -> Any:
            index, scale = rotation.next()
            tiles = products._tiles(index, len(x))
            parts = [linear(x, products.dense(index[t], scale[t], *form)) for t in tiles]
            return torch.cat(parts, -1)

        return call

    def fused(rotation: Rotation, form: tuple[str, int]) -> Callable[[], Any]:
        return lambda: products.multiply_few(x, *rotation.next(), *form)

    yield Contender("float32", plain(weights["float32"], x))
    yield Contender("bfloat16", plain(weights["bfloat16"], x.bfloat16()))
    for form, rotation in sketched.items():
        yield Contender("tiles", tiled(rotation, form))
        yield Contender("ours", fused(rotation, form))


def measure(
    sketched: dict[tuple[str, int], Rotation],
    weights: dict[str, Rotation],
    tokens: int,
    rounds: int,
) -> None:
    """One table: torch's times, and for each form ours with the ratios."""
    import torch

    x = torch.randn(tokens, weights["float32"].items[0].shape[1])
    with torch.inference_mode():
        found = list(contenders(sketched, weights, x))
        compete(found, rounds)
    full, half, *rest = (c.median * 1e6 for c in found)
    print(f"  {tokens} token(s): torch float32 {full:.0f} us, bfloat16 {half:.0f} us")
    for (grid, bits), tiles, ours in zip(sketched, rest[::2], rest[1::2], strict=True):
        print(
            f"    {grid:9} {bits} bits: {ours:6.0f} us; tiles {tiles:.0f} / ours = "
            f"{tiles / ours:.1f}; float32 / ours = {full / ours:.1f}; "
            f"bfloat16 / ours = {half / ours:.1f}",
            flush=True,
        )


def main() -> None:
    """Print one table per shape and number of tokens."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x columns")
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 4, 8))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        print(f"{shape}, {options.threads} thread(s)")
        sketched = {form: sketches(rows, columns, *form) for form in FORMS}
        weights = {n: dense(rows, columns, getattr(torch, n)) for n in ("float32", "bfloat16")}
        for tokens in options.tokens:
            measure(sketched, weights, tokens, options.rounds)


if __name__ == "__main__":
    main()
