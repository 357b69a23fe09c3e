"""The LUTs that are trained, as float32 masters, and the way back to the dtype of the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sketchconv.errors import TuningError
from sketchconv.runtime.modules import SketchModule

ATTRIBUTE = "lut_training"


@dataclass(frozen=True, slots=True)
class Master:
    """One LUT that is trained.

    Args:
        name: of the weight, as the sketch's document has it.
        module: holds the float32 master as `sketch_lut` ``[rows, groups, 2**bits]``.
        dtype: of the LUT in the file: float16, bfloat16 or float32.
        unit: float32 ``[rows, groups, 1]``: mean absolute entry of each group's LUT in the base.
    """

    name: str
    module: SketchModule
    dtype: torch.dtype
    unit: Tensor

    @property
    def parameter(self) -> nn.Parameter:
        """The float32 master.

        Raises:
            TuningError: somebody put a LUT of another dtype into the module.
        """
        found = self.module._parameters["sketch_lut"]
        if found is None or found.dtype is not torch.float32:
            kind = "removed" if found is None else f"replaced by a LUT of {found.dtype}"
            raise TuningError(f"the float32 LUT of {self.name} was {kind}; prepare the model again")
        return found

    def rounded(self) -> Tensor:
        """The LUT in the dtype of the file, rounded once, with the base's order of entries."""
        return self.parameter.detach().to(self.dtype)


@dataclass(frozen=True, slots=True)
class LutTraining:
    """What `prepare_for_lut_training` made of a model; `model.lut_training`."""

    masters: tuple[Master, ...]
    gradient: str

    @property
    def values(self) -> int:
        """How many values are trained."""
        return sum(master.parameter.numel() for master in self.masters)


def training_of(model: nn.Module) -> LutTraining:
    """The LUT training of a prepared model, also of one that DDP or another wrapper holds.

    Raises:
        TuningError: the model was not prepared.
    """
    for module in model.modules():
        found = module.__dict__.get(ATTRIBUTE)
        if isinstance(found, LutTraining):
            return found
    raise TuningError(
        f"{type(model).__name__} is not prepared: call sketchconv.prepare_for_lut_training(model)"
    )


def tuned_luts(model: nn.Module) -> dict[str, Tensor]:
    """The trained LUTs by weight name, on the CPU, rounded once to the dtypes of the file.

    Each ``[rows, groups, 2**bits]``, entry k of a group still the value of index k: what
    `sketchconv.deltas.create` takes.

    Raises:
        TuningError: the model was not prepared, or a value is not finite in its file's dtype.
    """
    found = {}
    for master in training_of(model).masters:
        table = master.rounded().cpu()
        if not bool(torch.isfinite(table).all()):
            raise TuningError(
                f"{master.name}: a trained LUT entry is not finite in {master.dtype}; lower the "
                "learning rate"
            )
        found[master.name] = table
    return found


def finish_lut_training(model: nn.Module) -> None:
    """Give every trained LUT its file's dtype again, rounded once, and freeze the model.

    Raises:
        TuningError: as `tuned_luts`.
    """
    luts = tuned_luts(model)
    for master in training_of(model).masters:
        device = master.parameter.device
        master.module.sketch_lut = nn.Parameter(luts[master.name].to(device), requires_grad=False)
    model.requires_grad_(False)
    for module in model.modules():
        if module.__dict__.pop(ATTRIBUTE, None) is not None:
            forget: Any = getattr(module, "disable_input_require_grads", None)
            if forget is not None:
                forget()


@contextmanager
def rounded_masters(masters: Sequence[Master]) -> Iterator[None]:
    """Have a model compute with the values that would be shipped, for as long as this lasts.

    Masters whose values need no rounding are left alone.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for master in masters:
            if master.dtype is not torch.float32:
                data = master.parameter.data
                kept.append((data, data.clone()))
                data.copy_(master.rounded())
        yield
    finally:
        for data, values in kept:
            data.copy_(values)


@contextmanager
def rounded_luts(model: nn.Module) -> Iterator[None]:
    """`rounded_masters` of a prepared model, for evaluation in one's own loop."""
    with rounded_masters(training_of(model).masters):
        yield
