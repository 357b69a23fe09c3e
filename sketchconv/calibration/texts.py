"""Calibration texts: plain files, JSON lines, data sets of the Hub."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sketchconv.calibration.options import SELF
from sketchconv.errors import CalibrationError
from sketchconv.tokens import BYTE_ORDER_MARK, PIECE, half_character

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters that are read of a data set per token that is wanted; a token has about four.
_CHARACTERS_PER_TOKEN = 16


def read_documents(
    text: str, tokenizer: PreTrainedTokenizerBase, tokens: int
) -> Iterator[Iterable[str]]:
    """The documents of one text, in its order, each as its parts: a file is read as far as needed.

    Args:
        text: a ``.jsonl`` file with a `text` or a `messages` field on every line, any other file
            (one document, UTF-8), or a data set's id on the Hub.
        tokenizer: renders `messages` with its chat template.
        tokens: how many are wanted; only a data set is cut by it.

    Raises:
        CalibrationError: no such text, not UTF-8, a line without text, half a character, no chat
            template.
    """
    check_text(text)
    path = Path(text).expanduser()
    if not path.is_file():
        return ((document,) for document in _data_set(text, tokenizer, tokens))
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return ((document,) for document in _json_lines(path, tokenizer))
    return iter((_parts(path),))


def check_texts(texts: Iterable[str]) -> None:
    """Refuse, among several texts, what `check_text` refuses."""
    for text in texts:
        if text != SELF:
            check_text(text)


def check_text(text: str) -> None:
    """Refuse what is neither a file nor the id of a data set; nothing is read.

    Raises:
        CalibrationError: no such file.
    """
    path = Path(text).expanduser()
    suffixes = (".txt", ".jsonl", ".ndjson", ".md")
    if not path.is_file() and (path.suffix.lower() in suffixes or text.count("/") != 1):
        raise CalibrationError(f"calibration text {text}: no such file")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """A text file, open behind its byte order mark."""
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8") as file:
        try:
            if file.read(1) != BYTE_ORDER_MARK:
                file.seek(0)
            yield file
        except UnicodeDecodeError as error:
            # The error counts from the start of what was decoded last.
            byte = raw.tell() - len(error.object) + error.start
            raise CalibrationError(
                f"calibration text {path}: byte {byte} is not UTF-8; save the text as UTF-8"
            ) from None


def _parts(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        while part := file.read(PIECE):
            yield part


def _json_lines(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"calibration text {path}: line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{where}: not JSON ({error})") from None
            yield _document(value, where, tokenizer)


def _document(value: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one record."""
    text = _text(value, where, tokenizer)
    found = half_character(text)
    if found is not None:
        raise CalibrationError(f"{where}: {found}")
    return text


def _text(value: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return str(value["text"])
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list):
        raise CalibrationError(f"{where}: expected an object with a text or a messages field")
    if not tokenizer.chat_template:
        raise CalibrationError(f"{where}: messages, but the model's tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        # A chat template is a program of the checkpoint and may raise anything.
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(f"{where}: the chat template refused it ({reason})") from None


def _data_set(name: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[str]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise CalibrationError(
            f"calibration text {name}: no such file; to read it as a data set of the Hub: "
            "pip install datasets"
        ) from None
    try:
        rows = load_dataset(name, split="train", streaming=True)
        yield from _until(rows, name, tokenizer, tokens * _CHARACTERS_PER_TOKEN)
    except CalibrationError:
        raise
    except Exception as error:
        # The package raises errors of many kinds: network, unknown names, formats.
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"calibration text {name}: no such file, and the Hub's data set cannot be read "
            f"({reason})"
        ) from None


def _until(
    rows: Any, name: str, tokenizer: PreTrainedTokenizerBase, characters: int
) -> Iterator[str]:
    for number, row in enumerate(rows):
        document = _document(row, f"calibration text {name}: row {number}", tokenizer)
        yield document
        characters -= len(document)
        if characters < 0:
            return
