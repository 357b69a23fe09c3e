"""Blocks of ggml: our encoders beside llama.cpp's own, and decoders beside gguf-py's.

One row for each type and set of rows: relative error (RMS, weighted where weights are given) and
speed on one thread, ours next to theirs, in one run. Theirs is `ggml_quantize_chunk` of the library
in the `xllamacpp` wheel, with the weights as its importance matrix. Speeds are MB of float32 per
second of processor time, the best of several turns that take turns, so that other work on the
machine weighs on both alike; decoders are compared with gguf-py and with ggml's own.

Rows: gaussian, heavy-tailed (Student's t of 3 degrees), and matrices of MiniLM and of any folder of
safetensors that is given. Weights: log-normal, sigma 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
import ggml_oracle
import models

from sketchconv.kernels.ggml import blocks
from sketchconv.kernels.ggml.kinds import KINDS


def matrices(folder: Path, rows: int) -> np.ndarray:
    """Some rows of the linear weights of a folder, side by side in multiples of 256 columns."""
    from safetensors import safe_open

    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and min(shape) >= 256 and "position" not in name:
                    tensor = file.get_slice(name)[:64].float().numpy()
                    found.append(tensor[:, : shape[1] // 256 * 256].reshape(-1, 256))
    everything = np.concatenate(found)
    step = max(1, everything.size // (rows * 2048))
    chosen = everything[::step]
    return np.ascontiguousarray(chosen[: len(chosen) // 8 * 8].reshape(-1, 2048)[:rows])


def sources(rows: int, folders: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 rows of 2048 columns."""
    rng = np.random.default_rng(0)
    yield "gaussian", rng.standard_normal((rows, 2048)).astype(np.float32)
    yield "heavy", rng.standard_t(3, (rows, 2048)).astype(np.float32)
    for folder in folders:
        if folder.exists():
            yield folder.name[:10], matrices(folder, rows)


def fastest(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Processor seconds of the fastest turn of each, all taking turns after a first call."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(rounds):
        for i, call in enumerate(calls):
            started = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - started)
    return best


def relative_error(kind: str, data: Any, rows: Any, weights: Any) -> float:
    """Weighted RMS of the error over that of the rows, by ggml's own decoder."""
    gap = ggml_oracle.decode(kind, data, rows.shape[1]).astype(np.float64) - rows
    masses = np.ones(rows.shape[1]) if weights is None else weights
    return float(np.sqrt((masses * gap**2).sum() / (masses * rows.astype(np.float64) ** 2).sum()))


def encoders(kind: str, name: str, rows: Any, weights: Any, rounds: int) -> str:
    """One row of the table."""
    ours, theirs = (
        (lambda: blocks.encode(kind, rows, weights, threads=1)),
        (lambda: ggml_oracle.encode(kind, rows, weights)),
    )
    mine, peer = (relative_error(kind, call(), rows, weights) for call in (ours, theirs))
    weighting = "plain" if weights is None else "weighted"
    speeds = [rows.nbytes / seconds / 1e6 for seconds in fastest([ours, theirs], rounds)]
    return (
        f"{kind:7}{KINDS[kind].bits_per_weight:6.2f}  {name:11}{weighting:9}"
        f"{mine:.5f} / {peer:.5f} = {mine / peer:.3f}  "
        f"{speeds[0]:6.0f} / {speeds[1]:6.0f} MB/s = {speeds[0] / speeds[1]:.1f}"
    )


def gguf_encoder(kind: str, rows: Any, rounds: int) -> str | None:
    """Speed beside gguf-py's encoder, where it has one."""
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.quantize(rows[:1], number)
    except NotImplementedError:
        return None
    calls = [
        lambda: blocks.encode(kind, rows, threads=1),
        lambda: gguf.quants.quantize(rows, number),
    ]
    ours, theirs = (rows.nbytes / seconds / 1e6 for seconds in fastest(calls, rounds))
    return f"{kind:7}{ours:6.0f} / {theirs:6.0f} MB/s = {ours / theirs:.1f}"


def decoders(kind: str, rows: Any, rounds: int) -> str:
    """Speed beside gguf-py's and ggml's decoders, in MB of float32 written per second."""
    import gguf

    data, columns = blocks.encode(kind, rows), rows.shape[1]
    calls = [
        lambda: blocks.decode(kind, data, columns, threads=1),
        lambda: gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]),
        lambda: ggml_oracle.decode(kind, data, columns),
    ]
    ours, python, c = (rows.nbytes / seconds / 1e6 for seconds in fastest(calls, rounds))
    return (
        f"{kind:7}{ours:6.0f} / {python:6.0f} MB/s = {ours / python:.1f}  "
        f"{ours:6.0f} / {c:6.0f} MB/s = {ours / c:.1f}"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rows", type=int, default=256, help="rows of 2048 weights of each source")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folders", type=Path, nargs="*", default=[models.MINILM.path])
    options = parser.parse_args()
    if ggml_oracle.library() is None:
        raise SystemExit("xllamacpp is not installed: there is nothing to compare with")
    weights = np.exp(np.random.default_rng(1).standard_normal(2048)).astype(np.float32)
    given = list(sources(options.rows, options.folders))
    print("encoders: relative RMS error and speed, ours / llama.cpp, one thread")
    for kind in options.kinds:
        for name, rows in given:
            for masses in (None, weights):
                print(encoders(kind, name, rows, masses, options.rounds), flush=True)
    print("\nencoders: ours / gguf-py, one thread")
    for kind in options.kinds:
        line = gguf_encoder(kind, given[0][1], options.rounds)
        if line is not None:
            print(line, flush=True)
    print("\ndecoders: ours / gguf-py, ours / ggml, one thread")
    for kind in options.kinds:
        print(decoders(kind, given[0][1], options.rounds), flush=True)


if __name__ == "__main__":
    main()
