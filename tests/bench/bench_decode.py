"""Decoding speed of sketches against other ways to run the same model, one token at a time.

Each contender lives in a process of its own; they take turns, one run each per round, and what
counts are medians over the rounds. All decode greedily the same number of tokens after the same
prompt; the clock runs from the first new token to the last, so that reading the prompt does not
count. `sketch` is `model.generate` of a loaded sketch, as anybody calls it; `modules` is the same
without the compiled step (`type(model).generate`); `generate` is `sketchconv generate`. The
numbers behind their names are the bits of the embeddings (and of a tied head).

    python tests/bench/bench_decode.py [MODEL] [--threads 1 2] [--tokens 64] [--rounds 5]

MODEL is a dense folder or a .gguf file [default: SmolLM2-135M, Q4_1]; llama.cpp and packed GGUF
take part only with a .gguf file.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from contest import Contender, Result, Unavailable, child_name, compete, contest, serve
from recipes import WORK, dense_folder, sketch, source
from timing import ratio

PROMPT = "Once upon a time there was a small village at the foot of a mountain, and"
OURS = ("modules", "sketch", "generate")
PEERS = ("bf16", "fp32", "nf4", "gguf", "llama.cpp")


def transformers_run(
    model: Any, tokenizer: Any, tokens: int, generate: Callable[..., Any] | None = None
) -> Callable[[], Result]:
    """A greedy run of `generate` (the model's own) that no end of sequence stops."""
    import torch

    generate = generate or model.generate

    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    class Clock:
        """A streamer that notes when tokens come; the prompt comes first."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _tokens: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            """Nothing to do."""

    def run(count: int = tokens) -> Result:
        clock = Clock()
        with torch.inference_mode():
            generate(ids, max_new_tokens=count, do_sample=False, streamer=clock)
        first, last = clock.times[1], clock.times[-1]
        return {"rate": (len(clock.times) - 2) / max(last - first, 1e-9)}

    run(min(8, tokens))  # compiles kernels, warms caches
    return run


def in_transformers(path: Path, tokens: int, dtype: str, **kwargs: Any) -> Callable[[], Result]:
    """A dense model, or one that transformers quantizes while it loads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"dtype": getattr(torch, dtype), **kwargs}
    model = AutoModelForCausalLM.from_pretrained(path, **given)
    return transformers_run(model, AutoTokenizer.from_pretrained(path), tokens)


def nf4(path: Path, tokens: int) -> Callable[[], Result]:
    """bitsandbytes NF4 on the CPU, computing in bfloat16."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Unavailable("bitsandbytes is not installed")
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return in_transformers(path, tokens, "bfloat16", quantization_config=config, device_map="cpu")


def packed_gguf(path: Path, tokens: int) -> Callable[[], Result]:
    """The .gguf file in transformers, if it leaves the weights packed."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    if not any("gguf" in type(module).__name__.lower() for module in model.modules()):
        raise Unavailable(
            f"transformers {transformers.__version__} decodes this file into dense weights when it "
            "loads it (no packed kernel for this architecture or machine)"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return transformers_run(model, tokenizer, tokens)


def llama_cpp(path: Path, tokens: int, threads: int) -> Callable[[], Result]:
    """llama.cpp by the `xllamacpp` wheel, on the .gguf file; the rate is its own measurement."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise Unavailable("xllamacpp is not installed")
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.n_predict = 512, 1, tokens
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    request = {
        "prompt": PROMPT,
        "n_predict": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }

    def run() -> Result:
        timings = server.handle_completions(request)["timings"]
        # it too counts from the first new token: intervals, not tokens
        return {"rate": float(timings["predicted_per_second"])}

    run()
    return run


def loaded_sketch(path: Path, tokens: int) -> Callable[[], Result]:
    """The sketch, by `model.generate`."""
    import sketchconv

    return transformers_run(sketchconv.load(path), sketchconv.load_tokenizer(path), tokens)


def modules_alone(path: Path, tokens: int) -> Callable[[], Result]:
    """The sketch's modules in transformers' own loop."""
    import sketchconv

    model = sketchconv.load(path)
    generate = functools.partial(type(model).generate, model)
    return transformers_run(model, sketchconv.load_tokenizer(path), tokens, generate)


def own_loop(path: Path, tokens: int) -> Callable[[], Result]:
    """The sketch, by the loop of `sketchconv generate`."""
    import sketchconv
    from sketchconv.runtime.generate import Pace, stream

    model, tokenizer = sketchconv.load(path), sketchconv.load_tokenizer(path)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None

    def run(count: int = tokens) -> Result:
        pace = Pace()
        for _ in stream(model, tokenizer, PROMPT, max_new_tokens=count, chat=False, pace=pace):
            pass
        return {"rate": pace.per_second}

    run(min(8, tokens))
    return run


def prepare(name: str, options: argparse.Namespace) -> Callable[[], Result]:
    """The run of one contender, in its child."""
    model = source(options.model)
    if name in ("gguf", "llama.cpp") and model.suffix != ".gguf":
        raise Unavailable("the model is not a .gguf file")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    threads, tokens = options.threads[0], options.tokens
    torch.set_num_threads(threads)
    kind, _, bits = name.partition("-")
    if kind in OURS:
        runs = {"modules": modules_alone, "sketch": loaded_sketch, "generate": own_loop}
        return runs[kind](sketch(model, options.work, int(bits)), tokens)
    if kind in ("bf16", "fp32"):
        dtype = "bfloat16" if kind == "bf16" else "float32"
        return in_transformers(dense_folder(model, options.work), tokens, dtype)
    if kind == "nf4":
        return nf4(dense_folder(model, options.work), tokens)
    return packed_gguf(model, tokens) if kind == "gguf" else llama_cpp(model, tokens, threads)


def environment(name: str, threads: int) -> dict[str, str]:
    """As users have it: `sketchconv generate` sets the wait policy, the others leave it."""
    own = {"OMP_WAIT_POLICY": "PASSIVE"} if name.startswith("generate") else {}
    return {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error", **own}


def arguments(options: argparse.Namespace, threads: int) -> list[str]:
    """Command line of the children."""
    words = ["--threads", str(threads), "--tokens", str(options.tokens)]
    words += ["--work", str(options.work)]
    return words if options.model is None else [str(options.model), *words]


def show(contenders: Sequence[Contender]) -> None:
    """Medians of all, then ratios of ours to each of the others."""
    for contender in contenders:
        rates = [result["rate"] for result in contender.results]
        print(
            f"  {contender.name:11} median {contender.median('rate'):6.1f} tokens/s "
            f"(lowest {min(rates):.1f}, highest {max(rates):.1f})"
        )
    for mine in (c for c in contenders if c.name.startswith(OURS)):
        for peer in (c for c in contenders if not c.name.startswith(OURS)):
            text = ratio(mine.median("rate"), peer.median("rate"), "tokens/s")
            print(f"  {mine.name} / {peer.name}: {text}")


def main() -> None:
    """Print tokens per second and ratios, for each number of threads."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each run, 2 or more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--embed-bits", type=int, nargs="+", default=(8, 4))
    parser.add_argument("--ours", nargs="+", choices=OURS, default=OURS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--work", type=Path, default=WORK, help="where sketches are kept")
    options = parser.parse_args()
    name = child_name()
    if name is not None:
        serve(lambda: prepare(name, options))
        return

    from sketchconv.kernels.dispatch import choose

    model = source(options.model)
    dense_folder(model, options.work)
    for bits in options.embed_bits:
        sketch(model, options.work, bits)
    names = [f"{kind}-{bits}" for bits in options.embed_bits for kind in options.ours]
    names += options.peers
    print(f"{model.name}, kernels {choose().name}: {choose().reason}")
    for threads in options.threads:
        print(f"\n{threads} thread(s), {options.rounds} rounds of {options.tokens} tokens")
        given = arguments(options, threads)
        with contest(names, given, lambda name, n=threads: environment(name, n)) as contenders:
            compete(contenders, options.rounds)
        show(contenders)


if __name__ == "__main__":
    main()
