"""What the weight files of a sketch hold, read from their headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sketchconv.errors import FormatError, LoadError
from sketchconv.formats.coverage import check_tensors
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.merge import merge_manifests
from sketchconv.formats.reader import SktchFile
from sketchconv.formats.rules import RESERVED_PREFIX
from sketchconv.formats.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Stored:
    """The document of a sketch and its tensors, of all its files together."""

    manifest: Manifest
    tensors: Mapping[str, TensorInfo]

    @property
    def sentinels(self) -> frozenset[str]:
        """Tensors that bear the name of a sketched weight: they carry nothing."""
        return frozenset(name for name in self.tensors if name in self.manifest.sketches)

    @property
    def weights(self) -> dict[str, TensorInfo]:
        """Tensors that belong to the model: no sentinel, no file of a bundle."""
        return {
            name: info
            for name, info in self.tensors.items()
            if name not in self.manifest.sketches and not name.startswith(RESERVED_PREFIX)
        }


def read_stored(files: Iterable[str | Path]) -> Stored:
    """Read and check the headers of all weight files of one sketch.

    Raises:
        LoadError: a file is no sketch or breaks a rule, files contradict each other, or a tensor
            of the document is in none of them.
    """
    paths = [Path(file) for file in files]
    if not paths:
        raise LoadError("a sketch is loaded from its files, but none were given")
    try:
        return _read(paths)
    except (FormatError, OSError) as error:
        raise LoadError(f"not a sound sketch: {error}") from error


def _read(paths: list[Path]) -> Stored:
    manifests: dict[str, Manifest] = {}
    tensors: dict[str, TensorInfo] = {}
    where = paths[0].parent.name
    for path in paths:
        with SktchFile.open(path, partial=len(paths) > 1) as file:
            manifests[path.name] = file.manifest
            for name, entry in file.container.entries.items():
                if name in tensors:
                    raise LoadError(f"{path.name}: {name} is in another file too")
                tensors[name] = entry.info
    manifest = merge_manifests(manifests, where)
    check_tensors(manifest, tensors, where)
    return Stored(manifest, tensors)
