"""Streaming, atomic writers: a bundle, or a Hugging Face folder.

Sizes are known first, the disk is reserved first, tensors come in any order, the header last.
Until `commit` returns there is only a temporary beside the output; `abort` removes it, or leaves it
for the next run to go on with, where that was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

from sketchconv.formats import staging
from sketchconv.formats.draft import Draft, Results, bundle_layout, bundle_size
from sketchconv.formats.part import Data, Part, os_failures
from sketchconv.formats.sharding import folder_files, folder_layouts, folder_sizes
from sketchconv.formats.shared import Parts
from sketchconv.formats.staged_folder import staged_files

__all__ = [
    "BundleWriter",
    "Draft",
    "FolderWriter",
    "Results",
    "Writer",
    "bundle_size",
    "folder_sizes",
]


class Writer(Protocol):
    """What both writers do."""

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a stored tensor."""

    def commit(self, results: Results) -> None:
        """Write digests and headers, and put the output in place."""

    def abort(self) -> None:
        """Remove the temporary; nothing is left."""


class _Base(Parts):
    """The life of an output: open, append, then commit or abort.

    Attributes:
        path: of the output.
    """

    _folder: bool

    def __init__(self, path: str | os.PathLike[str], overwrite: bool, resume: bool) -> None:
        super().__init__(keep=resume)
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 (Path.resolve would follow links)
        self._overwrite = overwrite
        self._open = True

    def _file_of(self, name: str) -> Part:
        self._check_open()
        return super()._file_of(name)

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a stored tensor.

        Chunks of one tensor come in order; tensors in any order, also interleaved.

        Raises:
            KeyError: if the draft has no such stored tensor.
            ValueError: for too many bytes, or after commit or abort.
            OutputFailure: if the disk is full or fails; the temporary is then removed (see `keep`).
        """
        self._check_open()
        part = self._owner[name]
        try:
            part.append(name, data)
        except BaseException:
            self.abort()
            raise

    def commit(self, results: Results) -> None:
        """Check that all is there, write digests and headers, sync, rename into place.

        Raises:
            KeyError, ValueError: if a tensor or a result is missing.
            OutputFailure: if the disk fails or the target appeared meanwhile.
            In every case the temporary is removed (see `keep`).
        """
        self._check_open()
        try:
            self._finish(results)
            staging.publish(self.path, folder=self._folder, overwrite=self._overwrite)
        except BaseException:
            self.abort()
            raise
        self._close()

    def abort(self) -> None:
        """Remove the temporary, unless it is to be kept. Does nothing after a commit."""
        if self._open:
            self._close_parts()  # first: no folder can be removed where no more files can be opened
            if not self.keep:
                staging.discard(self.path, folder=self._folder)
            self._close()

    def _finish(self, results: Results) -> None:
        for part in self._parts:
            part.finish(results)

    def _begin(self, part: Part) -> None:
        sentinel = part.layout.manifest.sentinel
        self._add(part)
        part.reserve()
        if sentinel is not None:
            part.append(sentinel, b"\0")

    def _close_parts(self) -> None:
        for part in self._parts:
            part.close()

    def _close(self) -> None:
        self._open = False
        self._close_parts()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError(f"the writer of {self.path} is closed")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


class BundleWriter(_Base):
    """Writes one self-contained `.sktch` file.

    Args:
        path: the file to write; its folder must exist.
        draft: what to write.
        files: relative POSIX path -> bytes of configuration, tokenizer and template files.
        overwrite: replace a regular file that is there.
        resume: keep what a former run left in the temporary, for `adopt`.

    Raises:
        FormatError: if the draft breaks a requirement.
        OutputFailure: if the output exists, cannot be written, or the disk is too small.
    """

    _folder = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        draft: Draft,
        files: Mapping[str, bytes],
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        super().__init__(path, overwrite, resume)
        layout = bundle_layout(draft, files)
        staging.check_target(self.path, folder=False, overwrite=overwrite)
        fd = staging.open_file(self.path, keep=resume)
        try:
            part = Part(fd, staging.staging_path(self.path), layout)
            self._begin(part)
            for file, tensor in layout.manifest.files.items():
                if tensor:
                    part.append(tensor, files[file])
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> BundleWriter:
        return self


class FolderWriter(_Base):
    """Writes a Hugging Face folder: the given files as they are, and the weights in shards.

    Args:
        path: the folder to write; its parent must exist.
        draft: what to write.
        files: relative POSIX path -> bytes of the other files, `config.json` among them.
        max_shard_size: bytes of weights per shard.
        overwrite: replace a folder that holds a sketch.
        resume: keep what a former run left in the temporary, for `adopt`.

    Raises:
        FormatError: if the draft or a path breaks a requirement.
        OutputFailure: if the output exists, cannot be written, or the disk is too small.
    """

    _folder = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        draft: Draft,
        files: Mapping[str, bytes],
        max_shard_size: int,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        super().__init__(path, overwrite, resume)
        layouts = folder_layouts(draft, max_shard_size)
        others = folder_files(files, layouts)
        staging.check_target(self.path, folder=True, overwrite=overwrite)
        self._lock = staging.open_folder(self.path, keep=layouts if resume else ())
        try:
            for layout, place, fd in staged_files(self.path, layouts, others):
                self._begin(Part(fd, place, layout))
        except BaseException:
            self.abort()
            raise

    def _finish(self, results: Results) -> None:
        super()._finish(results)
        folder = staging.staging_path(self.path)
        with os_failures(self.path):
            for sub in [p for p in folder.rglob("*") if p.is_dir()]:
                staging.sync_folder(sub)
            staging.sync_folder(folder)

    def __enter__(self) -> FolderWriter:
        return self
