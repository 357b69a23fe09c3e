"""One fine-tuning step: LUT training against LoRA and against a dense detour for every weight.

Each contender lives in a process of its own and they take turns, one step (forward, backward,
AdamW) per round, on the same windows of text in bfloat16. Peak memory is that of the process during
the step, above what it had with the model loaded and warmed up: activations, gradients and the
optimizer's state.

- `lut`: every LUT of the sketch is trained, in float32.
- `lora`: peft, r = 16 on all linear layers of the dense model, adapters in float32 as peft makes
  them; `lora-bf16` keeps the adapters in bfloat16.
- `gather`: the formulation of the paper's own code, written in torch: the dense weight is gathered
  from indices and LUT for every product; the backward makes the dense gradient and then adds it up
  by index.

    python tests/bench/bench_tuning.py [MODEL] [--text FILE] [--batch 4] [--length 256]

Without --text the text is this repository's own (README.md, spec/sktch.md).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from contest import Contender, Result, Unavailable, child_name, compete, contest, serve
from recipes import WORK, dense_folder, sketch, source
from timing import ratio

ROOT = Path(__file__).resolve().parent.parent.parent
CONTENDERS = ("lut", "lora", "lora-bf16", "gather")
WARM_TOKENS = 32
LEARNING_RATE = 1e-4


def memory_line(name: str) -> int:
    """Bytes that /proc/self/status gives for `name`."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise Unavailable(f"/proc/self/status has no {name}")
    return int(found[1]) << 10


def forget_peak() -> None:
    """Let the peak of this process start from what it has now."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """Return freed memory to the system, so that it does not count as the model's."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def windows(tokenizer: Any, text: str, batch: int, length: int) -> Any:
    """The first `batch` windows of `length` tokens, as ``[batch, length]``."""
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if ids.numel() < batch * length:
        raise Unavailable(f"the text has {ids.numel()} tokens, {batch * length} are needed")
    return ids[: batch * length].reshape(batch, length)


def lut_training(path: Path) -> Any:
    """The sketch with float32 LUTs, all trainable."""
    import torch

    import sketchconv

    model = sketchconv.load(path, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(getattr(module, "sketch_lut", None), torch.nn.Parameter):
            module.sketch_lut = torch.nn.Parameter(module.sketch_lut.detach().float())
    return model


def lora(path: Path, own_dtype: bool) -> Any:
    """peft's LoRA on all linear layers."""
    if importlib.util.find_spec("peft") is None:
        raise Unavailable("peft is not installed")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=not own_dtype)


def gather_training(path: Path) -> Any:
    """The sketch, each linear layer replaced by the formulation with dense weights."""
    from sketchconv.runtime.modules import SketchLinear

    model = lut_training(path)
    for name, module in list(model.named_modules()):
        if isinstance(module, SketchLinear):
            model.set_submodule(name, gather_linear(module))
    return model


def gather_linear(layer: Any) -> Any:
    """A layer with the weight of `layer` that goes through its dense form, forward and back."""
    import torch

    from sketchconv.kernels.plain import unpack

    class Product(torch.autograd.Function):
        @staticmethod
        def codes(index: Any, lut: Any, columns: int) -> Any:
            bits = lut.shape[2].bit_length() - 1
            return unpack(index, bits, columns // lut.shape[1]).long()

        @staticmethod
        def forward(ctx: Any, x: Any, index: Any, lut: Any) -> Any:
            ctx.save_for_backward(x, index, lut)
            codes = Product.codes(index, lut, x.shape[-1])
            weight = lut.to(x.dtype).gather(2, codes).reshape(lut.shape[0], -1)
            return torch.nn.functional.linear(x, weight)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            x, index, lut = ctx.saved_tensors
            codes = Product.codes(index, lut, x.shape[-1])
            weight = lut.to(x.dtype).gather(2, codes).reshape(lut.shape[0], -1)
            dense = grad.flatten(0, -2).T @ x.flatten(0, -2)
            total = torch.zeros_like(lut)
            total.scatter_add_(2, codes, dense.float().reshape(codes.shape))
            return grad @ weight, None, total

    class GatherLinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", layer.sketch_index)
            self.lut, self.bias = layer.sketch_lut, layer.bias

        def forward(self, x: Any) -> Any:
            y = Product.apply(x, self.index, self.lut)
            return y if self.bias is None else y + self.bias

    return GatherLinear()


def prepare(name: str, options: argparse.Namespace) -> Callable[[], Result]:
    """The model of one contender, warmed up, and its step."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    given = source(options.model)
    folder = dense_folder(given, options.work)
    text = "\n".join(path.read_text() for path in options.text)
    ids = windows(AutoTokenizer.from_pretrained(folder), text, options.batch, options.length)
    if name.startswith("lora"):
        model = lora(folder, own_dtype=name == "lora-bf16")
    else:
        make = lut_training if name == "lut" else gather_training
        model = make(sketch(given, options.work, None))
    model.train()
    return stepper(model, ids)


def stepper(model: Any, ids: Any) -> Callable[[], Result]:
    """One step of AdamW, timed, with its peak memory above what there is now."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def backward(batch: Any) -> float:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    backward(ids[:1, :WARM_TOKENS])
    optimizer.zero_grad(set_to_none=True)
    give_back()
    loaded = memory_line("VmRSS")

    def step() -> Result:
        give_back()
        forget_peak()
        started = time.perf_counter()
        loss = backward(ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        peak = memory_line("VmHWM") - loaded
        count = float(sum(p.numel() for p in trained))
        return {"seconds": seconds, "peak": float(peak), "loss": loss, "trained": count}

    return step


def show(contenders: Sequence[Contender]) -> None:
    """Medians of all, then ratios of ours to each of the others."""
    for contender in contenders:
        losses = [result["loss"] for result in contender.results]
        print(
            f"  {contender.name:9} {contender.median('seconds'):6.2f} s, peak "
            f"{contender.median('peak') / 1e6:6.0f} MB above the model, "
            f"{contender.median('trained') / 1e6:.2f} M parameters, "
            f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
        )
    for peer in (c for c in contenders if c.name != "lut"):
        for mine in (c for c in contenders if c.name == "lut"):
            for key, unit, scale in (("seconds", "s", 1.0), ("peak", "MB", 1e-6)):
                top, bottom = mine.median(key), peer.median(key)
                text = ratio(top, bottom, unit, scale=scale, digits=2 if unit == "s" else 0)
                print(f"  lut / {peer.name}, {key}: {text}")


def main() -> None:
    """Print seconds and peak memory of a step, and ratios."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("model", type=Path, nargs="?", help="[default: SmolLM2-135M]")
    own = [ROOT / "README.md", ROOT / "spec" / "sktch.md"]
    parser.add_argument("--text", type=Path, nargs="+", default=own)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--work", type=Path, default=WORK, help="where sketches are kept")
    options = parser.parse_args()
    name = child_name()
    if name is not None:
        serve(lambda: prepare(name, options))
        return
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("peak memory is measured by /proc/self/clear_refs, which this system lacks")

    given = source(options.model)
    dense_folder(given, options.work)
    sketch(given, options.work, None)
    print(
        f"{given.name}, {options.batch} x {options.length} tokens, {options.threads} thread(s), "
        f"{options.rounds} steps"
    )
    variables = {"OMP_NUM_THREADS": str(options.threads), "TRANSFORMERS_VERBOSITY": "error"}
    with contest(options.contenders, sys.argv[1:], lambda _: variables) as contenders:
        compete(contenders, options.rounds)
    show(contenders)


if __name__ == "__main__":
    main()
