"""Two streams of hidden states through a model's blocks: dense and compressed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sketchconv.calibration import blocks as around
from sketchconv.calibration.blocks import Call
from sketchconv.calibration.forward import head_paths
from sketchconv.calibration.hidden import HiddenStates
from sketchconv.calibration.shortcuts import Kept, find_shortcut
from sketchconv.errors import CalibrationError

if TYPE_CHECKING:
    from sketchconv.calibration.setting import Setting
    from sketchconv.calibration.stages import Stage

# Tokens that go through a block at a time.
BATCH_TOKENS = 4096
# One window in so many is held out, where there are at least as many.
HELD_OUT = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows [begin, end), and whether they are held out."""

    begin: int
    end: int
    held_out: bool = False


class Streams:
    """Hidden states of all windows in front of one block, in both models.

    Args:
        setting: model and blocks.
        windows: int64 ``[windows, seq]``, token ids.
        folder: for hidden states that take more memory than `room`, in bytes.
        room: see there.
        paired: whether they go through both models; else through the dense one, which is all that
            the recovery of a whole model needs.
        name: of these streams' files, where there are others in the folder.
    """

    def __init__(
        self,
        setting: Setting,
        windows: Tensor,
        folder: Path,
        room: int,
        *,
        paired: bool = True,
        name: str = "",
    ) -> None:
        self.weights, self.path = setting.weights, setting.path
        self.model = setting.weights.model
        self.windows, self.paired = windows, paired
        self._folder, self._room, self._name = folder, room, name
        self._size = max(1, BATCH_TOKENS // self.windows.shape[1])
        self._calls: dict[int, list[Call]] = {}
        self._rooms: tuple[HiddenStates, ...] = ()
        self._enter()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """All blocks, in their order."""
        return list(self.model.get_submodule(self.path).children())

    @property
    def inside(self) -> frozenset[str]:
        """Paths of what stays empty while the rest of the model runs: its blocks and its head."""
        return frozenset({self.path, *head_paths(self.model)})

    @property
    def dtype_name(self) -> str:
        """The compute dtype, in words."""
        return str(self.weights.dtype).removeprefix("torch.")

    def batches(self) -> list[Batch]:
        """All windows; the last of them are held out."""
        count = len(self.windows)
        kept = count - count // HELD_OUT
        return [*self._cut(0, kept, False), *self._cut(kept, count, True)]

    def call(self, block: int, batch: Batch) -> Call:
        """How a block is called with a batch of this size."""
        return self._calls[batch.end - batch.begin][block]

    def sample(self, block: int) -> tuple[Call, Tensor]:
        """A call of a block, and hidden states of the dense model to call it with."""
        batch = self.batches()[0]
        return self.call(block, batch), self.dense_hidden(batch)

    def dense_hidden(self, batch: Batch) -> Tensor:
        """What comes into the block in the dense model."""
        return self.dense.read(batch.begin, batch.end, self.weights.device)

    def compressed_hidden(self, batch: Batch) -> Tensor:
        """What comes into the block in the compressed model."""
        return self.compressed.read(batch.begin, batch.end, self.weights.device)

    def kept(self, index: int, block: nn.Module, stages: Sequence[Stage]) -> Kept | None:
        """Room for what spares later passes over a block a part of it, where that is possible."""
        one = Batch(0, 1)
        found = find_shortcut(block, self.call(index, one), self.dense_hidden(one), stages)
        if found is None:
            return None
        shape = (len(self.windows), self.windows.shape[1], found.columns)
        if not self._rooms or self._rooms[0].values.shape != shape:
            self._forget()
            names, dtype = ("kept-dense", "kept-compressed"), self.dense.values.dtype
            spill = self._bytes + len(names) * math.prod(shape) * dtype.itemsize > self._room
            self._rooms = tuple(self._room_for(shape, dtype, name, spill) for name in names)
        return Kept(found, *self._rooms)

    def advance(
        self,
        index: int,
        name: str,
        dense: nn.Module,
        compressed: nn.Module,
        kept: Kept | None = None,
    ) -> None:
        """Run a block on all hidden states, in place; `compressed` only where they are paired.

        Args:
            index: of the block.
            name: of the block, for messages.
            dense, compressed: the block in both models.
            kept: what spares them a part of it; of these streams.

        Raises:
            CalibrationError: the dense model's are not finite after it.
        """
        for batch in self.batches():
            if self.paired:
                hidden = self._passed(index, compressed, batch, self.compressed, kept)
                self.compressed.write(batch.begin, hidden)
            hidden = self._passed(index, dense, batch, self.dense, kept)
            if not torch.isfinite(hidden.sum(dtype=torch.float64)):
                raise CalibrationError(
                    f"{name}: NaN or infinity in the dense model's own output; it overflows in "
                    f"{self.dtype_name}, or its weights are damaged"
                )
            self.dense.write(batch.begin, hidden)

    def close(self) -> None:
        """Forget all of them."""
        self._forget()
        self.dense.close()
        if self.paired:
            self.compressed.close()

    def _forget(self) -> None:
        for room in self._rooms:
            room.close()

    def _passed(
        self, index: int, block: nn.Module, batch: Batch, states: HiddenStates, kept: Kept | None
    ) -> Tensor:
        """What a block gives for a batch of one model's hidden states."""
        hidden = states.read(batch.begin, batch.end, self.weights.device)
        which = "dense" if states is self.dense else "compressed"
        with nullcontext() if kept is None else kept.spared(block, which, batch.begin, batch.end):
            return around.hidden_of(self.call(index, batch).run(block, hidden))

    def _cut(self, begin: int, end: int, held_out: bool) -> Iterator[Batch]:
        for first in range(begin, end, self._size):
            yield Batch(first, min(first + self._size, end), held_out)

    def _enter(self) -> None:
        """Run everything before the first block, and learn how the blocks are called."""
        self.weights.fill("", without=self.inside)
        for batch in self.batches():
            hidden, _ = around.catch_first(self.model, self.blocks, self.ids(batch))
            if not self._calls:
                self._allocate(hidden)
                self._learn()
            self.dense.write(batch.begin, hidden)
            if self.paired:
                self.compressed.write(batch.begin, hidden)
        self.weights.empty("")

    def _allocate(self, hidden: Tensor) -> None:
        shape = (len(self.windows), hidden.shape[1], hidden.shape[2])
        self._bytes = math.prod(shape) * hidden.element_size() * (2 if self.paired else 1)
        self.spilled = self._bytes > self._room
        self.dense = self._room_for(shape, hidden.dtype, "dense", self.spilled)
        if self.paired:
            self.compressed = self._room_for(shape, hidden.dtype, "compressed", self.spilled)

    def _room_for(
        self, shape: tuple[int, int, int], dtype: torch.dtype, name: str, spill: bool
    ) -> HiddenStates:
        """Room for values of all windows, in memory or in a file."""
        file = self._folder / f"{self._name}{name}.hidden" if spill else None
        return HiddenStates(shape, dtype, file)

    def _learn(self) -> None:
        """Catch every block's call, for each size of batch."""
        name = f"{self.path}.0"
        self.weights.fill(name)
        # Single windows too: the recovery of a block trains on one at a time.
        for size, batch in {b.end - b.begin: b for b in [Batch(0, 1), *self.batches()]}.items():
            found = around.catch_calls(self.model, self.blocks, self.ids(batch))
            self._calls[size], returned = found
            self.returned = around.with_hidden(returned, around.hidden_of(returned)[:0])
        self._check_calls()
        self.weights.empty(name)

    def _check_calls(self) -> None:
        """Refuse models whose blocks are given more of the text than hidden states."""
        batch = self.batches()[0]
        other = self.ids(batch).flip(1)
        calls, _ = around.catch_calls(self.model, self.blocks, other)
        different = around.same_calls(self._calls[batch.end - batch.begin], calls)
        if different is not None:
            raise CalibrationError(
                f"{self.path}.{different}: is given more of the text than its hidden states, which "
                "cannot be calibrated block by block; convert this model without --calibration"
            )

    def ids(self, batch: Batch) -> Tensor:
        """Token ids of a batch."""
        return self.windows[batch.begin : batch.end].to(self.weights.device)
