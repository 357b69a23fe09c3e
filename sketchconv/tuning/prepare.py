"""`prepare_for_lut_training`: make a loaded sketch a model that only its LUTs are trained of."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sketchconv.errors import TuningError
from sketchconv.runtime import functions
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear, SketchModule
from sketchconv.runtime.shaped import ShapedLinear
from sketchconv.runtime.tied import Tied
from sketchconv.tuning.masters import ATTRIBUTE, LutTraining, Master

Gradient = Literal["mean", "sum"]
GRADIENTS = ("mean", "sum")
# Adam's steps are the same for both, but for clipping (and an epsilon that hardly counts). The norm
# of all gradients of SmolLM2-135M, 4 bits, G = 4, 512 tokens of WikiText-2, is 5.4 as sums and 1.0
# as means, so that the usual clipping at 1 acts on sums in every step and hardly on means. 16 steps
# took the test perplexity from 55.34 to 24.54 with sums and 24.71 with means; 24.59 with means that
# are clipped at 0.2. Sums are also what a norm of gradients means elsewhere.
DEFAULT_GRADIENT: Gradient = "sum"


def prepare_for_lut_training(
    model: PreTrainedModel,
    *,
    embeddings: bool = False,
    head: bool = False,
    gradient: Gradient = DEFAULT_GRADIENT,
) -> PreTrainedModel:
    """Freeze all of a loaded sketch but its LUTs, which become float32 masters; in place.

    What comes back is the same model, and an ordinary one: `transformers.Trainer`,
    `trl.SFTTrainer` or a loop of one's own train its parameters that require gradients, which are
    named `*.sketch_lut`. Then `tuned_luts(model)` gives what a delta is made of, and
    `finish_lut_training(model)` leaves a model to use, with LUTs in their file's dtype. Masters are
    evaluated as they would be shipped inside `with rounded_luts(model):`.

    Checkpoints of `transformers.Trainer` are whole sketches with float32 LUTs, which
    `sketchconv.load` opens; those of `sketchconv.tuning.trainer.LutTrainer` hold LUTs only.

    Args:
        model: from `sketchconv.load` or `from_pretrained`.
        embeddings: train the LUTs of sketched embeddings too. A head that is tied to them follows,
            as it is the same LUT.
        head: train the LUT of a sketched output head that is not tied.
        gradient: what the optimizer is given for a LUT entry: the sum of the gradients of the
            weights that share it, which is the derivative of the loss, or their mean, as in the
            paper. Adam's step is the same for both but for its epsilon and for clipping.

    Embeddings and heads are left out by default: their LUTs are most of the parameters of a small
    model, and only rows of tokens that the data holds would learn.

    With means: a copy (`copy.deepcopy`) of a prepared model loses the hooks that make them of sums,
    so prepare after copying.

    Raises:
        TuningError: no sketch, a shaped one (`--grid`), or a model that is prepared already.

    Source: Sketch to Adapt, section 2.3: the mapping is fixed, the values of the LUTs are tuned.
    """
    _check(model, gradient)
    masters = tuple(
        _master(name, module, gradient) for name, module in _trained(model, embeddings, head)
    )
    model.requires_grad_(False)
    for master in masters:
        master.parameter.requires_grad_(True)
    _require_input_gradients(model)
    model.__dict__[ATTRIBUTE] = LutTraining(masters, gradient)
    return model


def _check(model: nn.Module, gradient: str) -> None:
    if gradient not in GRADIENTS:
        raise TuningError(f"gradient must be mean or sum, got {gradient!r}")
    if any(ATTRIBUTE in module.__dict__ for module in model.modules()):
        raise TuningError("the model is prepared already; finish_lut_training(model) ends that")
    shaped = next((n for n, m in model.named_modules() if isinstance(m, ShapedLinear)), None)
    if shaped is not None:
        raise TuningError(
            f"{shaped} is a shaped sketch: it has scales of a fixed grid, and no LUT that could "
            "be trained; convert the model without --grid"
        )


def _trained(model: Any, embeddings: bool, head: bool) -> list[tuple[str, SketchModule]]:
    """The modules whose LUTs are trained, by the name of their weight."""
    output = _output(model)
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, SketchModule) or isinstance(module, Tied):
            continue
        embeds = isinstance(module, SketchEmbedding) or _shared_by_embedding(model, module)
        wanted = isinstance(module, SketchLinear)
        if embeds:
            wanted = embeddings
        elif module is output:
            wanted = head
        if wanted:
            found.append((_name(model, path), module))
    if not found:
        raise TuningError(
            f"{type(model).__name__} has no sketched layer to train; make a sketch with "
            "`sketchconv convert` and load it with sketchconv.load"
        )
    return found


def _output(model: Any) -> nn.Module | None:
    try:
        found = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _shared_by_embedding(model: nn.Module, owner: SketchModule) -> bool:
    """Whether an embedding is tied to `owner`, a head that holds the sketch of both."""
    return any(
        isinstance(module, Tied) and isinstance(module, SketchEmbedding) and module.owner is owner
        for module in model.modules()
    )


def _name(model: Any, path: str) -> str:
    """The name of the weight in the sketch's document."""
    records = getattr(getattr(model, "hf_quantizer", None), "records", {})
    return str(records[path].name) if path in records else f"{path}.weight"


def _master(name: str, module: SketchModule, gradient: str) -> Master:
    lut = module._tensors()[1].detach()
    wide = lut.float()
    unit = wide.abs().mean(-1, keepdim=True)
    # An own copy, also of float32 LUTs: those of a file may lie in memory that cannot be written.
    module.sketch_lut = nn.Parameter(wide.clone() if wide is lut else wide)
    master = Master(name, module, lut.dtype, unit)
    if gradient == "mean":
        scale = _shares(module)
        parameter: Any = master.parameter
        parameter.register_hook(lambda grad: grad * scale.to(grad.device))
    return master


def _shares(module: SketchModule) -> Tensor:
    """One over the number of weights that share each entry, float32, the shape of the LUT."""
    _, index, lut, layout = module.operands()
    ones = torch.ones(1, module.rows, device=lut.device)
    inputs = torch.ones(1, module.columns, device=lut.device)
    with torch.no_grad():  # the gradient of a sum over all weights counts them
        counts = functions.grad_lut(ones, inputs, index, lut, layout)
    return counts.round_().clamp_(min=1).reciprocal_()


def _require_input_gradients(model: Any) -> None:
    """Let hidden states require gradients from the embeddings on.

    Reentrant activation checkpointing gives no gradient at all to a block whose input needs none.
    """
    try:
        model.enable_input_require_grads()
    except (AttributeError, NotImplementedError):
        return  # no embedding of its own (a vision model, for instance)
