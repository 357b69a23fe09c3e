"""Tokens to text, piece by piece: whole characters only, and nothing that may be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what the first half of a character decodes to
CONTEXT = 8  # tokens of a prompt that its answer is decoded after; no character has so many


class Pieces:
    """Text of one answer as its tokens come.

    Args:
        tokenizer: decodes them.
        stop: text that ends the answer and is not part of it.
        before: tokens that the answer goes on after, which may end in half a character. Many
            tokenizers leave out the space before a first word, so it depends on what is before.

    Attributes:
        stopped: whether a stop string was met; the text ends before it.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...] = (), before: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(before[-CONTEXT:])
        # Tokens whose text is out, before and after the last piece.
        self._known, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(REPLACEMENT):
            return ""
        self._known, self._read = self._read, len(self._ids)
        return self._certain(new)

    def rest(self) -> str:
        """What was held back; the answer is over."""
        if self.stopped:
            return ""
        text = self._certain(self._new())
        self._known = self._read = len(self._ids)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _new(self) -> str:
        """The text of the tokens whose text is not out."""
        before = self._decode(self._ids[self._known : self._read])
        text = self._decode(self._ids[self._known :])
        if not text.startswith(before):  # half a character has become a whole one
            before = before.rstrip(REPLACEMENT)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _certain(self, new: str) -> str:
        """All of the text but what a stop string begins with, or the text before a stop string."""
        text = self._held + new
        met = [place for place in map(text.find, self._stop) if place >= 0]
        if met:
            self.stopped, self._held = True, ""
            return text[: min(met)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
