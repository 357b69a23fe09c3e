"""Names inside a model folder: no way out of it by `..`, absolute paths or symbolic links."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from sketchconv.errors import SourceError

_DRIVE = re.compile(r"^[A-Za-z]:")


class ModelFolder:
    """A folder whose files are reached only through checked names.

    A symbolic link may lead to another file of the folder. In a Hugging Face cache
    (`models--org--name/snapshots/<revision>`) it may also lead into that repository's `blobs`,
    which is how the cache stores every file.
    """

    def __init__(self, path: Path) -> None:
        """Raises SourceError if `path` is not a folder."""
        if not path.is_dir():
            raise SourceError(f"{path}: no such folder")
        self.root = path.resolve()
        repository = self.root.parent.parent
        cached = self.root.parent.name == "snapshots" and repository.name.startswith("models--")
        self._allowed = (self.root, repository / "blobs") if cached else (self.root,)
        self.id = repository.name[len("models--") :].replace("--", "/") if cached else path.name
        self.id = self.id or self.root.name
        self.revision = self.root.name if cached else None

    def path(self, name: str) -> Path:
        """The file of that name, links resolved.

        Raises:
            SourceError: the name leaves the folder, or nothing is there, or it is no regular file.
        """
        checked = safe_name(name)
        path = self.root / checked
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise SourceError(f"{name!r}: no such file in {self.id}") from None
        if not any(real.is_relative_to(folder) for folder in self._allowed):
            raise SourceError(
                f"{name!r}: a symbolic link that leaves the model folder; copy the file into it"
            )
        if not real.is_file():
            raise SourceError(f"{name!r}: not a regular file")
        return real

    def has(self, name: str) -> bool:
        """Whether an entry of that name exists, be it a dangling link."""
        path = self.root / name
        return path.is_symlink() or path.exists()

    def names(self) -> list[str]:
        """Sorted names of the top level's entries."""
        return sorted(entry.name for entry in self.root.iterdir())


_LONGEST = 255  # bytes of one part of a path that file systems take


def safe_name(name: str) -> str:
    """`name` itself if it is a relative path that stays below its folder.

    Raises:
        SourceError: empty, absolute, with a drive, a backslash, NUL or a `..` part, too long.
    """
    parts = PurePosixPath(name).parts
    bad = (
        not parts
        or name.startswith("/")
        or "\\" in name
        or "\0" in name
        or ".." in parts
        or _DRIVE.match(name)
    )
    if any(len(part.encode("utf-8", "replace")) > _LONGEST for part in parts):
        raise SourceError(f"{name[:80]!r}...: a file name has at most {_LONGEST} bytes")
    if bad:
        raise SourceError(f"{name!r}: a file name must be relative and stay in the model folder")
    return name
