"""Streaming, atomic writer of GGUF files: sizes first, tensors in any order, renamed at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from sketchconv.formats import staging
from sketchconv.formats.laid_file import FileLayout, LaidFile
from sketchconv.formats.part import Data, check_space


class GgufWriter:
    """Writes one model, in one file or in parts.

    Until `commit` there are only temporaries beside the output; `abort` removes them. The first
    part, the one that is opened, is renamed last, so that a model is never there by halves.

    Args:
        folder: where the files go.
        layouts: of each file by name, the first part first.
        overwrite: replace regular files that are there.

    Raises:
        OutputFailure: an output exists, cannot be written, or the disk is too small.
    """

    def __init__(
        self, folder: Path, layouts: Mapping[str, FileLayout], overwrite: bool = False
    ) -> None:
        root = Path(os.path.abspath(folder))  # noqa: PTH100 (Path.resolve would follow links)
        self._overwrite = overwrite
        self._files: dict[Path, LaidFile] = {}
        self._home = {name: root / part for part, at in layouts.items() for name in at.begin}
        self._open = True
        for name in layouts:
            staging.check_target(root / name, folder=False, overwrite=overwrite)
        try:
            check_space(root, sum(x.size for x in layouts.values()), root)
            for name, layout in layouts.items():
                self._stage(root / name, layout)
        except BaseException:
            self.abort()
            raise

    def _stage(self, path: Path, layout: FileLayout) -> None:
        descriptor = staging.open_file(path)
        try:
            self._files[path] = LaidFile(descriptor, path, layout)
        except BaseException:
            os.close(descriptor)
            staging.discard(path, folder=False)
            raise

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a tensor; tensors come in any order, also interleaved.

        Raises:
            KeyError: no such tensor.
            ValueError: too many bytes, or the writer is closed.
            OutputFailure: the disk is full or fails.
        """
        self._check_open()
        self._files[self._home[name]].append(name, data)

    def commit(self) -> None:
        """Check that all is there, sync, and rename into place, the first part last.

        Raises:
            ValueError: a tensor is incomplete, or the writer is closed.
            OutputFailure: the disk fails, or the target appeared meanwhile.
            In every case the temporaries, and parts that were new, are removed.
        """
        self._check_open()
        fresh = [path for path in self._files if not path.exists()]
        try:
            for file in self._files.values():
                file.finish()
            first, *rest = self._files
            if rest:
                # Old and new parts together would be a wrong model; without the first it is none.
                first.unlink(missing_ok=True)
            for path in (*rest, first):
                staging.publish(path, folder=False, overwrite=self._overwrite)
        except BaseException:
            for path in fresh:
                path.unlink(missing_ok=True)
            self.abort()
            raise
        self._close()

    def abort(self) -> None:
        """Remove the temporaries; does nothing after a commit."""
        if not self._open:
            return
        for path in self._files:
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
