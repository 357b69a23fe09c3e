"""Samples: token ids of documents, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sketchconv.errors import TuningError
from sketchconv.evaluation.windows import opening_tokens
from sketchconv.tuning.documents import Chat, Completion, Document, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens that see each other and no others.

    Args:
        ids: token ids.
        labels: the same ids, `IGNORED` where a token is not learned. The first token of a sample is
            never learned: nothing comes before it.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learned(self) -> int:
        """Predictions that count."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a data set, and how many were left out since nothing was left to learn."""

    samples: tuple[Sample, ...]
    left_out: int
    cut: int

    @property
    def learned(self) -> int:
        """Predictions that count in all samples."""
        return sum(sample.learned for sample in self.samples)


class Tokens:
    """Turns documents into samples of at most `seq_len` tokens.

    Texts longer than that are cut into several samples, each opened as the tokenizer opens a text
    (BOS); prompts and chats are cut off at the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> None:
        self.tokenizer: Any = tokenizer
        self.seq_len = seq_len
        self.opening = opening_tokens(tokenizer)

    def samples(self, documents: Iterable[Document]) -> Samples:
        """Samples of all documents, in their order.

        Raises:
            TuningError: a chat without a chat template, or one that the template refuses.
        """
        found: list[Sample] = []
        left_out = cut = 0
        for document in documents:
            made = self._sample(document)
            kept = [sample for sample in made if sample.learned]
            found += kept
            left_out += not kept
            cut += not isinstance(document, Text) and len(made[0].ids) == self.seq_len
        return Samples(tuple(found), left_out, cut)

    def _sample(self, document: Document) -> list[Sample]:
        if isinstance(document, Text):
            return self._text(document)
        ids, learned = (
            self._completion(document) if isinstance(document, Completion) else self._chat(document)
        )
        labels = [token if flag else IGNORED for token, flag in zip(ids, learned, strict=True)]
        return [Sample(tuple(ids[: self.seq_len]), tuple(labels[: self.seq_len]))]

    def _text(self, document: Text) -> list[Sample]:
        ids = self._ids(document.text) + self._ending()
        step = self.seq_len - len(self.opening)
        pieces = [(*self.opening, *ids[at : at + step]) for at in range(0, len(ids), step)]
        ignored = (IGNORED,) * len(self.opening)
        return [Sample(piece, ignored + piece[len(self.opening) :]) for piece in pieces]

    def _completion(self, document: Completion) -> tuple[list[int], list[bool]]:
        """Both parts are tokenized apart: a prompt's tokens are all that is known when it ends."""
        prompt = self.opening + self._ids(document.prompt)
        completion = self._ids(document.completion) + self._ending()
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    def _chat(self, document: Chat) -> tuple[list[int], list[bool]]:
        text = self._render(document, len(document.messages), False)
        spans = self._spans(document, text)
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        places: Sequence[tuple[int, int]] = encoded["offset_mapping"]
        learned = [any(b <= begin < e for b, e in spans) for begin, _ in places]
        return [int(token) for token in encoded["input_ids"]], learned

    def _spans(self, document: Chat, text: str) -> list[tuple[int, int]]:
        """Where in the rendered chat the assistant speaks, its ending mark included."""
        spans = []
        for number, message in enumerate(document.messages):
            if number < document.first or message["role"] != "assistant":
                continue
            if number == 0:
                raise TuningError(
                    f"{document.where}: begins with the assistant's turn, so that there is nothing "
                    "it answers; put a user's, or a system's, before it"
                )
            before = self._render(document, number, True)
            after = self._render(document, number + 1, False)
            if not (text.startswith(before) and text.startswith(after)):
                raise TuningError(
                    f"{document.where}: the chat template writes earlier turns otherwise once "
                    f"later ones follow, so that turn {number + 1} cannot be told apart; give "
                    "prompt and completion with one assistant turn at the end"
                )
            spans.append((len(before), len(after)))
        return spans

    def _render(self, document: Chat, count: int, prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise TuningError(
                f"{document.where}: a chat, but the sketch's tokenizer has no chat template; give "
                "text, or prompt and completion as texts"
            )
        if not self.tokenizer.is_fast:
            raise TuningError(
                f"{document.where}: a chat, but {type(self.tokenizer).__name__} cannot tell where "
                "its tokens lie in the text; give prompt and completion as texts"
            )
        options = {"tools": list(document.tools)} if document.tools else {}
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(document.messages[:count]),
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **options,
                )
            )
        except Exception as error:
            # A chat template is a program of the checkpoint and may raise anything.
            reason = " ".join(str(error).split())[:200]
            raise TuningError(
                f"{document.where}: the chat template refused it ({reason})"
            ) from None

    def _ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return [int(token) for token in encoded["input_ids"]]

    def _ending(self) -> list[int]:
        found = self.tokenizer.eos_token_id
        return [] if found is None else [int(found)]
