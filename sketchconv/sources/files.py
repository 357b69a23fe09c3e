"""Side files that travel with the weights: an allowlist, with limits on size."""

from __future__ import annotations

import re

from sketchconv.errors import SourceError
from sketchconv.sources.config import (
    MAX_CONFIG_BYTES,
    dump_json,
    parse_json,
    read_limited,
    strip_remote_code,
)
from sketchconv.sources.folder import ModelFolder

MAX_FILE_BYTES = 256 << 20
MAX_TOTAL_BYTES = 512 << 20

_NAMES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
        "preprocessor_config.json",
        "image_processor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    }
)
_PATTERNS = re.compile(
    r"tokenizer[\w-]*\.json|[\w-]+\.spm|[\w-]+\.tiktoken"
    r"|chat_templates/[\w-]+\.jinja|additional_chat_templates/[\w-]+\.jinja"
    r"|\d+_Pooling/config\.json"
    r"|(?:LICEN[SC]E|NOTICE)[\w-]*(?:\.(?:md|txt|rst))?"
)
_SUBFOLDERS = re.compile(r"chat_templates|additional_chat_templates|\d+_Pooling")


def is_side_file(name: str) -> bool:
    """Whether a relative POSIX path is on the allowlist (never code, weights or dotfiles)."""
    return name in _NAMES or _PATTERNS.fullmatch(name) is not None


def collect_files(folder: ModelFolder) -> dict[str, bytes]:
    """Every allowlisted file of the folder, byte for byte but for `auto_map` in configs.

    Raises:
        SourceError: a file leaves the folder, is not regular, is too large, or is broken JSON.
    """
    files: dict[str, bytes] = {}
    for name in _candidates(folder):
        limit = MAX_CONFIG_BYTES if name == "config.json" else MAX_FILE_BYTES
        files[name] = without_remote_code(name, read_limited(folder.path(name), limit))
    total = sum(len(data) for data in files.values())
    if total > MAX_TOTAL_BYTES:
        raise SourceError(
            f"{folder.id}: side files of {total} bytes, more than the limit of {MAX_TOTAL_BYTES}"
        )
    return files


def without_remote_code(name: str, data: bytes) -> bytes:
    """`data` unchanged, unless it is a config with an `auto_map`, which is then removed.

    Vocabularies are left alone: there "auto_map" could be a token.
    """
    if not name.endswith("config.json"):
        return data
    value = parse_json(data, name)
    stripped = strip_remote_code(value)
    return data if stripped == value else dump_json(stripped)


def _candidates(folder: ModelFolder) -> list[str]:
    found = []
    for name in folder.names():
        if is_side_file(name):
            found.append(name)
        elif _SUBFOLDERS.fullmatch(name) and (folder.root / name).is_dir():
            inner = (f"{name}/{entry.name}" for entry in (folder.root / name).iterdir())
            found.extend(path for path in sorted(inner) if is_side_file(path))
    return found
