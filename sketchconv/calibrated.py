"""A calibrated conversion: calibrate, recover where that is asked for, then write as ever."""

from __future__ import annotations

import dataclasses
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from sketchconv.calibration.run import Calibrated, Tick, calibrate, torch_threads
from sketchconv.calibration.state import OWN_TEXT, forget, state_folder
from sketchconv.errors import CalibrationError, OutputError, Suspended
from sketchconv.pipeline import write
from sketchconv.worker import Progress, Worker

if TYPE_CHECKING:
    from pathlib import Path

    from sketchconv.calibration.report import RecoveryReport
    from sketchconv.job import Job
    from sketchconv.pipeline import ProgressCallback
    from sketchconv.report import Report

_DRAFT = "draft.sktch"
_GO_ON = "run the same command again to go on, or with --no-resume to start anew"


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
        SketchconvError: as `convert`; an `OutputError` before the calibration where the disk is too
            small for its result.
        Suspended: interrupted, with finished work on the disk.
    """
    if not resume:
        forget(job.output)
    try:
        check_disk(job)
        return _run(job, started, threads, progress)
    except KeyboardInterrupt:
        if (kept := _kept(job.output)) is None:
            raise
        raise Suspended(kept) from None
    except OutputError as error:
        if (kept := _kept(job.output)) is None:
            raise
        raise OutputError(f"{error}; {kept}") from error


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
    if calibrated.recover:
        recovery = _recover(job, calibrated, threads, progress)
    report = dataclasses.replace(calibrated.report, recovery=recovery)
    with job.writer() as writer:
        worker = Worker(job.renewed(), writer, threads, calibrated.weights())
        write(worker, writer, progress)
    calibrated.state.remove()
    return worker.report(time.perf_counter() - started, report)


def _kept(output: Path) -> str | None:
    """What the next run goes on with, in words; without anything the state is dropped."""
    folder = state_folder(output)
    if blocks := len(list(folder.glob("block-*.safetensors"))):
        what = f"{blocks} finished block{'s are' if blocks > 1 else ' is'} kept"
    elif (folder / OWN_TEXT).exists():
        what = "the text that the model wrote is kept"
    else:
        with suppress(CalibrationError):  # a folder of someone else's
            forget(output)
        return None
    return f"{what}: {_GO_ON}"


def check_disk(job: Job) -> None:
    """Compare what the output and the blocks beside it will still take with the free disk.

    Raises:
        OutputError: with the bytes that are missing.
    """
    from sketchconv.formats.part import check_space

    blocks = sum(r.index_info.nbytes + r.lut_info.nbytes for r in job.plan.sketches)
    finished = state_folder(job.output).glob("block-*.safetensors")
    there = sum(path.stat().st_size for path in finished)
    check_space(job.output.absolute().parent, job.output_bytes + max(0, blocks - there), job.output)


def _recover(
    job: Job,
    calibrated: Calibrated,
    threads: int | None,
    progress: ProgressCallback | None,
) -> RecoveryReport:
    """Write a draft, and train its LUTs."""
    from sketchconv.calibration.recovering import recover_draft

    draft = calibrated.state.folder / _DRAFT
    with job.draft_writer(draft) as writer:
        write(Worker(job.renewed(), writer, threads, calibrated.weights()), writer, progress)
    tick = _ticker("recover", progress)
    with torch_threads(threads):
        return recover_draft(job, calibrated, draft, calibrated.recover, tick)


def _ticker(action: str, progress: ProgressCallback | None) -> Tick | None:
    if progress is None:
        return None
    return lambda text, done, total: progress(Progress(text, action, done, total))
