"""R4: a full or failing disk: a clear error, sources untouched, and the job goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace
from shutil import rmtree

from rows.base import Count, Outcome, Row, Setting, in_turn
from rows.harness import jobs, names

_WORDS = ("full", "disk", "space", os.strerror(errno.EIO), os.strerror(errno.ENOSPC))


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
    with jobs([name for name in names(setting) if name != "recovered"]) as (victim, made):
        half = replace(setting, until=(setting.until + time.monotonic()) / 2)
        mounted = _small_disks(half, victim, made, count)
        failing = in_turn(*(_failing(job, setting) for job in made))
        for job, at, code in count.until(setting, failing, len(made)):
            folder = setting.room(f"disk-{job.name}-{at}")
            problem = _case(victim, job, folder, {"fault": {"at": at, "code": code}})
            count.add(problem and f"{job.name}, calls from {at} fail with {code}: {problem}")
            rmtree(folder)
    count.notes.append(
        f"{count.cases - mounted} with calls that fail (ENOSPC, EIO) from the k-th on"
    )
    count.notes.append(f"{mounted} on a tmpfs too small for the output, made larger afterwards")
    return count.outcome()


def _failing(job, setting):
    """The calls of a job from which on all fail: every call, or some of them."""
    rng, most = setting.rng(f"disk-{job.name}"), min(job.calls, setting.pick(2, 6, 1000))
    for number, at in enumerate(rng.sample(range(1, job.calls + 1), most)):
        yield job, at, (errno.ENOSPC, errno.EIO)[number % 2]


def _small_disks(setting, victim, made, count):
    """Sizes from one page to just below what is needed; how many were tried."""
    before, room = count.cases, setting.room("small")
    shares = setting.pick((0.5,), (0.1, 0.5, 0.9), (0.5, 0.9, 0.1, 0.0, 0.97, 0.3, 0.7))
    cases = ((job, share) for share in shares for job in made)
    for job, share in count.until(setting, cases, len(made)):
        size = max(1, int(sum(map(len, job.whole.values())) * share) // 4096) * 4096
        with small_disk(room, size) as there:
            if not there:
                break
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
