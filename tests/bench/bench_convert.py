"""Convert a large synthetic checkpoint: memory, and time against its own floor.

The floor is measured in the same process: read every shard from start to end, then run the solver
alone over every linear weight, one tensor after the other. The conversion then runs in a child
process whose anonymous memory is sampled.

    python tests/bench/bench_convert.py --gigabytes 8 --folder /path/with/space
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHARD_BYTES = 500_000_000
HIDDEN, FFN, VOCAB = 2048, 5632, 32000
READ_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """One bf16 tensor of the synthetic checkpoint."""

    name: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return 2 * int(np.prod(self.shape))


def tensors(layers: int) -> Iterator[Tensor]:
    """A Llama checkpoint, in the order of its layers."""
    yield Tensor("model.embed_tokens.weight", (VOCAB, HIDDEN))
    for n in range(layers):
        layer = f"model.layers.{n}"
        yield Tensor(f"{layer}.input_layernorm.weight", (HIDDEN,))
        for part in "qkvo":
            yield Tensor(f"{layer}.self_attn.{part}_proj.weight", (HIDDEN, HIDDEN))
        yield Tensor(f"{layer}.post_attention_layernorm.weight", (HIDDEN,))
        yield Tensor(f"{layer}.mlp.gate_proj.weight", (FFN, HIDDEN))
        yield Tensor(f"{layer}.mlp.up_proj.weight", (FFN, HIDDEN))
        yield Tensor(f"{layer}.mlp.down_proj.weight", (HIDDEN, FFN))
    yield Tensor("model.norm.weight", (HIDDEN,))


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write shards, index and config; returns the number of shards."""
    layer_bytes = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
    layers = max(1, round((gigabytes * 1e9 - 2 * VOCAB * HIDDEN) / layer_bytes))
    folder.mkdir(parents=True)
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors(layers):
        if sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / name, shard, seed=number)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers)))
    return len(shards)


def config(layers: int) -> dict[str, object]:
    """A Llama config for the synthetic shapes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def write_shard(path: Path, shard: list[Tensor], seed: int) -> None:
    """Heavy-tailed random weights in bf16, written tensor by tensor."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in shard:
        offsets = [offset, offset + tensor.nbytes]
        entry = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        header |= {tensor.name: entry}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            values = random.standard_normal(tensor.shape, np.float32) * np.float32(0.02)
            if len(tensor.shape) == 1:
                values = np.ones(tensor.shape, np.float32)
            file.write((values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes())


def read_seconds(folder: Path) -> float:
    """Time to read every shard once from start to end."""
    started = time.perf_counter()
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass
    return time.perf_counter() - started


def solver_seconds(folder: Path) -> tuple[float, int]:
    """Time of the solver alone over every linear weight, and the number of weights."""
    from sketchconv.formats.container import Container
    from sketchconv.kernels.cpu import bf16_to_f32, solve_rows

    solve_rows(np.ones((2, 64), np.float32), 4, 1, column_weights=None)
    seconds, weights = 0.0, 0
    for shard in sorted(folder.glob("*.safetensors")):
        with Container.open(shard, profile="safetensors") as container:
            for name in container.entries:
                if not re.search(r"_proj\.weight$", name):
                    continue
                rows = bf16_to_f32(container.array(name))
                started = time.perf_counter()
                solve_rows(rows, 4, 1, column_weights=None)
                seconds += time.perf_counter() - started
                weights += rows.size
    return seconds, weights


def convert(folder: Path, output: Path) -> tuple[float, int, dict[str, object]]:
    """Run the command in a child; returns wall seconds, peak anonymous bytes, its report."""
    command = [sys.executable, "-P", "-m", "sketchconv", "convert", str(folder), str(output)]
    started = time.perf_counter()
    # The report goes to a file: a pipe that nobody reads yet would stop the child when it is full.
    with tempfile.TemporaryFile() as report:
        peak = 0
        with subprocess.Popen([*command, "--json", "--force"], stdout=report) as child:
            while child.poll() is None:
                peak = max(peak, anonymous(child.pid))
                time.sleep(0.02)
        seconds = time.perf_counter() - started
        if child.returncode:
            raise SystemExit(f"convert failed with exit code {child.returncode}")
        report.seek(0)
        return seconds, peak, json.load(report)


def anonymous(pid: int) -> int:
    """Anonymous memory of a process in bytes; 0 when it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def main() -> None:
    """Make the checkpoint, measure the floor and the conversion, print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path(".demo/bench-convert"))
    options = parser.parse_args()
    source, output = options.folder / "source", options.folder / "sketch"
    shutil.rmtree(options.folder, ignore_errors=True)
    shards = make_checkpoint(source, options.gigabytes)
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    print(f"checkpoint: {size:,} bytes of bf16 in {shards} shards")
    reading = read_seconds(source)
    solving, weights = solver_seconds(source)
    print(
        f"reading alone: {reading:.1f} s; solver alone: {solving:.1f} s for {weights:,} weights "
        f"({1e9 * solving / weights:.2f} ns per weight)"
    )
    seconds, peak, report = convert(source, output)
    print(f"convert: {seconds:.1f} s, start-up included; solver {report['solve_seconds']:.1f} s")
    print(
        f"ratio to reading + solver: {seconds:.1f} / {reading + solving:.1f} = "
        f"{seconds / (reading + solving):.2f}"
    )
    print(f"peak anonymous memory: {peak:,} bytes")
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
