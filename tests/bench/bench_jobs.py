"""What several processes cost: CPU time and anonymous memory of all of them together.

Each conversion runs in a process of its own. Its memory is that of the whole tree of processes,
added up every few milliseconds; its CPU time is that of all of them, start included.

    python tests/bench/bench_jobs.py --model FOLDER --jobs 1 2 --max-memory 700MB
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sketchconv.memory import parse_size

_CODE = """
import json, sys
from sketchconv.pipeline import convert
from sketchconv.recipe import Recipe, SketchSpec
model, out, bits, weighting, jobs, limit, said = sys.argv[1:]
recipe = Recipe(SketchSpec(int(bits)), weighting=weighting)
limit = int(limit) or None
report = convert(model, out, recipe, jobs=int(jobs), max_memory=limit)
with open(said, "w") as file:
    json.dump({"peak": report.peak_anonymous}, file)
"""


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for own in found:
        try:
            for task in Path(f"/proc/{own}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def anonymous(pid: int) -> int:
    """Anonymous memory of a process in bytes; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in text.splitlines() if line.startswith("RssAnon")]
    return 1024 * int(lines[0].split()[1]) if lines else 0


def measure(model: str, given: argparse.Namespace, jobs: int) -> None:
    """One conversion, in one line."""
    with tempfile.TemporaryDirectory() as folder:
        out, limit = f"{folder}/m.sktch", given.max_memory or 0
        values = [
            model,
            out,
            str(given.bits),
            given.weighting,
            str(jobs),
            str(limit),
            f"{folder}/said",
        ]
        before, begin, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
        process = subprocess.Popen([sys.executable, "-P", "-c", _CODE, *values])
        while process.poll() is None:
            peak = max(peak, sum(map(anonymous, tree(process.pid))))
            time.sleep(0.005)
        said = json.loads(Path(folder, "said").read_text())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = time.perf_counter() - begin
    print(
        f"{jobs} jobs: {cpu:.1f} CPU seconds, {seconds:.1f} s; together at most "
        f"{peak / 1e6:.0f} MB anonymous, {said['peak'] / 1e6:.0f} MB by the report"
        + (f", {limit / 1e6:.0f} MB allowed" if limit else ""),
        flush=True,
    )


def main() -> None:
    """Measure each number of processes in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--weighting", default="moments")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--max-memory", type=parse_size)
    given = parser.parse_args()
    for jobs in given.jobs:
        measure(given.model, given, jobs)


if __name__ == "__main__":
    main()
