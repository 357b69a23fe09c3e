"""The base of every error that sketchconv raises on purpose, and the format's own error."""

from __future__ import annotations


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
