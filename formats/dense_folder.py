"""A Hugging Face folder of plain safetensors: laid out first, streamed, put in place at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from sketchconv.formats import staging
from sketchconv.formats.adopting import Adopting
from sketchconv.formats.errors import OutputFailure
from sketchconv.formats.header import canonical_header, data_order
from sketchconv.formats.laid_file import FileLayout, NotedFile
from sketchconv.formats.part import Data, os_failures
from sketchconv.formats.paths import check_path
from sketchconv.formats.sharding import INDEX_NAME, SINGLE_NAME
from sketchconv.formats.staged_folder import staged_files
from sketchconv.formats.tensors import TensorInfo


def safetensors_layout(infos: Iterable[TensorInfo], framework: str = "pt") -> FileLayout:
    """Lay out one safetensors file: tensors by element size, then name.

    Args:
        infos: its tensors.
        framework: `format` in its metadata, by which loaders know whose layout it is.
    """
    ordered = data_order(infos)
    header = canonical_header({"format": framework}, ordered)
    begin, at = {}, len(header)
    for info in ordered:
        begin[info.name] = at
        at += info.nbytes
    return FileLayout(header, begin, {i.name: i.nbytes for i in ordered}, at)


def dense_layouts(
    infos: Sequence[TensorInfo], max_shard_size: int, framework: str = "pt"
) -> dict[str, FileLayout]:
    """Lay out the weight files of a folder, by name, in the order of `infos`.

    A file takes tensors until their bytes would pass `max_shard_size`; a larger one gets its own.

    Raises:
        OutputFailure: a name is used twice.
    """
    if len({info.name for info in infos}) != len(infos):
        raise OutputFailure("a tensor name is used twice")
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for info in infos:
        if shards[-1] and used + info.nbytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(info)
        used += info.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: safetensors_layout(shards[0], framework)}
    return {
        f"model-{i:05d}-of-{len(shards):05d}.safetensors": safetensors_layout(shard, framework)
        for i, shard in enumerate(shards, 1)
    }


def with_index(files: Mapping[str, bytes], layouts: Mapping[str, FileLayout]) -> dict[str, bytes]:
    """The small files of a folder, an index of several weight files among them.

    Raises:
        FormatError: a path that leaves the folder or is not portable.
    """
    others = {path: data for path, data in files.items() if path != INDEX_NAME}
    if len(layouts) > 1:
        weight_map = {name: shard for shard, layout in layouts.items() for name in layout.begin}
        total = sum(sum(layout.nbytes.values()) for layout in layouts.values())
        value = {"metadata": {"total_size": total}, "weight_map": weight_map}
        others[INDEX_NAME] = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
    for path in others:
        check_path(path, "folder")
    return others


class DenseFolderWriter(Adopting):
    """Writes a folder of weights and small files; there is none of it until `commit`.

    Args:
        path: the folder to make; an empty one that is there is taken.
        layouts: of the weight files by name.
        files: the small files by relative POSIX path.
        resume: keep what a former run left in the temporary, for `adopt`.

    Raises:
        OutputFailure: it exists and is not empty, cannot be written, or the disk is too small.
    """

    def __init__(
        self,
        path: Path,
        layouts: Mapping[str, FileLayout],
        files: Mapping[str, bytes],
        resume: bool = False,
    ) -> None:
        super().__init__(keep=resume)
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 (Path.resolve would follow links)
        self._files: list[NotedFile] = []
        self._home: dict[str, NotedFile] = {}
        staging.check_target(self.path, folder=True, overwrite=False)
        self._lock = staging.open_folder(self.path, keep=layouts if resume else ())
        try:
            for layout, place, descriptor in staged_files(self.path, layouts, files):
                self._begin(layout, place, descriptor)
        except BaseException:
            self.abort()
            raise

    def _begin(self, layout: FileLayout, place: Path, descriptor: int) -> None:
        try:
            file = NotedFile(descriptor, place, layout)
        except BaseException:
            os.close(descriptor)
            raise
        self._files.append(file)
        self._home.update(dict.fromkeys(layout.begin, file))

    def _file_of(self, name: str) -> NotedFile:
        return self._home[name]

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a tensor. Raises as `LaidFile.append`, KeyError if unknown."""
        self._home[name].append(name, data)

    def commit(self) -> None:
        """Check that all is there, sync, and put the folder in place.

        Raises:
            ValueError: a tensor is incomplete, or the writer is closed.
            OutputFailure: the disk fails, or the target appeared meanwhile.
        """
        if self._lock < 0:
            raise ValueError("the writer is closed")
        try:
            for file in self._files:
                file.finish()
            folder = staging.staging_path(self.path)
            with os_failures(self.path):
                for sub in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
                    staging.sync_folder(sub)
            staging.publish(self.path, folder=True, overwrite=False)
        except BaseException:
            self.abort()
            raise
        self._close()

    def abort(self) -> None:
        """Remove the temporary, unless it is to be kept; does nothing after a commit."""
        if self._lock >= 0:
            self._close_files()  # first: no folder can be removed where no more files can be opened
            if not self.keep:
                staging.discard(self.path, folder=True)
            self._close()

    def _close_files(self) -> None:
        for file in self._files:
            file.close()

    def _close(self) -> None:
        self._close_files()
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> DenseFolderWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()
