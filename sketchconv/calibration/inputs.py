"""The token ids that a calibration runs on, from all its texts."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sketchconv.calibration.options import SELF, Calibration
from sketchconv.calibration.windows import (
    SHORT,
    TextWindows,
    check_vocabulary,
    pieces,
    text_windows,
)
from sketchconv.errors import CalibrationError
from sketchconv.positions import longest_text, model_positions

# The recovery measures itself on one window in eight.
_WITH_HELD_OUT = 8 / 7

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sketchconv.calibration.own_text import OwnText
    from sketchconv.calibration.weights import Weights
    from sketchconv.sources.base import Source


def make_windows(options: Calibration, weights: Weights, recover: int, own: OwnText) -> TextWindows:
    """Windows of every text in turn, so that each text has an equal share.

    Args:
        options: texts, tokens and seed.
        weights: of the model, for its vocabulary and for text that it writes itself.
        recover: tokens that the recovery trains on, 0 for none. It gets windows of its own: those
            that were gathered from already fit the sketch far better than any other text. Windows
            beyond what the texts hold are let go.
        own: keeps the text that the model writes itself.

    Raises:
        CalibrationError: a text is too short, or does not fit the model.
    """
    if not options.texts:
        raise CalibrationError(
            f"method {options.method} needs a text: --calibration FILE.txt, FILE.jsonl or self"
        )
    options = options.within(longest_text(weights.model))
    _check_positions(options.length, weights)
    tokenizer = load_tokenizer(weights.source)
    count = len(options.texts)
    needed = -(-options.windows // count)
    fresh = math.ceil(recover * _WITH_HELD_OUT)
    wanted = needed + math.ceil(fresh / options.length / count)
    shares = [
        _windows(text, options, weights, tokenizer, (needed, wanted), own) for text in options.texts
    ]
    short = _in_turn([share.short for share in shares])
    most = -(-fresh // short.shape[1])
    return TextWindows(
        _in_turn([share.gathered for share in shares])[: options.windows], short[:most]
    )


def _in_turn(shares: Sequence[Tensor]) -> Tensor:
    """The first rows of all, then the second rows, as far as each goes."""
    longest = max(len(share) for share in shares)
    return torch.stack([share[i] for i in range(longest) for share in shares if i < len(share)])


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer among a source's files.

    Raises:
        CalibrationError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="sketchconv-") as name:
        for path, data in source.files().items():
            target = Path(name) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        try:
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
        except Exception as error:
            # Tokenizer files are a checkpoint's own, and fail in many ways.
            reason = " ".join(str(error).replace(name, source.id).split())[:200]
            raise CalibrationError(
                f"{source.id}: its tokenizer cannot be opened ({reason}); calibration needs one"
            ) from None


def _windows(
    text: str,
    options: Calibration,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    count: tuple[int, int],
    own: OwnText,
) -> TextWindows:
    rows, (needed, wanted) = _vocabulary(weights), count
    if text == SELF:
        asked = {"windows": wanted, "seq_len": options.length, "seed": options.seed}
        written = own.windows(
            asked, lambda tick: _self_written(options, weights, tokenizer, wanted, tick)
        )
        check_vocabulary(written, rows, text)
        # Sequences of SHORT tokens are what the model wrote, each with its own beginning.
        rest = written[needed:] if wanted > needed else written
        return TextWindows(written[:needed], pieces(rest, min(SHORT, options.length)))
    return text_windows(
        text,
        tokenizer,
        count,
        options.length,
        seed=options.seed,
        vocabulary=rows,
        strict=options.tokens is not None,
    )


def _vocabulary(weights: Weights) -> int:
    """Rows of the model's embedding."""
    weight = weights.model.get_input_embeddings().weight
    if not isinstance(weight, Tensor):
        raise CalibrationError("the model has no embedding of token ids, so it reads no text")
    return weight.shape[0]


def _self_written(
    options: Calibration,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    windows: int,
    tick: Callable[[int, int], None],
) -> Tensor:
    """Text of the dense model, which is in memory as a whole for as long as that takes."""
    from sketchconv.calibration.self_written import self_written

    weights.fill("")
    try:
        return self_written(
            *(weights.model, tokenizer, windows * options.length, options.length, options.seed),
            progress=tick,
        )
    finally:
        weights.empty("")


def _check_positions(seq_len: int, weights: Weights) -> None:
    most = model_positions(weights.model)
    if most is not None and most < seq_len:
        raise CalibrationError(
            f"windows of {seq_len} tokens, but the model has positions for {most}; "
            f"take --seq-len {most} or less"
        )
