"""Fine-tuning on WikiText-2: LUTs of a sketch against peft's LoRA on the same weights.

Both start from the same sketch. `lut` trains its LUTs with sketchconv; `lora` is what QLoRA does:
the sketch's weights, decoded and frozen, and an adapter on every linear layer. Same batches, steps,
warm-up, schedules, clipping and bfloat16 for both; schedule and learning rate are searched for both
and chosen by the loss on held-out windows of the validation text, from its end. What counts is the
perplexity on the test text.

Every run is one line of JSON in `WORK/runs.jsonl`, written when it is done; runs that are there
are not made again, so that the benchmark can be stopped and started, and several processes can work
side by side on shapes or rates of their own. `--only show` prints the table of what there is. The
rows of an H100 and of a CPU are kept in `adaptation.jsonl` beside this file; `tables.py` prints
them.

    python tests/bench/bench_adaptation.py --train wiki.valid.txt --test wiki.test.txt

The LoRA rank is the smallest with at least as many parameters as the LUTs; `--ranks` adds others.
Search LoRA's rate anew for each rank: SmolLM2, 4 bits, 16 steps, r = 9 gives 25.84 at 2e-3, the
best rate of r = 33, and 24.39 at 4e-3.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

LUT_RATES = (4e-3, 5.6e-3, 2.8e-3)
LORA_RATES = (2e-3, 2.8e-3, 1.4e-3)
SCHEDULES = ("cosine", "linear")
# Most telling first: what is not run today is run another day.
SHAPES = ((4, 4), (4, 1), (4, 8), (4, 2), (3, 4), (2, 4))
HELD_OUT = 0.1
WARMUP = 0.1


@dataclass(frozen=True)
class Run:
    """One training, or with 0 steps none."""

    kind: str  # "none", "lut" or "lora"
    bits: int
    groups: int
    rate: float = 0.0
    rank: int = 0
    steps: int = 0
    batch: int = 0
    length: int = 256
    gradient: str = "sum"
    relative: bool = True
    clip: float = 1.0
    epsilon: float = 1e-12
    windows: int = 0
    optimizer: str = "adamw"
    schedule: str = "cosine"
    base: str = "data-free"
    cautious: bool = True
    seed: int = 0  # of the order of the training text, and of LoRA's start

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Text:
    """Windows int64 ``[n, length]``: to train on, to choose the rate by, and to report."""

    training: Any
    held_out: Any
    test: Any


def windows_of(tokenizer: Any, options: argparse.Namespace) -> Text:
    """The training text without its end, its end, and the start of the test text."""
    import torch

    def cut(path: Path) -> Any:
        ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)
        flat = ids.input_ids[0]
        whole = flat.numel() // options.length
        return flat[: whole * options.length].view(whole, options.length)

    known = cut(options.train)
    end = int(len(known) * (1 - HELD_OUT))
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(end, generator=generator)
    count = options.windows
    parts = (known[order], known[end:][: max(1, count // 2)], cut(options.test)[:count])
    return Text(*(part.to(options.device) for part in parts))


def lut_model(path: Path, run: Run, device: str) -> tuple[Any, Any]:
    """The sketch, prepared, and its optimizer."""
    import torch

    import sketchconv
    from sketchconv.tuning.optimizer import lut_optimizer

    model = sketchconv.load(path, dtype=torch.bfloat16).to(device)
    if run.kind == "none":
        return model, None
    sketchconv.prepare_for_lut_training(model, gradient=run.gradient)
    mine = {"eps": run.epsilon, "cautious": run.cautious}
    options = mine if run.optimizer == "adamw" else {}
    kind: Any = run.optimizer
    optimizer = lut_optimizer(model, run.rate, optimizer=kind, relative=run.relative, **options)
    return model, optimizer


def lora_model(path: Path, run: Run, device: str) -> tuple[Any, Any]:
    """The decoded sketch with a LoRA adapter, in float32 as peft makes it."""
    import torch
    from peft import LoraConfig, get_peft_model

    import sketchconv

    model = sketchconv.load(path, dtype=torch.bfloat16)
    model = model.dequantize().requires_grad_(False)
    torch.manual_seed(run.seed)
    config = LoraConfig(
        r=run.rank, lora_alpha=2 * run.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config).to(device)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return adapted, torch.optim.AdamW(trained, lr=run.rate, weight_decay=0.0)


@contextmanager
def multiplied(model: Any, run: Run) -> Iterator[Any]:
    """Decoded weights, once per step, as `LutTrainer` has them; and quick attention for both."""
    import torch

    from sketchconv.recovery.attention import quicker_attention
    from sketchconv.recovery.products import decoded
    from sketchconv.runtime.modules import SketchLinear

    layers = [m for m in model.modules() if isinstance(m, SketchLinear)]
    with quicker_attention(), decoded(layers, torch.bfloat16 if run.kind != "lora" else None) as p:
        yield p


def loss_of(model: Any, windows: Any, batch: int = 4) -> float:
    """Mean loss per predicted token."""
    import torch

    model.eval()
    total = 0.0
    with torch.no_grad():
        for begin in range(0, len(windows), batch):
            part = windows[begin : begin + batch]
            total += float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part)
    return total / len(windows)


def share(step: int, run: Run) -> float:
    """Of the learning rate, at step 0, 1, ...: up linearly, then down, linearly or as a cosine."""
    warm = max(1, round(WARMUP * run.steps))
    if step < warm:
        return (step + 1) / warm
    way = (step - warm) / max(1, run.steps - warm)
    return 1 - way if run.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * way))


def train(model: Any, optimizer: Any, products: Any, text: Text, run: Run) -> list[float]:
    """All steps; CPU seconds of each, which other work on the machine changes little."""
    import torch

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    seconds = []
    for step in range(run.steps):
        started = time.process_time()
        products.refresh()
        at = (step * run.batch) % (len(text.training) - run.batch)
        part = text.training[at : at + run.batch]
        model(input_ids=part, labels=part, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, run.clip)
        for group in optimizer.param_groups:
            group["lr"] = run.rate * share(step, run)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - started)
    return seconds


def perform(run: Run, path: Path, text: Text, device: str) -> dict[str, Any]:
    """Train, and measure: LUTs rounded to the dtype of the file, as they would be shipped."""
    from sketchconv.tuning.masters import finish_lut_training

    prepared = lora_model if run.kind == "lora" else lut_model
    model, optimizer = prepared(path, run, device)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds: list[float] = []
    with multiplied(model, run) as products:
        if run.steps:
            seconds = train(model, optimizer, products, text, run)
        if run.kind == "lut":
            finish_lut_training(model)
        products.refresh()
        held_out, test = loss_of(model, text.held_out), loss_of(model, text.test)
    middle = sorted(seconds)[len(seconds) // 2] if seconds else 0.0
    facts = {"held_out": held_out, "test": test, "trained": count, "cpu_seconds_per_step": middle}
    return {**asdict(run), **facts, "device": device, "machine": machine(device)}


def machine(device: str) -> str:
    """The GPU, or the processor."""
    import torch

    from sketchconv.machine import find_machine

    there = torch.device(device)
    return torch.cuda.get_device_name(there) if there.type == "cuda" else find_machine().cpu


def sketch_of(bits: int, groups: int, options: argparse.Namespace) -> Path:
    """The sketch of this shape, made once, without a text or calibrated on one."""
    path: Path = options.work / f"b{bits}g{groups}-{base_of(options)}.sktch"
    if not path.exists():
        import sketchconv
        from sketchconv.calibration.options import Calibration
        from sketchconv.recipe import Recipe, SketchSpec

        recipe = Recipe(default=SketchSpec(bits=bits, groups=groups), weighting="moments")
        if options.calibration is None:
            sketchconv.convert(options.model, path, recipe)
        else:
            text = Calibration(options.calibration, recover=0, device=options.device)
            sketchconv.convert(options.model, path, recipe, calibration=text)
    return path


def base_of(options: argparse.Namespace) -> str:
    """What the sketches were made from."""
    return "data-free" if options.calibration is None else "calibrated"


def luts_of(path: Path) -> tuple[int, int]:
    """LUT values of the decoder's layers, and LoRA values of rank 1 on the same layers."""
    from sketchconv.formats.reader import SktchModel

    with SktchModel.open(path) as sketch:
        records = list(sketch.manifest.sketches.values())
    values = sum(r.shape[0] * r.groups * 2**r.bits for r in records)
    return values, sum(sum(r.shape) for r in records)


def plan(bits: int, groups: int, path: Path, options: argparse.Namespace) -> list[Run]:
    """All runs of one shape."""
    values, rank_one = luts_of(path)
    fair = math.ceil(values / rank_one)
    shared = {"length": options.length, "windows": options.windows, "base": base_of(options)}
    base = Run("none", bits, groups, **shared)
    work = replace(base, steps=options.steps, batch=options.batch, seed=options.seed)
    runs = [base]
    tables = replace(work, kind="lut", optimizer=options.optimizer)
    adapter = replace(work, kind="lora", epsilon=1e-8, cautious=False)
    lut = [
        replace(tables, rate=rate, schedule=schedule)
        for rate in options.lut_rates
        for schedule in options.schedules
    ]
    lora = [
        replace(adapter, rate=rate, rank=rank, schedule=schedule)
        for rank in (fair, *options.ranks)
        for rate in options.lora_rates
        for schedule in options.schedules
    ]
    runs += [run for pair in zip(lut, lora, strict=False) for run in pair]
    return runs + [run for run in (*lut, *lora) if run not in runs]


def ablations(options: argparse.Namespace) -> list[Run]:
    """One thing changed at a time; rates in the weights' own unit too."""
    work = Run("lut", 4, 4, steps=options.steps, batch=options.batch, length=options.length)
    work = replace(work, windows=options.windows, rate=options.ablation_rate, base=base_of(options))
    work = replace(work, seed=options.seed)
    absolute = [replace(work, relative=False, rate=rate) for rate in options.absolute_rates]
    return [
        replace(work, gradient="mean"),
        replace(work, gradient="mean", clip=0.2),
        replace(work, clip=1e9),
        replace(work, epsilon=1e-8),
        replace(work, cautious=False),
        *absolute,
    ]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Runs that were made, by their key."""
    found = {}
    names = Run.__dataclass_fields__
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        # Rows of before there was a choice.
        since = {"optimizer": "adamw", "schedule": "cosine", "base": "data-free", "cautious": False}
        row = since | {"seed": 0} | row
        found[Run(**{k: row[k] for k in names}).key] = row
    return found


def _seconds(row: dict[str, Any]) -> str:
    """Per step; rows of before have wall time."""
    if "cpu_seconds_per_step" in row:
        return f"{row['cpu_seconds_per_step']:5.2f} CPU s/step"
    return f"{row['seconds_per_step']:5.2f} s/step"


def tell(row: dict[str, Any]) -> None:
    """One row, as it is made."""
    name = row["kind"] + (f" r={row['rank']}" if row["kind"] == "lora" else "")
    extras = [row["optimizer"], row["gradient"]] if row["kind"] == "lut" else []
    extras += [] if row["relative"] else ["absolute"]
    extras += [] if row["clip"] < 1e8 else ["no clipping"]
    if extras[:1] == ["adamw"]:
        extras += [f"eps {row['epsilon']:g}", "cautious" if row["cautious"] else "plain"]
    extras += [f"seed {row['seed']}"] if row["seed"] else []
    print(
        f"{row['base']} {row['bits']} bits G={row['groups']} {name:10} lr {row['rate']:.0e} "
        f"{row['trained'] / 1e6:6.2f} M, test ppl {math.exp(row['test']):7.3f}, held-out "
        f"{math.exp(row['held_out']):7.3f}, {_seconds(row)}, "
        f"{row['steps']} x {row['batch']} x {row['length']} {row['schedule']} {' '.join(extras)}",
        flush=True,
    )


def show(rows: list[dict[str, Any]]) -> None:
    """For each shape and method the run with the best held-out loss."""
    print("\nbest learning rate by held-out loss:")
    usual = {"gradient": "sum", "relative": True, "clip": 1.0}
    plain = [r for r in rows if all(r[k] == v for k, v in usual.items())]
    plain = [r for r in plain if not (r["kind"] == "lut" and r["epsilon"] != Run.epsilon)]
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in plain:
        work = (row["steps"], row["batch"], row["length"], row["windows"])
        shape = (row["bits"], row["groups"], row["kind"], row["rank"], row["base"], work)
        shape += (row["optimizer"], row["cautious"], row["seed"])
        groups.setdefault(shape, []).append(row)
    for key in sorted(groups, key=lambda k: (-k[0], k[1], k[2] != "none", k[2], k[3])):
        tell(min(groups[key], key=lambda row: row["held_out"]))


def options_of() -> argparse.Namespace:
    """The command line."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--model", type=Path, help="dense folder [default: dithered SmolLM2-135M]")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("adaptation"))
    parser.add_argument("--calibration", type=Path, help="text that the sketches are made with")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128, help="of the test text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="*", default=[])
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="of LUTs")
    parser.add_argument("--lut-rates", type=float, nargs="*", default=LUT_RATES)
    parser.add_argument("--lora-rates", type=float, nargs="*", default=LORA_RATES)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the training text")
    parser.add_argument("--ablation-rate", type=float, default=4e-3)
    parser.add_argument("--absolute-rates", type=float, nargs="*", default=[2e-4, 4e-4, 8e-4])
    parser.add_argument("--shapes", nargs="+", help="as 4x1: bits x groups [default: all]")
    parser.add_argument("--only", choices=["table", "ablations", "show"])
    return parser.parse_args()


def main() -> None:
    """Make the runs that are missing, one row each, and print the table."""
    options = options_of()
    options.work.mkdir(parents=True, exist_ok=True)
    store = options.work / "runs.jsonl"
    done = read(store)
    if options.only == "show":
        show(list(done.values()))
        return
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.model is None:
        from dithered import dense_model

        options.model = dense_model()
    text = windows_of(AutoTokenizer.from_pretrained(options.model), options)
    shapes = [tuple(map(int, s.split("x"))) for s in options.shapes or ()] or SHAPES
    for bits, groups in shapes:
        path = sketch_of(bits, groups, options)
        runs = [] if options.only == "ablations" else plan(bits, groups, path, options)
        if options.only != "table" and (bits, groups) == (4, 4):
            runs += ablations(options)
        for run in runs:
            row = done.get(run.key)
            if row is None:
                row = done[run.key] = perform(run, path, text, options.device)
                with store.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            tell(row)
    show(list(done.values()))


if __name__ == "__main__":
    main()
