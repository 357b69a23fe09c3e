"""What a push did, or would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

State = Literal["sent", "there already", "to send"]


@dataclass(frozen=True, slots=True)
class PushedFile:
    """One file of a push: its path in the repository, bytes, SHA-256, and what became of it."""

    name: str
    size: int
    sha256: str
    state: State


@dataclass(frozen=True, slots=True)
class PushReport:
    """The outcome of a push.

    Args:
        repo: hub id.
        url: its page.
        revision: the branch; None for the main one.
        commit: what the files were compared at; None in a dry run.
        pull_request: its address, if one was opened.
        created: whether the repository was (or would be) made.
        private: None if not known.
        files: every file, in the order of sending.
        left: names in a model's folder that stay here.
        notes: hints for the user.
        card: the card as it is (or would be) there; None without one.
    """

    repo: str
    url: str
    revision: str | None
    commit: str | None
    pull_request: str | None
    created: bool
    private: bool | None
    files: tuple[PushedFile, ...]
    left: tuple[str, ...]
    notes: tuple[str, ...]
    card: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def sent_bytes(self) -> int:
        """Bytes of the files that were, or would be, sent."""
        return sum(file.size for file in self.files if file.state != "there already")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values for ``--json``."""
        return {
            "repo": self.repo,
            "url": self.url,
            "revision": self.revision,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "created": self.created,
            "private": self.private,
            "bytes": self.nbytes,
            "sent_bytes": self.sent_bytes,
            "files": [
                {"name": f.name, "bytes": f.size, "sha256": f.sha256, "state": f.state}
                for f in self.files
            ],
            "left_behind": list(self.left),
            "notes": list(self.notes),
            "card": self.card,
        }
