"""Run a block up to a stage, and keep what its linear modules are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sketchconv.calibration.blocks import Call
from sketchconv.calibration.forward import Stopped
from sketchconv.calibration.stages import Stage, Tap, input_of


class Tapped:
    """What one pass over a few windows showed, for every group of a stage.

    Attributes:
        inputs: first linear of a group -> its inputs ``[tokens, columns]``; several runs of one
            module are joined.
        residual: tap -> the residual stream there ``[tokens, hidden]``.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.residual: dict[Tap, Tensor] = {}


def run_tapped(block: nn.Module, call: Call, hidden: Tensor, stage: Stage) -> Tapped:
    """Run `block` on ``hidden [windows, seq, hidden]`` until the stage's inputs are known."""
    tapped = Tapped()
    last = stage.groups[0].linears[0] if len(stage.groups) == 1 else None
    handles = []
    for tap in {tap for group in stage.groups for tap in group.residual.values()}:
        handles.append(_watch(block.get_submodule(tap.path), tap, tapped))
    for group in stage.groups:
        module = block.get_submodule(group.linears[0])
        handles.append(
            module.register_forward_pre_hook(_catch(tapped, group.linears[0], last is not None))
        )
    try:
        call.run(block, hidden)
    except Stopped:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return tapped


def _catch(tapped: Tapped, path: str, stop: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1])
        known = tapped.inputs.get(path)
        tapped.inputs[path] = rows if known is None else torch.cat((known, rows))
        if stop:
            raise Stopped

    return hook


def _watch(module: nn.Module, tap: Tap, tapped: Tapped) -> Any:
    def keep(value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple | list) else value
        tapped.residual[tap] = tensor.reshape(-1, tensor.shape[-1])

    if tap.side == "in":
        return module.register_forward_pre_hook(
            lambda _m, args, kwargs: keep(input_of(args, kwargs)), with_kwargs=True
        )
    return module.register_forward_hook(lambda _m, _a, output: keep(output))
