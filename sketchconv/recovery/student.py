"""The model that is trained: its sketched layers, its final hidden states, its head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sketchconv.kernels.gemv import _fast_bf16
from sketchconv.recovery.divergence import Head
from sketchconv.recovery.options import RecoveryError
from sketchconv.runtime.modules import SketchLinear, SketchModule
from sketchconv.runtime.shaped import ShapedLinear
from sketchconv.runtime.tied import Tied

PROBE_TOKENS = 8
# Rounding of bfloat16 logits, whose sums run in another order; a missing factor is far above it.
PROBE_TOLERANCE = 0.05


class _Caught(Exception):
    """No error: it carries the input of the head past the head."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Student:
    """A loaded sketch, seen as a map from token ids to final hidden states."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = next(iter(model.parameters())).device
        self.output = _output(model)
        self.modules = trainable_layers(model, self.output)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states ``[batch, length, hidden]`` of token ids: the input of the head."""
        if self.output is None:
            found: Tensor = self.model.base_model(
                input_ids=ids, **self._options()
            ).last_hidden_state
            return found
        hook = self.output.register_forward_pre_hook(_catch)
        try:
            self.model(input_ids=ids, **self._options())
        except _Caught as caught:
            return caught.hidden
        finally:
            hook.remove()
        raise RecoveryError(f"{type(self.model).__name__} does not call its output head")

    def _options(self) -> dict[str, Any]:
        return {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}

    def head(self, dtype: torch.dtype) -> Head | None:
        """The head, its weight dense in `dtype`; None for a model without one.

        Raises:
            RecoveryError: logits are made from hidden states in a way that is not known.
        """
        if self.output is None:
            return None
        weight = self.output.weight
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise RecoveryError(f"the output head is a {type(self.output).__name__}, not a Linear")
        config = self.model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        bias = getattr(self.output, "bias", None)
        head = Head(weight.detach().to(dtype), None if bias is None else bias.detach(), scale, cap)
        self._probe(head)
        return head

    def _probe(self, head: Head) -> None:
        """Compare logits of the model with those of `head`."""
        count = min(PROBE_TOKENS, head.weight.shape[0])
        ids = torch.arange(count, device=self.device).view(1, -1)
        with torch.no_grad():
            wanted = self.model(input_ids=ids, **self._options()).logits[0].float()
            found = head.logits(self.hidden(ids)[0])
        fits = wanted.shape == found.shape
        if not fits or not (wanted - found).abs().max() <= PROBE_TOLERANCE * wanted.abs().max():
            raise RecoveryError(
                f"{type(self.model).__name__} makes its logits in a way that recovery does not "
                "know (more than a head with a scale and a soft cap); convert without --recover"
            )


def _catch(_module: nn.Module, args: tuple[Any, ...]) -> None:
    raise _Caught(args[0])


def _output(model: PreTrainedModel) -> nn.Module | None:
    try:
        found = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def trainable_layers(model: nn.Module, output: nn.Module | None = None) -> list[SketchLinear]:
    """The sketched linear layers of `model`, in its order, without the head `output`.

    Raises:
        RecoveryError: one is shaped: it has no LUT of its own that could be trained.
    """
    shaped = next((n for n, m in model.named_modules() if isinstance(m, ShapedLinear)), None)
    if shaped is not None:
        raise RecoveryError(
            f"recovery: trains LUTs, and {shaped} has scales of a fixed grid; convert with --grid "
            "free, or without --recover"
        )
    return [
        module
        for module in model.modules()
        if isinstance(module, SketchLinear)
        and module is not output
        and not isinstance(module, Tied)
    ]


def one_device(modules: Sequence[SketchLinear]) -> torch.device:
    """The device of all of these layers.

    Raises:
        RecoveryError: there is no layer, or there are several devices.
    """
    places = sorted({str(module.sketch_lut.device) for module in modules})
    if not places:
        raise RecoveryError("recovery: there is no sketched linear layer to train")
    if len(places) > 1:
        where = ", ".join(places)
        raise RecoveryError(f"recovery: the model must be on one device, it is on {where}")
    return modules[0].sketch_lut.device


def working_dtype(device: torch.device) -> torch.dtype:
    """The dtype to train in: bfloat16 wherever the hardware multiplies it, else float32."""
    if device.type == "cpu":
        return torch.bfloat16 if _fast_bf16() else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.float32


@contextmanager
def prepared(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Have `model` compute in `dtype`, frozen, in evaluation mode; all as it was afterwards.

    LUTs are left alone, and so are buffers: rotary frequencies are float32 in every model.
    """
    luts = {id(m.sketch_lut) for m in model.modules() if isinstance(m, SketchModule)}
    former = [(p, p.data, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for parameter, data, _ in former:
            parameter.requires_grad_(False)
            if id(parameter) not in luts and data.is_floating_point():
                parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data, needs in former:
            if id(parameter) not in luts:
                parameter.data = data
            parameter.requires_grad_(needs)
        for module, mode in modes:
            module.training = mode
