"""A calibrated conversion: calibrate, recover where that is asked for, then write as ever."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from sketchconv.calibration.run import Calibrated, Tick, calibrate, torch_threads
from sketchconv.calibration.state import forget, state_folder
from sketchconv.errors import Suspended
from sketchconv.pipeline import write
from sketchconv.worker import Progress, Worker

if TYPE_CHECKING:
    from sketchconv.calibration.report import RecoveryReport
    from sketchconv.job import Job
    from sketchconv.pipeline import ProgressCallback
    from sketchconv.report import Report

_DRAFT = "draft.sktch"


def run_calibrated(
    job: Job,
    started: float,
    *,
    threads: int | None = None,
    resume: bool = True,
    progress: ProgressCallback | None = None,
) -> Report:
    """Carry out a job that has a calibration.

    Args:
        job: see `prepare`.
        started: `time.perf_counter()` at the start of the conversion.
        threads: see `convert`.
        resume: go on with what an interrupted run left; otherwise drop it.
        progress: see `convert`; `done` counts weights, in recovery steps, in "write" tokens.

    Raises:
        SketchconvError: as `convert`.
        Suspended: interrupted, with finished blocks on the disk.
    """
    if not resume:
        forget(job.output)
    try:
        return _run(job, started, threads, progress)
    except KeyboardInterrupt:
        if not state_folder(job.output).exists():
            raise
        text = "finished blocks are kept: run the same command again to go on"
        raise Suspended(f"{text}, or with --no-resume to start anew") from None


def _run(
    job: Job, started: float, threads: int | None, progress: ProgressCallback | None
) -> Report:
    if job.calibration is None:
        raise TypeError("the job has no calibration")
    recover = job.calibration.recovery_tokens(job.plan.steps)
    tick = _ticker("calibrate", progress)
    writing = _ticker("write", progress)
    calibrated = calibrate(job, recover=recover, threads=threads, tick=tick, writing=writing)
    recovery = calibrated.report.recovery
    if recover and not calibrated.by_blocks:
        recovery = _recover(job, calibrated, recover, threads, progress)
    report = dataclasses.replace(calibrated.report, recovery=recovery)
    with job.writer() as writer:
        work = write(Worker(job.renewed(), writer, threads, calibrated.weights()), progress)
    calibrated.state.remove()
    return work.report(time.perf_counter() - started, report)


def _recover(
    job: Job,
    calibrated: Calibrated,
    tokens: int,
    threads: int | None,
    progress: ProgressCallback | None,
) -> RecoveryReport:
    """Write a draft, and train its LUTs."""
    from sketchconv.calibration.recovering import recover_draft

    draft = calibrated.state.folder / _DRAFT
    with job.draft_writer(draft) as writer:
        write(Worker(job.renewed(), writer, threads, calibrated.weights()), progress)
    tick = _ticker("recover", progress)
    with torch_threads(threads):
        return recover_draft(job, calibrated, draft, tokens, tick)


def _ticker(action: str, progress: ProgressCallback | None) -> Tick | None:
    if progress is None:
        return None
    return lambda text, done, total: progress(Progress(text, action, done, total))
