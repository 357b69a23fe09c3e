"""Parts of a GGUF export that a former run has put in place, or left under other names."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sketchconv.formats.part import feed, os_failures
from sketchconv.formats.staging import SUFFIX, discard_unheld, open_file, staging_path
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


def drop_strays(output: Path, layouts: Mapping[str, FileLayout]) -> None:
    """Remove what a run that is not gone on with has left of an output in other parts.

    Their temporaries have other names than those of this run, and the size of the whole model.
    """
    absolute = output.absolute()
    part = rf"{re.escape(absolute.stem)}-\d{{5}}-of-\d{{5}}\.gguf"
    known = re.compile(rf"\.({re.escape(absolute.name)}|{part}){re.escape(SUFFIX)}", re.ASCII)
    found = (known.fullmatch(path.name) for path in absolute.parent.iterdir())
    for name in [match[1] for match in found if match is not None]:
        target = absolute.parent / name
        # One that has a journal of its own is another output.
        if name not in layouts and (name == absolute.name or not journal_path(target).exists()):
            discard_unheld(target)


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
