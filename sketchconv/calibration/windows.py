"""Windows of token ids, cut from calibration texts."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sketchconv.calibration.texts import read_documents
from sketchconv.errors import CalibrationError
from sketchconv.tokens import first_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"

# Tokens of a window to recover on: shorter ones make more steps of as many tokens. KL to the dense
# SmolLM2 at 3 bits fell from 0.234 to 0.216 on windows of 256 (on an H100) and from 0.253 to 0.240
# on windows of 1024 (on a CPU, other held-out text), 16,384 tokens each.
SHORT = 256
# Windows that are cut for each that is drawn, and tokens that are cut in any case: of a long text
# no more is tokenized.
REACH = 16
LEAST = 1 << 21


@dataclass(frozen=True, slots=True)
class TextWindows:
    """Windows of token ids, int64.

    Attributes:
        gathered: ``[n, seq_len]``, to gather statistics from.
        short: ``[m, at most SHORT]``, to recover on: of other tokens where the text has them.
    """

    gathered: Tensor
    short: Tensor


def text_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    count: tuple[int, int],
    seq_len: int,
    *,
    seed: int,
    vocabulary: int,
    strict: bool = True,
) -> TextWindows:
    """Windows of a text.

    The text is cut into windows from its start (of a long one two million tokens, or 16 times as
    many as are wanted), and some are drawn without replacement; those that
    are drawn beyond the least count are cut into short ones. Every window has the special tokens
    that the tokenizer puts around a text, such as BOS or CLS and SEP.

    Args:
        text: see `read_documents`.
        tokenizer: the model's.
        count: how many windows at least, and at most, as far as the text goes.
        seq_len: tokens per window, special tokens included.
        seed: decides which windows are drawn.
        vocabulary: rows of the model's embedding.
        strict: refuse a text that has not the least count; else both counts shrink alike.

    Raises:
        CalibrationError: too short a text, or a token that the model does not have.
    """
    before, after = special_tokens(tokenizer)
    inner = seq_len - len(before) - len(after)
    if inner < 1:
        raise CalibrationError(
            f"windows of {seq_len} tokens have no room beside {len(before) + len(after)} special "
            "tokens; choose a larger --seq-len"
        )
    documents = read_documents(text, tokenizer, count[1] * seq_len)
    tokens = _token_ids(documents, tokenizer, max(LEAST, REACH * count[1] * inner))
    available = len(tokens) // inner
    if not strict and available < count[1]:
        count = (max(1, available * count[0] // count[1]), available)
    drawn = _draw(tokens, text, count, inner, seed)
    check_vocabulary(drawn, vocabulary, text)
    first, rest = drawn[: count[0]], drawn[count[0] :]
    size = min(SHORT - seq_len + inner, inner)
    short = pieces(rest, size) if len(rest) * (inner // size) >= 2 else pieces(first, size)
    return TextWindows(_framed(first, before, after), _framed(short, before, after))


def pieces(windows: Tensor, size: int) -> Tensor:
    """Windows cut into as many of `size` tokens as each holds: ``[m, size]``."""
    whole = windows[:, : windows.shape[1] // size * size]
    return whole.reshape(-1, size)


def check_vocabulary(windows: Tensor, vocabulary: int, text: str) -> None:
    """Refuse token ids beyond the model's embedding.

    Raises:
        CalibrationError: names the largest id.
    """
    largest = int(windows.max())
    if largest >= vocabulary:
        raise CalibrationError(
            f"calibration text {text}: token {largest}, but the model has an embedding of "
            f"{vocabulary} rows; its tokenizer belongs to another model"
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = _ids(tokenizer, _PROBE, special=False)
    framed = _ids(tokenizer, _PROBE, special=True)
    for begin in range(len(framed) - len(bare) + 1):
        if framed[begin : begin + len(bare)] == bare:
            return framed[:begin], framed[begin + len(bare) :]
    return [], []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    # `verbose=False`: texts longer than a model's context are what we want here.
    encoded = tokenizer(text, add_special_tokens=special, verbose=False)
    return [int(token) for token in encoded["input_ids"]]


def _token_ids(
    documents: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase, most: int
) -> array[int]:
    """The documents' first tokens, int32, with the end-of-text token between documents."""
    tokens: array[int] = array("i")
    for document in documents:
        if tokens and tokenizer.eos_token_id is not None:
            tokens.append(int(tokenizer.eos_token_id))
        tokens += first_tokens(tokenizer, document, most - len(tokens))
        if len(tokens) >= most:
            return tokens[:most]
    return tokens


def _draw(tokens: array[int], text: str, count: tuple[int, int], length: int, seed: int) -> Tensor:
    import torch

    available = len(tokens) // length
    if available < 1:
        raise CalibrationError(
            f"calibration text {text}: {len(tokens)} tokens, less than one window of {length}; "
            "take a longer text or a smaller --seq-len"
        )
    if available < count[0]:
        raise CalibrationError(
            f"calibration text {text}: {available} windows of {length} tokens, but {count[0]} are "
            f"needed; take a longer text, or --tokens {available * length}"
        )
    cut = torch.frombuffer(tokens, dtype=torch.int32, count=available * length)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return cut.view(available, length)[order[: count[1]]].long()


def _framed(windows: Tensor, before: list[int], after: list[int]) -> Tensor:
    import torch

    rows = len(windows)
    parts = [torch.tensor(side, dtype=torch.int64).expand(rows, -1) for side in (before, after)]
    return torch.cat((parts[0], windows, parts[1]), dim=1)
