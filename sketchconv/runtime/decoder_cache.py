"""A transformers cache whose keys and values lie where the compiled step reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sketchconv.kernels.decoder.session import Session
from sketchconv.runtime.decoder_network import Fingerprint


class DecoderLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `DecoderCache`."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: DecoderCache, number: int) -> None:
        self._cache, self._number = cache, number
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """Keys ``[1, heads, length, dim]``: a copy."""
        return self._cache.read(self._number, self._cache.length)[0]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Values ``[1, heads, length, dim]``."""
        return self._cache.read(self._number, self._cache.length)[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the memory is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[1, heads, count, dim]``; returns all keys and values."""
        return self._cache.append(self._number, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask for `query_length` more positions."""
        return self._cache.length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions that are there."""
        return self._cache.length

    def get_max_length(self) -> int:
        """No limit: the memory grows."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; as in transformers the number is zero or negative."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes zero or a negative number, got {tokens_to_remove}")
        if self._number == 0:  # all layers share the length
            self._cache.length = max(self._cache.length + tokens_to_remove, 0)

    def reset(self) -> None:
        """Forget everything."""
        self._cache.length = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Not possible, see `DecoderCache`."""
        raise ValueError("a DecoderCache holds one sequence; beam search needs another cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not possible, see `DecoderCache`."""
        raise ValueError("a DecoderCache holds one sequence, it cannot be repeated")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not possible, see `DecoderCache`."""
        raise ValueError("a DecoderCache holds one sequence, there are none to select")

    def offload(self) -> None:
        """Nothing to do in CPU memory."""

    def prefetch(self) -> None:
        """Nothing to do in CPU memory."""


class DecoderCache(Cache):
    """Keys and values of **one** sequence, for transformers' modules and the compiled step alike.

    Make it with `Decoder.cache`. A forward that fails before the attention of its last layer leaves
    the cache as it was. A deep copy goes on alone.

    Attributes:
        length: positions that are there.
        session: what runs the compiled step on this cache.
        weights: the weights that the session was made for.
    """

    def __init__(self, session: Session, weights: Fingerprint) -> None:
        self.session, self.weights = session, weights
        self.length = 0
        count = len(session.network.layers)
        super().__init__(layers=[DecoderLayer(self, number) for number in range(count)])

    def __deepcopy__(self, memo: object) -> DecoderCache:
        """A cache that goes on alone, on the same weights: how a prompt is used twice."""
        made = DecoderCache(self.session.copy(), self.weights)
        made.length = self.length
        return made

    def read(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `count` positions, ``[1, heads, count, dim]``."""
        keys, values = self.session.memory.get(layer, count)
        return keys[None], values[None]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions of one layer; they count once the last layer has them.

        Raises:
            ValueError: there is more than one sequence.
        """
        if keys.shape[0] != 1:
            raise ValueError(f"a DecoderCache holds one sequence, got {keys.shape[0]}")
        end = self.length + keys.shape[2]
        self.session.reserve(end)
        self.session.memory.put(layer, self.length, keys[0].detach(), values[0].detach())
        if self.length:
            every, all_values = self.read(layer, end)
            keys, values = every.to(keys.dtype), all_values.to(values.dtype)
        if layer == len(self.layers) - 1:
            self.length = end
        return keys, values
