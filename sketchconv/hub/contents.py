"""What of a model may leave the machine: an allowlist of names, and every text looked through."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sketchconv.errors import HubError
from sketchconv.formats.delta import is_delta
from sketchconv.formats.rules import ADAPTER_CONFIG, ADAPTER_NAME
from sketchconv.formats.sharding import INDEX_NAME
from sketchconv.hub.outgoing import Outgoing
from sketchconv.hub.secrets import find_secret
from sketchconv.sources.config import (
    MAX_CONFIG_BYTES,
    parse_json,
    read_limited,
    strip_remote_code,
)
from sketchconv.sources.files import collect_files, is_side_file
from sketchconv.sources.folder import ModelFolder
from sketchconv.summary import is_sketch

Kind = Literal["bundle", "folder", "delta", "gguf", "dense", "mlx"]
_NAME: Final = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}", re.ASCII)
_SPLIT: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_LICENCE: Final = ("LICENSE", "LICENCE", "NOTICE")


@dataclass(frozen=True, slots=True)
class Model:
    """One model that is to be sent.

    Args:
        kind: what it is.
        path: where it lies.
        name: what to call it, the name of its file or folder.
        weights: the files that hold its tensors, first of all.
        others: the side files.
        left: names in its folder that stay behind.
    """

    kind: Kind
    path: Path
    name: str
    weights: tuple[Outgoing, ...]
    others: tuple[Outgoing, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Outgoing, ...]:
        """Everything that is sent of it."""
        return (*self.weights, *self.others)

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)


def find_model(path: Path, token: str | None = None) -> Model:
    """Recognise a model, read its headers, and decide what of it may leave.

    Args:
        path: a `.sktch` file, a folder of a sketch, a delta, a dense or an MLX model, or a `.gguf`
            file; one part of a split GGUF stands for all of them.
        token: the access token in use; a text that holds it is refused.

    Raises:
        HubError: it is nothing that can be published, or it holds a secret or remote code.
        SketchconvError: a header breaks a rule of its format.
    """
    if not path.exists():
        raise HubError(f"{path}: there is no such file or folder")
    model = _folder(path) if path.is_dir() else _single(path)
    for file in model.files:
        if not all(_NAME.fullmatch(part) for part in file.name.split("/")):
            raise HubError(f"{file.name!r}: a name that not every system takes; rename the file")
    _refuse_secrets(model, token)
    return model


def _single(path: Path) -> Model:
    if path.suffix == ".gguf":
        parts = _split_parts(path)
        return Model("gguf", path, parts[0].name, tuple(_file(part) for part in parts))
    if path.suffix != ".sktch":
        raise HubError(
            f"{path}: can push a .sktch or .gguf file, or a folder of a model or a delta"
        )
    return Model("delta" if is_delta(path) else "bundle", path, path.name, (_file(path),))


def _split_parts(path: Path) -> list[Path]:
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found[3])
    parts = [path.with_name(f"{found[1]}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    absent = [part.name for part in parts if not part.is_file()]
    if absent:
        raise HubError(f"{path}: {absent[0]} of the same split model is missing beside it")
    return parts


def _file(path: Path) -> Outgoing:
    if not path.is_file():
        raise HubError(f"{path}: not a regular file")
    return Outgoing.of_file(path.name, path)


def _folder(path: Path) -> Model:
    folder = ModelFolder(path)
    if is_delta(path):
        weights = [Outgoing.of_file(ADAPTER_NAME, folder.path(ADAPTER_NAME))]
        if folder.has(ADAPTER_CONFIG):
            weights.append(Outgoing.of_file(ADAPTER_CONFIG, folder.path(ADAPTER_CONFIG)))
        sides = {n: d for n, d in collect_files(folder).items() if n.startswith(_LICENCE)}
        return _in_folder("delta", folder, path, weights, sides)
    if not folder.has("config.json"):
        raise HubError(f"{path}: no config.json and no {ADAPTER_NAME}, so neither model nor delta")
    kind: Kind = "folder" if is_sketch(path) else "mlx" if _is_mlx(folder) else "dense"
    return _in_folder(kind, folder, path, _folder_weights(path), collect_files(folder))


def _is_mlx(folder: ModelFolder) -> bool:
    """Whether the config is one of a model in MLX's affine mode."""
    config = parse_json(read_limited(folder.path("config.json"), MAX_CONFIG_BYTES), folder.id)
    found = config.get("quantization") if isinstance(config, dict) else None
    return isinstance(found, dict) and found.get("mode") == "affine"


def _folder_weights(path: Path) -> list[Outgoing]:
    from sketchconv.formats.container import Container
    from sketchconv.formats.folder import find_shards

    found = find_shards(path)
    for real in found.paths.values():
        with Container.open(real, profile="safetensors"):
            pass  # the header is checked: nothing but tensors leaves under this name
    weights = [Outgoing.of_file(name, real) for name, real in found.paths.items()]
    if found.weight_map is not None:
        weights.append(Outgoing.of_bytes(INDEX_NAME, (path / INDEX_NAME).read_bytes()))
    return weights


def _in_folder(
    kind: Kind,
    folder: ModelFolder,
    path: Path,
    weights: Sequence[Outgoing],
    sides: Mapping[str, bytes],
) -> Model:
    sent = {file.name for file in weights} | {name.split("/")[0] for name in sides}
    others = tuple(Outgoing.of_bytes(name, data) for name, data in sorted(sides.items()))
    left = tuple(name for name in folder.names() if name not in sent)
    return Model(kind, path, path.resolve().name, tuple(weights), others, left)


def _refuse_secrets(model: Model, token: str | None) -> None:
    for where, data in _texts(model):
        found = find_secret(data, token)
        if found is not None:
            raise HubError(f"{where}: holds {found}; nothing was sent, remove it (and revoke it)")


def _texts(model: Model) -> Iterator[tuple[str, bytes]]:
    """Every text that would leave: side files, files inside bundles, texts of headers."""
    for file in model.files:
        if isinstance(file.data, bytes):
            yield file.name, file.data
        elif file.name == ADAPTER_CONFIG:
            yield file.name, file.data.read_bytes()
        elif file.name.endswith(".gguf"):
            yield from _gguf_texts(file.name, file.data)
        else:
            yield from _header_texts(file.name, file.data)
    if model.kind == "bundle":
        yield from _embedded(model)


def _header_texts(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    from sketchconv.formats.container import Container

    with Container.open(path, profile="safetensors") as container:
        for key, value in container.metadata.items():
            yield f"{name}, metadata {key}", value.encode("utf-8", "backslashreplace")


def _gguf_texts(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    from sketchconv.sources.gguf_header import read_header

    for key, value in read_header(path).values.items():
        if isinstance(value, str):
            yield f"{name}, {key}", value.encode("utf-8", "backslashreplace")


def _embedded(model: Model) -> Iterator[tuple[str, bytes]]:
    """The files inside a bundle, which cannot be left out or changed: they must be clean."""
    from sketchconv.formats.reader import SktchModel

    with SktchModel.open(model.path) as sketch:
        for name in sketch.files:
            where = f"{model.name}: {name}"
            if not is_side_file(name):
                raise HubError(f"{where}: not a file that may be published; convert again")
            data = sketch.file(name)
            if name.endswith("config.json"):
                value = parse_json(data, where)
                if strip_remote_code(value) != value:
                    raise HubError(f"{where}: names code to run (auto_map); convert again")
            yield where, data
