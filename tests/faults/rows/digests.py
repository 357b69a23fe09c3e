"""R7: one digest, whatever the threads, in one go or resumed."""

from __future__ import annotations

import hashlib

from rows.base import Count, Outcome, Row, Setting
from rows.harness import jobs
from rows.toys import content


def run(setting: Setting) -> Outcome:
    """Good: the bytes of the first run with one thread."""
    count = Count()
    names = setting.pick(
        ("bundle",), ("bundle", "folder", "coarse"), ("bundle", "folder", "coarse")
    )
    with jobs(names) as (victim, made):
        for job in made:
            wanted, rng = _digest(job.whole), setting.rng(f"R7-{job.name}")
            for threads in (1, 2, 4):
                for resumed in (False, True):
                    folder = setting.room(f"digest-{job.name}-{threads}-{resumed}")
                    if resumed:  # begun with other threads, killed half-way
                        fault = {"at": rng.randrange(job.calls // 3, job.calls - 8)}
                        victim(
                            job.task, job.on(folder, threads=3 if threads == 1 else 1), fault=fault
                        )
                    reply = victim(job.task, job.on(folder, threads=threads))
                    problem = job.unfinished(folder, reply)
                    same = problem is None and _digest(content(folder / job.form)) == wanted
                    name = f"{job.name}, {threads} threads, {'resumed' if resumed else 'fresh'}"
                    count.add(None if same else f"{name}: {problem}")
    return count.outcome()


def _digest(files):
    running = hashlib.sha256()
    for name, data in sorted(files.items()):
        running.update(f"{name}\0{len(data)}\0".encode() + data)
    return running.hexdigest()


R7 = Row(
    "R7",
    "runs with the digest of the first: threads 1, 2, 4, fresh and resumed",
    "one digest",
    run,
)
