"""Files that a calibration keeps for a run that goes on: whole and undamaged, or as if not there.

A power cut may leave a file without some of its blocks, and a disk may change some. What is taken
up again therefore carries its own digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.errors import OutputError
from sketchconv.formats.part import os_failures

if TYPE_CHECKING:
    from torch import Tensor

UNFINISHED = ".unfinished"
_DIGEST = "digest"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with its digest: all of it, or nothing.

    Raises:
        OutputError: the disk is full or fails.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    sealed = {**metadata, _DIGEST: _digest(sorted(tensors.items()), metadata)}
    with _replaced(path) as unfinished:
        try:
            save_file(dict(tensors), unfinished, metadata=sealed)
        except SafetensorError as error:  # an `OSError` of the Rust library, as text
            raise OutputError(f"cannot write {path}: {error}") from error


def kept_metadata(path: Path) -> Mapping[str, str] | None:
    """The metadata of a file of `save_tensors`, without the digest; None if it is not intact."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            digest = metadata.pop(_DIGEST, None)
            tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            return metadata if digest == _digest(tensors, metadata) else None
    # Every kind of damage has an error of its own, from a length to a dtype that torch lacks.
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file: all of it, or nothing.

    Raises:
        OutputError: the disk is full or fails.
    """
    with _replaced(path) as unfinished:
        unfinished.write_bytes(json.dumps(value, indent=1).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        running = hashlib.sha256()
        while piece := file.read(1 << 20):
            running.update(piece)
    return running.hexdigest()


def sync(path: Path) -> None:
    """Force what was written to a file to the disk.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A path beside, whose file takes the place of `path` once it is written and on the disk."""
    unfinished = path.with_suffix(UNFINISHED)
    try:
        with os_failures(path):
            yield unfinished
            sync(unfinished)
            unfinished.replace(path)
    except OutputError:
        unfinished.unlink(missing_ok=True)
        raise


def _digest(tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> str:
    """One digest over both; tensors come by name, one at a time."""
    import torch

    running = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name, tensor in tensors:
        running.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        running.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return running.hexdigest()
