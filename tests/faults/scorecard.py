"""The scorecard of reliability: `python -P tests/faults/scorecard.py [--short] [--out FILE.md]`.

Prints every row with numerator, denominator, seed and commit; exit code 1 if any case failed, or
a row has none. A failure is shown with what is needed to repeat it: the row, the seed and the case.
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
from rows.harness import NAMES, jobs, names, shared  # noqa: E402
from rows.table import ROWS  # noqa: E402

_SHOWN = 10
# Of the time that is left, where it is limited: R2 has none of its own.
_SHARES = {"S3": 12, "S4": 4, "R1": 14, "R2": 0, "R4": 9, "R5": 2, "R6": 4}


def commit():
    """The commit at work, with a mark if files differ from it."""
    run = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    try:
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_rows(rows, size, options):
    """Run rows one by one, and print each; yields row, outcome and seconds."""
    seed, minutes, chosen = options.seed, options.minutes, tuple(options.jobs or ())
    end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    kills = None
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, shared:
        for number, row in enumerate(rows):
            if row.key == "R1" and minutes is not None:
                # It takes long on a busy machine, and is no part of the row's share.
                with jobs(names(Setting(size, seed, Path(folder), jobs=chosen))):
                    pass
            started = time.monotonic()
            left = sum(_SHARES.get(r.key, 1) for r in rows[number:])
            until = started + max(0.0, end - started) * _SHARES.get(row.key, 1) / left
            own = Setting(size, seed, Path(folder) / row.key, until, chosen)
            if row.key in ("R1", "R2"):  # from the same kills, so they share a setting
                own = kills = kills or own
            outcome = row.run(own)
            seconds = time.monotonic() - started
            print(f"{row.key:4} {outcome.good} / {outcome.cases}  {row.title} ({seconds:.0f} s)")
            for note in outcome.notes:
                print(f"       {note}")
            for failure in outcome.failures[:_SHOWN]:
                print(f"  FAIL {failure}")
            sys.stdout.flush()
            yield row, outcome, seconds


def document(done, missing, options, size, revision):
    """The committed form, with the rows that have not run yet."""
    limit = "" if options.minutes is None else f" --minutes {options.minutes:g}"
    limit += f" --jobs {' '.join(options.jobs)}" if options.jobs else ""
    lines = [
        "# Scorecard of reliability",
        "",
        "Written by `python -P tests/faults/scorecard.py"
        f"{'' if size == 'full' else ' --' + size}{limit} --seed {options.seed} --out FILE`;"
        " do not edit.",
        "",
        f"Size: {size}. Seed: {options.seed}. Commit: {revision}. "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}.",
        "",
        "| | what is counted | target | good | of | seconds |",
        "|---|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row.key} | {row.title} | {row.target} | {o.good} | {o.cases} | {seconds:.0f} |"
        for row, o, seconds in done
    ]
    lines += [f"| {row.key} | {row.title} | {row.target} | not run | | |" for row in missing]
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
    parser.add_argument("--minutes", type=float, help="leave cases out, and say so, to end then")
    parser.add_argument("--jobs", nargs="+", choices=NAMES, help="that are killed and starved")
    parser.add_argument("--rows", nargs="+", choices=[row.key for row in ROWS])
    parser.add_argument("--out", type=Path, help="also write a Markdown document")
    options = parser.parse_args(arguments)
    size = "short" if options.short else "test" if options.test else "full"
    chosen = [row for row in ROWS if options.rows is None or row.key in options.rows]
    revision = commit()
    print(f"size {size}, seed {options.seed}, commit {revision}")
    done = []
    for result in run_rows(chosen, size, options):
        done.append(result)
        if options.out is not None:  # of an hour something is left if it ends early
            text = document(done, chosen[len(done) :], options, size, revision)
            options.out.write_text(text)
    return int(any(not outcome.good == outcome.cases > 0 for _, outcome, _ in done))


if __name__ == "__main__":
    sys.exit(main())
