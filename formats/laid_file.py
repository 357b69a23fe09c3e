"""One file whose every byte has its place before the first is written: header, then tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sketchconv.formats.part import Data, allocate, as_bytes, feed, os_failures, pwrite_all


@dataclass(frozen=True)
class FileLayout:
    """One file: all bytes before the data, where each tensor begins, how long it is, the size."""

    header: bytes
    begin: Mapping[str, int]
    nbytes: Mapping[str, int]
    size: int


class LaidFile:
    """A file that takes its tensors in chunks: those of one tensor in order, else in any order.

    Args:
        fd: open for writing; closed by `close`.
        path: the file, for errors.
        layout: of its bytes.

    Raises:
        OutputFailure: the disk is full or fails.
    """

    def __init__(self, fd: int, path: Path, layout: FileLayout) -> None:
        self.path = path
        self.layout = layout
        self._fd = fd
        self._written = dict.fromkeys(layout.begin, 0)
        with os_failures(path, layout.size):
            allocate(fd, layout.size)
            pwrite_all(fd, memoryview(layout.header), 0)

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a tensor.

        Raises:
            ValueError: more bytes than the tensor has.
            OutputFailure: the disk is full or fails.
        """
        view, at, size = as_bytes(data), self._written[name], self.layout.nbytes[name]
        if at + len(view) > size:
            raise ValueError(f"{name}: {at + len(view)} bytes given, the tensor has {size}")
        with os_failures(self.path):
            pwrite_all(self._fd, view, self.layout.begin[name] + at)
        self._written[name] = at + len(view)

    def finish(self) -> None:
        """Check that every tensor is complete, and force the file to the disk.

        Raises:
            ValueError: a tensor is incomplete.
            OutputFailure: the disk fails.
        """
        for name, size in self.layout.nbytes.items():
            if self._written[name] != size:
                raise ValueError(f"{name}: {self._written[name]} of {size} bytes were given")
        with os_failures(self.path):
            os.fsync(self._fd)

    def is_there(self) -> bool:
        """Whether the path names this very file, rather than nothing or somebody else's."""
        try:
            named, held = self.path.lstat(), os.fstat(self._fd)
        except OSError:
            return False
        return (named.st_ino, named.st_dev) == (held.st_ino, held.st_dev)

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class NotedFile(LaidFile):
    """A file that knows the SHA-256 of what each of its tensors holds.

    What the file has held up to its size stays, for `adopt`. Arguments and errors are those of
    `LaidFile`.
    """

    def __init__(self, fd: int, path: Path, layout: FileLayout) -> None:
        with os_failures(path, layout.size):
            if os.fstat(fd).st_size > layout.size:
                os.ftruncate(fd, layout.size)
        super().__init__(fd, path, layout)
        self._hashes = {name: hashlib.sha256() for name in layout.begin}

    def adopt(self, name: str, digest: str) -> bool:
        """Take a tensor that the file holds already, if its bytes have this digest.

        Returns:
            False, and nothing is changed, if they have another one.

        Raises:
            OutputFailure: the disk fails.
        """
        running = hashlib.sha256()
        with os_failures(self.path):
            feed(running, self._fd, self.layout.begin[name], self.layout.nbytes[name])
        if running.hexdigest() != digest:
            return False
        self._hashes[name], self._written[name] = running, self.layout.nbytes[name]
        return True

    def forget(self, name: str) -> None:
        """Let a tensor be written again from its start."""
        self._hashes[name], self._written[name] = hashlib.sha256(), 0

    def digest(self, name: str) -> str:
        """The SHA-256 of what a tensor holds so far."""
        return self._hashes[name].hexdigest()

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a tensor. Raises as `LaidFile.append`."""
        super().append(name, data)
        self._hashes[name].update(as_bytes(data))
