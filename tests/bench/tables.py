"""The README's tables of quality, from the rows that the benchmarks keep beside this file.

python tests/bench/tables.py
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEXT, OTHER = "wikitext2-test", "python"
SIZES = tuple((bits, groups) for groups in (1, 4) for bits in (4, 3, 2))
NAMES = {
    "rtn": "round to nearest",
    "kmeans": "k-means, equal weights",
    "gptq": "GPTQ, act-order",
    "leanquant": "LeanQuant, as its README says",
    "free": "ours without data",
    "sketch+blocks": "ours, LUTs trained block by block",
    "sketch+recover": "**ours, calibrated, LUTs trained**",
    "self+recover": "the same, on text of the model's own",
    "mixed+recover": "the same, on half of each",
}
PEERS = {
    "nf4": "bitsandbytes NF4 in 64s",
    "nf4-double": "NF4, maxima compressed",
    "hqq-4": "HQQ in 64s",
    "hqq-3": "HQQ in 64s",
    "hqq-2": "HQQ in 64s",
}


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def perplexity(value: float) -> str:
    """Two decimals, or its order of magnitude where nothing else is left to say."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0e}".replace("e+0", "e")


def cell(row: dict[str, Any]) -> str:
    """Bits per weight: perplexity, KL, KL on the other text."""
    near, far = row["texts"][TEXT], row["texts"][OTHER]
    kl, other = (text["divergence"]["kl"]["mean"] for text in (near, far))
    return (
        f"{row['bits_per_weight']:.2f}: {perplexity(near['perplexity'])} / {kl:.3f} / {other:.3f}"
    )


def methods() -> str:
    """Every method at every size."""
    rows = {row["row"]: row for row in read("methods.jsonl")}
    head = ["", *(f"{bits} bits, G = {groups}" for bits, groups in SIZES)]
    body = []
    for name, words in NAMES.items():
        titles = [f"{name} {bits} G={groups}" for bits, groups in SIZES]
        if any(title in rows for title in titles):
            body.append([words, *(cell(rows[t]) if t in rows else "" for t in titles)])
    for name in dict.fromkeys(PEERS.values()):
        mine = [rows[key] for key, words in PEERS.items() if words == name and key in rows]
        cells = {int(row["bits_per_weight"]): cell(row) for row in mine}
        body.append([name, *(cells.get(bits, "") for bits in (4, 3, 2)), "", "", ""])
    return grid(head, body)


def adaptation() -> str:
    """For each shape and length: untuned, LoRA and LUTs, each at its best by the held-out loss."""
    best: dict[Any, dict[str, Any]] = {}
    for row in read("adaptation.jsonl"):
        where = (row["device"], row["base"], -row["bits"], row["groups"])
        key = (*where, row["steps"], row.get("seed", 0), row["kind"])
        known = best.get(key)
        if known is None or row["held_out"] < known["held_out"]:
            best[key] = row
    body = []
    for work in sorted({key[:6] for key in best if key[4]}):
        untuned = best[(*work[:4], 0, 0, "none")]
        pair = [best.get((*work, kind)) for kind in ("lora", "lut")]
        cells = [
            perplexity(math.exp(untuned["test"])),
            *("" if r is None else tuned(r) for r in pair),
        ]
        lora, lut = pair
        ratio = "" if lora is None or lut is None else f"{math.exp(lut['test'] - lora['test']):.3f}"
        first = lut or lora or untuned
        body.append([shape(first), str(work[4]), *cells, ratio])
    return grid(["", "steps", "untuned", "LoRA", "LUTs", "LUTs / LoRA"], body)


def shape(run: dict[str, Any]) -> str:
    """The base that a run started from, and the machine where it was not the GPU."""
    base = ", calibrated" if run["base"] == "calibrated" else ""
    place = ", on a CPU" if run["device"] == "cpu" else ""
    order = f", order {run['seed'] + 1}" if run.get("seed") else ""
    return f"{run['bits']} bits, G = {run['groups']}{base}{place}{order}"


def tuned(run: dict[str, Any]) -> str:
    """Test perplexity: values trained, learning rate, schedule, kind of AdamW."""
    kind = ", cautious" if run["kind"] == "lut" and run.get("cautious") else ""
    words = f"{run['trained'] / 1e6:.2f} M, {run['rate']:.1e}, {run['schedule']}{kind}"
    return f"{perplexity(math.exp(run['test']))} ({words})"


TABLES: dict[str, Callable[[], str]] = {"methods": methods, "adaptation": adaptation}


def written(text: str) -> str:
    """A document with its tables as the rows are now."""
    for name, table in TABLES.items():
        marks = f"<!-- tables.py: {name} -->\n", "<!-- end -->"
        pattern = f"({re.escape(marks[0])}).*?({re.escape(marks[1])})"
        text = re.sub(pattern, rf"\g<1>\n{table()}\n\n\g<2>", text, flags=re.DOTALL)
    return text


def main() -> None:
    """Print both, or put them into a document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE")
    document: Path | None = parser.parse_args().write
    if document is None:
        print(*(table() for table in TABLES.values()), sep="\n\n")
    else:
        document.write_text(written(document.read_text()))


if __name__ == "__main__":
    main()
