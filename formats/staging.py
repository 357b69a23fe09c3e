"""The temporary sibling of an output: locked against a second writer, renamed at the end.

Its name is fixed (`.NAME.sktch-partial`), so what a killed run left behind is found and replaced
by the next one, and two writers of one output meet at its lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from sketchconv.formats import rules
from sketchconv.formats.errors import OutputFailure, SketchconvError
from sketchconv.formats.part import os_failures

SUFFIX: Final = ".sktch-partial"
_OLD: Final = ".sktch-old"
_ADAPTER: Final = {rules.ADAPTER_NAME, rules.ADAPTER_CONFIG, "README.md"}
_HELD: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})


def staging_path(target: Path) -> Path:
    """Return the temporary beside `target`."""
    return target.parent / f".{target.name}{SUFFIX}"


def old_path(target: Path) -> Path:
    """Return where an old output waits beside `target` while a new one is put in its place."""
    return target.parent / f".{target.name}{_OLD}"


def check_target(target: Path, *, folder: bool, overwrite: bool) -> None:
    """Check that an output may be written, before anything is.

    Raises:
        OutputFailure: if it exists and must not be replaced, or its parent is no folder.
    """
    if not target.parent.is_dir():
        raise OutputFailure(f"cannot write {target}: there is no folder {target.parent}")
    if target.name in ("", "..") or target.is_symlink():
        raise OutputFailure(f"cannot write {target}: give the real path, not a link to it")
    if not target.exists():
        return
    if folder and target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputFailure(f"{target} exists; it is only replaced on request")
    if not folder and not target.is_file():
        raise OutputFailure(f"{target} exists and is not a regular file")
    if folder and not is_sketch_folder(target):
        raise OutputFailure(f"{target} exists and is not a folder that sketchconv wrote")


def is_sketch_folder(path: Path) -> bool:
    """Tell whether a folder holds a sketch and no version control, so that it may be replaced.

    A folder that holds nothing but an adapter may be, too.
    """
    if not path.is_dir():
        return False
    names = {child.name for child in path.iterdir()}
    if names <= _ADAPTER and rules.ADAPTER_NAME in names:
        return True
    config = path / "config.json"
    try:
        if not stat.S_ISREG(config.stat().st_mode) or config.stat().st_size > 1 << 24:
            return False
        value = json.loads(config.read_bytes())
        method = value["quantization_config"]["quant_method"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return bool(method == "sktch") and not (path / ".git").exists()


def open_file(target: Path, *, keep: bool = False) -> int:
    """Create and lock the temporary file beside `target`; return its descriptor.

    Its mode is that of any new file (0666 less the umask). What it held is kept on request, else
    dropped.

    Raises:
        OutputFailure: if another writer holds it, or the folder is not writable.
    """
    path = staging_path(target)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        with os_failures(target):
            fd = os.open(path, flags, 0o666)
        if _locked(fd, path, target):
            if not keep:
                with os_failures(target):
                    os.ftruncate(fd, 0)
            return fd
        os.close(fd)


def open_folder(target: Path, *, keep: Collection[str] = ()) -> int:
    """Create and lock the temporary folder beside `target`; return its descriptor.

    It is emptied but for the files named in `keep`.

    Raises:
        OutputFailure: if another writer holds it, or the parent is not writable.
    """
    path = staging_path(target)
    fd = lock_folder(path, target)
    with os_failures(target):
        empty(path, keep)
    return fd


def lock_folder(path: Path, target: Path) -> int:
    """Make the folder `path` unless it is there, lock it for `target`; return its descriptor.

    Raises:
        OutputFailure: if another writer holds it, or the parent is not writable.
    """
    while True:
        with os_failures(target):
            path.mkdir(exist_ok=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        if _locked(fd, path, target):
            return fd
        os.close(fd)


def publish(target: Path, *, folder: bool, overwrite: bool) -> None:
    """Rename the finished temporary to its target and force the rename to the disk.

    Where the disk fails the temporary is one again, and a folder that was there is back; a file
    that was there is gone, and the new one stays.

    Raises:
        OutputFailure: if the target appeared meanwhile, or the disk fails.
    """
    check_target(target, folder=folder, overwrite=overwrite)
    old, replaced = old_path(target), target.exists()
    with os_failures(target):
        if folder and target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        try:
            staging_path(target).replace(target)
        except OSError:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        try:
            sync_folder(target.parent)
        except OSError:
            if folder or not replaced:
                _withdraw(target, folder=folder)
            if folder and replaced and not target.exists():
                old.rename(target)
            raise
    if folder:
        shutil.rmtree(old, ignore_errors=True)


def _withdraw(target: Path, *, folder: bool) -> None:
    """Make what was renamed into place the temporary again, or remove it."""
    try:
        target.replace(staging_path(target))
    except OSError:  # what is gone is made again; what cannot be removed either is complete
        if folder:
            shutil.rmtree(target, ignore_errors=True)
        else:
            with suppress(OSError):
                target.unlink()


def discard(target: Path, *, folder: bool) -> None:
    """Remove the temporary, whatever state it is in."""
    path = staging_path(target)
    if folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def discard_unheld(target: Path) -> None:
    """Remove the temporary file of an output, unless a writer holds it or it cannot be told."""
    path = staging_path(target)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        pass
    finally:
        os.close(fd)


def write_file(folder: Path, name: str, data: bytes) -> None:
    """Write a small file of the temporary folder, and force it to the disk.

    Raises:
        OutputFailure: if the disk is full or fails.
    """
    path = folder / name
    with os_failures(path if path.parent.is_dir() else folder, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force the names in a folder to the disk.

    Raises:
        OSError: if the disk fails.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _locked(fd: int, path: Path, target: Path) -> bool:
    """Lock a descriptor; False if `path` meanwhile names another file, so it must be reopened."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            os.close(fd)
            raise OutputFailure(f"another process is writing {target}") from error
        # Some network file systems have no locks; go on without one.
    try:
        named, held = path.lstat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    if (named.st_ino, named.st_dev) != (held.st_ino, held.st_dev):
        return False
    if not stat.S_ISREG(held.st_mode) and not stat.S_ISDIR(held.st_mode):
        os.close(fd)
        raise SketchconvError(f"{path} is in the way: it is no regular file")
    return True


def empty(path: Path, keep: Collection[str] = ()) -> None:
    """Remove all that a folder holds but for the files named in `keep`."""
    for child in path.iterdir():
        if child.name in keep and child.is_file() and not child.is_symlink():
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
