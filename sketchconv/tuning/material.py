"""From data files to rows to train on and rows held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sketchconv.errors import TuningError
from sketchconv.tuning.documents import JSON_SUFFIXES, read_documents
from sketchconv.tuning.options import TuneOptions
from sketchconv.tuning.packing import Row, pack
from sketchconv.tuning.samples import Sample, Samples, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Material:
    """Rows to train on, rows held out, and what was left out on the way."""

    rows: tuple[Row, ...]
    held_out: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def learned(self) -> int:
        """Learned tokens of one pass."""
        return sum(sample.learned for row in self.rows for sample in row)

    @property
    def eval_learned(self) -> int:
        """Held-out tokens that count."""
        return sum(sample.learned for row in self.held_out for sample in row)


def gather(
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    eval_data: Path | None,
    vocabulary: int,
    options: TuneOptions,
) -> Material:
    """Read, tokenize, hold out and pack.

    Without `eval_data` a share of the samples is held out: of JSON lines a seeded choice, of a text
    its end, since windows side by side know of each other.

    Args:
        vocabulary: rows of the model's embedding; token ids must lie below.

    Raises:
        TuningError: files, lines or chats that cannot be read, nothing to learn, too little to hold
            anything out, token ids beyond the vocabulary.
    """
    tokens = Tokens(tokenizer, options.seq_len)
    if len(tokens.opening) + 2 > options.seq_len:
        raise TuningError(f"rows of {options.seq_len} tokens hold no text; give a larger seq_len")
    found = _samples(tokens, data, vocabulary)
    notes = _notes(found, data)
    if eval_data is None:
        training, held_out = _split(found.samples, data, options)
    else:
        kept = _samples(tokens, eval_data, vocabulary)
        notes += _notes(kept, eval_data)
        training, held_out = found.samples, kept.samples
    held_out = _first(held_out, options.most_eval_tokens)
    return Material(_rows(training, options), _rows(held_out, options), tuple(notes))


def _samples(tokens: Tokens, path: Path, vocabulary: int) -> Samples:
    found = tokens.samples(read_documents(path))
    if not found.samples:
        raise TuningError(
            f"{path}: no tokens to learn: {found.left_out} samples hold no assistant turn or "
            f"completion within {tokens.seq_len} tokens; look at the data, or give a larger "
            "--seq-len"
        )
    if not _is_json(path) and sum(len(s.ids) for s in found.samples) < tokens.seq_len:
        size = sum(len(s.ids) for s in found.samples)
        raise TuningError(
            f"{path}: {size} tokens are fewer than one window of {tokens.seq_len}; give a longer "
            "text or a smaller --seq-len"
        )
    highest = max(max(sample.ids) for sample in found.samples)
    if highest >= vocabulary:
        raise TuningError(
            f"{path}: the tokenizer gives token {highest}, but the model knows {vocabulary}: they "
            "do not belong together"
        )
    return found


def _is_json(path: Path) -> bool:
    return path.suffix.lower() in JSON_SUFFIXES


def _notes(found: Samples, path: Path) -> list[str]:
    notes = []
    if found.left_out:
        notes.append(f"{path.name}: {found.left_out} samples left out: nothing to learn in them")
    if found.cut:
        notes.append(f"{path.name}: {found.cut} chats or completions cut off at --seq-len")
    return notes


def _split(
    samples: Sequence[Sample], data: Path, options: TuneOptions
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    if len(samples) < 2:
        raise TuningError(
            f"{data}: one sample is not enough to hold one out; give more data, --eval-data, or a "
            "smaller --seq-len"
        )
    count = min(max(1, round(len(samples) * options.eval_share)), len(samples) - 1)
    numbers = list(range(len(samples)))
    if _is_json(data):
        chosen = set(random.Random(options.seed).sample(numbers, count))
    else:
        chosen = set(numbers[-count:])
    return (
        tuple(sample for n, sample in enumerate(samples) if n not in chosen),
        tuple(sample for n, sample in enumerate(samples) if n in chosen),
    )


def _first(samples: Sequence[Sample], most: int) -> tuple[Sample, ...]:
    """The first samples that hold at most so many tokens, but at least one."""
    total, kept = 0, list[Sample]()
    for sample in samples:
        total += len(sample.ids)
        if kept and total > most:
            break
        kept.append(sample)
    return tuple(kept)


def _rows(samples: Sequence[Sample], options: TuneOptions) -> tuple[Row, ...]:
    if options.packing:
        return tuple(pack(samples, options.seq_len))
    return tuple((sample,) for sample in samples)
