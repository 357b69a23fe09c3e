"""Tokens to text, piece by piece: whole characters only, and nothing that may be a stop string."""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\ufffd"  # what the first half of a character decodes to


class Pieces:
    """Text of one answer as its tokens come.

    Attributes:
        stopped: whether a stop string was met; the text ends before it.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._known = self._read = 0  # tokens whose text is out, before and after the last piece
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._ids.append(token)
        before = self._decode(self._ids[self._known : self._read])
        text = self._decode(self._ids[self._known :])
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
            return ""
        self._known, self._read = self._read, len(self._ids)
        return self._certain(text[len(before) :])

    def rest(self) -> str:
        """What was held back; the answer is over."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._known : self._read])
        text = self._certain(self._decode(self._ids[self._known :])[len(before) :])
        self._known = self._read = len(self._ids)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

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
