"""What a user writes for a model on the Hub: `user/repo`, or `user/repo:file.sktch`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from sketchconv.sources.hub import is_hub_id

# One path in a repository, of a file that holds weights; never hidden, never above.
_FILE: Final = re.compile(
    r"(?:[A-Za-z0-9_][\w.-]*/)*[A-Za-z0-9_][\w.-]*\.(?:sktch|gguf|safetensors)", re.ASCII
)
# A text with one of these ends names a local file, though its form is that of an id.
_LOCAL: Final = (".sktch", ".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")


@dataclass(frozen=True, slots=True)
class HubSpec:
    """A repository, and the file in it if one was named."""

    repo: str
    file: str | None = None


def is_weight_file(name: str) -> bool:
    """Whether a path in a repository is one of a weight file, with no hidden part and no `..`."""
    return _FILE.fullmatch(name) is not None


def parse_spec(text: str) -> HubSpec | None:
    """Read a spec; None if the text can only be a local path.

    >>> parse_spec("user/repo:model.sktch")
    HubSpec(repo='user/repo', file='model.sktch')
    >>> parse_spec("out/model.sktch") is None
    True
    """
    repo, colon, file = text.partition(":")
    if not is_hub_id(repo) or repo.lower().endswith(_LOCAL):
        return None
    if not colon:
        return HubSpec(repo)
    return HubSpec(repo, file) if is_weight_file(file) else None
