"""Training data: plain text, and JSON lines of texts, chats, or prompts with completions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sketchconv.errors import TuningError

JSON_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Text:
    """A document of which every token is learned."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, and what is to follow it; only the latter is learned."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages; what the assistant says from message `first` on is learned."""

    where: str
    messages: tuple[dict[str, Any], ...]
    first: int = 0
    tools: tuple[Any, ...] = ()


Document = Text | Completion | Chat


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file, in its order.

    A `.jsonl` or `.ndjson` file has one object per line, with `text`, with `messages` (and `tools`,
    if any), or with `prompt` and `completion`, both strings or both lists of messages. Every other
    file is one UTF-8 text.

    Raises:
        TuningError: no such file, not UTF-8, empty, or a line that is none of these; it names the
            file and the line.
    """
    text = _decoded(path)
    if not text.strip():
        raise TuningError(f"{path}: holds no text")
    if path.suffix.lower() not in JSON_SUFFIXES:
        yield Text(str(path), text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _record(line, f"{path}: line {number}")


def data_digest(path: Path) -> str:
    """SHA-256 of a data file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if _HAS_FILE_DIGEST else _slow(file)


_HAS_FILE_DIGEST = hasattr(hashlib, "file_digest")  # Python 3.11


def _slow(file: Any) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def _decoded(path: Path) -> str:
    if not path.is_file():
        raise TuningError(f"{path}: no such file; --data takes a .txt or .jsonl file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TuningError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None


def _record(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise TuningError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise TuningError(f"{where}: expected an object, got {type(value).__name__}")
    if isinstance(value.get("text"), str):
        return Text(where, value["text"])
    tools = value.get("tools") or ()
    if "messages" in value:
        return Chat(where, _messages(value["messages"], "messages", where), 0, tuple(tools))
    prompt, completion = value.get("prompt"), value.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(where, prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, "prompt", where)
        after = _messages(completion, "completion", where)
        return Chat(where, before + after, len(before), tuple(tools))
    raise TuningError(
        f"{where}: expected text, messages, or prompt and completion (both texts or both lists of "
        f"messages), got the fields {', '.join(sorted(map(str, value))) or '(none)'}"
    )


def _messages(value: Any, field: str, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise TuningError(f"{where}: {field} must be a list of messages, and not empty")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TuningError(f"{where}: {field}[{number}] is no object with a role")
    return tuple(value)
