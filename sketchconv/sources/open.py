"""Open what the user names: a Hugging Face folder, a GGUF file or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sketchconv.errors import SourceError
from sketchconv.sources.base import Source
from sketchconv.sources.checkpoint import CheckpointSource
from sketchconv.sources.config import QuantizedError
from sketchconv.sources.hub import download, is_hub_id
from sketchconv.sources.sniff import refuse_impostor
from sketchconv.summary import is_sketch

if TYPE_CHECKING:
    from sketchconv.importers.base import ImportOptions

_PATH_PREFIXES = ("/", "./", "../", "~")
_FILE_SUFFIXES = (".gguf", ".safetensors", ".sktch", ".bin", ".pt", ".pth", ".ckpt", ".json")


def open_source(
    spec: str,
    *,
    revision: str | None = None,
    sketches: bool = False,
    imports: ImportOptions | None = None,
) -> Source:
    """Open a source by what its name says; only metadata is read.

    An existing path wins over a hub id of the same name. A text that cannot be a hub id, such as
    one that begins with `./` or has two slashes, is always a path.

    Args:
        spec: a folder, a `.gguf` file, or `org/name` on the Hub.
        revision: branch, tag or commit on the Hub.
        sketches: take a `.sktch` file or a sketch folder too, as the dense model it stands for.
        imports: what the user says of a checkpoint that another project quantized.

    Raises:
        SourceError: nothing there, or nothing that can be converted; one line that says why.
        HubError: the Hub refused.
        ArchitectureError: a GGUF architecture that is not supported.
        FormatError: a weight file is not valid safetensors.
    """
    path = Path(spec).expanduser()
    if not _exists(path) and sketches:
        # What is on the Hub may be a sketch, too; a dense repository is downloaded as below.
        path = _published(spec, revision) or path
        revision = None if _exists(path) else revision
    if _exists(path):
        if revision is not None:
            raise SourceError(f"{spec}: a revision can be chosen only on the Hub, not for a path")
        if sketches and is_sketch(path):
            from sketchconv.sources.checkpoint_view import SketchCheckpoint

            return SketchCheckpoint(path)
        return _open_folder(path, imports) if path.is_dir() else _open_file(path, imports)
    if _looks_like_path(spec):
        raise SourceError(f"{spec}: no such file or folder")
    if not is_hub_id(spec):
        raise SourceError(
            f"{spec!r}: no such file or folder here, and not a hub id of the form org/name"
        )
    snapshot = download(spec, revision=revision)
    return _open_folder(snapshot.path, imports, id=spec, revision=snapshot.revision)


def _published(spec: str, revision: str | None) -> Path | None:
    """The local path of a sketch or file on the Hub; None for a text that names none."""
    from sketchconv.hub.fetching import fetch
    from sketchconv.hub.spec import parse_spec

    return None if parse_spec(spec) is None else fetch(spec, revision, dense=True)


def is_gguf(spec: str) -> bool:
    """Whether a source is a GGUF file, by its name and by being there."""
    path = Path(spec).expanduser()
    return path.suffix.lower() == ".gguf" and _exists(path) and path.is_file()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _looks_like_path(spec: str) -> bool:
    return (
        spec.startswith(_PATH_PREFIXES)
        or spec in (".", "..")
        or spec.count("/") > 1
        or "\\" in spec
        or spec.endswith(_FILE_SUFFIXES)
    )


def _open_folder(
    path: Path,
    imports: ImportOptions | None,
    *,
    id: str | None = None,
    revision: str | None = None,
) -> Source:
    """A dense checkpoint, or one that another project quantized and an importer knows."""
    from sketchconv.importers.base import ImportOptions
    from sketchconv.importers.open import open_import, refuse_unneeded, says_quantized
    from sketchconv.sources.fp8 import Fp8Checkpoint, says_fp8

    options = imports or ImportOptions()
    if says_fp8(path):
        refuse_unneeded(options, id or path.name)
        return Fp8Checkpoint(path, id=id, revision=revision)
    if options.base is not None or says_quantized(path):
        found = open_import(path, options, id=id, revision=revision)
        if found is not None:
            return found
    try:
        source: Source = CheckpointSource(path, id=id, revision=revision)
    except QuantizedError:
        found = open_import(path, options, id=id, revision=revision)
        if found is None:
            raise
        return found
    try:
        refuse_unneeded(options, source.id)
    except BaseException:
        source.close()
        raise
    return source


def _open_file(path: Path, imports: ImportOptions | None) -> Source:
    if not path.is_file():
        raise SourceError(f"{path.name}: neither a folder nor a regular file")
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        from sketchconv.sources.gguf import GgufSource

        return GgufSource(path)
    if suffix == ".sktch":
        raise SourceError(
            f"{path.name}: already a sketch; inspect, verify or load it, or convert the dense model"
        )
    if imports is not None and imports.base is not None:
        from sketchconv.importers.open import is_importable_file, open_import

        found = open_import(path, imports) if is_importable_file(path) else None
        if found is not None:
            return found
        raise SourceError(f"{path.name}: no checkpoint of a layout that is known; drop --base")
    refuse_impostor(path, path.name)
    if suffix == ".safetensors":
        raise SourceError(
            f"{path.name}: weights alone are not a model; give the folder that also holds"
            " config.json (or, of a checkpoint of LeanQuant, --base FOLDER)"
        )
    raise SourceError(f"{path.name}: expected a model folder, a .gguf file or a hub id (org/name)")
