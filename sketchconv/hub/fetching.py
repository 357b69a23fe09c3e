"""From a hub id to a local path: the sketch, the delta or the file that a repository holds."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sketchconv.errors import HubError, SourceError
from sketchconv.formats.rules import ADAPTER_CONFIG, ADAPTER_NAME
from sketchconv.hub.spec import HubSpec, is_weight_file, parse_spec
from sketchconv.sources.config import MAX_CONFIG_BYTES, parse_json, read_limited
from sketchconv.sources.files import is_side_file
from sketchconv.sources.hub import download, explained
from sketchconv.sources.shards import INDEX, MAX_INDEX_BYTES, SINGLE, parse_weight_map

_ADAPTER: Final = (ADAPTER_NAME, ADAPTER_CONFIG)
_CONFIG: Final = "config.json"
_WEIGHTS: Final = frozenset({SINGLE, INDEX})
_SHOWN: Final = 5


def fetch(
    spec: str | os.PathLike[str], revision: str | None = None, *, dense: bool = False
) -> Path:
    """The local path that a text stands for; what is on the Hub is downloaded into its cache.

    An existing path wins. `user/repo` stands for the repository's sketch folder, its delta folder,
    or its only `.sktch` or `.gguf` file, in this order (with `dense`, its dense weights come before
    single files); `user/repo:file.sktch` for one file. All files are of one commit. With
    `HF_HUB_OFFLINE` set the cache alone is used.

    Args:
        spec: a path, `user/repo` or `user/repo:file`.
        revision: branch, tag or commit; the main branch by default.
        dense: take a repository that holds nothing but a dense model, too.

    Raises:
        SourceError: no such path, and no hub id; or a revision for a path.
        HubError: the Hub refused, or the repository holds nothing of ours, or several files.
    """
    path = Path(spec).expanduser()
    if _exists(path):
        if revision is not None:
            raise SourceError(f"{spec}: a revision can be chosen only on the Hub, not for a path")
        return path
    found = parse_spec(os.fspath(spec))
    if found is None:
        raise SourceError(f"{spec}: there is no such file or folder")
    with explained(found.repo, revision):
        if found.file is not None:
            return _file(found.repo, found.file, revision)
        return _repository(found, revision, dense)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _file(repo: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except RemoteEntryNotFoundError:
        raise HubError(f"{repo}: holds no file {name!r}; look at its list of files") from None


def _repository(spec: HubSpec, revision: str | None, dense: bool) -> Path:
    from huggingface_hub.constants import is_offline_mode

    repo = spec.repo
    folder: Path | None = None
    if is_offline_mode():
        folder = _cached(repo, revision)
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    else:
        names = _listed(repo, revision)
    if _is_sketch(repo, names, revision):
        wanted = [name for name in names if is_side_file(name)]
        return _snapshot(repo, revision, [*wanted, *_weights(repo, names, revision)])
    if ADAPTER_NAME in names and not _WEIGHTS.intersection(names):
        licences = [n for n in names if n.startswith(("LICENSE", "LICENCE")) and is_side_file(n)]
        return _snapshot(repo, revision, [n for n in (*_ADAPTER, *licences) if n in names])
    ours = {
        s: sorted(n for n in names if n.endswith(s) and is_weight_file(n))
        for s in (".sktch", ".gguf")
    }
    if dense and (_WEIGHTS.intersection(names) or not any(ours.values())):
        return folder if folder is not None else download(repo, revision=revision).path
    for files in filter(None, ours.values()):
        return _file(repo, _only(repo, files), revision)
    raise HubError(
        f"{repo}: holds no sketch, no delta and no GGUF file; if it is a dense model, compress it "
        f"with `sketchconv convert {repo} model.sktch`"
    )


def _listed(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision)
    return [item.rfilename for item in info.siblings or []]


def _cached(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # No file is asked for: the folder's path is all that is wanted.
    return Path(
        snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True)
    )


def _is_sketch(repo: str, names: Sequence[str], revision: str | None) -> bool:
    """Whether the repository is a folder that our quantizer reads; only its config is read."""
    if _CONFIG not in names or not _WEIGHTS.intersection(names):
        return False
    config = parse_json(read_limited(_file(repo, _CONFIG, revision), MAX_CONFIG_BYTES), repo)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "sktch"


def _weights(repo: str, names: Sequence[str], revision: str | None) -> list[str]:
    if SINGLE in names:
        return [SINGLE]
    data = read_limited(_file(repo, INDEX, revision), MAX_INDEX_BYTES)
    shards = sorted(set(parse_weight_map(data, f"{repo}/{INDEX}").values()))
    absent = [name for name in shards if name not in names]
    if absent:
        raise HubError(
            f"{repo}: its {INDEX} names {absent[0]!r}, which the repository (or the cache) lacks "
            f"({len(absent)} such files)"
        )
    return [INDEX, *shards]


def _snapshot(repo: str, revision: str | None, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [re.sub(r"([*?\[])", r"[\1]", name) for name in names]
    # By the branch's name, so that the cache remembers what it stands for when offline.
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def _only(repo: str, files: Sequence[str]) -> str:
    if len(files) == 1:
        return files[0]
    shown = ", ".join(f"{repo}:{name}" for name in files[:_SHOWN])
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    raise HubError(f"{repo}: holds {len(files)} such files; name one of {shown}{more}")
