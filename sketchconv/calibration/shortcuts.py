"""What of a block need not run again: a module whose weights are all done, given what it makes.

Every stage runs the block once more up to its linears, and the last pass runs it whole: a decoder
layer's attention would run four times in each of the two models. Its result is that of one linear,
or that linear's inputs; these are kept when the linear's sums are gathered, and the module then
gives them again. Nothing is rounded otherwise than before. With 16,384 tokens in windows of 1024 a
block of SmolLM2 takes 14.1 s of CPU time instead of 16.9 (three blocks, one thread).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sketchconv.calibration.blocks import Call, with_hidden
from sketchconv.calibration.forward import replaced_forward
from sketchconv.calibration.hidden import HiddenStates
from sketchconv.calibration.stages import Stage


@dataclass(frozen=True, slots=True)
class Shortcut:
    """A module and the linear whose inputs decide its result.

    Attributes:
        module, linear: paths in the block.
        stage: that gathers the linear's inputs; later passes need not run the module.
        columns: of the linear.
        behind: the module returns the linear's outputs; otherwise its inputs.
        returned: what the module returned on a sample, without its tensors.
    """

    module: str
    linear: str
    stage: Stage
    columns: int
    behind: bool
    returned: Any

    def result(self, block: nn.Module, inputs: Tensor) -> Any:
        """What the module would return, from the linear's inputs ``[windows, seq, columns]``."""
        hidden = block.get_submodule(self.linear)(inputs) if self.behind else inputs
        return with_hidden(self.returned, hidden)


def find_shortcut(
    block: nn.Module, call: Call, hidden: Tensor, stages: Sequence[Stage]
) -> Shortcut | None:
    """The largest module that is done first, if there is one.

    Args:
        block: with its weights.
        call: how it is called with `hidden`.
        hidden: ``[windows, seq, hidden]``; one window will do.
        stages: of the block, in their order.
    """
    ends = {
        stage.groups[0].linears[0]: stage
        for stage in stages
        if len(stage.groups) == 1 and len(stage.groups[0].linears) == 1
    }
    inputs, outputs = _watched(block, call, hidden, ends)
    done: set[str] = set()
    for stage in stages:
        done.update(path for group in stage.groups for path in group.linears)
        linear = next((path for path, end in ends.items() if end is stage), None)
        if linear is None or linear not in inputs:
            continue
        for module in outputs:  # outermost first
            if module != linear and _closed(module, done, stages):
                found = _ended(module, linear, stage, inputs, outputs)
                if found is not None:
                    return found
    return None


def _watched(
    block: nn.Module, call: Call, hidden: Tensor, linears: dict[str, Stage]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs of `linears`, and what every module returned; without modules that ran twice."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Any] = {}
    runs: dict[str, int] = {}

    def enter(path: str, args: tuple[Any, ...]) -> None:
        runs[path] = runs.get(path, 0) + 1
        if path in linears:
            inputs[path] = args[0]

    handles = []
    for path, module in block.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda _m, args, p=path: enter(p, args)),
            module.register_forward_hook(lambda _m, _a, out, p=path: outputs.update({p: out})),
        ]
    try:
        call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()
    once = {path for path, count in runs.items() if count == 1 and path}
    order = [path for path, _ in block.named_modules() if path in once and path in outputs]
    return {p: x for p, x in inputs.items() if p in once}, {p: outputs[p] for p in order}


def _closed(module: str, done: set[str], stages: Sequence[Stage]) -> bool:
    """Whether a module has linears to sketch, all of them done, and nothing that others look at."""
    groups = [group for stage in stages for group in stage.groups]
    inside = [p for g in groups for p in g.linears if p.startswith(f"{module}.")]
    seen = {
        tap.path for g in groups if not done.issuperset(g.linears) for tap in g.residual.values()
    }
    return done.issuperset(inside) and bool(inside) and not _any_below(module, seen)


def _any_below(module: str, paths: set[str]) -> bool:
    return any(path.startswith(f"{module}.") for path in paths)


def _ended(
    module: str, linear: str, stage: Stage, inputs: dict[str, Tensor], outputs: dict[str, Any]
) -> Shortcut | None:
    """A shortcut if the module returns the very tensor that the linear gives or is given."""
    returned = outputs[module]
    first, *others = returned if isinstance(returned, tuple | list) else (returned,)
    if not isinstance(first, Tensor) or any(other is not None for other in others):
        return None
    for behind, tensor in ((True, outputs.get(linear)), (False, inputs[linear])):
        if isinstance(tensor, Tensor) and _same(first, tensor) and first.dim() == 3:
            columns = inputs[linear].shape[-1]
            return Shortcut(
                module, linear, stage, columns, behind, with_hidden(returned, first[:0])
            )
    return None


def _same(first: Tensor, second: Tensor) -> bool:
    places = [(t.data_ptr(), tuple(t.shape), t.stride()) for t in (first, second)]
    return places[0] == places[1]


class Kept:
    """The inputs of a shortcut's linear for all windows, in both models.

    Args:
        shortcut: of the block that is at work.
        dense, compressed: room for them, ``[windows, seq, columns]``.
    """

    def __init__(self, shortcut: Shortcut, dense: HiddenStates, compressed: HiddenStates) -> None:
        self.shortcut = shortcut
        self._rooms = {"dense": dense, "compressed": compressed}
        self._known: set[tuple[str, int]] = set()

    def put(self, which: str, begin: int, rows: Tensor, windows: int) -> None:
        """Keep the inputs ``[tokens, columns]`` of so many windows from `begin` on."""
        self._rooms[which].write(begin, rows.view(windows, -1, rows.shape[-1]))
        self._known.add((which, begin))

    def forget(self, which: str) -> None:
        """Drop one model's: its block has other weights now."""
        self._known = {(other, begin) for other, begin in self._known if other != which}

    @contextmanager
    def spared(self, block: nn.Module, which: str, begin: int, end: int) -> Iterator[None]:
        """Let the module of `block` give its result for these windows without running."""
        if (which, begin) not in self._known:
            yield
            return
        module = block.get_submodule(self.shortcut.module)
        device = next(block.parameters()).device
        inputs = self._rooms[which].read(begin, end, device)
        with torch.no_grad():
            result = self.shortcut.result(block, inputs)
        with replaced_forward({module: lambda *_args, **_kwargs: result}):
            yield
