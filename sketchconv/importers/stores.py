"""Where a peer's tensors are: safetensors files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from sketchconv.errors import SourceError
from sketchconv.formats.container import Container
from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.folder import ModelFolder
from sketchconv.sources.shards import check_members, find_shards
from sketchconv.sources.sniff import refuse_impostor


class SafetensorsStore:
    """The tensors of one or several safetensors files; only headers are read at once.

    Args:
        files: each with the tensors that an index expects in it, or None.

    Raises:
        SourceError: a file is something else, or does not hold what its index says.
        FormatError: a file is not valid safetensors.
    """

    def __init__(self, files: Iterable[tuple[Path, frozenset[str] | None]]) -> None:
        self._containers: list[Container] = []
        self._owners: dict[str, Container] = {}
        try:
            for path, expected in files:
                self._open(path, expected)
        except BaseException:
            self.close()
            raise
        self._infos = {name: c.entries[name].info for name, c in self._owners.items()}
        self.paths = tuple(container.path for container in self._containers)
        self.nbytes = sum(container.size for container in self._containers)

    @classmethod
    def of_folder(cls, folder: ModelFolder) -> SafetensorsStore:
        """The model's files in a folder.

        Raises:
            SourceError, FormatError: as the class, and for a folder without such files.
        """
        return cls((folder.path(shard), names) for shard, names in find_shards(folder).items())

    def _open(self, path: Path, expected: frozenset[str] | None) -> None:
        refuse_impostor(path, path.name)
        try:
            container = Container.open(path, profile="safetensors")
        except OSError as error:
            raise SourceError(f"{path.name}: cannot be read ({error.strerror})") from None
        self._containers.append(container)
        if expected is not None:
            check_members(path.name, set(container.entries), expected)
        self._owners.update(dict.fromkeys(container.entries, container))

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by file and in its order."""
        return MappingProxyType(self._infos)

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a tensor."""
        return self._owners[name].read(name, begin, end)

    def close(self) -> None:
        """Close every file."""
        for container in self._containers:
            container.close()
