"""Self-distillation: LUTs trained so that the sketch predicts what the dense model predicts.

The indices stay, so the file does not grow by a byte. The dense model itself is not needed: its
final hidden states are enough, as its logits are one product away.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sketchconv.recovery.divergence import Head, divergence, hidden_error
from sketchconv.recovery.loop import Loop, Loss, Task
from sketchconv.recovery.options import (
    ProgressCallback,
    Recovery,
    RecoveryError,
    RecoveryOptions,
    RecoveryStep,
)
from sketchconv.recovery.student import Student, one_device, prepared, working_dtype

__all__ = ["Recovery", "RecoveryError", "RecoveryOptions", "RecoveryStep", "recover"]


def recover(
    student: PreTrainedModel,
    windows: Tensor,
    hidden: Tensor,
    head: Tensor | None = None,
    options: RecoveryOptions | None = None,
    progress: ProgressCallback | None = None,
) -> Recovery:
    """Train the LUTs of `student` in place; never leave it worse than it was.

    The loss is KL(dense || student) of the next token over the full vocabulary, the mean over all
    tokens; for a model without a head, the relative squared error of the final hidden states.

    Args:
        student: a loaded sketch on the CPU or a GPU.
        windows: token ids, int64 ``[windows, length]``. Windows of 256 to 512 tokens are best: a
            step has at least one window, and attention's backward is slow on CPUs.
        hidden: the dense model's final hidden states for the same windows, run whole: what its
            head takes (after the last norm), ``[windows, length, width]`` of any float dtype, in
            CPU memory or mapped from a file.
        head: the dense model's output head ``[vocabulary, width]``; None where that of the student
            is dense too.
        options: see `RecoveryOptions`.
        progress: called after every step, from the calling thread.

    Returns:
        What was done. Where the held-out loss did not fall, the student is as it was.

    The same inputs give the same bytes on the same machine with the same number of torch threads;
    matrix products of other machines, or split among more threads, are summed in another order.

    Raises:
        RecoveryError: inputs do not fit each other or the model; the model is as it was.
    """
    _check(student, windows, hidden)
    seen = Student(student)
    dtype = working_dtype(one_device(seen.modules))
    with prepared(student, dtype), torch.enable_grad():
        task = Task(
            modules=seen.modules,
            run=lambda rows: _outputs(seen, windows[rows], hidden[rows]),
            loss=_loss(seen, head, hidden.shape[2], dtype),
            samples=windows.shape[0],
            length=windows.shape[1],
            measure="error" if seen.output is None else "kl",
        )
        return Loop(task, options or RecoveryOptions(), progress).run(dtype)


def _check(student: PreTrainedModel, windows: Tensor, hidden: Tensor) -> None:
    integers = not windows.is_floating_point() and windows.dtype is not torch.bool
    if windows.dim() != 2 or not integers or windows.shape[0] < 2 or not windows.shape[1]:
        raise RecoveryError(
            "recovery: windows must be at least 2 rows of token ids (one is held out), got "
            f"{windows.dtype} {tuple(windows.shape)}"
        )
    if hidden.dim() != 3 or hidden.shape[:2] != windows.shape or not hidden.is_floating_point():
        raise RecoveryError(
            f"recovery: hidden must be float [{windows.shape[0]}, {windows.shape[1]}, width] for "
            f"these windows, got {hidden.dtype} {tuple(hidden.shape)}"
        )
    rows = getattr(student.get_input_embeddings(), "num_embeddings", None)
    low, high = (int(v) for v in windows.aminmax())
    if low < 0 or (rows is not None and high >= rows):
        raise RecoveryError(
            f"recovery: token ids reach from {low} to {high}, the model knows {rows}: is the text "
            "from another tokenizer?"
        )


def _outputs(student: Student, ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Final hidden states of the student and of the dense model."""
    found, wanted = student.hidden(ids.to(student.device)), hidden.to(student.device)
    if found.shape != wanted.shape:
        raise RecoveryError(
            f"recovery: the student's hidden states are {tuple(found.shape)}, the dense model's "
            f"{tuple(wanted.shape)}"
        )
    return found, wanted


def _loss(student: Student, head: Tensor | None, width: int, dtype: torch.dtype) -> Loss:
    own = student.head(dtype)
    if own is None:
        return hidden_error
    weight = own.weight if head is None else head.detach().to(student.device, dtype)
    if weight.shape != own.weight.shape or weight.shape[1] != width:
        raise RecoveryError(
            f"recovery: the dense head is {tuple(weight.shape)}, the student's "
            f"{tuple(own.weight.shape)}, and hidden states have {width} values"
        )
    dense = Head(weight, own.bias, own.scale, own.cap)
    return lambda wanted, found, gradient: divergence(dense, wanted, own, found, gradient)
