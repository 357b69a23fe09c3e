"""What each method keeps of a model at each size: one table, on the dithered SmolLM2-135M.

Every row compresses the same dense model, calibrated on the same text, and is measured with the
same windows of two other texts: one of the calibration's domain, and Python's licence and sources.
Methods are ranked by their KL to the dense model. Finished rows are kept in `methods.jsonl`, beside
this file, with the machine that made them: a run can be stopped and taken up again, and goes on
with what is missing there. With `--results` of one's own everything is measured anew.

    python tests/bench/bench_methods.py --calibration wikitext2-valid.txt --text wikitext2-test.txt
        [--bits 4 3 2] [--groups 1 4] [--only 'sketch*' ...] [--device cuda] [--plot table.png]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from dithered import dense_model, other_domain
from peers import PEERS, apply

AFFINE = ("rtn", "gptq")
GIVEN = ""
# name -> method, calibration texts, what LUTs are trained by afterwards
METHODS: dict[str, tuple[str | None, tuple[str, ...], str | None]] = {
    "free": (None, (), None),
    "rtn": ("rtn", (), None),
    "kmeans": ("kmeans", (), None),
    "gptq": ("gptq", (GIVEN,), None),
    "leanquant": ("leanquant", (GIVEN,), None),
    "sketch": ("sketch", (GIVEN,), None),
    "sketch+blocks": ("sketch", (GIVEN,), "blocks"),
    "sketch+recover": ("sketch", (GIVEN,), "model"),
    "self": ("sketch", ("self",), None),
    "self+recover": ("sketch", ("self",), "model"),
    "mixed+recover": ("sketch", (GIVEN, "self"), "model"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One contender: a method at a size, or a peer (bits and groups None)."""

    name: str
    bits: int | None = None
    groups: int | None = None

    @property
    def title(self) -> str:
        """What `--only` is matched against, and the key of a finished row."""
        return self.name if self.bits is None else f"{self.name} {self.bits} G={self.groups}"


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """The rows that were asked for, in the order of the patterns; all, small ones first."""
    found = [Row(name) for name in PEERS]
    for groups in options.groups:
        found += [Row(name, bits, groups) for bits in options.bits for name in METHODS]
    wanted = options.only
    asked = (row for p in wanted or ["*"] for row in found if fnmatchcase(row.title, p))
    return iter(dict.fromkeys(asked))


class Bench:
    """The dense model, its ruler, and what it takes to make a row."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        from sketchconv.evaluation.opening import open_network
        from sketchconv.evaluation.reference import Reference
        from sketchconv.evaluation.ruler import Ruler, Text
        from sketchconv.evaluation.windows import Cut, cut_windows, read_text

        self.options = options
        self.dense = options.model or dense_model()
        tokenizer = AutoTokenizer.from_pretrained(self.dense)
        cut = Cut(options.seq_len, None, options.windows)
        texts = {options.text.stem: read_text(options.text), "python": other_domain()}
        cut_texts = [Text(n, tuple(cut_windows(tokenizer, t, cut, n))) for n, t in texts.items()]
        reference = Reference(open_network(self.dense, device=options.device), cut_texts)
        self.ruler = Ruler(cut_texts, reference)

    def conditions(self) -> dict[str, Any]:
        """What two rows must share to be compared."""
        o = self.options
        shared = {"windows": o.windows, "seq_len": o.seq_len, "tokens": o.tokens, "seed": o.seed}
        return {
            **shared,
            "recover": o.recover,
            "model": self.dense.name,
            "calibration": o.calibration.name,
            "text": o.text.name,
            "python": ".".join(map(str, sys.version_info[:2])),
        }

    def measure(self, row: Row) -> dict[str, Any]:
        """Compress, measure, and tell."""
        from sketchconv.evaluation.network import Network

        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            model, bits_per_weight = self._make(row, Path(folder))
            seconds = time.perf_counter() - started
            measured = self.ruler.measure(Network(model.to(self.options.device), row.title))
        own = {text.text: text.perplexity for text in measured.reference or ()}
        return {
            "row": row.title,
            "bits_per_weight": bits_per_weight,
            "seconds": seconds,
            "device": self.options.device,
            "machine": self._machine(),
            "texts": {text.text: asdict(text) for text in measured.texts},
            "layers": measured.layers,
            "dense": own,
            "conditions": self.conditions(),
        }

    def _make(self, row: Row, folder: Path) -> tuple[Any, float]:
        """The compressed model, and the bits that one decoder weight takes."""
        if row.bits is None or row.groups is None:
            from transformers import AutoModelForCausalLM

            peer = PEERS[row.name]()
            return apply(
                AutoModelForCausalLM.from_pretrained(self.dense, dtype="auto"), peer
            ), peer.bits_per_weight
        import sketchconv
        from sketchconv.recipe import Recipe, SketchSpec

        recipe = Recipe(SketchSpec(row.bits, row.groups))
        out = folder / "model.sktch"
        calibration = self._calibration(row)
        options = {} if calibration is None else {"calibration": calibration}
        report = sketchconv.convert(
            self.dense, out, recipe, threads=self.options.threads, **options
        )
        return sketchconv.load(out), stored_bits(report, affine=row.name in AFFINE)

    def _machine(self) -> str:
        """The processor and its threads, or the GPU."""
        import torch

        from sketchconv.machine import find_machine

        if torch.device(self.options.device).type == "cuda":
            return torch.cuda.get_device_name(self.options.device)
        return f"{find_machine().cpu}, {torch.get_num_threads()} threads"

    def _calibration(self, row: Row) -> Any:
        method, texts, recover_by = METHODS[row.name]
        if method is None:
            return None
        from sketchconv.calibration.options import Calibration

        o = self.options
        return Calibration(
            tuple(text or str(o.calibration) for text in texts) or None,
            tokens=o.tokens,
            seq_len=o.seq_len,
            seed=o.seed,
            method=method,
            device=o.device,
            recover=o.recover if recover_by else 0,
            recover_by=recover_by or "auto",
        )


def stored_bits(report: Any, *, affine: bool) -> float:
    """Bits per sketched weight; an affine grid is counted as 16-bit scale and zero per group."""
    from sketchconv.report import sketched_bits_per_weight

    if not affine:
        return sketched_bits_per_weight(report.plan.steps)
    steps = [step for step in report.plan.steps if step.record is not None]
    weights = sum(step.parameters for step in steps)
    bits = sum(
        step.record.bits * step.parameters + 32 * step.record.groups * step.info.shape[0]
        for step in steps
    )
    return bits / weights


def finished(path: Path, conditions: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of a results file that were measured under these conditions; the last of a name."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {r["row"]: r for r in records if r["conditions"] == conditions}


def table(records: dict[str, dict[str, Any]]) -> str:
    """Rows by bits, then by KL on the first text."""
    names = list(next(iter(records.values()))["texts"])
    head = f"{'method':24}{'bits/w':>8}"
    head += "".join(f"{n[:14] + ' ppl':>20}{'KL +- s.e.':>18}{'top-1':>8}" for n in names)
    lines = [head + f"{'seconds':>9}  device"]
    dense = next(iter(records.values()))["dense"]
    lines.append(f"{'dense':32}" + "".join(f"{dense[n]:20.2f}{'':26}" for n in names))

    def place(record: dict[str, Any]) -> tuple[int, float]:
        return -int(record["bits_per_weight"]), record["texts"][names[0]]["divergence"]["kl"][
            "mean"
        ]

    for record in sorted(records.values(), key=place):
        line = f"{record['row']:24}{record['bits_per_weight']:8.2f}"
        for name in names:
            text = record["texts"][name]
            kl, same = text["divergence"]["kl"], text["divergence"]["agreement"]["mean"]
            spread = f"{kl['mean']:.4f} +- {kl['error'] or 0:.4f}"
            line += f"{text['perplexity']:20.2f}{spread:>18}{100 * same:7.1f}%"
        lines.append(line + f"{record['seconds']:9.0f}  {record['device']}")
    return "\n".join(lines)


def plot(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Size against KL on each text, a mark per row; the lower left is best."""
    from matplotlib.figure import Figure

    names = list(next(iter(records.values()))["texts"])
    figure = Figure(figsize=(7 * len(names), 5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for method in dict.fromkeys(row.split(" ")[0] for row in records):
            mine = [r for title, r in records.items() if title.split(" ")[0] == method]
            places = [r["bits_per_weight"] for r in mine]
            axes.scatter(places, [r["texts"][name]["divergence"]["kl"]["mean"] for r in mine],
                         label=method)  # fmt: skip
        axes.set(yscale="log", xlabel="bits per weight", ylabel="KL to the dense model", title=name)
        axes.legend(fontsize="small")
    figure.savefig(path)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", type=Path, required=True, help="calibration text, UTF-8")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text, UTF-8")
    parser.add_argument("--model", type=Path, help="another dense folder than the dithered SmolLM2")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="rows, as 'sketch* 3 G=1'")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    parser.add_argument("--recover", type=int, default=32_768, help="tokens to recover on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("methods.jsonl"))
    parser.add_argument("--plot", type=Path, help="draw size against KL, .png or .svg")
    return parser.parse_args()


def main() -> None:
    """Make the rows that are missing, and print the table after each."""
    options = arguments()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    bench = Bench(options)
    conditions = bench.conditions()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for row in rows(options):
        if row.title in finished(options.results, conditions):
            continue
        print(f"... {row.title}", file=sys.stderr, flush=True)
        try:
            record = bench.measure(row)
        except ImportError as error:
            print(f"{row.title}: left out, {error}", file=sys.stderr)
            continue
        with options.results.open("a") as file:
            file.write(json.dumps(record) + "\n")
    done = finished(options.results, conditions)
    if done:
        print(json.dumps(conditions))
        print(table(done))
        if options.plot is not None:
            plot(done, options.plot)


if __name__ == "__main__":
    main()
