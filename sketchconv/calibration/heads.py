"""What the dense model gives its output head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sketchconv.calibration.blocks import with_hidden
from sketchconv.calibration.forward import find_head, last_hidden, replaced_forward

if TYPE_CHECKING:
    from sketchconv.calibration.streams import Streams

__all__ = ["final_hidden", "find_head", "passing"]


def final_hidden(streams: Streams) -> Iterator[tuple[int, Tensor]]:
    """The inputs ``[windows, seq, hidden]`` of the dense model's head, batch after batch.

    Args:
        streams: behind the last block.

    Yields:
        First window, and the hidden states after everything between the last block and the head.
    """
    model, weights = streams.model, streams.weights
    weights.fill("", without=streams.inside)
    try:
        for batch in streams.batches():
            passed = with_hidden(streams.returned, streams.dense_hidden(batch))
            with replaced_forward(passing(streams.blocks, passed)):
                yield batch.begin, last_hidden(model, streams.ids(batch))
    finally:
        weights.empty("")


def passing(modules: Sequence[nn.Module], output: Any) -> Mapping[nn.Module, Callable[..., Any]]:
    """Forwards that return the same, whatever they are given."""
    return {module: (lambda *_args, **_kwargs: output) for module in modules}
