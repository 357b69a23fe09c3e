"""A vocabulary as GGUF keeps it: one text, type and score per row of the embedding."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sketchconv.errors import SourceError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNUSED_SCORE: Final = -10000.0
ADDED_SCORE: Final = -1000.0
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass
class Vocabulary:
    """Tokens by id, filled in step by step; ids that are never set stay padding.

    Args:
        size: rows of the embedding.
        where: the source, for errors.
    """

    size: int
    where: str
    tokens: list[str] = field(init=False)
    types: list[int] = field(init=False)
    scores: list[float] = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = [f"[PAD{index}]" for index in range(self.size)]
        self.types = [UNUSED] * self.size
        self.scores = [UNUSED_SCORE] * self.size

    def put(self, index: int, token: str, kind: int, score: float = 0.0) -> None:
        """Set one token.

        Raises:
            SourceError: the embedding has no such row.
        """
        if not 0 <= index < self.size:
            raise SourceError(
                f"{self.where}: token {token!r} has the id {index}, but the embedding has only"
                f" {self.size} rows; tokenizer and weights do not belong together"
            )
        self.tokens[index], self.types[index], self.scores[index] = token, kind, score

    def add(self, added: Iterable[Mapping[str, Any]], *, spaces: bool = False) -> None:
        """Set the tokens of a `tokenizer.json`'s `added_tokens`.

        Those beyond the embedding are left out with a note: no model can read or write them.

        Args:
            added: entries with `id`, `content` and `special`.
            spaces: U+2581 in plain added tokens stands for a space.
        """
        beyond = []
        for entry in added:
            index, token = int(entry["id"]), str(entry["content"])
            if index >= self.size:
                beyond.append(token)
                continue
            unknown = self.types[index] == UNKNOWN
            kind = CONTROL if entry.get("special") else USER_DEFINED
            if spaces and kind == USER_DEFINED:
                token = token.replace("\u2581", " ")
            self.put(index, token, UNKNOWN if unknown else kind, ADDED_SCORE)
        if beyond:
            self.notes.append(
                f"{len(beyond)} added tokens beyond the embedding's {self.size} rows were left out:"
                f" {', '.join(beyond[:5])}"
            )

    def check_unique(self) -> None:
        """Check that no text has two ids, which llama.cpp does not load.

        Raises:
            SourceError: names the first such text.
        """
        seen: dict[str, int] = {}
        for index, text in enumerate(self.tokens):
            first = seen.setdefault(text, index)
            if first != index:
                raise SourceError(
                    f"{self.where}: token {text!r} has two ids, {first} and {index}; llama.cpp does"
                    " not load such a vocabulary, rename one of them"
                )

    def index(self, token: str) -> int | None:
        """The id of a token that is in use."""
        for index, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if text == token and kind != UNUSED:
                return index
        return None


def is_byte(token: str) -> bool:
    """Whether a SentencePiece token stands for one byte, as `<0x0A>` does."""
    return _BYTE.fullmatch(token) is not None
