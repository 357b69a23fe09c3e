"""Run a model whose weights are not all there: up to its head, or to where something stops it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sketchconv.errors import CalibrationError, SketchconvError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stopped(Exception):
    """Raised inside a model to end a forward pass whose rest is not needed."""


def find_head(model: PreTrainedModel) -> nn.Module | None:
    """The output head of a language model; None for models without one."""
    try:
        head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    except NotImplementedError:
        return None
    return head


def head_paths(model: PreTrainedModel) -> list[str]:
    """Path of the output head, which is never run here."""
    head = find_head(model)
    return [name for name, module in model.named_modules() if module is head and name]


def last_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the model gives its head ``[windows, seq, hidden]``, or returns where it has none.

    Raises:
        CalibrationError: the model cannot be run on token ids alone.
    """
    head = find_head(model)
    if head is None:
        with _one_error(model):
            last: Tensor = model.base_model(input_ids=ids).last_hidden_state
        return last
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise Stopped

    handle = head.register_forward_pre_hook(catch)
    try:
        run_to_stop(model, ids)
    finally:
        handle.remove()
    if not caught:
        raise CalibrationError(
            f"{type(model).__name__} does not run its output head; convert it without --calibration"
        )
    return caught[0]


def run_to_stop(model: PreTrainedModel, ids: Tensor) -> None:
    """Run the model on token ids until something in it raises `Stopped`.

    Raises:
        CalibrationError: the model cannot be run on token ids alone.
    """
    with _one_error(model):
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


@contextmanager
def _one_error(model: PreTrainedModel) -> Iterator[None]:
    """Say in one line what a model's own code finds wrong: it may be anything, in any class."""
    try:
        yield
    except (SketchconvError, Stopped, MemoryError, torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CalibrationError(
            f"{type(model).__name__} cannot be run on token ids alone, block by block ({reason}); "
            "convert it without --calibration"
        ) from error
