"""Training data: plain text, and JSON lines of texts, chats, or prompts with completions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sketchconv.errors import TuningError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
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
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TuningError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None


def _record(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TuningError(f"{where}: not JSON ({error})") from None
    if _SURROGATE.search(line):
        _refuse_halves(value, where)
    if not isinstance(value, dict):
        raise TuningError(f"{where}: expected an object, got {type(value).__name__}")
    if isinstance(value.get("text"), str):
        return Text(where, value["text"])
    tools = _tools(value.get("tools"), where)
    if "messages" in value:
        return Chat(where, _messages(value["messages"], "messages", where), 0, tools)
    prompt, completion = value.get("prompt"), value.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return Completion(where, prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, "prompt", where)
        after = _messages(completion, "completion", where)
        return Chat(where, before + after, len(before), tools)
    raise TuningError(
        f"{where}: expected text, messages, or prompt and completion (both texts or both lists of "
        f"messages), got the fields {', '.join(sorted(map(str, value))) or '(none)'}"
    )


def _messages(value: Any, field: str, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise TuningError(f"{where}: {field} must be a list of messages, and not empty")
    return tuple(_message(m, f"{where}: {field}[{number}]") for number, m in enumerate(value))


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message whose content is one text, or None where it only calls tools.

    Many templates write the content as it is, and would write a list of parts as Python does.
    """
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise TuningError(f"{where} is no object with a role")
    content = value.get("content")
    if content is None or isinstance(content, str):
        return value
    parts = content if isinstance(content, list) else [None]
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise TuningError(f"{where}: its content must be a text, or a list of parts of type text")
    return {**value, "content": "".join(map(str, texts))}


def _tools(value: Any, where: str) -> tuple[Any, ...]:
    """A list, or the JSON of one, as many data sets have it."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise TuningError(f"{where}: tools is a text that is not JSON") from None
    if value is not None and value != "" and not isinstance(value, list):
        raise TuningError(f"{where}: tools must be a list, got {type(value).__name__}")
    return tuple(value or ())


def _refuse_halves(value: Any, where: str) -> None:
    """Half of a surrogate pair is no character; tokenizers take no text that holds one."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise TuningError(
            f"{where}: holds half of a surrogate pair (as \\ud83d), which is no text; repair it"
        ) from None
