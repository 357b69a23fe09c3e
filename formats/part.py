"""One file being written: preallocated, tensors at their places in any order, then the header."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from sketchconv.formats.digest import tensor_hash
from sketchconv.formats.draft import Layout, Results
from sketchconv.formats.errors import OutputFailure

if TYPE_CHECKING:
    from hashlib import _Hash

Data = bytes | bytearray | memoryview | npt.NDArray[Any]
_READ: Final = 1 << 22
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_MORE: Final = frozenset({errno.EMFILE, errno.ENFILE})
_NO_FALLOCATE: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM})


class Part:
    """A file of a known layout that takes its tensors in chunks.

    Chunks of one tensor come in order; tensors come in any order, also interleaved. Not
    thread-safe.
    """

    def __init__(self, fd: int, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self._fd = fd
        self._written = dict.fromkeys(layout.infos, 0)
        self._hashes = {name: tensor_hash(info) for name, info in layout.infos.items()}
        self._settled: dict[str, str] = {}

    @property
    def fd(self) -> int:
        """The descriptor of the file; -1 once it is closed."""
        return self._fd

    def settle(self, name: str, digest: str) -> None:
        """Take a tensor as written, by another process that tells its digest."""
        self._settled[name], self._written[name] = digest, self.layout.infos[name].nbytes

    def adopt(self, name: str, digest: str) -> bool:
        """Take a tensor that the file holds already, if its bytes have this digest.

        Returns:
            False, and nothing is changed, if they have another one.

        Raises:
            OutputFailure: if the disk fails.
        """
        info, running = self.layout.infos[name], tensor_hash(self.layout.infos[name])
        with os_failures(self.path):
            feed(running, self._fd, self.layout.begin[name], info.nbytes)
        if running.hexdigest() != digest:
            return False
        self._hashes[name], self._written[name] = running, info.nbytes
        return True

    def forget(self, name: str) -> None:
        """Let a tensor be written again from its start."""
        self._settled.pop(name, None)
        self._hashes[name], self._written[name] = tensor_hash(self.layout.infos[name]), 0

    def digest(self, name: str) -> str:
        """The digest of what a tensor holds so far."""
        return self._settled.get(name) or self._hashes[name].hexdigest()

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a tensor.

        Raises:
            ValueError: for more bytes than the tensor has.
            OutputFailure: if the disk is full or fails.
        """
        view = as_bytes(data)
        at, size = self._written[name], self.layout.infos[name].nbytes
        if at + len(view) > size:
            raise ValueError(f"{name}: {at + len(view)} bytes given, the tensor has {size}")
        with os_failures(self.path):
            pwrite_all(self._fd, view, self.layout.begin[name] + at)
        self._hashes[name].update(view)
        self._written[name] = at + len(view)

    def finish(self, results: Results) -> None:
        """Write the header and force everything to the disk.

        Raises:
            ValueError: if a tensor is incomplete, or the results do not fit the draft.
            OutputFailure: if the disk fails.
        """
        for name, info in self.layout.infos.items():
            if self._written[name] != info.nbytes:
                raise ValueError(f"{name}: {self._written[name]} of {info.nbytes} bytes were given")
        digests = {name: self.digest(name) for name in self.layout.infos}
        manifest = self.layout.results(digests, results)
        manifest.check(self.path.name)
        header = self.layout.header(manifest)
        if len(header) != self.layout.data_begin:
            raise ValueError(
                f"the header takes {len(header)} bytes, {self.layout.data_begin} were planned"
            )
        with os_failures(self.path):
            pwrite_all(self._fd, memoryview(header), 0)
            os.fsync(self._fd)

    def reserve(self) -> None:
        """Give the file its final size on the disk now; what it holds up to there stays.

        Raises:
            OutputFailure: if the disk is full, with the bytes that are missing.
        """
        needed = max(self.layout.size - allocated(os.fstat(self._fd)), 0)
        check_space(self.path.parent, needed, self.path)
        with os_failures(self.path, needed):
            if os.fstat(self._fd).st_size > self.layout.size:
                os.ftruncate(self._fd, self.layout.size)
            allocate(self._fd, self.layout.size)

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def as_bytes(data: Data) -> memoryview:
    """Return the bytes of a buffer, or of an array in row-major order, without a copy if possible.

    Raises:
        ValueError: for a big-endian array.
    """
    if isinstance(data, np.ndarray):
        if data.dtype.newbyteorder("<") != data.dtype:
            raise ValueError(f"an array must be little-endian, got {data.dtype}")
        return memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return memoryview(data).cast("B")


def feed(running: _Hash, fd: int, begin: int, size: int) -> None:
    """Add `size` bytes of a file to a digest, or fewer where the file ends before.

    Raises:
        OSError: as `os.pread`.
    """
    end = begin + size
    while begin < end:
        data = os.pread(fd, min(_READ, end - begin), begin)
        if not data:
            return
        running.update(data)
        begin += len(data)


def pwrite_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all bytes at an offset, however few each call takes.

    Raises:
        OSError: as `os.pwrite`.
    """
    while view:
        done = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[done:], offset + done


def allocate(fd: int, size: int) -> None:
    """Reserve `size` bytes for a file, where the system and the file system can; else set its size.

    Raises:
        OSError: ENOSPC if the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
        else:
            return
    os.ftruncate(fd, size)


def allocated(status: os.stat_result) -> int:
    """Bytes of the disk that a file has already."""
    return status.st_blocks * 512


def check_space(folder: Path, needed: int, target: Path) -> None:
    """Compare `needed` bytes with the free disk of a folder.

    Raises:
        OutputFailure: with the bytes that are missing.
    """
    free = free_bytes(folder)
    if free < needed:
        raise _full(target, needed, free)


def free_bytes(folder: Path) -> int:
    """Return the bytes that an ordinary user may still write below `folder`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@contextmanager
def os_failures(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an `OSError` of writing into an `OutputFailure` of one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path, needed, free_bytes(path.parent)) from error
        way = "; choose larger shards, or raise `ulimit -n`" if error.errno in _NO_MORE else ""
        raise OutputFailure(f"cannot write {path}: {error.strerror or error}{way}") from error


def _full(path: Path, needed: int, free: int) -> OutputFailure:
    missing = max(needed - free, 0)
    detail = f": {needed} bytes needed, {free} free, {missing} missing" if missing else ""
    return OutputFailure(f"the disk is full, cannot write {path}{detail}")
