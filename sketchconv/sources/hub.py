"""Download a model from the Hugging Face Hub: safetensors and side files, nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sketchconv.errors import HubError
from sketchconv.sources.config import (
    IMPORTED_METHODS,
    MAX_CONFIG_BYTES,
    OLD_SETTINGS,
    parse_config,
    quantized_by,
    read_limited,
)
from sketchconv.sources.files import is_side_file
from sketchconv.sources.fp8_scheme import FP8_METHODS, split_config
from sketchconv.sources.shards import INDEX, MAX_INDEX_BYTES, SINGLE, parse_weight_map
from sketchconv.sources.sniff import refuse_pickles

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_ID = 96


def is_hub_id(spec: str) -> bool:
    """Whether a text looks like `org/name`."""
    return len(spec) <= _MAX_ID and _ID.fullmatch(spec) is not None and ".." not in spec


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A downloaded revision: the folder in the cache, and the commit."""

    path: Path
    revision: str


def download(repo: str, *, revision: str | None = None) -> Snapshot:
    """Download the repository's weights and side files into the Hugging Face cache.

    The file list comes first, so that a repository without safetensors is refused before anything
    large is downloaded; all files are of one commit. With `HF_HUB_OFFLINE` set, the cache alone is
    used.

    Args:
        repo: `org/name`.
        revision: branch, tag or commit; the main branch by default.

    Raises:
        HubError: one line that says why, and what to do.
    """
    from huggingface_hub.constants import is_offline_mode

    with explained(repo, revision):
        if is_offline_mode():
            return _cached(repo, revision)
        return _download(repo, revision)


def _download(repo: str, revision: str | None) -> Snapshot:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(repo, revision=revision)
    commit = info.sha or revision or "main"
    listed = [item.rfilename for item in info.siblings or []]
    names = [name for name in listed if is_side_file(name) or name in OLD_SETTINGS]
    if "config.json" in listed:
        # What no importer knows is refused before its shards are downloaded.
        config = hf_hub_download(repo, "config.json", revision=commit)
        data = read_limited(Path(config), MAX_CONFIG_BYTES)
        method = quantized_by(data)
        if method in FP8_METHODS:
            split_config(data, f"{repo}/config.json")
        elif method not in IMPORTED_METHODS:
            parse_config(data, f"{repo}/config.json")
    if SINGLE in listed:
        names.append(SINGLE)
    elif INDEX in listed:
        index = hf_hub_download(repo, INDEX, revision=commit)
        data = read_limited(Path(index), MAX_INDEX_BYTES)
        shards = set(parse_weight_map(data, f"{repo}/{INDEX}").values())
        _refuse_absent(repo, sorted(shards.difference(listed)))
        names.extend([INDEX, *sorted(shards)])
    else:
        _refuse_contents(repo, listed)
    patterns = [re.sub(r"([*?\[])", r"[\1]", name) for name in names]
    # By the branch's name, so that the cache remembers what it stands for when offline.
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    return Snapshot(folder, folder.name)


def _cached(repo: str, revision: str | None) -> Snapshot:
    from huggingface_hub import hf_hub_download

    config = hf_hub_download(repo, "config.json", revision=revision, local_files_only=True)
    folder = Path(config).parent
    return Snapshot(folder, folder.name)


def _refuse_absent(repo: str, missing: list[str]) -> None:
    if missing:
        raise HubError(
            f"{repo}: its {INDEX} names {missing[0]!r}, which the repository lacks"
            f" ({len(missing)} such files); tell its authors"
        )


def _refuse_contents(repo: str, listed: list[str]) -> None:
    ggufs = [name for name in listed if name.endswith(".gguf")]
    if ggufs:
        raise HubError(
            f"{repo}: holds GGUF files and no safetensors; download one with"
            f" `hf download {repo} {ggufs[0]} --local-dir .` and give that file as the source"
        )
    refuse_pickles([Path(name).name for name in listed], repo)
    raise HubError(f"{repo}: no {SINGLE} or {INDEX} in this repository; is it a model?")


@contextmanager
def explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the hub library's errors into one line each, a `HubError`."""
    from huggingface_hub import errors

    # The base class of its HTTP library, which has had two names.
    http_error: type[Exception] = getattr(errors, "HTTPError", OSError)
    cases: tuple[tuple[type[Exception], Callable[[Any], str]], ...] = (
        (errors.GatedRepoError, lambda _: _gated(repo)),
        (errors.RepositoryNotFoundError, lambda error: _not_found(repo, error)),
        (errors.RevisionNotFoundError, lambda _: f"{repo}: no revision {revision!r} on the Hub"),
        (errors.LocalEntryNotFoundError, lambda error: _not_cached(repo, error)),
        (errors.OfflineModeIsEnabled, lambda error: _not_cached(repo, error)),
        (errors.EntryNotFoundError, lambda _: f"{repo}: a file has vanished; try again"),
        (errors.HfHubHTTPError, lambda error: _status(repo, error)),
        (errors.HFValidationError, lambda _: f"{repo!r} is not a valid hub id (org/name)"),
        (http_error, lambda error: _unreachable(repo, error)),
        (ConnectionError, lambda error: _unreachable(repo, error)),
        (TimeoutError, lambda error: _unreachable(repo, error)),
        (OSError, lambda error: f"{repo}: the download failed ({error.strerror or error})"),
    )
    try:
        yield
    except Exception as error:
        for kind, explain in cases:
            if isinstance(error, kind):
                raise HubError(explain(error)) from None
        raise


def _gated(repo: str) -> str:
    return (
        f"{repo}: gated model; accept its conditions on {_page(repo)}"
        " and log in with `hf auth login`, then try again"
    )


def _not_found(repo: str, error: Any) -> str:
    if _code(error) == 401:
        return (
            f"{repo}: the Hub does not know it, or it is private (401); check the name,"
            " or log in with `hf auth login`"
        )
    return f"{repo}: not on the Hub ({_code(error)}), and no such folder here; check the name"


def _not_cached(repo: str, error: Any) -> str:
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return (
            f"{repo}: not in the local cache, and HF_HUB_OFFLINE is set; unset it,"
            f" or run `hf download {repo}` where there is a network"
        )
    return _unreachable(repo, error)


def _status(repo: str, error: Any) -> str:
    code = _code(error)
    if code == 401:
        return f"{repo}: the access token is not valid (401); log in again with `hf auth login`"
    if code == 403:
        return f"{repo}: access denied (403); ask for access on {_page(repo)}"
    if code == 429:
        return f"{repo}: too many requests (429); wait, or log in with `hf auth login`"
    return f"{repo}: the Hub answered {code or 'with an error'}; try again later"


def _unreachable(repo: str, error: Any) -> str:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return (
        f"{repo}: no such folder here, and the Hub cannot be reached ({reason});"
        " check the network or HF_ENDPOINT, or give a local folder"
    )


def _code(error: Any) -> int | None:
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", None)
    return code if isinstance(code, int) else None


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"
