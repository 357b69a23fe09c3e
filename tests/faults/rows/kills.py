"""R1, R2: kill -9 at any call that changes the disk, or at any time; then go on.

A kill leaves what the kernel holds, as a crash of the process does. What a power cut may leave is
imitated on top of it in some of the cases: blocks of the unfinished files become zeros.
"""

from __future__ import annotations

from functools import lru_cache

from rows.base import Count, Outcome, Row, Setting
from rows.harness import NAMES, jobs

_BLOCK = 512


def _zero_blocks(folder, form, rng):
    """Lose some blocks of every file that is not the finished output."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and form not in path.relative_to(folder).parts:
            data = bytearray(path.read_bytes())
            for at in range(0, len(data), _BLOCK):
                if rng.random() < 0.1:
                    data[at : at + _BLOCK] = bytes(len(data[at : at + _BLOCK]))
            path.write_bytes(data)


def _names(setting):
    """Which jobs: all of them but in the test suite."""
    return ("bundle", "apply", "export") if setting.size == "test" else NAMES


def _plans(job, setting, rng):
    """What happens to a job, case by case: one to three kills, each by call or by time."""
    every = setting.pick(0, 0, job.calls)  # each call of the toy job once, then at random
    for case in range(setting.pick(2, 10, 40) + every):
        kills = []
        for _ in range(1 if case < every else rng.choice((1, 1, 2, 3))):
            if case < every or rng.random() < 0.6:
                at = case + 1 if case < every else rng.randrange(1, job.calls + 1)
                kills.append({"fault": {"at": at, "torn": rng.random() < 0.5}})
            else:
                kills.append({"after": rng.uniform(0.0, job.seconds)})
        yield case, kills, rng.random() < 0.25


@lru_cache(maxsize=1)
def run_all(setting: Setting) -> tuple[Outcome, Outcome]:
    """Both rows from the same kills."""
    same, never, struck = Count(), Count(), 0
    with jobs(setting, _names(setting)) as (victim, made):
        for job in made:
            rng = setting.rng(f"kills-{job.name}")
            for case, kills, power in _plans(job, setting, rng):
                folder = setting.room(f"kill-{job.name}-{case}")
                where = f"{job.name} case {case}, kills {kills}, blocks lost: {power}"
                for kill in kills:
                    struck += victim(job.task, job.on(folder), **kill)["killed"]
                    never.add(_named(where, job.wrong(folder)))
                    if power:
                        _zero_blocks(folder, job.form, rng)
                if (folder / job.form).exists():  # the kill came too late to leave anything to do
                    same.add(_named(where, job.wrong(folder)))
                    continue
                reply = victim(job.task, job.on(folder))
                same.add(_named(where, job.unfinished(folder, reply)))
        seconds = ", ".join(f"{j.name} {j.calls} calls" for j in made)
    same.notes.append(f"{struck} processes were killed; {seconds}")
    same.notes.append("exports and deltas start anew, by design; conversions go on")
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
