"""A part of a file that is read from front to back, never beyond its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sketchconv.errors import SourceError
from sketchconv.formats.container import pread_exact

_BUFFER: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [begin, begin + length) of a file."""

    begin: int
    length: int


class Window:
    """Reads a span of an open file by `pread`.

    Args:
        fd: the file.
        span: which part of it.
        where: the file, for errors.
    """

    def __init__(self, fd: int, span: Span, where: str) -> None:
        self._fd, self._where = fd, where
        self._at, self._end = span.begin, span.begin + span.length
        self._held, self._held_at = b"", span.begin

    @property
    def place(self) -> int:
        """Where in the file the next byte is."""
        return self._at

    def span(self, length: int) -> Span:
        """The next bytes as a span, without reading them.

        Raises:
            SourceError: the window ends before.
        """
        if length > self._end - self._at:
            raise SourceError(
                f"{self._where}: cut off: {length} bytes expected at byte {self._at}, but"
                f" {self._end - self._at} are left; download it again"
            )
        found = Span(self._at, length)
        self._at += length
        return found

    def take(self, length: int) -> bytes:
        """The next bytes.

        Raises:
            SourceError: the window ends before.
        """
        span = self.span(length)
        inside = span.begin - self._held_at
        if not (inside >= 0 and inside + length <= len(self._held)):
            size = min(max(length, _BUFFER), self._end - span.begin)
            self._held = pread_exact(self._fd, size, span.begin, self._where)
            self._held_at, inside = span.begin, 0
        return self._held[inside : inside + length]

    def line(self, longest: int) -> str:
        """The text up to the next line feed.

        Raises:
            SourceError: there is none within `longest` bytes, or it is not ASCII.
        """
        found = bytearray()
        while len(found) <= longest:
            byte = self.take(1)
            if byte == b"\n":
                break
            found += byte
        if len(found) > longest or not found.isascii():
            raise SourceError(f"{self._where}: a name that is too long, or not ASCII")
        return found.decode("ascii")
