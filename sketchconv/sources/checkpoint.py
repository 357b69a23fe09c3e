"""A Hugging Face folder of safetensors as a source."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sketchconv.errors import SourceError
from sketchconv.formats.container import Container
from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.base import Float32
from sketchconv.sources.config import (
    MAX_CONFIG_BYTES,
    parse_config,
    read_limited,
    refuse_quantized_names,
)
from sketchconv.sources.files import collect_files
from sketchconv.sources.folder import ModelFolder
from sketchconv.sources.shards import check_members, find_shards
from sketchconv.sources.sniff import refuse_impostor
from sketchconv.sources.values import row_bytes, stored_info, to_float32, to_stored


class CheckpointSource:
    """A folder with `config.json` and `model.safetensors`, or an index and its shards.

    Opening reads headers only. Integer and boolean tensors can be copied but have no float32
    values; F64 is stored as F32.

    Args:
        path: the folder.
        id: overrides the folder's base name (the hub id of a download).
        revision: the hub's commit of a download.

    Raises:
        SourceError: anything about the folder that the metadata can tell.
        FormatError: a file is not valid safetensors.
    """

    format = "safetensors"

    def __init__(self, path: Path, *, id: str | None = None, revision: str | None = None) -> None:
        folder = ModelFolder(path)
        self.id = id or folder.id
        self.revision = revision or folder.revision
        self._folder = folder
        self._config = self._read_config()
        self._containers: list[Container] = []
        self._tensors: dict[str, tuple[Container, TensorInfo]] = {}
        try:
            self._open_shards()
            self._infos = self._stored_infos()
        except BaseException:
            self.close()
            raise
        self.paths: tuple[Path, ...] = (folder.root, *(c.path for c in self._containers))
        self.nbytes = sum(container.size for container in self._containers)

    def _read_config(self) -> dict[str, Any]:
        if not self._folder.has("config.json"):
            # Say first what the folder is, if it is no model folder at all.
            find_shards(self._folder)
            raise SourceError(f"{self.id}: no config.json; download it from the model's page")
        data = read_limited(self._folder.path("config.json"), MAX_CONFIG_BYTES)
        return self._parse(data, f"{self.id}/config.json")

    def _parse(self, data: bytes, where: str) -> dict[str, Any]:
        return parse_config(data, where)

    def _stored_infos(self) -> dict[str, TensorInfo]:
        """Every tensor as a copy of it is stored."""
        refuse_quantized_names(list(self._tensors), self.id)
        return {n: stored_info(info, self.id) for n, (_, info) in self._tensors.items()}

    def _open_shards(self) -> None:
        for shard, expected in find_shards(self._folder).items():
            path = self._folder.path(shard)
            refuse_impostor(path, shard)
            try:
                container = Container.open(path, profile="safetensors")
            except OSError as error:
                raise SourceError(f"{shard}: cannot be read ({error.strerror})") from None
            self._containers.append(container)
            if expected is not None:
                check_members(shard, set(container.entries), expected)
            for name, entry in container.entries.items():
                self._tensors[name] = (container, entry.info)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by shard and in the file's order."""
        return MappingProxyType(self._infos)

    def rows(self, name: str, begin: int, end: int) -> bytes:
        """The file's bytes of rows [begin, end); see `Source.rows`."""
        container, info = self._tensor(name)
        size = row_bytes(info, begin, end)
        return container.read(name, begin * size, end * size)

    def float32(self, name: str, raw: bytes) -> Float32:
        """The values of `raw` as float32; exact but for F64, which is rounded."""
        return to_float32(raw, self._tensor(name)[1])

    def stored(self, name: str, raw: bytes) -> bytes:
        """`raw` itself, but for F64, which becomes F32."""
        return to_stored(raw, self._tensor(name)[1])

    def _tensor(self, name: str) -> tuple[Container, TensorInfo]:
        try:
            return self._tensors[name]
        except KeyError:
            raise SourceError(f"{self.id}: no tensor {name!r}") from None

    def config(self) -> dict[str, Any]:
        """A fresh copy of `config.json` without `auto_map`."""
        return copy.deepcopy(self._config)

    def files(self) -> dict[str, bytes]:
        """The folder's allowlisted files."""
        return collect_files(self._folder)

    def close(self) -> None:
        """Close every shard."""
        for container in self._containers:
            container.close()

    def __enter__(self) -> CheckpointSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
