"""What an interrupted conversion has finished: a file beside its output, one line per tensor.

The tensors themselves lie in the writer's temporary. A line is believed only if their bytes there
still have the digests that it states, so that neither the order in which a failing machine wrote
its pages nor a cut line can do harm; and the source is read again, and must be the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.errors import ResumeError
from sketchconv.formats.part import os_failures

if TYPE_CHECKING:
    from sketchconv.formats.tensors import TensorInfo
    from sketchconv.job import Job

SUFFIX = ".sktch-state"
_MOST_BYTES = 1 << 28  # of a journal: 200,000 tensors with long names take a quarter of that


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished tensor of the source.

    Args:
        name: in the source.
        source: SHA-256 of its bytes there.
        stored: stored tensor -> digest (`formats.digest`).
        squares: error and norm of a sketched weight, both squared; zeros of others.
    """

    name: str
    source: str
    stored: Mapping[str, str]
    squares: tuple[float, float]

    def to_line(self) -> bytes:
        """One line of JSON; floats as hexadecimal text, exact."""
        exact = [value.hex() for value in self.squares]
        return json.dumps({**asdict(self), "squares": exact}).encode() + b"\n"

    @classmethod
    def from_value(cls, value: Any) -> Entry:
        """Read a line. Raises KeyError, TypeError, ValueError, AttributeError or OverflowError."""
        stored = {str(name): str(digest) for name, digest in value["stored"].items()}
        error, norm = map(float.fromhex, value["squares"])
        return cls(str(value["name"]), str(value["source"]), stored, (error, norm))


class Journal:
    """The finished tensors of a conversion, those of a former run included.

    Args:
        output: the sketch that is being made.
        fingerprint: everything else that decides its bytes, as plain JSON values.
        resume: go on with what a former run left; otherwise forget it.

    Raises:
        ResumeError: what is there belongs to another conversion.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        self.path = journal_path(output)
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self.finished: dict[str, Entry] = self._read() if resume else {}
        self._fd = -1

    @property
    def resumes(self) -> bool:
        """Whether there is anything to go on with."""
        return bool(self.finished)

    def add(self, entry: Entry) -> None:
        """Note a finished tensor.

        Raises:
            OutputError: the disk is full or fails.
        """
        with os_failures(self.path):
            if self._fd < 0:
                self._open(entry)
            else:
                write_all(self._fd, entry.to_line())
        self.finished[entry.name] = entry

    def reread(self) -> bool:
        """Believe the disk, after an interrupt: it may have come between a line and its noting.

        Returns:
            Whether there is anything to go on with.
        """
        if self._fd >= 0:
            self.finished = self._read()
        return self.resumes

    def kept(self, total: int) -> str:
        """What was kept of so many tensors, and how to go on, in words."""
        return (
            f"{len(self.finished)} of {total} tensors are finished and kept: run the same command "
            "again to go on, or with --no-resume to start anew"
        )

    def remove(self) -> None:
        """Forget everything: the output exists, or is not to be."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, entry: Entry) -> None:
        """Begin the file anew with what is known: a cut last line must not stay in the way.

        A journal is never without an entry: who sees the file may count on finished work.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fresh = self.path.with_name(self.path.name + ".new")
        self._fd = os.open(fresh, flags, 0o666)
        known = (e for name, e in self.finished.items() if name != entry.name)
        lines = (json.dumps(self._fingerprint).encode() + b"\n", *(e.to_line() for e in known))
        try:
            write_all(self._fd, b"".join(lines) + entry.to_line())
            fresh.replace(self.path)
        except OSError:
            self.close()
            raise
        finally:
            fresh.unlink(missing_ok=True)

    def _read(self) -> dict[str, Entry]:
        try:
            if self.path.stat().st_size > _MOST_BYTES:
                return {}
            first, *lines = self.path.read_bytes().split(b"\n")
            self._compare(json.loads(first))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        found: dict[str, Entry] = {}
        for line in lines[:-1]:  # what follows the last line feed was cut
            try:
                entry = Entry.from_value(json.loads(line))
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
                break
            found[entry.name] = entry
        return found

    def _compare(self, found: Any) -> None:
        old = found if isinstance(found, dict) else {}
        keys = self._fingerprint.keys() | old.keys()
        other = sorted(key for key in keys if old.get(key) != self._fingerprint.get(key))
        if other:
            raise ResumeError(
                f"{self.path}: an interrupted conversion to this output differs in "
                f"{', '.join(other)}; repeat that one to finish it, or pass --no-resume to start "
                "anew"
            )


def journal_path(output: Path) -> Path:
    """Where the journal of an output lies, beside it."""
    return output.absolute().parent / f".{output.absolute().name}{SUFFIX}"


def write_all(fd: int, data: bytes) -> None:
    """Write all of it: on a full disk a call may take a part, and the next one then fails."""
    while data:
        data = data[os.write(fd, data) :]


def fingerprint_of(job: Job) -> dict[str, Any]:
    """Everything that decides a job's bytes, but for the source's tensors, by what it is.

    `--threads` and `--max-memory` are not in it: the bytes do not depend on them.
    """
    files = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(job.files.items())}
    return {
        "version": job.draft.tool,
        "options": dict(job.draft.recipe),
        "source": {"tensors": infos_digest(job.source.infos), **job.draft.source},
        "files": files,
        "form": {"bundle": job.bundle, "sizes": dict(job.sizes)},
    }


def infos_digest(infos: Mapping[str, TensorInfo]) -> str:
    """Digest of tensors' names, dtypes and shapes."""
    return json_digest(sorted((i.name, i.dtype, list(i.shape)) for i in infos.values()))


def json_digest(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
