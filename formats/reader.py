"""Strict readers: one `.sktch` or safetensors file, or a whole model of either form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from sketchconv.formats import rules
from sketchconv.formats.container import Container
from sketchconv.formats.coverage import check_tensors
from sketchconv.formats.decode import SketchTensor, read_sketch
from sketchconv.formats.errors import refuse
from sketchconv.formats.folder import (
    CONFIG_NAME,
    MAX_CONFIG,
    find_shards,
    parse_config,
    read_member,
)
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.merge import check_weight_map, merge_manifests
from sketchconv.formats.tensors import F32Array, TensorInfo

_MAX_FILE = 1 << 30


class SktchFile:
    """One open file with its document. Use `SktchFile.open`; close it, or use it in a `with`."""

    def __init__(self, container: Container, manifest: Manifest) -> None:
        self.container = container
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, partial: bool = False) -> SktchFile:
        """Open one file and check all that its header and document can break.

        Args:
            path: a bundle, or one weight file of a folder.
            partial: the file is a shard; its document may describe tensors of other shards.

        Raises:
            FormatError: if the file breaks a requirement. Tensor data is not read: see
                `formats.validate` for digests, padding bits and LUT values.
            OSError: if the file is missing or not readable.
        """
        container = Container.open(path)
        try:
            manifest = _manifest(container)
            infos = {name: e.info for name, e in container.entries.items()}
            check_tensors(manifest, infos, container.path.name, partial=partial)
        except BaseException:
            container.close()
            raise
        return cls(container, manifest)

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the files inside a bundle, sorted."""
        return tuple(sorted(self.manifest.files))

    def sketch(self, name: str) -> SketchTensor:
        """Return a sketched weight, unpacked.

        Raises:
            KeyError: if there is no such sketch.
            FormatError: SKT-071 for padding bits that are not zero, SKT-013.
        """
        return read_sketch(self.container, self.container, self.manifest.sketches[name])

    def decode(self, name: str) -> F32Array:
        """Return a sketched weight as float32 `[out, in]`. Raises as `sketch`."""
        return self.sketch(name).decode()

    def file(self, path: str) -> bytes:
        """Return a file of a bundle.

        Raises:
            KeyError: if there is no such file.
        """
        tensor = self.manifest.files[path]
        return self.container.read(tensor) if tensor else b""

    def close(self) -> None:
        """Close the file; may be called again."""
        self.container.close()

    def __enter__(self) -> SktchFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SktchModel:
    """A whole model, bundle or folder. Use `SktchModel.open`; close it, or use it in a `with`.

    Attributes:
        path: the bundle or the folder.
        is_bundle: which of both it is.
        shards: the open files, by file name.
        manifest: one document for all of them.
        tensors: every stored tensor.
    """

    def __init__(self, path: Path, is_bundle: bool, shards: Mapping[str, SktchFile]) -> None:
        self.path = path
        self.is_bundle = is_bundle
        self.shards = shards
        self.manifest = merge_manifests({n: s.manifest for n, s in shards.items()}, path.name)
        self._home = {name: s for s in shards.values() for name in s.container.entries}
        self.tensors: dict[str, TensorInfo] = {
            name: s.container.entries[name].info for name, s in self._home.items()
        }

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> SktchModel:
        """Open a bundle (a file), or a folder with its index and all shards.

        Raises:
            FormatError: if anything breaks a requirement.
            OSError: if something is missing or not readable.
        """
        root = Path(path)
        if not root.is_dir():
            return cls(root, True, {root.name: SktchFile.open(root)})
        found = find_shards(root)
        shards: dict[str, SktchFile] = {}
        try:
            for name, real in found.paths.items():
                shards[name] = SktchFile.open(real, partial=len(found.paths) > 1)
            if found.weight_map is not None:
                stored = {name: tuple(s.container.entries) for name, s in shards.items()}
                check_weight_map(found.weight_map, stored, root.name)
            model = cls(root, False, shards)
            check_tensors(model.manifest, model.tensors, root.name)
            for name, shard in shards.items():
                sentinel = shard.manifest.sentinel
                if sentinel is not None and sentinel not in model.tensors:
                    refuse("SKT-075", f"{root.name}/{name}", f"no sentinel tensor {sentinel}")
            if model.manifest.files:
                refuse("SKT-107", root.name, "files inside the weights of a folder")
        except BaseException:
            for shard in shards.values():
                shard.close()
            raise
        return model

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the files inside a bundle; for a folder empty."""
        return tuple(sorted(self.manifest.files))

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return bytes of a stored tensor, see `Container.read`."""
        return self._home[name].container.read(name, begin, end)

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a stored tensor in its carrier dtype, see `Container.array`."""
        return self._home[name].container.array(name)

    def sketch(self, name: str) -> SketchTensor:
        """Return a sketched weight, unpacked. Raises as `SktchFile.sketch`."""
        record = self.manifest.sketches[name]
        index, lut = self._home[record.index_name], self._home[record.lut_name]
        return read_sketch(index.container, lut.container, record)

    def decode(self, name: str) -> F32Array:
        """Return a sketched weight as float32 `[out, in]`. Raises as `sketch`."""
        return self.sketch(name).decode()

    def file(self, path: str) -> bytes:
        """Return a file of the bundle, or a file beside the weights of a folder.

        Raises:
            KeyError: if a bundle has no such file.
            FormatError: SKT-103 or SKT-104 if a folder has no such file inside it.
        """
        if self.is_bundle:
            return next(iter(self.shards.values())).file(path)
        return read_member(self.path, path, _MAX_FILE, "SKT-104")

    def config(self) -> dict[str, Any]:
        """Return `config.json` as a dict.

        Raises:
            FormatError: SKT-108 if it is missing or not a JSON object.
        """
        where = f"{self.path.name}: {CONFIG_NAME}"
        if not self.is_bundle:
            return parse_config(read_member(self.path, CONFIG_NAME, MAX_CONFIG), where)
        if CONFIG_NAME not in self.manifest.files:
            refuse("SKT-108", where, "the bundle holds no config.json")
        return parse_config(self.file(CONFIG_NAME), where)

    def close(self) -> None:
        """Close every file; may be called again."""
        for shard in self.shards.values():
            shard.close()

    def __enter__(self) -> SktchModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _manifest(container: Container) -> Manifest:
    where = container.path.name
    if container.metadata.get("format") != "pt":
        refuse("SKT-041", where, "the metadata must hold format 'pt'; is this a sketch at all?")
    text = container.metadata.get(rules.DOCUMENT_KEY)
    if text is None:
        refuse("SKT-042", where, "no sktch document in the metadata: not a sketch")
    return Manifest.from_json(text, where)
