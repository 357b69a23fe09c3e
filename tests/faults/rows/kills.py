"""R1, R2: kill -9 at any call that changes the disk, or at any time; then go on.

A kill leaves what the kernel holds, as a crash of the process does. What a power cut may leave is
imitated on top of it in some of the cases: blocks of the unfinished files become zeros.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from shutil import rmtree

from rows.base import Count, Outcome, Row, Setting, in_turn
from rows.harness import jobs, names

_BLOCK = 512


def _zero_blocks(folder, form, rng):
    """Lose some blocks of every file that is not the finished output."""
    for path in sorted(folder.rglob("*")):
        # Of files that were forced to the disk only those with digests of their own lose any.
        synced = path.name == "calibration.json"
        if path.is_file() and not synced and form not in path.relative_to(folder).parts:
            data = bytearray(path.read_bytes())
            for at in range(0, len(data), _BLOCK):
                if rng.random() < 0.1:
                    data[at : at + _BLOCK] = bytes(len(data[at : at + _BLOCK]))
            path.write_bytes(data)


def _plans(job, setting):
    """What happens to a job, case by case: one to three kills, each by call or by time.

    First those at random, then one at each call of the toy job.
    """
    rng = setting.rng(f"kills-{job.name}")
    long = job.name == "recovered"  # takes 2 s, and has calls like those of others
    some = setting.pick(4, 10, 20 if long else 40)
    for case in range(some + setting.pick(0, 0, 0 if long else job.calls)):
        at_call, kills = case - some + 1, []
        for _ in range(1 if at_call > 0 else rng.choice((1, 1, 2, 3))):
            if at_call > 0 or rng.random() < 0.6:
                at = at_call if at_call > 0 else rng.randrange(1, job.calls + 1)
                kills.append({"fault": {"at": at, "torn": rng.random() < 0.5}})
            else:
                kills.append({"after": rng.uniform(0.0, job.seconds)})
        yield job, case, kills, rng.random() < 0.25


@lru_cache(maxsize=1)
def run_all(setting: Setting) -> tuple[Outcome, Outcome]:
    """Both rows from the same kills."""
    same, never, struck, each = Count(), Count(), 0, Counter()
    with jobs(names(setting)) as (victim, made):
        plans = in_turn(*(_plans(job, setting) for job in made))
        for job, case, kills, power in same.until(setting, plans, 2 * len(made)):
            each[job.name] += 1
            folder = setting.room(f"kill-{job.name}-{case}")
            where = f"{job.name} case {case}, kills {kills}, blocks lost: {power}"
            for kill in kills:
                struck += victim(job.task, job.on(folder), **kill)["killed"]
                never.add(_named(where, job.wrong(folder)))
                if power:
                    _zero_blocks(folder, job.form, setting.rng(where))
            if (folder / job.form).exists():  # the kill came too late to leave anything to do
                same.add(_named(where, job.wrong(folder)))
            else:
                reply = victim(job.task, job.on(folder))
                same.add(_named(where, job.unfinished(folder, reply)))
            rmtree(folder)
    same.notes.append(f"{struck} processes were killed")
    same.notes += [
        f"{j.name}: {each[j.name]} cases; it changes the disk {j.calls} times" for j in made
    ]
    same.notes.append("deltas start anew; conversions and exports go on, by tensor")
    same.notes.append("calibrated conversions (2 layers, 32 tokens) go on by block")
    return same.outcome(), never.outcome()


def _named(where, problem):
    return None if problem is None else f"{where}: {problem}"


R1 = Row(
    "R1",
    "kill -9, then the same command again: byte-identical output, nothing left beside it",
    "all, 200 random times and every call of a toy job",
    lambda setting: run_all(setting)[0],
)
R2 = Row(
    "R2",
    "after a kill: no output or the right one, and the sources untouched",
    "all",
    lambda setting: run_all(setting)[1],
)
