"""S3: mutants of every kind of input for a while: taken, and then read as a second reader reads
them where there is one, or refused by an error of ours, in time."""

from __future__ import annotations

import time

from rows.base import Count, Outcome, Row, Setting
from rows.mutants import TARGETS
from rows.readers import attempt, warm


def run(setting: Setting, targets=None) -> Outcome:
    """Every target for as long as the size says; a failure names target and number."""
    count, most = Count(), setting.pick(60, 10**9, 10**9)
    seconds = setting.pick(20.0, 30.0, 67.0)
    warm(setting.room("fuzz-warm"))
    known = targets or TARGETS
    for done, (name, target) in enumerate(known.items()):
        make, read = target(setting.room(f"fuzz-{name}"))
        taken, number, started = 0, 0, time.monotonic()
        limit = min(seconds, max(0.0, setting.until - started) / (len(known) - done))
        while number < most and (number < 40 or time.monotonic() - started < limit):
            rng = setting.rng(f"fuzz-{name}-{number}")
            found = attempt(read, make(rng))
            taken += found is None
            count.add(f"{name} mutant {number}: {found}" if isinstance(found, str) else None)
            number += 1
        count.notes.append(f"{name}: {number} mutants, {taken} of them taken")
    return count.outcome()


S3 = Row(
    "S3",
    "mutants of nine kinds of input: no crash, no hang (10 s), no error not ours, no wrong reading",
    "all, 10 min",
    run,
)
