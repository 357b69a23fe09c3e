"""The keys and values of a batch whose sequences come and go: rows with padding on the left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Attention makes a mask of padded prompts: an entry for each row and pair of positions, of a byte
# in transformers and of a float in torch. Prompts are read together while all of it is this small.
ENTRY_BYTES, MASK_BYTES = 5, 64 << 20


class Rows:
    """A cache of transformers and which of its positions each row has.

    Attributes:
        cache: keys and values, ``[rows, heads, positions, dim]`` in each layer.
        mask: int64 ``[rows, positions]``, 0 where a row is padded.
    """

    def __init__(self, cache: Any, mask: Tensor) -> None:
        self.cache, self.mask = cache, mask

    @property
    def lengths(self) -> Tensor:
        """Positions of each row, without padding."""
        return self.mask.sum(1)

    def join(self, other: Rows) -> Rows:
        """These rows and `other`'s below them."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([_left(mine.keys, width), _left(theirs.keys, width)])
            mine.values = torch.cat([_left(mine.values, width), _left(theirs.values, width)])
        masks = [pad(rows.mask, (width - rows.mask.shape[1], 0)) for rows in (self, other)]
        return Rows(self.cache, torch.cat(masks))

    def keep(self, numbers: Sequence[int]) -> Rows:
        """Rows `numbers` alone, without the padding that they all have."""
        chosen = torch.tensor(numbers, device=self.mask.device)
        mask = self.mask[chosen]
        first = mask.shape[1] - int(mask.sum(1).max())
        for layer in self.cache.layers:
            layer.keys = layer.keys[chosen][:, :, first:]
            layer.values = layer.values[chosen][:, :, first:]
        return Rows(self.cache, mask[:, first:].contiguous())


def _left(states: Tensor, width: int) -> Tensor:
    return pad(states, (0, 0, width - states.shape[2], 0))


def fits(cache: Any) -> bool:
    """Whether rows of a filled cache can be joined: plain keys and values in every layer."""
    plain = isinstance(cache, DynamicCache)
    return plain and all(type(layer) is DynamicLayer for layer in cache.layers)


def together(lengths: Iterable[int], most: int) -> int:
    """How many of the next prompts to read in one forward: as many as `MASK_BYTES` allow, or one.

    A prompt that is read alone has no padding, and so no mask, however long it is.
    """
    count = width = 0
    for length in islice(lengths, most):
        width = max(width, length)
        if count and (count + 1) * width**2 * ENTRY_BYTES > MASK_BYTES:
            break
        count += 1
    return count


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as tokens and mask, int64 ``[prompts, longest]``, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask
