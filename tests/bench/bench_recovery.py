"""What recovery gains and what it costs: KL before and after, tokens per second, parts of a step.

A sketch is trained against its dense model on one text and measured on others, each cut into
windows; nothing is written.

    python tests/bench/bench_recovery.py DENSE SKETCH --text train.txt --measure test.txt other.txt
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALL = 8  # windows run through a model at a time


def windows(tokenizer: Any, path: Path, count: int, length: int) -> Any:
    """The first `count` windows of a text, int64 ``[count, length]``."""
    import torch

    ids = torch.tensor(tokenizer(path.read_text(encoding="utf-8"))["input_ids"])
    whole = min(count, ids.numel() // length)
    return ids[: whole * length].view(whole, length)


def states(model: Any, ids: Any) -> Any:
    """Final hidden states of a model for windows."""
    import torch

    from sketchconv.recovery.student import Student

    seen = Student(model)
    with torch.no_grad():
        return torch.cat([seen.hidden(ids[n : n + SMALL]) for n in range(0, len(ids), SMALL)])


def measure(model: Any, head: Any, ids: Any, hidden: Any) -> tuple[float, float]:
    """Mean KL(dense || model), and the perplexity of the model."""
    import torch

    from sketchconv.recovery.divergence import divergence

    losses, missed = [], []
    for n in range(len(ids)):
        found = states(model, ids[n : n + 1])[0]
        losses.append(divergence(head, hidden[n], head, found, gradient=False)[0])
        logits = head.logits(found[:-1])
        missed.append(torch.nn.functional.cross_entropy(logits, ids[n, 1:], reduction="none"))
    return float(torch.cat(losses).mean()), math.exp(float(torch.cat(missed).mean()))


def parts_of_a_step(path: Path, ids: Any, hidden: Any, tokens: int) -> str:
    """CPU seconds of the parts of one step, warmed up."""
    import torch

    import sketchconv
    from sketchconv.recovery.divergence import divergence
    from sketchconv.recovery.products import decoded
    from sketchconv.recovery.student import Student, prepared, working_dtype
    from sketchconv.recovery.tables import Tables

    seen = Student(sketchconv.load(path, dtype=torch.bfloat16))
    dtype = working_dtype(seen.device)
    rows = slice(0, max(1, tokens // ids.shape[1]))
    with prepared(seen.model, dtype):
        head, tables = seen.head(dtype), Tables(seen.modules, lambda _: 1e-6)
        tables.open()
        with decoded(seen.modules, dtype) as products:
            for _ in range(2):
                marks = [time.process_time()]
                products.refresh()
                marks.append(time.process_time())
                found = seen.hidden(ids[rows]).flatten(0, 1)
                marks.append(time.process_time())
                _, grad = divergence(head, hidden[rows].flatten(0, 1), head, found.detach())
                marks.append(time.process_time())
                found.backward(grad)
                marks.append(time.process_time())
                tables.step(1.0, (0.9, 0.95))
                marks.append(time.process_time())
    names = ("decode", "forward", "loss", "backward", "adam")
    took = zip(names, marks, marks[1:], strict=False)
    return ", ".join(f"{name} {last - first:.2f}" for name, first, last in took)


def parse() -> argparse.Namespace:
    """The command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("dense", type=Path, help="Hugging Face folder")
    parser.add_argument("sketch", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to train on")
    parser.add_argument("--measure", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[None])
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[None])
    parser.add_argument("--length", type=int, default=256, help="of the windows to train on")
    parser.add_argument("--windows", type=int, default=4, help="of each text that is measured")
    parser.add_argument("--exam-length", type=int, default=1024, help="of these windows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    return parser.parse_args()


def show(label: str, model: Any, head: Any, exams: Sequence[tuple[str, Any, Any]]) -> None:
    """One line: the model on each text."""
    found = [(name, *measure(model, head, ids, hidden)) for name, ids, hidden in exams]
    text = "; ".join(f"{name} KL {kl:.4f}, perplexity {ppl:.2f}" for name, kl, ppl in found)
    print(f"{label}: {text}", flush=True)


def main() -> None:
    """Print a line per setting, and the parts of a step."""
    options = parse()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sketchconv
    from sketchconv.recovery.options import RecoveryOptions
    from sketchconv.recovery.student import Student
    from sketchconv.recovery.train import recover

    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    dense = AutoModelForCausalLM.from_pretrained(options.dense, dtype=torch.bfloat16)
    head = Student(dense).head(torch.bfloat16)
    most = -(-max(options.tokens) * 8 // 7) // options.length + 1
    ids = windows(tokenizer, options.text, most, options.length)
    hidden, exams = states(dense, ids), []
    for path in options.measure:
        exam = windows(tokenizer, path, options.windows, options.exam_length)
        exams.append((path.stem, exam, states(dense, exam)))
    del dense
    parts = parts_of_a_step(options.sketch, ids, hidden, 1024)
    print(f"{torch.get_num_threads()} thread(s), 1024 tokens, CPU seconds: {parts}")
    show("before", sketchconv.load(options.sketch, dtype=torch.bfloat16), head, exams)
    for tokens in options.tokens:
        for per_step in options.step_tokens:
            for rate in options.learning_rate:
                settings = {} if per_step is None else {"step_tokens": per_step}
                asked = RecoveryOptions(rate, tokens, seed=options.seed, **settings)
                model = sketchconv.load(options.sketch, dtype=torch.bfloat16)
                result = recover(model, ids, hidden, None, asked)
                label = (
                    f"{tokens} tokens, {asked.step_tokens} per step, rate {rate or 'by bits'}: "
                    f"held-out {result.kl_before:.4f} -> {result.kl_after:.4f}, "
                    f"{result.tokens / result.seconds:.0f} tokens/s"
                )
                show(label, model, head, exams)


if __name__ == "__main__":
    main()
