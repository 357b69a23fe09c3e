"""Held-out error of single layers: ours against the recipe of LeanQuant's README.

Weights and inputs are those of the dense models: SmolLM2-135M (dithered), block 12, and MiniLM,
layer 2. Both methods get the same second moments of inputs over the same calibration tokens, of
which ours keeps a slice apart to choose its damping by; asymmetric targets are off, so that both
aim at the same weight. What counts is `||(W - Q) X||^2 / ||W X||^2` over tokens of another text.

    python tests/bench/bench_layer_error.py --calibration wiki.valid.txt --text wiki.test.txt
        [--tokens 16384] [--bits 4 3 2]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent))
from dithered import dense_model
from models import MINILM, fetch

HELD_OUT = 0.2  # of the calibration windows
SMOLLM2_NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
MINILM_NAMES = ("attention.self.query", "attention.output.dense", "intermediate.dense",
                "output.dense")  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A weight ``[out, in]`` and second moments of its inputs ``[in, in]``, all float32."""

    name: str
    weight: Tensor
    fitted: Tensor
    held_out: Tensor
    test: Tensor
    tokens: int


class Moments:
    """Adds up ``X'X`` of the inputs of modules while the model runs."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0
        for name, module in modules.items():
            module.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            self.sums[name] = self.sums.get(name, 0) + x.mT @ x

        return add

    def over(self, model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
        """Means over the tokens of these windows."""
        self.sums = {}
        with torch.no_grad():
            for window in windows:
                model(input_ids=window[None])
        return {name: total / windows.numel() for name, total in self.sums.items()}


def windows_of(folder: Path, text: Path, options: Any) -> Tensor:
    """The start of a text, int64 ``[windows, tokens of a window]``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False, add_special_tokens=False)
    count = min(len(ids.input_ids), options.tokens) // options.window
    return torch.tensor(ids.input_ids[: count * options.window]).view(count, options.window)


def layers_of(folder: Path, block: str, names: tuple[str, ...], options: Any) -> list[Layer]:
    """The block's weights, with moments over calibration, held-out and test windows."""
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    modules = {name: model.get_submodule(f"{block}.{name}") for name in names}
    moments = Moments(modules)
    known = windows_of(folder, options.calibration, options)
    test = windows_of(folder, options.text, options)
    end = round(len(known) * (1 - HELD_OUT))
    parts = [moments.over(model, part) for part in (known[:end], known[end:], test)]
    return [
        Layer(f"{folder.name} {name}", module.weight.detach().float(),
              *(part[name] for part in parts), known[:end].numel())
        for name, module in modules.items()
    ]  # fmt: skip


def lost(layer: Layer, bits: int, method: Any, held_out: Tensor | None) -> float:
    """The error of a method over the test tokens."""
    from sketchconv.calibration.solve import solve
    from sketchconv.calibration.statistics import Statistics

    statistics = Statistics(layer.fitted, layer.tokens, held_out=held_out)
    found = solve(layer.weight, bits, 1, "F16", method, statistics)
    wrong = layer.weight - found.lut[:, 0].float().gather(1, found.indices.long())
    return float(((wrong @ layer.test) * wrong).sum() / energy(layer))


def energy(layer: Layer) -> Tensor:
    """``||W X||^2`` over the test tokens."""
    return ((layer.weight @ layer.test) * layer.weight).sum()


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True, help="text, UTF-8")
    parser.add_argument("--text", type=Path, required=True, help="another text, to measure on")
    parser.add_argument("--smollm2", type=Path, help="a Llama folder instead")
    parser.add_argument("--minilm", type=Path, help="a BERT folder instead")
    parser.add_argument("--blocks", type=int, nargs=2, default=(12, 2), help="of the two models")
    parser.add_argument("--tokens", type=int, default=16_384, help="of each text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    return parser.parse_args()


def main() -> None:
    """One line per weight and width, and the mean of the ratios."""
    from transformers.utils import logging

    from sketchconv.calibration.methods import METHODS

    options = options_of()
    logging.disable_progress_bar()
    ours, theirs = replace(METHODS["sketch"], asymmetric=False), METHODS["leanquant"]
    llama, bert = options.smollm2 or dense_model(), options.minilm or fetch(MINILM)
    layers = layers_of(llama, f"layers.{options.blocks[0]}", SMOLLM2_NAMES, options)
    layers += layers_of(bert, f"encoder.layer.{options.blocks[1]}", MINILM_NAMES, options)
    ratios = []
    for layer in layers:
        # The published recipe knows of no held-out tokens: it gets all of them to fit on.
        share = 1 / (1 - HELD_OUT)
        whole = replace(layer, fitted=(layer.fitted + (share - 1) * layer.held_out) / share)
        for bits in options.bits:
            pair = lost(layer, bits, ours, layer.held_out), lost(whole, bits, theirs, None)
            ratios.append(pair[0] / pair[1])
            print(f"{layer.name:40} {bits} bits: error ours / LeanQuant "
                  f"{pair[0]:.5f} / {pair[1]:.5f} = {ratios[-1]:.3f}", flush=True)  # fmt: skip
    print(f"mean of {len(ratios)} ratios: {math.fsum(ratios) / len(ratios):.3f}")


if __name__ == "__main__":
    main()
