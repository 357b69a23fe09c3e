"""The order in which a block's linear modules can be compressed, found by running the block."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sketchconv.calibration.blocks import Call, hidden_of

_DIGITS = re.compile(r"(?<=\.)\d+(?=\.)")
_COMPARED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor inside a block: the input or the output of one of its modules."""

    path: str
    side: Literal["in", "out"]


@dataclass(frozen=True, slots=True)
class Group:
    """Linear modules that get the same tensor as their input.

    Attributes:
        linears: their paths in the block, in the order in which they run.
        residual: for those whose output is added to the residual stream: where that stream can be
            seen before the sum.
    """

    linears: tuple[str, ...]
    residual: Mapping[str, Tap]


@dataclass(frozen=True, slots=True)
class Stage:
    """Groups whose statistics are gathered in one pass: one, or those of all experts."""

    groups: tuple[Group, ...]


@dataclass
class _Trace:
    """What one run of a block showed; tensors are kept so that no address is used twice."""

    moment: int = 0
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    began: dict[str, int] = field(default_factory=dict)
    seen: list[tuple[int, Tap, Tensor]] = field(default_factory=list)


def find_stages(
    block: nn.Module, call: Call, hidden: Tensor, linears: Collection[str]
) -> tuple[list[Stage], list[str]]:
    """Group a block's linear modules by their inputs, in the order in which they run.

    Args:
        block: with its weights.
        call: how it is called.
        hidden: ``[windows, seq, hidden]``, what comes into it.
        linears: paths in the block of the modules to be compressed.

    Returns:
        The stages, and the paths of linears that did not run.
    """
    trace = _run(block, call, hidden, linears)
    by_input: dict[tuple[Any, ...], list[str]] = {}
    for path in sorted(trace.began, key=lambda p: trace.began[p]):
        by_input.setdefault(_identity(trace.inputs[path][0]), []).append(path)
    groups = [_group(tuple(paths), trace) for paths in by_input.values()]
    return _merged(groups), [path for path in linears if path not in trace.began]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def _group(paths: tuple[str, ...], trace: _Trace) -> Group:
    found = {path: _residual(path, trace) for path in paths}
    return Group(paths, {path: tap for path, tap in found.items() if tap is not None})


def _residual(path: str, trace: _Trace) -> Tap | None:
    """The residual stream r if a later tensor is exactly r + (this linear's output).

    In the model's own dtype the sum is the same operation, so equality is exact.
    """
    output = trace.outputs[path]
    before = [(tap, t) for moment, tap, t in trace.seen if moment < trace.began[path]]
    after = [t for moment, _, t in trace.seen if moment > trace.began[path]]
    for tap, stream in before:
        if stream.shape != output.shape or not after:
            continue
        total = _start(stream) + _start(output)
        if any(t.shape == output.shape and torch.equal(_start(t), total) for t in after):
            return tap
    return None


def _start(tensor: Tensor) -> Tensor:
    return tensor[:1, :_COMPARED_TOKENS]


def _merged(groups: list[Group]) -> list[Stage]:
    """One stage for groups whose names differ in their first number: the experts of a mixture."""
    stages: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        key = tuple(_DIGITS.sub("#", f".{path}.", count=1) for path in group.linears)
        stages.setdefault(key, []).append(group)
    return [Stage(tuple(members)) for members in stages.values()]


def _run(block: nn.Module, call: Call, hidden: Tensor, linears: Collection[str]) -> _Trace:
    trace, wanted, handles = _Trace(), frozenset(linears), []

    def note(path: str, side: Literal["in", "out"], value: Any) -> None:
        trace.moment += 1
        tensor = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(tensor, Tensor) and tensor.shape == hidden.shape:
            trace.seen.append((trace.moment, Tap(path, side), tensor))

    def enter(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(path, "in", input_of(args, kwargs))
        if path in wanted:
            trace.inputs.setdefault(path, []).append(args[0])
            trace.began.setdefault(path, trace.moment)

    def leave(path: str, output: Any) -> None:
        note(path, "out", output)
        if path in wanted:
            trace.outputs.setdefault(path, output)

    for path, module in block.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda _m, args, kwargs, p=path: enter(p, args, kwargs), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda _m, _a, out, p=path: leave(p, out)))
    try:
        hidden_of(call.run(block, hidden))
    finally:
        for handle in handles:
            handle.remove()
    return trace


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A module's first argument, or its hidden states where those come by name."""
    return args[0] if args else kwargs.get("hidden_states")
