"""R4: a full or failing disk: a clear error, sources untouched, and the job goes on."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import contextmanager

from rows.base import Count, Outcome, Row, Setting
from rows.harness import NAMES, jobs

_WORDS = ("full", "disk", "space", os.strerror(errno.EIO), os.strerror(errno.ENOSPC))


def _names(setting):
    """Which jobs: all of them but in the test suite."""
    return ("bundle", "apply", "export") if setting.size == "test" else NAMES


def _unclear(reply, job, folder):
    """What is wrong with the error of a run whose disk failed."""
    if reply["error"] is None:
        return "no error"
    message = reply.get("message", "")
    if not reply["ours"]:
        return f"an error that is not ours: {reply['error']}: {message}"
    if "\n" in message or not any(word in message for word in _WORDS):
        return f"an unclear error: {message}"
    if job.form not in message and str(folder) not in message:
        return f"an error that names neither the output nor its folder: {message}"
    return None


def _case(victim, job, folder, command):
    """Starve a job, then let it go on: what went wrong, or None."""
    reply = victim(job.task, job.on(folder), **command)
    problem = _unclear(reply, job, folder)
    if problem is None and (folder / job.form).exists():
        problem = "an output in spite of the error"
    problem = problem or job.wrong(folder)
    return problem or job.unfinished(folder, victim(job.task, job.on(folder)))


def run(setting: Setting) -> Outcome:
    """Failing calls, then file systems of swept sizes where they can be mounted."""
    count = Count()
    with jobs(setting, _names(setting)) as (victim, made):
        for job in made:
            rng = setting.rng(f"disk-{job.name}")
            calls = sorted(rng.sample(range(1, job.calls + 1), min(job.calls, _most(setting))))
            for number, at in enumerate(calls):
                code = (errno.ENOSPC, errno.EIO)[number % 2]
                folder = setting.room(f"disk-{job.name}-{at}")
                command = {"fault": {"at": at, "code": code}}
                problem = _case(victim, job, folder, command)
                count.add(problem and f"{job.name}, calls from {at} fail with {code}: {problem}")
        injected = count.cases
        mounted = _small_disks(setting, victim, made, count)
    count.notes.append(f"{injected} with calls that fail (ENOSPC, EIO) from the k-th on")
    count.notes.append(f"{mounted} on a tmpfs too small for the output, made larger afterwards")
    return count.outcome()


def _most(setting):
    return setting.pick(2, 6, 1000)


def _small_disks(setting, victim, made, count):
    """Sizes from one page to just below what is needed; how many were tried."""
    before, room = count.cases, setting.room("small")
    for job in made:
        need = sum(map(len, job.whole.values()))
        for share in setting.pick((0.5,), (0.1, 0.5, 0.9), (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)):
            size = max(1, int(need * share) // 4096) * 4096
            with small_disk(room, size) as there:
                if not there:
                    return count.cases - before
                reply = victim(job.task, job.on(room))
                problem = _unclear(reply, job, room) or job.wrong(room)
                subprocess.run(["mount", "-o", "remount,size=64m", room], check=True)
                problem = problem or job.unfinished(room, victim(job.task, job.on(room)))
            count.add(problem and f"{job.name} on a disk of {size} bytes: {problem}")
    return count.cases - before


@contextmanager
def small_disk(folder, size):
    """A tmpfs on a folder; yields False where this process may not mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


R4 = Row(
    "R4",
    "disk full or failing: a clear error of ours, sources untouched, then byte-identical output",
    "all of >= 50",
    run,
)
