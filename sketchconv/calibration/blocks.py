"""Find a model's repeated blocks by structure, and run the model around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sketchconv.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Call:
    """How a block is called.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: named arguments without the hidden states.
        keyword: the name under which the hidden states come, or None if they come first.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keyword: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """Whatever the block returns for these hidden states."""
        if self.keyword is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.keyword: hidden, **self.kwargs})


class Stopped(Exception):
    """Raised inside a model to end a forward pass whose rest is not needed."""


def find_blocks(model: nn.Module) -> str:
    """Path of the list of blocks: the `ModuleList` with the most parameters, outermost first.

    Raises:
        CalibrationError: there is none, or there are two stacks (encoder and decoder).
    """
    lists = {
        name: _parameters(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = {n: p for n, p in lists.items() if not any(n.startswith(f"{o}.") for o in lists)}
    if not outer or max(outer.values()) == 0:
        raise CalibrationError(
            f"{type(model).__name__} has no list of blocks, so it cannot be calibrated block by "
            "block; convert it without --calibration"
        )
    path: str = max(outer, key=lambda name: outer[name])
    rivals = [n for n, p in outer.items() if n != path and 4 * p > outer[path]]
    if rivals:
        raise CalibrationError(
            f"{type(model).__name__} has several stacks of blocks ({path}, {', '.join(rivals)}); "
            "only a decoder or an encoder alone can be calibrated; convert it without --calibration"
        )
    return path


def _parameters(module: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in module.parameters())


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise CalibrationError(f"a block returned {type(found).__name__}, not hidden states")
    return found


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a block returned, with other hidden states and nothing else."""
    return (hidden, *(None for _ in output[1:])) if isinstance(output, tuple | list) else hidden


def catch_first(
    model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Tensor
) -> tuple[Tensor, Call]:
    """The hidden states ``[windows, seq, hidden]`` that reach the first block, and its call."""
    caught: list[tuple[Tensor, Call]] = []

    def stub(*args: Any, **kwargs: Any) -> Any:
        caught.append(_split(args, kwargs))
        raise Stopped

    with replaced_forward({blocks[0]: stub}):
        run_to_stop(model, ids)
    if not caught:
        raise CalibrationError(
            f"{type(model).__name__} does not run its blocks; convert it without --calibration"
        )
    return caught[0]


def catch_calls(
    model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Tensor, returned: Any
) -> list[Call]:
    """How every block is called.

    Args:
        model: everything outside the blocks has its weights.
        blocks: all blocks, in their order.
        ids: int64 ``[windows, seq]``.
        returned: what the first block returns; the others are taken to return the like.

    Raises:
        CalibrationError: the model skips blocks or runs one twice.
    """
    calls: list[Call] = []
    order: list[int] = []
    passed: list[Tensor] = []

    def stub(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            if passed and not torch.equal(passed.pop(), hidden):
                raise CalibrationError(
                    f"{type(model).__name__} changes what passes from block {index - 1} to the "
                    "next; convert it without --calibration"
                )
            passed.append(hidden)
            calls.append(call)
            order.append(index)
            if len(order) == len(blocks):
                raise Stopped
            return with_hidden(returned, hidden)

        return forward

    with replaced_forward({block: stub(i) for i, block in enumerate(blocks)}):
        run_to_stop(model, ids)
    if order != list(range(len(blocks))):
        raise CalibrationError(
            f"{type(model).__name__} does not run its {len(blocks)} blocks once each, one after "
            "the other; convert it without --calibration"
        )
    return calls


def same_calls(first: Sequence[Call], second: Sequence[Call]) -> int | None:
    """Index of the first block whose arguments differ between two calls, or None."""
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        mine, others = (list(_leaves((call.args, call.kwargs))) for call in (a, b))
        pairs = zip(mine, others, strict=False)
        if len(mine) != len(others) or not all(torch.equal(x, y) for x, y in pairs):
            return index
    return None


def run_to_stop(model: PreTrainedModel, ids: Tensor) -> None:
    """Run the model on token ids until something in it raises `Stopped`."""
    try:
        model(input_ids=ids)
    except Stopped:
        return


@contextmanager
def replaced_forward(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules run other functions while the block lasts."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Hidden states and the rest of a block's arguments."""
    if args and isinstance(args[0], Tensor):
        return args[0], Call(args[1:], kwargs, None)
    name = "hidden_states"
    if not isinstance(kwargs.get(name), Tensor):
        raise CalibrationError("the blocks are not called with hidden states first")
    return kwargs[name], Call(args, {k: v for k, v in kwargs.items() if k != name}, name)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
