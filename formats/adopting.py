"""What writers have in common that can go on with what a former run has written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Adopter(Protocol):
    """A file that knows the digests of its tensors."""

    def adopt(self, name: str, digest: str) -> bool:
        """Take a tensor that the file holds already, if its bytes have this digest."""

    def forget(self, name: str) -> None:
        """Let a tensor be written again from its start."""

    def digest(self, name: str) -> str:
        """The digest of what a tensor holds so far."""


class Adopting:
    """Stored tensors of an output that may be there already, by their digests.

    Attributes:
        keep: leave the temporary where it is if the output is not finished.
    """

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep

    def _file_of(self, name: str) -> Adopter:
        raise NotImplementedError

    def adopt(self, digests: Mapping[str, str]) -> bool:
        """Take stored tensors that a former run has written, if their bytes have these digests.

        Returns:
            False if one has not; what it holds is then to be written again.

        Raises:
            KeyError: if there is no such stored tensor.
            ValueError: after commit or abort.
            OutputFailure: if the disk fails.
        """
        if all(self._file_of(name).adopt(name, digest) for name, digest in digests.items()):
            return True
        for name in digests:
            self._file_of(name).forget(name)
        return False

    def digest(self, name: str) -> str:
        """The digest of what a stored tensor holds so far."""
        return self._file_of(name).digest(name)
