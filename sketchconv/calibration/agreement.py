"""Whether a model run block by block is the model: asked once, before the first block is solved.

What passes from block to block beside the hidden states, and what blocks leave behind for others,
differs from model to model. One window goes through the whole dense model, with one block at a time
in memory, and each block is run by itself beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sketchconv.calibration.blocks import hidden_of, split_call, with_hidden
from sketchconv.calibration.forward import last_hidden, replaced_forward
from sketchconv.calibration.heads import passing
from sketchconv.calibration.streams import Batch
from sketchconv.errors import CalibrationError

if TYPE_CHECKING:
    from torch import nn

    from sketchconv.calibration.streams import Streams

_ONE = Batch(0, 1)
# The same operations on the same values: on a GPU some sum in another order each time.
_TOLERANCE = 1e-2


def check_blocks(streams: Streams) -> None:
    """Refuse a model whose blocks, run one by one, do not give what they give inside it.

    Reads every weight once. The window is one of those calibrated on, of full length: some models
    change for good when they see a length for the first time.

    Raises:
        CalibrationError: names the block, what was expected and what was found.
    """
    model, weights, ids = streams.model, streams.weights, streams.ids(_ONE)
    walk, blocks = _Walk(streams), streams.blocks
    try:
        weights.fill("", without=streams.inside)
        with replaced_forward({b: walk.forward(i, b) for i, b in enumerate(blocks)}):
            whole = last_hidden(model, ids)
        apart = _end(model, blocks, with_hidden(streams.returned, walk.last), ids)
    finally:
        weights.empty("")
    _compare(f"{type(model).__name__}, behind its last block", apart, whole)


def _end(model: Any, blocks: Sequence[nn.Module], passed: Any, ids: Tensor) -> Tensor:
    """The last hidden states, of a model whose blocks all return `passed`."""
    with replaced_forward(passing(blocks, passed)):
        return last_hidden(model, ids)


class _Walk:
    """A pass through the whole model, with the weights of one block at a time."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.last = torch.empty(0)  # of what the last block gave inside the model

    def forward(self, index: int, block: nn.Module) -> Callable[..., Any]:
        """What a block runs in place of its own forward: inside the model, then by itself."""
        original, name = block.forward, f"{self._streams.path}.{index}"
        call, weights = self._streams.call(index, _ONE), self._streams.weights

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, inside = split_call(args, kwargs)
            weights.fill(name)
            # Copies: a block may add to what it is given in place.
            output = inside.run(original, hidden.clone())
            self.last = hidden_of(output).clone()
            _compare(name, hidden_of(call.run(original, hidden.clone())), self.last)
            # Another text, for blocks that leave something behind for later ones: as batches do.
            call.run(original, hidden.flip(1))
            weights.empty(name)
            return output

        return forward


def _compare(name: str, apart: Tensor, whole: Tensor) -> None:
    """Refuse hidden states that are not the whole model's; those that overflow are named later."""
    wanted = whole.float()
    if not torch.isfinite(wanted.sum(dtype=torch.float64)):
        return
    least = torch.finfo(torch.float32).tiny
    error = float((apart.float() - wanted).norm() / wanted.norm().clamp(min=least))
    if not error <= _TOLERANCE:
        raise CalibrationError(
            f"{name}: run block by block it gives other hidden states than inside the model "
            f"(relative difference {error:.2g}, expected at most {_TOLERANCE:g}); convert this "
            "model without --calibration"
        )
