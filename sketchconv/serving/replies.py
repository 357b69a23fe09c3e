"""Answers in the shapes of OpenAI's API: whole, and as pieces of a stream."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Reply:
    """The frame of one answer.

    Attributes:
        model: the name that was asked for.
        chat: whether it is a chat completion.
        prompt: tokens of the prompt.
        id: of the answer.
        created: seconds since 1970.
    """

    model: str
    chat: bool
    prompt: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, finish: str, tokens: int) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {**self._frame(piece=False), "choices": [choice], "usage": self._usage(tokens)}

    def opening(self) -> str:
        """The first event of a stream of a chat: who speaks. Of a completion: nothing."""
        if not self.chat:
            return ""
        return self._event({"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, text: str, finish: str | None) -> str:
        """An event of a stream."""
        said = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return self._event(said, finish)

    def count(self, tokens: int) -> str:
        """The event that counts tokens, after the last piece."""
        return event({**self._frame(piece=True), "choices": [], "usage": self._usage(tokens)})

    def _event(self, said: dict[str, Any], finish: str | None) -> str:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return event({**self._frame(piece=True), "choices": [choice]})

    def _frame(self, *, piece: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if piece else "chat.completion"
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        made = {"id": prefix + self.id, "object": kind, "created": self.created}
        return {**made, "model": self.model}

    def _usage(self, tokens: int) -> dict[str, int]:
        total = self.prompt + tokens
        return {"prompt_tokens": self.prompt, "completion_tokens": tokens, "total_tokens": total}


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


END = "data: [DONE]\n\n"
