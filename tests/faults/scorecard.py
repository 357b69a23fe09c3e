"""The scorecard of reliability: `python -P tests/faults/scorecard.py [--short] [--out FILE.md]`.

Prints every row with numerator, denominator, seed and commit; exit code 1 if any case failed. A
failure is shown with what is needed to repeat it: the row, the seed and the case.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # `-P` keeps it out, and test folders are no packages

from rows.base import Setting  # noqa: E402
from rows.table import ROWS  # noqa: E402

_SHOWN = 10


def commit():
    """The commit at work, with a mark if files differ from it."""
    run = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    try:
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_rows(rows, size, seed):
    """Run rows one by one, and print each; yields row, outcome and seconds."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        shared = Setting(size, seed, Path(folder) / "shared")
        for row in rows:
            started = time.monotonic()
            # R1 and R2 come from the same kills, so they share a setting.
            own = shared if row.key in ("R1", "R2") else Setting(size, seed, Path(folder) / row.key)
            outcome = row.run(own)
            seconds = time.monotonic() - started
            print(f"{row.key:4} {outcome.good} / {outcome.cases}  {row.title} ({seconds:.0f} s)")
            for note in outcome.notes:
                print(f"       {note}")
            for failure in outcome.failures[:_SHOWN]:
                print(f"  FAIL {failure}")
            sys.stdout.flush()
            yield row, outcome, seconds


def document(done, size, seed, revision):
    """The committed form."""
    lines = [
        "# Scorecard of reliability",
        "",
        "Written by `python -P tests/faults/scorecard.py"
        f"{'' if size == 'full' else ' --' + size} --seed {seed} --out FILE`; do not edit.",
        "",
        f"Size: {size}. Seed: {seed}. Commit: {revision}. "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}.",
        "",
        "| | what is counted | target | good | of | seconds |",
        "|---|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row.key} | {row.title} | {row.target} | {o.good} | {o.cases} | {seconds:.0f} |"
        for row, o, seconds in done
    ]
    for row, outcome, _ in done:
        if outcome.notes or outcome.failures:
            lines += ["", f"## {row.key}", ""]
            lines += [f"- {note}" for note in outcome.notes]
            lines += [f"- FAILED: {failure}" for failure in outcome.failures[:_SHOWN]]
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="minutes instead of an hour")
    parser.add_argument("--test", action="store_true", help="as the test suite runs it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", nargs="+", choices=[row.key for row in ROWS])
    parser.add_argument("--out", type=Path, help="also write a Markdown document")
    options = parser.parse_args(arguments)
    size = "short" if options.short else "test" if options.test else "full"
    chosen = [row for row in ROWS if options.rows is None or row.key in options.rows]
    revision = commit()
    print(f"size {size}, seed {options.seed}, commit {revision}")
    done = list(run_rows(chosen, size, options.seed))
    if options.out is not None:
        options.out.write_text(document(done, size, options.seed, revision))
    return int(any(outcome.good != outcome.cases for _, outcome, _ in done))


if __name__ == "__main__":
    sys.exit(main())
