"""A folder before it is put in place: room for all of it, its side files, its weight files open."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from sketchconv.formats import staging
from sketchconv.formats.part import allocated, check_space, os_failures


class _Sized(Protocol):
    @property
    def size(self) -> int: ...


Layout = TypeVar("Layout", bound=_Sized)


def staged_files(
    target: Path, layouts: Mapping[str, Layout], files: Mapping[str, bytes]
) -> Iterator[tuple[Layout, Path, int]]:
    """Write the side files of a held staging folder, then open its weight files, one a step.

    Args:
        target: where the folder goes in the end.
        layouts: of the weight files, by name; those that are there already are kept as they are.
        files: contents of the side files, by path.

    Yields:
        Layout, path and open descriptor of each weight file; the descriptor is the caller's.

    Raises:
        OutputFailure: the disk is full or fails.
    """
    folder = staging.staging_path(target)
    needed = sum(layout.size for layout in layouts.values()) + sum(map(len, files.values()))
    there = [folder / name for name in layouts if (folder / name).exists()]
    needed = max(needed - sum(allocated(path.stat()) for path in there), 0)
    check_space(folder, needed, target)
    for name, data in files.items():
        staging.write_file(folder, name, data)
    for name, layout in layouts.items():
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os_failures(target):
            descriptor = os.open(folder / name, flags, 0o666)
        yield layout, folder / name, descriptor
