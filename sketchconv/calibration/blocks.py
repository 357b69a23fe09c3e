"""Find a model's repeated blocks by structure, and run the model around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sketchconv.calibration.forward import Stopped, last_hidden, replaced_forward, run_to_stop
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

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """Whatever the block returns for these hidden states."""
        if self.keyword is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **{self.keyword: hidden, **self.kwargs})


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
    """The hidden states ``[windows, seq, hidden]`` that reach the first block, and its call.

    Raises:
        CalibrationError: the blocks do not run, or what they take has another form.
    """
    caught: list[tuple[Tensor, Call]] = []

    def stub(*args: Any, **kwargs: Any) -> Any:
        caught.append(split_call(args, kwargs))
        raise Stopped

    with replaced_forward({blocks[0]: stub}):
        run_to_stop(model, ids)
    if not caught:
        raise CalibrationError(
            f"{type(model).__name__} does not run its blocks; convert it without --calibration"
        )
    shape = caught[0][0].shape
    if len(shape) != 3 or shape[:2] != ids.shape:
        raise CalibrationError(
            f"{type(model).__name__}: its blocks take hidden states {list(shape)}, expected "
            f"[{ids.shape[0]}, {ids.shape[1]}, width] (windows, tokens, width); convert it without "
            "--calibration"
        )
    return caught[0]


def catch_calls(
    model: PreTrainedModel, blocks: Sequence[nn.Module], ids: Tensor
) -> tuple[list[Call], Any]:
    """How every block is called, and what the first one returns.

    The first block is run, since models hand on what it returns beside the hidden states (T5 its
    position bias); the others are taken to return the like. The model runs on behind the last
    block, up to its head: what shares one block among several layers would run it again there.

    Args:
        model: everything outside the blocks, and the first block, has its weights.
        blocks: all blocks, in their order.
        ids: int64 ``[windows, seq]``.

    Raises:
        CalibrationError: the model skips blocks or runs one twice.
    """
    catcher = _Catcher(model, blocks)
    stubs = {block: catcher.stub(index) for index, block in enumerate(blocks)}
    with replaced_forward(stubs):
        last_hidden(model, ids)
    if len(catcher.calls) != len(blocks):
        raise catcher.disorder()
    return catcher.calls, catcher.returned


class _Catcher:
    """Stands in for a model's blocks, and notes how they are called."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
        self.calls: list[Call] = []
        self.returned: Any = None
        self._name, self._blocks = type(model).__name__, blocks
        self._passed: Tensor | None = None

    def stub(self, index: int) -> Callable[..., Any]:
        """What a block runs in place of its own forward."""
        original = self._blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = split_call(args, kwargs)
            if index != len(self.calls):
                raise self.disorder()
            if self._passed is not None and not torch.equal(self._passed, hidden):
                raise CalibrationError(
                    f"{self._name} changes what passes from block {index - 1} to the next; convert "
                    "it without --calibration"
                )
            self._passed = hidden
            self.calls.append(call)
            if index == 0:
                # A copy: a block may add to what it is given in place.
                self.returned = call.run(original, hidden.clone())
            return _with_rest(self.returned, hidden)

        return forward

    def disorder(self) -> CalibrationError:
        """The error of a model that goes through its blocks in another way."""
        return CalibrationError(
            f"{self._name} does not run its {len(self._blocks)} blocks once each, one after the "
            "other; convert it without --calibration"
        )


def _with_rest(output: Any, hidden: Tensor) -> Any:
    """What a block returned, with other hidden states."""
    return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden


def same_calls(first: Sequence[Call], second: Sequence[Call]) -> int | None:
    """Index of the first block whose arguments differ between two calls, or None."""
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        mine, others = (list(_leaves((call.args, call.kwargs))) for call in (a, b))
        pairs = zip(mine, others, strict=False)
        if len(mine) != len(others) or not all(torch.equal(x, y) for x, y in pairs):
            return index
    return None


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
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
