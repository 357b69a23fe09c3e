"""One output written by several processes: who opened it shares its files with the others.

The others write whole tensors at their places and say which digests they have; the one that opened
the output believes them (`settle`), writes the headers and puts the output in place. All of them
hold the descriptor that is locked, so no other writer comes in before the last one has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sketchconv.formats.adopting import Adopting
from sketchconv.formats.draft import Layout
from sketchconv.formats.part import Data, Part


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A file of an output: a descriptor that another process has inherited, its path and layout."""

    fd: int
    path: Path
    layout: Layout


@dataclass(frozen=True, slots=True)
class Shared:
    """An open output as another process needs it.

    Attributes:
        files: of the output.
        lock: descriptor of the folder that is locked, or -1 where a file itself is.
    """

    files: tuple[SharedFile, ...]
    lock: int

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What another process has to inherit."""
        return (*(file.fd for file in self.files), *((self.lock,) if self.lock >= 0 else ()))


class Parts(Adopting):
    """Stored tensors by the file that they are in.

    Args:
        keep: see `Adopting`.
    """

    def __init__(self, *, keep: bool) -> None:
        super().__init__(keep=keep)
        self._parts: list[Part] = []
        self._owner: dict[str, Part] = {}
        self._lock = -1

    def _file_of(self, name: str) -> Part:
        return self._owner[name]

    def _add(self, part: Part) -> None:
        self._parts.append(part)
        self._owner.update(dict.fromkeys(part.layout.infos, part))

    def settle(self, digests: Mapping[str, str]) -> None:
        """Take stored tensors that another process of this run has written, with these digests.

        Raises:
            KeyError: if there is no such stored tensor.
            ValueError: after commit or abort.
        """
        for name, digest in digests.items():
            self._file_of(name).settle(name, digest)

    def shared(self) -> Shared:
        """The output, for processes that inherit its descriptors."""
        files = tuple(SharedFile(part.fd, part.path, part.layout) for part in self._parts)
        return Shared(files, self._lock)


class SharedWriter(Parts):
    """Writes tensors into an output that another process has opened, and will commit.

    Args:
        files: of the output.
    """

    def __init__(self, files: Sequence[SharedFile]) -> None:
        super().__init__(keep=True)
        for file in files:
            self._add(Part(file.fd, file.path, file.layout))

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a stored tensor; its chunks come in order.

        Raises:
            KeyError: if there is no such stored tensor.
            ValueError: for too many bytes.
            OutputFailure: if the disk is full or fails.
        """
        self._owner[name].append(name, data)
