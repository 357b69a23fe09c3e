"""What each process of a shared conversion is told before its first tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sketchconv.journal import infos_digest
from sketchconv.kernels.threads import available_threads
from sketchconv.parallel.messages import Share

if TYPE_CHECKING:
    from sketchconv.formats.shared import Shared
    from sketchconv.job import Job


def shares_of(job: Job, shared: Shared, count: int, threads: int | None) -> list[Share]:
    """One share for each of `count` processes.

    Args:
        job: that they share.
        shared: its output, opened.
        count: of processes.
        threads: of all of them together; None: every core, and at least one each.
    """
    total = available_threads() if threads is None else threads
    infos = infos_digest(job.source.infos)
    return [
        Share(
            place=job.place,
            imports=job.imports,
            source=job.source.id,
            infos=infos,
            output=job.output,
            recipe=job.recipe,
            plan=job.plan,
            calibration=job.calibration,
            shared=shared,
            threads=max(1, (total + number) // count),
            limited=job.max_memory is not None,
        )
        for number in range(count)
    ]
