"""Peak anonymous memory of a calibrated conversion, over what the formula states beforehand.

Without a model, a Llama of 1.1 billion random parameters is made (22 layers, 2.2 GB in bfloat16),
of which the first `--sketched` layers are compressed; `--layers` makes it shorter. What is stated:
what the process holds before the first block, one block twice with its sums and its solver
(`sketchconv/calibration/needs.py`), and the hidden states, which are in memory here.

    python tests/bench/bench_calibrated_memory.py [--layers 22] [--sketched 2] [--tokens 4096]
    python tests/bench/bench_calibrated_memory.py --model FOLDER --text FILE [--max-memory 700MB]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HIDDEN, INNER, HEADS, KEYS, VOCABULARY = 2048, 5632, 32, 4, 32_000


def make_model(folder: Path, layers: int) -> Path:
    """A folder with random weights, one file per layer, and a tokenizer of bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    places = {}
    for part, shapes in enumerate(parts(layers)):
        file = f"model-{part:05d}.safetensors"
        tensors = {name: values(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def parts(layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each file."""
    yield {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    keys = HIDDEN // HEADS * KEYS
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield {
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
            f"{at}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}self_attn.k_proj.weight": (keys, HIDDEN),
            f"{at}self_attn.v_proj.weight": (keys, HIDDEN),
            f"{at}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{at}mlp.up_proj.weight": (INNER, HIDDEN),
            f"{at}mlp.down_proj.weight": (HIDDEN, INNER),
        }


def values(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Gains near 1, weights of standard deviation 0.02."""
    noise = torch.randn(shape, generator=generator)
    return (1 + 0.1 * noise if len(shape) == 1 else 0.02 * noise).bfloat16()


def make_tokenizer() -> Any:
    """Bytes as tokens, and an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<eos>": len(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_text(path: Path, characters: int) -> Path:
    """Random words."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(1, 6))) for _ in range(60)]
    path.write_text(" ".join(generator.choices(words, k=characters // 3))[:characters])
    return path


def measure(model: Path, text: Path, out: Path, options: argparse.Namespace) -> None:
    """Convert, and print the peak over what was stated."""
    from sketchconv.calibration.needs import working_memory
    from sketchconv.calibration.options import Calibration
    from sketchconv.calibration.setting import make_setting
    from sketchconv.job import prepare
    from sketchconv.memory import anonymous_bytes, parse_size
    from sketchconv.pipeline import run
    from sketchconv.recipe import Recipe, SketchSpec

    include = tuple(f"*layers.{n}.*" for n in range(options.sketched)) if options.sketched else ()
    recipe = Recipe(SketchSpec(bits=options.bits), include=include)
    calibration = Calibration(
        text, tokens=options.tokens, seq_len=options.seq_len, device="cpu", recover=0
    )
    limit = parse_size(options.max_memory) if options.max_memory else None
    job = prepare(model, out, recipe, calibration=calibration, max_memory=limit)
    setting = make_setting(job, calibration, 0)
    width = int(setting.weights.model.config.hidden_size)
    # Between blocks, and within one what attention gives; in both models.
    hidden = 4 * setting.tokens * width * setting.weights.dtype.itemsize
    stated = {
        "before": anonymous_bytes(),
        "one block": working_memory(setting),
        "hidden states": hidden,
    }
    parameters = sum(step.parameters for step in job.plan.steps)
    del setting
    started = time.perf_counter()
    report = run(job, threads=options.threads, progress=_say if options.verbose else None)
    seconds = time.perf_counter() - started
    if report.calibration is None:
        raise RuntimeError("the conversion was not calibrated")
    total, peak = sum(stated.values()), report.calibration.peak_anonymous
    counted = report.calibration
    print(
        f"{model.name}: {parameters:,} parameters, {len(counted.weights)} weights in "
        f"{options.sketched or counted.blocks} of {counted.blocks} blocks, {counted.tokens:,} "
        f"tokens, {options.bits} bits, {seconds:.0f} s"
    )
    print("  stated: " + " + ".join(f"{name} {size / 1e6:.0f}" for name, size in stated.items()))
    print(f"  peak / stated: {peak / 1e6:.0f} / {total / 1e6:.0f} MB = {peak / total:.3f}")
    if limit is not None:
        print(f"  peak / limit: {peak / 1e6:.0f} / {limit / 1e6:.0f} MB = {peak / limit:.3f}")
    print(f"  peak while it was written: {report.peak_anonymous / 1e6:.0f} MB")


def _say(event: Any) -> None:
    sys.stderr.write(f"{event.done:,} of {event.total:,}: {event.name}\n")


def main() -> None:
    """Make the model where none is given, convert it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder, instead of the random model")
    parser.add_argument("--text", type=Path, help="to calibrate on, instead of random words")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--sketched", type=int, help="how many layers are compressed; all")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--max-memory", metavar="SIZE", help="hold the conversion to it")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, help="where to write; else a temporary folder")
    parser.add_argument("--verbose", action="store_true", help="progress on stderr")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        text = options.text or make_text(work / "words.txt", 8 * options.tokens + 20_000)
        model = options.model or make_model(work / f"random-{options.layers}", options.layers)
        measure(model, text, work / "out.sktch", options)


if __name__ == "__main__":
    main()
