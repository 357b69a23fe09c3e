"""Parts of a GGUF export that was killed while it put them in place one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sketchconv.formats.part import feed, os_failures
from sketchconv.formats.staging import open_file, staging_path
from sketchconv.journal import journal_path

if TYPE_CHECKING:
    from sketchconv.export.job import GgufJob
    from sketchconv.formats.laid_file import FileLayout
    from sketchconv.journal import Journal


def half_published(output: Path, layouts: Mapping[str, FileLayout]) -> bool:
    """Whether a killed run may have left parts: the first, renamed last, is not there yet."""
    first = output.absolute().parent / next(iter(layouts))
    return len(layouts) > 1 and journal_path(output).exists() and not first.exists()


def recall(job: GgufJob, journal: Journal) -> None:
    """Make parts that are in place temporaries again, for a run that goes on.

    Only those that hold, byte for byte, what the journal says that the export has written; any
    other file is left where it is, and refused by the writer.

    Raises:
        OutputError: the disk fails, or another process is just putting its parts in place.
    """
    if not journal.resumes or not half_published(job.output, job.layouts):
        return
    folder = job.output.absolute().parent
    lock = open_file(folder / next(iter(job.layouts)), keep=True)
    try:
        for name, layout in job.layouts.items():
            path = folder / name
            with os_failures(path):
                if path.is_file() and not path.is_symlink() and _holds(path, layout, journal):
                    path.replace(staging_path(path))
    finally:
        os.close(lock)


def _holds(path: Path, layout: FileLayout, journal: Journal) -> bool:
    """Whether a file has the layout's header, and the tensors that the journal knows."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_size != layout.size:
            return False
        if os.pread(descriptor, len(layout.header), 0) != layout.header:
            return False
        for name, begin in layout.begin.items():
            entry, running = journal.finished.get(name), hashlib.sha256()
            feed(running, descriptor, begin, layout.nbytes[name])
            if entry is None or entry.stored.get(name) != running.hexdigest():
                return False
        return True
    finally:
        os.close(descriptor)
