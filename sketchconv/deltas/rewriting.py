"""A sketch written again with other tables: the same form, tensors and order, byte by byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from sketchconv.deltas.editing import Edit, layouts
from sketchconv.errors import DeltaError, FormatError
from sketchconv.formats import staging
from sketchconv.formats.digest import tensor_hash
from sketchconv.formats.folder import safe_member
from sketchconv.formats.laid_file import FileLayout, LaidFile
from sketchconv.formats.part import check_space, os_failures
from sketchconv.formats.reader import SktchFile, SktchModel

Progress = Callable[[int, int], None]
_CHUNK: Final = 1 << 24
_SKIPPED: Final = frozenset({".git", ".cache", "__pycache__"})


def size(model: SktchModel, edit: Edit) -> int:
    """Bytes of the new sketch, all files of a folder together. Raises as `layouts`."""
    others = [] if model.is_bundle else [path for _, path in _other_files(model)]
    laid = layouts(model, edit).values()
    return sum(x.size for x in laid) + sum(path.stat().st_size for path in others)


def write(
    model: SktchModel,
    out: Path,
    edit: Edit,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the new sketch; return its bytes.

    Every tensor is copied in pieces and compared with its digest; one table is in memory at a time.

    Raises:
        DeltaError: `out` would not have the form of the sketch.
        FormatError: a tensor of the sketch is damaged (SKT-081); nothing is left behind.
        OutputError: `out` exists or cannot be written.
    """
    target = check_target(model, out, force=force)
    laid = layouts(model, edit)
    others = {} if model.is_bundle else dict(_other_files(model))
    total = size(model, edit)
    count = _Count(total, progress)
    if model.is_bundle:
        fd = staging.open_file(target)
        write_all = _write_bundle
    else:
        fd = staging.open_folder(target)
        write_all = _write_folder
    try:
        check_space(target.parent, total, target)
        write_all(model, target, laid, others, edit, count)
        staging.publish(target, folder=not model.is_bundle, overwrite=force)
    except BaseException:
        staging.discard(target, folder=not model.is_bundle)
        raise
    finally:
        os.close(fd)
    return total


def check_target(model: SktchModel, out: Path, *, force: bool) -> Path:
    """Check that the new sketch may be written to `out`; return its absolute path.

    Raises:
        DeltaError: it would not have the form of the sketch.
        OutputError: it exists or cannot be written.
    """
    target = Path(os.path.abspath(out))  # noqa: PTH100 (resolve would follow a link)
    if model.is_bundle != (target.suffix == ".sktch"):
        form = "one file: let OUT end in .sktch" if model.is_bundle else "a folder: OUT must be one"
        raise DeltaError(f"{model.path.name} is {form}")
    staging.check_target(target, folder=not model.is_bundle, overwrite=force)
    return target


class _Count:
    """Bytes done, told to whoever wants to know."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _write_bundle(
    model: SktchModel,
    target: Path,
    laid: Mapping[str, FileLayout],
    others: Mapping[str, Path],
    edit: Edit,
    count: _Count,
) -> None:
    (shard,) = model.shards.values()
    (layout,) = laid.values()
    _write_file(model, shard, staging.staging_path(target), layout, edit, count)


def _write_folder(
    model: SktchModel,
    target: Path,
    laid: Mapping[str, FileLayout],
    others: Mapping[str, Path],
    edit: Edit,
    count: _Count,
) -> None:
    folder = staging.staging_path(target)
    for name, path in others.items():
        data = path.read_bytes()
        staging.write_file(folder, name, data)
        count.add(len(data))
    for file, layout in laid.items():
        _write_file(model, model.shards[file], folder / file, layout, edit, count)
    with os_failures(target):
        for sub in [p for p in folder.rglob("*") if p.is_dir()]:
            staging.sync_folder(sub)
        staging.sync_folder(folder)


def _write_file(
    model: SktchModel, shard: SktchFile, path: Path, layout: FileLayout, edit: Edit, count: _Count
) -> None:
    changed = {model.manifest.sketches[w].lut_name: w for w in edit.tables}
    with os_failures(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        out = LaidFile(fd, path, layout)
        count.add(len(layout.header))
        for name, entry in shard.container.entries.items():
            if name in changed:
                out.append(name, edit.table(changed[name]))
                count.add(entry.info.nbytes)
                continue
            for piece in _pieces(shard, name):
                out.append(name, piece)
                count.add(len(piece))
        out.finish()
    finally:
        os.close(fd)


def _pieces(shard: SktchFile, name: str) -> Iterator[bytes]:
    """A tensor in pieces; at its end its digest is compared.

    Raises:
        FormatError: SKT-081.
    """
    info = shard.container.entries[name].info
    running = tensor_hash(info)
    for begin in range(0, info.nbytes, _CHUNK):
        piece = shard.container.read(name, begin, min(begin + _CHUNK, info.nbytes))
        running.update(piece)
        yield piece
    wanted = shard.manifest.digests[name]
    if running.hexdigest() != wanted:
        text = f"digest: recorded {wanted}, computed {running.hexdigest()}; the sketch is damaged"
        raise FormatError("SKT-081", f"{shard.container.path.name}: {name}", text)


def _other_files(model: SktchModel) -> Iterator[tuple[str, Path]]:
    """Every file of a folder that holds no weights of the sketch, by its relative path."""
    root = model.path
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_dir() or name.as_posix() in model.shards or _SKIPPED & set(name.parts):
            continue
        yield name.as_posix(), safe_member(root, name.as_posix())
