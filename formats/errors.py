"""The base of every error that sketchconv raises on purpose, and the format's own errors."""

from __future__ import annotations

import reprlib
from typing import NoReturn


class SketchconvError(Exception):
    """Base class: one clear line that says what, where, expected, got and what to do next."""


class FormatError(SketchconvError):
    """A file breaks a numbered requirement of `spec/sktch.md`.

    Args:
        requirement: the number of the broken requirement, for instance ``"SKT-012"``.
        where: the file, and the tensor or field in it.
        message: what was expected and what was found.
    """

    def __init__(self, requirement: str, where: str, message: str) -> None:
        self.requirement = requirement
        self.where = where
        self.message = message
        super().__init__(f"{where}: {message} [{requirement}]")

    def __reduce__(self) -> tuple[type[FormatError], tuple[str, str, str]]:
        return (type(self), (self.requirement, self.where, self.message))


class OutputFailure(SketchconvError):
    """The output cannot be written: it exists, the place is not writable, the disk is full."""


def refuse(requirement: str, where: str, message: str) -> NoReturn:
    """Raise the `FormatError` of a requirement.

    Raises:
        FormatError: always.
    """
    raise FormatError(requirement, where, message)


def shown(value: object, limit: int = 80) -> str:
    """Return `repr(value)` cut to `limit` characters, so that hostile input keeps errors short."""
    if isinstance(value, str | bytes):
        text = repr(value[:limit])
    else:
        text = repr(value) if isinstance(value, int | float | None) else reprlib.repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
