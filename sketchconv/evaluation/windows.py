"""Windows of a tokenized text: what is shown to a model, and which predictions count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketchconv.errors import EvaluationError
from sketchconv.tokens import BYTE_ORDER_MARK, first_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEQ_LEN = 1024


@dataclass(frozen=True, slots=True)
class Window:
    """One input of a model.

    Args:
        ids: token ids, int64 [tokens].
        first: the first position whose prediction counts. Position i predicts token i + 1, and
            the last position predicts nothing.
    """

    ids: Tensor
    first: int

    @property
    def scored(self) -> int:
        """Number of predictions that count."""
        return self.ids.shape[0] - 1 - self.first


@dataclass(frozen=True, slots=True)
class Cut:
    """How a text is cut into windows.

    Args:
        seq_len: tokens per window, the opening tokens included.
        stride: tokens from the start of one window to that of the next. Below `seq_len` windows
            overlap, and after the first only predictions of new tokens count.
        count: windows from the start of the text; None takes all.
    """

    seq_len: int = SEQ_LEN
    stride: int | None = None
    count: int | None = 16

    def __post_init__(self) -> None:
        step = self.seq_len if self.stride is None else self.stride
        if self.seq_len < 2 or not 1 <= step <= self.seq_len:
            raise EvaluationError(
                f"windows of {self.seq_len} tokens with stride {step}: a window holds at least 2 "
                "tokens, and the stride is between 1 and its length"
            )
        if self.count is not None and self.count < 1:
            raise EvaluationError(f"the number of windows must be positive, got {self.count}")


def read_text(path: Path) -> str:
    """A UTF-8 text file; a byte order mark is no part of the text.

    Raises:
        EvaluationError: it is not UTF-8, or holds no text.
    """
    try:
        text = path.read_text(encoding="utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path}: byte {error.start} is not UTF-8; save the text as UTF-8"
        ) from None
    if not text.strip():
        raise EvaluationError(f"{path}: holds no text")
    return text


def cut_windows(tokenizer: PreTrainedTokenizerBase, text: str, cut: Cut, name: str) -> list[Window]:
    """Tokenize a text and cut it; the rest that does not fill a window is left out.

    A tokenizer that opens every text with tokens of its own (BOS) has every window opened so:
    such models do badly without. Those tokens are not predicted.

    Args:
        name: of the text, for errors.

    Raises:
        EvaluationError: the text is shorter than one window.
    """
    opening = opening_tokens(tokenizer)
    body = cut.seq_len - len(opening)
    step = min(body, cut.seq_len if cut.stride is None else cut.stride)
    wanted = None if cut.count is None else body + step * (cut.count - 1)
    ids = first_tokens(tokenizer, text, wanted)
    if body < 2 or len(ids) < body:
        raise EvaluationError(
            f"{name}: {len(ids)} tokens are fewer than one window of {cut.seq_len}; "
            "give a longer text or a smaller --seq-len"
        )
    starts = range(0, len(ids) - body + 1, step)[: cut.count]
    return [
        _window(opening, ids[start : start + body], 0 if start == 0 else body - step)
        for start in starts
    ]


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before a text, for instance BOS; often none."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for n in range(len(whole) - len(plain) + 1):
        if whole[n : n + len(plain)] == plain:
            return whole[:n]
    return []


def _window(opening: Sequence[int], body: Sequence[int], overlap: int) -> Window:
    """Predictions of the first token of a text, and of tokens already counted, do not count."""
    ids = torch.tensor([*opening, *body], dtype=torch.int64)
    known = len(opening) + max(overlap, 1)
    return Window(ids, known - 1)
