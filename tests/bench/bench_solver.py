"""The solver against scikit-learn, flash1dkmeans and the exact optimum: time and squared error.

Everything runs in this process on one thread, and times are CPU times. Each method codes the same
rows; slow methods get fewer of them (`--slow-rows`), and ratios of squared error compare row by row
with the exact optimum (the exact mode of the solver, checked against ckwrap where that is
installed).

    python tests/bench/bench_solver.py [--rows N] [--quick] [--model FILE [--dither]]

With `--model` (a .safetensors or .gguf file) the rows are cut from its matrices, and the k-means of
the whole model at its own row lengths is timed too. `--dither` moves weights off the grid of a
quantized GGUF: seeded uniform noise of one step of 16 levels per block of 32.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sketchconv.kernels import cpu

Rows = NDArray[np.float32]
Errors = NDArray[np.float64]
Method = Callable[[Rows, int], Errors]
LENGTHS, ENTRIES = (512, 4096), (4, 8, 16)


@dataclass(frozen=True, slots=True)
class Result:
    """CPU time per weight, and the squared error of each row."""

    nanoseconds: float
    errors: Errors


def matrices(path: Path) -> Iterator[Rows]:
    """Every two-dimensional weight of a file as float32, embeddings left out."""
    if path.suffix == ".gguf":
        from gguf import GGUFReader, dequantize

        for tensor in GGUFReader(path).tensors:
            if len(tensor.shape) == 2 and tensor.name.startswith("blk."):
                yield dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if "embed" not in name and len(file.get_slice(name).get_shape()) == 2:
                yield file.get_tensor(name).float().numpy()


def dithered(weight: Rows, rng: np.random.Generator) -> Rows:
    """Noise of one step of 16 affine levels per block of 32 columns."""
    blocks = weight.reshape(weight.shape[0], -1, 32)
    step = (blocks.max(axis=2, keepdims=True) - blocks.min(axis=2, keepdims=True)) / 15
    noise = rng.random(blocks.shape, np.float32) - np.float32(0.5)
    return (blocks + noise * step).reshape(weight.shape)


def model_weights(path: Path, dither: bool) -> list[Rows]:
    """The matrices of a model, dithered where asked."""
    rng = np.random.default_rng(0)
    return [dithered(w, rng) if dither else w for w in matrices(path)]


def sample_rows(weights: list[Rows], rows: int, length: int) -> Rows:
    """Rows of `length` consecutive weights, evenly from all matrices; synthetic without any."""
    rng = np.random.default_rng(length)
    if not weights:
        scale = rng.uniform(0.3, 3.0, (rows, 1))
        return (rng.standard_t(6, (rows, length)) * scale / 50).astype(np.float32)
    picked = []
    for index in range(rows):
        flat = weights[index % len(weights)].reshape(-1)
        begin = int(rng.integers(0, flat.size // length)) * length
        picked.append(flat[begin : begin + length])
    return np.stack(picked)


def nearest_error(row: Rows, centres: NDArray[np.floating]) -> float:
    """Squared error of a row whose every value takes its nearest centre."""
    lut = np.sort(np.asarray(centres, np.float64).reshape(-1))
    x = row.astype(np.float64)
    codes = np.searchsorted((lut[1:] + lut[:-1]) / 2, x)
    return float(((x - lut[codes]) ** 2).sum())


def ours(rows: Rows, k: int) -> Errors:
    """The solver."""
    bits = k.bit_length() - 1
    return cpu.solve_rows(rows, bits, 1, lut_dtype="F32", threads=1).squared_error


def exact(rows: Rows, k: int) -> Errors:
    """The exact mode of the solver."""
    bits = k.bit_length() - 1
    return cpu.solve_rows(rows, bits, 1, lut_dtype="F32", threads=1, exact=True).squared_error


def sklearn(rows: Rows, k: int) -> Errors:
    """scikit-learn's KMeans with LeanQuant's arguments."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    centres = []
    with threadpool_limits(1):
        for row in rows:
            column = row.astype(np.float64)[:, None]
            start = np.linspace(column.min(), column.max(), k)[:, None] if k <= 8 else "k-means++"
            model = KMeans(
                k, init=start, n_init=1 if k <= 8 else "auto", max_iter=100, tol=1e-6,
                random_state=0,
            )  # fmt: skip
            centres.append(model.fit(column).cluster_centers_)
    return np.array([nearest_error(r, c) for r, c in zip(rows, centres, strict=True)])


def flash(rows: Rows, k: int) -> Errors:
    """flash1dkmeans."""
    from flash1dkmeans import kmeans_1d

    centres = [kmeans_1d(row.astype(np.float64), k, max_iter=100, random_state=0)[0]
               for row in rows]  # fmt: skip
    return np.array([nearest_error(r, c) for r, c in zip(rows, centres, strict=True)])


def ckwrap(rows: Rows, k: int) -> Errors:
    """ckwrap, an exact solver in C++."""
    from ckwrap import ckmeans

    centres = [ckmeans(row.astype(np.float64), k).centers for row in rows]
    return np.array([nearest_error(r, c) for r, c in zip(rows, centres, strict=True)])


def measure(method: Method, rows: Rows, k: int, repeats: int) -> Result:
    """Best CPU time of some repeats, after one run on a few rows that compiles what needs it."""
    method(rows[:2], k)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        errors = method(rows, k)
        times.append(time.process_time() - start)
    return Result(min(times) / rows.size * 1e9, errors)


def rivals() -> dict[str, Method]:
    """The other methods, as far as they are installed."""
    found = {"scikit-learn": ("sklearn", sklearn), "flash1dkmeans": ("flash1dkmeans", flash),
             "ckwrap": ("ckwrap", ckwrap)}  # fmt: skip
    return {n: m for n, (module, m) in found.items() if importlib.util.find_spec(module)}


def show(name: str, result: Result, best: Errors, solver: float) -> None:
    """One line: time, time relative to the solver's, squared error relative to the optimum."""
    ratio = result.errors / np.maximum(best[: result.errors.size], 1e-300)
    times = "" if name == "solver" else f"{result.nanoseconds:.1f} / {solver:.2f}"
    factor = "" if name == "solver" else f"= {result.nanoseconds / solver:.1f}x"
    print(f"  {name:14s} {result.errors.size:6d} {result.nanoseconds:10.2f}  {times:>16s} "
          f"{factor:>9s}   {ratio.mean():8.5f} {ratio.max():8.4f}")  # fmt: skip


def compare(rows: Rows, k: int, slow_rows: int) -> None:
    """All methods on the same rows."""
    print(f"\nd = {rows.shape[1]}, k = {k}")
    print(f"  {'method':14s} {'rows':>6s} {'ns/weight':>10s}  {'time / solver':>16s} "
          f"{'':9s}   {'SSE/best':>8s} {'worst':>8s}")  # fmt: skip
    optimum = measure(exact, rows, k, 1)
    solver = measure(ours, rows, k, 5)
    show("solver", solver, optimum.errors, solver.nanoseconds)
    show("exact mode", optimum, optimum.errors, solver.nanoseconds)
    for name, method in rivals().items():
        result = measure(method, rows[:slow_rows], k, 1)
        show(name, result, optimum.errors, solver.nanoseconds)


def whole_model(weights: list[Rows], bits: int, weighted: bool) -> None:
    """The k-means of every matrix at its own row length, one group per row."""
    rng = np.random.default_rng(0)
    spent, count = 0.0, 0
    for weight in weights:
        given = np.exp(rng.normal(0, 1, weight.shape[1])) if weighted else None
        start = time.process_time()
        cpu.solve_rows(weight, bits, 1, column_weights=given, threads=1)
        spent += time.process_time() - start
        count += weight.size
    kind = "weighted" if weighted else "equal weights"
    print(f"  {kind:14s} {spent:8.3f} s / {count / 1e6:.1f} M weights = "
          f"{spent / count * 1e9:.2f} ns per weight and thread")  # fmt: skip


def main() -> None:
    """Parse the command line and print the tables."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--rows", type=int, default=500, help="rows for the solver (500)")
    parser.add_argument("--slow-rows", type=int, default=20, help="rows for the others (20)")
    parser.add_argument("--quick", action="store_true", help="40 rows, and 4 for the others")
    parser.add_argument("--model", type=Path, help="take rows from this .safetensors or .gguf")
    parser.add_argument("--dither", action="store_true", help="move weights off a grid of 32")
    args = parser.parse_args()
    rows, slow = (40, 4) if args.quick else (args.rows, args.slow_rows)
    weights = model_weights(args.model, args.dither) if args.model else []
    print(f"rows: {args.model.name if args.model else 'synthetic, Student t with 6 degrees'}")
    for length in LENGTHS:
        for k in ENTRIES:
            compare(sample_rows(weights, rows, length), k, slow)
    if weights:
        print("\nwhole model, k = 16, one group per row")
        whole_model(weights, 4, weighted=False)
        whole_model(weights, 4, weighted=True)


if __name__ == "__main__":
    main()
