"""Streaming, atomic writer of GGUF files: sizes first, tensors in any order, renamed at the end."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from sketchconv.formats import staging
from sketchconv.formats.adopting import Adopting
from sketchconv.formats.errors import OutputFailure
from sketchconv.formats.laid_file import FileLayout, NotedFile
from sketchconv.formats.part import Data, allocated, check_space, os_failures


class GgufWriter(Adopting):
    """Writes one model, in one file or in parts.

    Until `commit` there are only temporaries beside the output; `abort` removes them (see `keep`).
    The first part, the one that is opened, is renamed last, so that a model is never there by
    halves.

    Args:
        folder: where the files go.
        layouts: of each file by name, the first part first.
        overwrite: replace regular files that are there.
        resume: keep what a former run left in the temporaries, for `adopt`.

    Raises:
        OutputFailure: an output exists, cannot be written, or the disk is too small.
    """

    def __init__(
        self,
        folder: Path,
        layouts: Mapping[str, FileLayout],
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        super().__init__(keep=resume)
        root = Path(os.path.abspath(folder))  # noqa: PTH100 (Path.resolve would follow links)
        self._overwrite, self._resume = overwrite, resume
        self._files: dict[Path, NotedFile] = {}
        self._home = {name: root / part for part, at in layouts.items() for name in at.begin}
        self._open = True
        for name in layouts:
            staging.check_target(root / name, folder=False, overwrite=overwrite)
        try:
            check_space(root, _missing(root, layouts, resume=resume), root)
            for name, layout in layouts.items():
                self._stage(root / name, layout)
        except BaseException:
            self.abort()
            raise

    def _stage(self, path: Path, layout: FileLayout) -> None:
        descriptor = self._opened(path)
        try:
            self._files[path] = NotedFile(descriptor, path, layout)
        except BaseException:
            os.close(descriptor)
            if not self.keep:
                staging.discard(path, folder=False)
            raise

    def _opened(self, path: Path) -> int:
        try:
            return staging.open_file(path, keep=self._resume)
        except OutputFailure as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
                raise OutputFailure(
                    f"cannot write {path}: {len(self._files)} parts are open, and the system opens"
                    " no more files at once; choose larger parts"
                ) from error
            raise

    def _file_of(self, name: str) -> NotedFile:
        self._check_open()
        return self._files[self._home[name]]

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a tensor; tensors come in any order, also interleaved.

        Raises:
            KeyError: no such tensor.
            ValueError: too many bytes, or the writer is closed.
            OutputFailure: the disk is full or fails.
        """
        self._file_of(name).append(name, data)

    def commit(self) -> None:
        """Check that all is there, sync, and rename into place, the first part last.

        Raises:
            ValueError: a tensor is incomplete, or the writer is closed.
            OutputFailure: the disk fails, or the target appeared meanwhile.
            In every case the temporaries, and parts that were new, are removed, and parts that
            were to be replaced are back.
        """
        self._check_open()
        try:
            for file in self._files.values():
                file.finish()
            self._publish()
        except BaseException:
            self.abort()
            raise
        self._close()

    def _publish(self) -> None:
        first, *rest = self._files
        there = [path for path in self._files if path.exists()] if self._overwrite else []
        # Old and new parts together would be a wrong model. One file is replaced in one step.
        aside = {path: staging.old_path(path) for path in there} if rest else {}
        try:
            for path, old in aside.items():
                with os_failures(path):
                    path.replace(old)
            for path in (*rest, first):
                staging.publish(path, folder=False, overwrite=self._overwrite)
        except BaseException:
            self._take_back(aside, there)
            raise
        for path in self._files:  # also those that a killed run has moved aside
            staging.old_path(path).unlink(missing_ok=True)

    def _take_back(self, aside: Mapping[Path, Path], there: list[Path]) -> None:
        """Undo what this writer renamed into place, by identity, and put old parts back."""
        for path, file in self._files.items():
            if (path in aside or path not in there) and file.is_there():
                _withdraw(path, keep=self.keep)
        for path, old in aside.items():
            if old.exists() and not path.exists():
                old.rename(path)

    def abort(self) -> None:
        """Remove the temporaries, unless they are to be kept; does nothing after a commit."""
        if not self._open:
            return
        for path in () if self.keep else self._files:
            staging.discard(path, folder=False)
        self._close()

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("the writer is closed")

    def _close(self) -> None:
        self._open = False
        for file in self._files.values():
            file.close()

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


def _withdraw(path: Path, *, keep: bool) -> None:
    """Make a file that was renamed into place the temporary again, or remove it."""
    try:
        if keep:
            path.replace(staging.staging_path(path))
            return
    except OSError:  # a disk that fails: what is gone is made again
        pass
    path.unlink(missing_ok=True)


def _missing(root: Path, layouts: Mapping[str, FileLayout], *, resume: bool) -> int:
    """Bytes of the disk that the files still need, beside what a former run's have already."""
    staged = {staging.staging_path(root / name): x.size for name, x in layouts.items()}
    there = {path: allocated(path.stat()) for path in staged if resume and path.exists()}
    return sum(max(size - there.get(path, 0), 0) for path, size in staged.items())
