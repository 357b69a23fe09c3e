"""The safetensors container, read with `pread`: a strict profile for ours, a lenient one."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sketchconv.formats.errors import FormatError, refuse, shown
from sketchconv.formats.header import PROFILES, Entry, Profile, parse_header
from sketchconv.formats.rules import LENGTH_BYTES, MIN_HEADER
from sketchconv.formats.sniff import describe_head
from sketchconv.formats.tensors import DTYPES

__all__ = ["Container", "Entry", "open_regular", "pread_exact"]

_CHUNK = 1 << 30


class Container:
    """An open safetensors file. Use `Container.open`; close it, or use it as a context manager.

    Reading is thread-safe. The file is never mapped into memory: a file that shrinks while it is
    open gives a `FormatError` (SKT-013) rather than a signal.
    """

    def __init__(
        self,
        path: Path,
        fd: int,
        size: int,
        header_size: int,
        metadata: Mapping[str, str],
        entries: Mapping[str, Entry],
    ) -> None:
        self.path = path
        self.size = size
        self.data_begin = LENGTH_BYTES + header_size
        self.metadata = MappingProxyType(metadata)
        self.entries = MappingProxyType(entries)
        self._fd: int | None = fd

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        profile: Literal["sktch", "safetensors"] = "sktch",
    ) -> Container:
        """Open a file and check its whole header before anything else is read.

        Args:
            path: the file.
            profile: `"sktch"`, the strict profile of the specification, or `"safetensors"` for
                any valid foreign checkpoint (dimensions of 0, BOOL, odd names, white space).

        Raises:
            FormatError: if the file breaks a rule of the container.
            OSError: if the file is missing or not readable.
        """
        fd, size = open_regular(path)
        try:
            rule, where = PROFILES[profile], Path(path).name
            raw = _read_header(fd, size, where, rule)
            data_size = size - LENGTH_BYTES - len(raw)
            metadata, entries = parse_header(raw, data_size, where, rule)
        except BaseException:
            os.close(fd)
            raise
        return cls(Path(path), fd, size, len(raw), metadata, entries)

    def header(self) -> bytes:
        """Return the length and the header as they are in the file."""
        return pread_exact(self._open_fd(), self.data_begin, 0, self.path.name)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return the bytes `[begin, end)` of a tensor; the whole tensor by default.

        Raises:
            KeyError: if there is no such tensor.
            ValueError: if the range does not lie inside the tensor.
            FormatError: SKT-013 if the file got shorter.
        """
        entry = self.entries[name]
        size = entry.end - entry.begin
        stop = size if end is None else end
        if not 0 <= begin <= stop <= size:
            raise ValueError(f"{name}: bytes [{begin}, {stop}) are not in [0, {size})")
        return pread_exact(self._open_fd(), stop - begin, entry.begin + begin, self.path.name)

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a whole tensor as a read-only array in its carrier dtype and its shape.

        Dtypes below a byte come as flat uint8.

        Raises:
            KeyError: if there is no such tensor.
            FormatError: SKT-013 if the file got shorter.
        """
        info = self.entries[name].info
        dtype = DTYPES[info.dtype]
        flat = np.frombuffer(self.read(name), dtype.numpy)
        return flat.reshape(info.shape) if dtype.itemsize else flat

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open_fd(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self.path.name} is closed")
        return self._fd

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def open_regular(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Open a regular file for reading without ever blocking; return its descriptor and size.

    Raises:
        FormatError: SKT-001 for a folder, a pipe, a device or a socket.
        OSError: if the file is missing or not readable.
    """
    where = Path(path).name
    # Ask before opening: opening a device can have effects, and a socket cannot be opened at all.
    _refuse_irregular(Path(path).stat().st_mode, where)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        _refuse_irregular(status.st_mode, where)
    except FormatError:
        os.close(fd)
        raise
    return fd, status.st_size


def pread_exact(fd: int, count: int, offset: int, where: str) -> bytes:
    """Return exactly `count` bytes at `offset`.

    Raises:
        FormatError: SKT-013 if the file ends before.
    """
    parts, left = [], count
    while left:
        part = os.pread(fd, min(left, _CHUNK), offset)
        if not part:
            refuse("SKT-013", where, f"the file got shorter while open: {left} bytes are missing")
        parts.append(part)
        left -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _refuse_irregular(mode: int, where: str) -> None:
    if not stat.S_ISREG(mode):
        what = "folder" if stat.S_ISDIR(mode) else "pipe, device or socket"
        refuse("SKT-001", where, f"expected a regular file, got a {what}")


def _read_header(fd: int, size: int, where: str, profile: Profile) -> bytes:
    head = pread_exact(fd, min(size, 256), 0, where)
    hint = describe_head(head)
    if size < LENGTH_BYTES + MIN_HEADER:
        refuse("SKT-002", where, f"a file has at least 10 bytes, got {size}{hint}")
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    if not MIN_HEADER <= length <= profile.max_header:
        refuse(
            "SKT-003",
            where,
            f"the header length must be {MIN_HEADER} to {profile.max_header}, got {length}{hint}",
        )
    if LENGTH_BYTES + length > size:
        refuse(
            "SKT-004",
            where,
            f"the header ends at byte {LENGTH_BYTES + length}, the file at {size}{hint}",
        )
    if head[LENGTH_BYTES] != ord("{"):
        first = shown(head[LENGTH_BYTES : LENGTH_BYTES + 4])
        refuse("SKT-005", where, f"expected '{{' as the header's first byte, got {first}{hint}")
    return pread_exact(fd, length, LENGTH_BYTES, where)
