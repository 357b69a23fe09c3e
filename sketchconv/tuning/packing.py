"""Rows of a batch: several short samples in one row, none of which sees another.

A sample's positions start at 0, and transformers makes the attention mask block-diagonal where
position ids start anew (`attention_mask` must not be given). Whether a model obeys is tried on it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sketchconv.tuning.samples import IGNORED, Sample

Row = tuple[Sample, ...]
_PROBE = 6  # tokens of each of the two samples that are tried
_LEAST_LEAK = 0.25
_ROUNDING = 1e-3


def pack(samples: Sequence[Sample], seq_len: int) -> list[Row]:
    """Rows of at most `seq_len` tokens, longest samples first, each into the fullest row it fits.

    Rows keep the order of their first samples. Best fit decreasing; the same samples give the same
    rows.
    """
    order = sorted(range(len(samples)), key=lambda n: (-len(samples[n].ids), n))
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room left, row; sorted
    for number in order:
        size = len(samples[number].ids)
        place = bisect_left(free, (size, -1))
        if place < len(free):
            room, row = free.pop(place)
            rows[row].append(number)
        else:
            room, row = seq_len, len(rows)
            rows.append([number])
        if room > size:
            insort(free, (room - size, row))
    ordered = sorted(sorted(row) for row in rows)
    return [tuple(samples[number] for number in row) for row in ordered]


class Rows(torch.utils.data.Dataset[Row]):
    """Rows as a data set of torch."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]


class Collator:
    """Makes a batch of rows: `input_ids`, `labels`, and what keeps samples and padding apart.

    Args:
        padding: the id that rows are filled up with, to the longest; those places are not learned
            and come last, where causal attention lets nothing see them.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """int64 ``[rows, tokens]`` each; `position_ids` only where a row holds several samples."""
        length = max(sum(len(sample.ids) for sample in row) for row in rows)
        parts = [self._row(row, length) for row in rows]
        ids, labels, places = (torch.tensor(list(part)) for part in zip(*parts, strict=True))
        batch = {"input_ids": ids, "labels": labels}
        if any(len(row) > 1 for row in rows):
            batch["position_ids"] = places
        return batch

    def _row(self, row: Row, length: int) -> tuple[list[int], list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        places: list[int] = []
        for sample in row:
            ids += sample.ids
            labels += (IGNORED, *sample.labels[1:])
            places += range(len(sample.ids))
        rest = length - len(ids)
        ids += [self.padding] * rest
        labels += [IGNORED] * rest
        places += range(rest)
        return ids, labels, places


def keeps_samples_apart(model: PreTrainedModel) -> bool:
    """Whether a model, given two samples in one row, computes what it does for each alone.

    Compared with what it computes for one sample of both: a leak would look like that.
    """
    device = next(iter(model.parameters())).device
    size = int(model.config.get_text_config().vocab_size)
    ids = ((torch.arange(2 * _PROBE, device=device) * 7 + 1) % size).view(1, -1)
    places = torch.arange(_PROBE, device=device).repeat(2)[None]
    network: Any = model
    mode = model.training
    network.eval()
    try:
        with torch.no_grad():
            alone = _logits(model, input_ids=ids[:, _PROBE:])
            joined = _logits(model, input_ids=ids)[:, _PROBE:]
            packed = _logits(model, input_ids=ids, position_ids=places)[:, _PROBE:]
    except (TypeError, ValueError):  # a model that takes no position ids
        return False
    finally:
        model.train(mode)
    off, leak = (packed - alone).norm(), (joined - alone).norm()
    return bool(off <= max(_LEAST_LEAK * leak, _ROUNDING * alone.norm()))


def _logits(model: Any, **inputs: Tensor) -> Tensor:
    found: Tensor = model(**inputs, use_cache=False).logits
    return found.float()
