"""Two streams of hidden states through a model's blocks: dense and compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sketchconv.calibration import blocks as around
from sketchconv.calibration.blocks import Call
from sketchconv.calibration.hidden import HiddenStates
from sketchconv.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sketchconv.calibration.setting import Setting

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
        self._enter()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """All blocks, in their order."""
        return list(self.model.get_submodule(self.path).children())

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

    def advance(self, index: int, name: str, dense: nn.Module, compressed: nn.Module) -> None:
        """Run a block on all hidden states, in place; `compressed` only where they are paired.

        Raises:
            CalibrationError: the dense model's are not finite after it.
        """
        for batch in self.batches():
            call = self.call(index, batch)
            if self.paired:
                hidden = around.hidden_of(call.run(compressed, self.compressed_hidden(batch)))
                self.compressed.write(batch.begin, hidden)
            hidden = around.hidden_of(call.run(dense, self.dense_hidden(batch)))
            if not torch.isfinite(hidden.sum(dtype=torch.float64)):
                raise CalibrationError(
                    f"{name}: NaN or infinity in the dense model's own output; it overflows in "
                    f"{self.dtype_name}, or its weights are damaged"
                )
            self.dense.write(batch.begin, hidden)

    def close(self) -> None:
        """Forget the hidden states."""
        self.dense.close()
        if self.paired:
            self.compressed.close()

    def _cut(self, begin: int, end: int, held_out: bool) -> Iterator[Batch]:
        for first in range(begin, end, self._size):
            yield Batch(first, min(first + self._size, end), held_out)

    def _enter(self) -> None:
        """Run everything before the first block, and learn how the blocks are called."""
        outside = frozenset({self.path, *self.heads()})
        self.weights.fill("", without=outside)
        first: Call | None = None
        for batch in self.batches():
            hidden, call = around.catch_first(self.model, self.blocks, self.ids(batch))
            if first is None:
                first = call
                self._allocate(hidden)
                self._learn(call, hidden)
            self.dense.write(batch.begin, hidden)
            if self.paired:
                self.compressed.write(batch.begin, hidden)
        self.weights.empty("")

    def _allocate(self, hidden: Tensor) -> None:
        count = len(self.windows)
        shape = (count, hidden.shape[1], hidden.shape[2])
        size = count * hidden[0].numel() * hidden.element_size() * (2 if self.paired else 1)
        names = (f"{self._name}dense", f"{self._name}compressed")
        spill = size > self._room
        self.spilled = spill
        dense, compressed = (self._folder / f"{name}.hidden" if spill else None for name in names)
        self.dense = HiddenStates(shape, hidden.dtype, dense)
        if self.paired:
            self.compressed = HiddenStates(shape, hidden.dtype, compressed)

    def _learn(self, call: Call, hidden: Tensor) -> None:
        """Catch every block's call, for each size of batch."""
        name = f"{self.path}.0"
        self.weights.fill(name)
        returned = call.run(self.blocks[0], hidden)
        self.weights.empty(name)
        self.returned = around.with_hidden(returned, hidden[:0])
        # Single windows too: the recovery of a block trains on one at a time.
        for size, batch in {b.end - b.begin: b for b in [Batch(0, 1), *self.batches()]}.items():
            found = around.catch_calls(self.model, self.blocks, self.ids(batch), returned)
            self._calls[size] = found
        self._check_calls(returned)

    def _check_calls(self, returned: object) -> None:
        """Refuse models whose blocks are given more of the text than hidden states."""
        batch = self.batches()[0]
        other = self.ids(batch).flip(1)
        calls = around.catch_calls(self.model, self.blocks, other, returned)
        different = around.same_calls(self._calls[batch.end - batch.begin], calls)
        if different is not None:
            raise CalibrationError(
                f"{self.path}.{different}: is given more of the text than its hidden states, which "
                "cannot be calibrated block by block; convert this model without --calibration"
            )

    def ids(self, batch: Batch) -> Tensor:
        """Token ids of a batch."""
        return self.windows[batch.begin : batch.end].to(self.weights.device)

    def heads(self) -> list[str]:
        """Path of the output head, which is never run here."""
        head = find_head(self.model)
        return [name for name, module in self.model.named_modules() if module is head and name]


def final_hidden(streams: Streams) -> Iterator[tuple[int, Tensor]]:
    """The inputs ``[windows, seq, hidden]`` of the dense model's head, batch after batch.

    Args:
        streams: behind the last block.

    Yields:
        First window, and the hidden states after everything between the last block and the head.
    """
    model, weights = streams.model, streams.weights
    head = find_head(model)
    weights.fill("", without=frozenset({streams.path, *streams.heads()}))
    try:
        for batch in streams.batches():
            passed = around.with_hidden(streams.returned, streams.dense_hidden(batch))
            with around.replaced_forward(_passing(streams.blocks, passed)):
                yield batch.begin, _last_hidden(model, head, streams.ids(batch))
    finally:
        weights.empty("")


def find_head(model: PreTrainedModel) -> nn.Module | None:
    """The output head of a language model; None for models without one."""
    try:
        head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    except NotImplementedError:
        return None
    return head


def _last_hidden(model: PreTrainedModel, head: nn.Module | None, ids: Tensor) -> Tensor:
    if head is None:
        last: Tensor = model.base_model(input_ids=ids).last_hidden_state
        return last
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise around.Stopped

    handle = head.register_forward_pre_hook(catch)
    try:
        around.run_to_stop(model, ids)
    finally:
        handle.remove()
    return caught[0]


def _passing(modules: Sequence[nn.Module], output: Any) -> Mapping[nn.Module, Callable[..., Any]]:
    """Forwards that return the same, whatever they are given."""
    return {module: (lambda *_args, **_kwargs: output) for module in modules}
