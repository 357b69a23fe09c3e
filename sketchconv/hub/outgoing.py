"""One file that is to be sent: its name in the repository, its bytes, its digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sketchconv.errors import HubError

_CHUNK: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A file to send.

    Args:
        name: POSIX path in the repository.
        data: the bytes themselves, or the file that holds them.
        size: in bytes.
        stamp: modification time in nanoseconds of the file; 0 for bytes.
    """

    name: str
    data: bytes | Path
    size: int
    stamp: int = 0

    @classmethod
    def of_file(cls, name: str, path: Path) -> Outgoing:
        """A file on disk, which is streamed."""
        status = path.stat()
        return cls(name, path, status.st_size, status.st_mtime_ns)

    @classmethod
    def of_bytes(cls, name: str, data: bytes) -> Outgoing:
        """A small file in memory."""
        return cls(name, data, len(data))

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """SHA-256 of the content, which LFS names a file by.

        Args:
            progress: called with the bytes of each chunk.

        Raises:
            HubError: the file changed since it was looked at.
        """
        running = hashlib.sha256()
        for chunk in self._chunks():
            running.update(chunk)
            if progress is not None:
                progress(len(chunk))
        self.check_unchanged()
        return running.hexdigest()

    def git_sha1(self) -> str:
        """The name that git gives this content: SHA-1 of `blob SIZE NUL` and the bytes."""
        running = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        for chunk in self._chunks():
            running.update(chunk)
        return running.hexdigest()

    def check_unchanged(self) -> None:
        """Raise `HubError` if the file on disk is no longer the one that was looked at."""
        if isinstance(self.data, Path):
            status = self.data.stat()
            if (status.st_size, status.st_mtime_ns) != (self.size, self.stamp):
                raise HubError(f"{self.data}: changed while it was being sent; push it again")

    def _chunks(self) -> Iterator[bytes]:
        if isinstance(self.data, bytes):
            yield self.data
            return
        with self.data.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
