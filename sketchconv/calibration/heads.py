"""A model's output head, and what the dense model gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sketchconv.calibration import blocks as around

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sketchconv.calibration.streams import Streams


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
