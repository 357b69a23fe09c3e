"""Open a peer's checkpoint: a folder, or one file with the folder of its base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sketchconv.errors import SketchconvError, SourceError
from sketchconv.formats.sniff import PICKLE_SUFFIXES
from sketchconv.importers.base import Checkpoint, Importer, ImportOptions, Store, Weight
from sketchconv.importers.source import ImportedSource
from sketchconv.importers.stores import SafetensorsStore
from sketchconv.importers.table import importer_of
from sketchconv.importers.torch_files import TorchStore
from sketchconv.sources.base import Source
from sketchconv.sources.checkpoint import CheckpointSource
from sketchconv.sources.config import (
    MAX_CONFIG_BYTES,
    OLD_SETTINGS,
    parse_json,
    read_limited,
    refuse_quantized,
    strip_remote_code,
)
from sketchconv.sources.files import collect_files
from sketchconv.sources.folder import ModelFolder

_PEER_KEYS: Final = frozenset({"quantization_config", "compression_config", "anyprec"})
_PICKLE: Final = "pytorch_model.bin"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a checkpoint and what goes with it are."""

    id: str
    folder: ModelFolder | None
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]


def is_importable_file(path: Path) -> bool:
    """Whether a single file may be a peer's checkpoint, by its suffix."""
    return path.suffix.lower() in (".safetensors", *PICKLE_SUFFIXES)


def says_quantized(path: Path) -> bool:
    """Whether a folder's settings say that its weights are quantized, other than by ourselves."""
    try:
        config, settings = _settings(ModelFolder(path))
    except SourceError:
        return False  # Opening it as a checkpoint says what is wrong.
    return (bool(settings) or "anyprec" in config) and settings.get("quant_method") != "sktch"


def layout_of(path: Path) -> str | None:
    """Whose layout a folder or a safetensors file has, in words; None if no importer knows it."""
    try:
        place = _place(path, None)
        store = _store(path, place)
    except SketchconvError:
        return None
    try:
        found = importer_of(Checkpoint(place.id, store, place.config, place.quantization))
        return None if found is None else f"{found.name}: {found.layout}"
    finally:
        store.close()


def open_import(
    path: Path, options: ImportOptions, *, id: str | None = None, revision: str | None = None
) -> Source | None:
    """The checkpoint as a source, or None if no importer knows it.

    Args:
        path: a folder, or a file of weights.
        options: base and precision.
        id: overrides the folder's base name.
        revision: the hub's commit of a download.

    Raises:
        SourceError: it is known, but incomplete, damaged, or without an exact sketch.
        FormatError: a file is not valid safetensors.
    """
    place = _place(path, id)
    store = _store(path, place)
    try:
        checkpoint = Checkpoint(place.id, store, place.config, place.quantization)
        importer = importer_of(checkpoint)
        if importer is None:
            store.close()
            return None
        weights = importer.weights(checkpoint, options)
        _check_bits(weights, options, place.id)
        config, files = _model_files(place, importer, options)
        folders = [] if place.folder is None else [place.folder.root]
        folders += [] if options.base is None else [options.base.expanduser().resolve()]
        source = ImportedSource(
            *(checkpoint, importer, weights, config, files), folders=folders, revision=revision
        )
        return source if importer.complete else _with_base(source, place, options)
    except BaseException:
        store.close()
        raise


def _check_bits(weights: Sequence[Weight], options: ImportOptions, where: str) -> None:
    """Refuse a precision that the checkpoint does not have, rather than overlook the wish."""
    other = next((w.record for w in weights if w.record.bits != options.bits), None)
    if options.bits is not None and other is not None:
        raise SourceError(
            f"{where}: {other.name} has {other.bits} bits, not {options.bits}, and is taken over as"
            " it is; drop --bits"
        )


def _place(path: Path, id: str | None) -> _Place:
    if not path.is_dir():
        return _Place(path.name, None, {}, {})
    folder = ModelFolder(path)
    config, settings = _settings(folder)
    return _Place(id or folder.id, folder, config, settings)


def _settings(folder: ModelFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config as it is, and the settings of a quantization, each empty if there are none."""
    config = _object(folder, "config.json")
    settings = config.get("quantization_config")
    if isinstance(settings, dict):
        return config, settings
    old = next((name for name in OLD_SETTINGS if folder.has(name)), None)
    return config, {} if old is None else _object(folder, old)


def _object(folder: ModelFolder, name: str) -> dict[str, Any]:
    if not folder.has(name):
        return {}
    value = parse_json(read_limited(folder.path(name), MAX_CONFIG_BYTES), f"{folder.id}/{name}")
    if not isinstance(value, dict):
        raise SourceError(f"{folder.id}/{name}: expected a JSON object")
    return value


def _store(path: Path, place: _Place) -> Store:
    if place.folder is None:
        if path.suffix.lower() == ".safetensors":
            return SafetensorsStore([(path, None)])
        return TorchStore(path)
    if "anyprec" in place.config and not _has_safetensors(place.folder):
        return TorchStore(place.folder.path(_PICKLE))
    return SafetensorsStore.of_folder(place.folder)


def _has_safetensors(folder: ModelFolder) -> bool:
    return any(name.endswith(".safetensors") for name in folder.names())


def _model_files(
    place: _Place, importer: Importer, options: ImportOptions
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The dense model's config and side files: the base's, if one is given."""
    folder, config = place.folder, dict(place.config)
    if options.base is not None:
        folder = ModelFolder(options.base.expanduser())
        config = _object(folder, "config.json")
    if folder is None or not config:
        raise SourceError(
            f"{place.id}: a checkpoint of {importer.name} without config.json; pass --base FOLDER,"
            " the model that was quantized (its config and tokenizer)"
        )
    dense = {key: value for key, value in config.items() if key not in _PEER_KEYS}
    refuse_quantized(dense, f"{folder.id}/config.json")
    stripped: dict[str, Any] = strip_remote_code(dense)
    return stripped, collect_files(folder)


def _with_base(source: ImportedSource, place: _Place, options: ImportOptions) -> Source:
    if options.base is None:
        raise SourceError(
            f"{place.id}: holds the quantized weights alone; pass --base FOLDER, the model that was"
            " quantized, for all others"
        )
    return source.beside(CheckpointSource(options.base.expanduser()))


def refuse_unneeded(options: ImportOptions, spec: str) -> None:
    """Raise if options of an import were given for something else.

    Raises:
        SourceError: `--base` without a peer's checkpoint.
    """
    if replace(options, bits=None) != ImportOptions():
        raise SourceError(f"{spec}: not a checkpoint that is imported; drop --base")
