"""What each GGUF type keeps of a model, and what its encoder takes: ours beside llama.cpp's own.

The decoder weights of a dense model are encoded and decoded again, all of one type (rows that do
not fit its blocks take its fallback, as in a file), by our encoder and by `ggml_quantize_chunk` of
the library in the `xllamacpp` wheel; embeddings stay as they are. KL is to the dense model, in nats
per token. Speeds are MB of float32 per second of processor time on one thread, over all weights.

With --calibration both are given the mean squares of each column's inputs on that text.

    python tests/bench/bench_gguf_types.py --text wikitext2-test.txt [--model FOLDER]
        [--types Q4_K Q6_K ...] [--windows 4] [--seq-len 512] [--calibration wikitext2-valid.txt]
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent))
import ggml_oracle
from dithered import dense_model
from peers import linears

Encode = Callable[[str, Any, Any], Any]


@dataclass
class Tally:
    """One encoder on all weights of a model: bytes and values written, processor seconds."""

    nbytes: int = 0
    values: int = 0
    seconds: float = 0.0

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.values

    @property
    def speed(self) -> float:
        """MB of float32 per second."""
        return 4 * self.values / 1e6 / self.seconds


def ours(kind: str, rows: Any, weights: Any) -> Any:
    """Blocks as an export writes them."""
    from sketchconv.export.encoders import ENCODERS

    return ENCODERS[kind].encode(rows, weights)


def importance(dense: Path, text: Path, tokens: int) -> dict[str, Any]:
    """Mean squares of the inputs, by the names of weights."""
    from sketchconv.calibration.options import Calibration
    from sketchconv.calibration.squares import mean_squares
    from sketchconv.sources.open import open_source

    with tempfile.TemporaryDirectory() as folder, open_source(str(dense)) as source:
        return mean_squares(source, Calibration(text, tokens), Path(folder), 1 << 30)


def stored(model: Any, name: str, encode: Encode, weights: dict[str, Any]) -> tuple[Any, Tally]:
    """A copy of a model with every decoder weight as a file would hold it."""
    import torch

    from sketchconv.export.encoders import ENCODERS, fitting
    from sketchconv.kernels.ggml.blocks import decode

    changed, tally = copy.deepcopy(model), Tally()
    with torch.no_grad():
        for path, module in linears(changed):
            rows = module.weight.float().numpy()
            kind = fitting(ENCODERS[name], rows.shape[1]).type.name
            begun = time.process_time()
            blocks = encode(kind, rows, weights.get(f"{path}.weight"))
            tally.seconds += time.process_time() - begun
            tally.nbytes += blocks.nbytes
            tally.values += rows.size
            module.weight.copy_(torch.from_numpy(decode(kind, blocks, rows.shape[1])))
    return changed, tally


def ruler(dense: Path, options: argparse.Namespace) -> Any:
    """Measures models against the dense one."""
    from transformers import AutoTokenizer

    from sketchconv.evaluation.opening import open_network
    from sketchconv.evaluation.reference import Reference
    from sketchconv.evaluation.ruler import Ruler, Text
    from sketchconv.evaluation.windows import Cut, cut_windows, read_text

    cut = Cut(options.seq_len, None, options.windows)
    windows = cut_windows(
        AutoTokenizer.from_pretrained(dense), read_text(options.text), cut, options.text.stem
    )
    texts = [Text(options.text.stem, tuple(windows))]
    return Ruler(texts, Reference(open_network(dense), texts))


def main() -> None:
    """Print one row per type."""
    from transformers import AutoModelForCausalLM

    from sketchconv.evaluation.network import Network
    from sketchconv.kernels.ggml.kinds import KINDS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="dense folder [the dithered SmolLM2]")
    parser.add_argument("--types", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration", type=Path, help="text that weighs columns")
    parser.add_argument("--tokens", type=int, default=16_384, help="of that text")
    options = parser.parse_args()
    folder = options.model or dense_model()
    measured, weights = ruler(folder, options), {}
    if options.calibration is not None:
        weights = importance(folder, options.calibration, options.tokens)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    theirs = ggml_oracle.encode if ggml_oracle.library() is not None else None
    print(f"{'type':8}{'bits/w':>8}{'KL, ours':>18}{'KL, theirs':>18}{'MB/s, ours / theirs':>26}")
    for name in options.types:
        compiled = dense.lm_head.weight[:16, :256].float().detach().numpy()
        ours(name, compiled, np.ones(256, np.float32))
        line, tallies = "", []
        for encode in (ours, theirs):
            if encode is None:
                line += f"{'no xllamacpp':>18}"
                continue
            model, tally = stored(dense, name, encode, weights)
            kl = measured.measure(Network(model, name)).texts[0].divergence.kl
            line += f"{f'{kl.mean:.4f} +- {kl.error or 0:.4f}':>18}"
            tallies.append(tally)
        speeds = " / ".join(f"{tally.speed:.0f}" for tally in tallies)
        if len(tallies) == 2:
            speeds += f" = {tallies[0].speed / tallies[1].speed:.1f}"
        print(f"{name:8}{tallies[0].bits:8.2f}{line}{speeds:>26}", flush=True)


if __name__ == "__main__":
    main()
