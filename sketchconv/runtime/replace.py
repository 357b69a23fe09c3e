"""Put sketch modules where a model has dense ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sketchconv.errors import LoadError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.runtime.conv1d import SketchConv1D
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear, SketchModule
from sketchconv.runtime.names import Place
from sketchconv.runtime.shaped import ShapedLinear

LUT_TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
WEIGHT = ".weight"


def replace_modules(
    model: PreTrainedModel,
    records: Mapping[str, SketchRecord],
    at: Mapping[str, Place],
    dtype: torch.dtype,
) -> dict[str, SketchRecord]:
    """Replace every module whose weight is sketched.

    Args:
        model: on the meta device, dense.
        records: the sketches of the checkpoint, by weight name.
        at: the place of each weight in the model.
        dtype: dtype of the model.

    Returns:
        The record of each replaced module, by the module's path in the model.

    Raises:
        LoadError: a sketched weight has another shape in the model, or belongs to a module that
            has no sketched form.
    """
    done = {}
    for name, record in records.items():
        place = at[name]
        if not place.there:
            continue
        path = place.key.removesuffix(WEIGHT)
        if place.merged or path == place.key:
            raise LoadError(f"{name} is sketched, but the model merges it into {place.key}")
        module = sketched(model.get_submodule(path), record, dtype)
        model.set_submodule(path, module)
        done[path] = record
    return done


def sketched(module: nn.Module, record: SketchRecord, dtype: torch.dtype) -> SketchModule:
    """An empty sketch module on the meta device that takes the place of `module`.

    Raises:
        LoadError: as for `replace_modules`.
    """
    rows, columns = record.shape
    if not isinstance(module, nn.Embedding) and not has_sketched_form(module):
        raise LoadError(
            f"{record.name} is sketched, but belongs to a {type(module).__name__}; "
            "only Linear, Conv1D and Embedding have a sketched form"
        )
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != record.shape:
        shape = list(weight.shape) if isinstance(weight, torch.Tensor) else None
        raise LoadError(f"{record.name} is {list(record.shape)}, the model expects {shape}")
    if record.shaped:
        return _shaped(module, record, dtype)
    lut_dtype = LUT_TORCH[record.lut_dtype]
    if isinstance(module, nn.Embedding):
        embedding = SketchEmbedding(
            *(rows, columns, record.bits, record.groups),
            padding_idx=module.padding_idx,
            lut_dtype=lut_dtype,
            device="meta",
            dtype=dtype,
        )
        copy_scale(module, embedding)
        return embedding
    kind = SketchConv1D if isinstance(module, Conv1D) else SketchLinear
    return kind(
        *(columns, rows, record.bits, record.groups),
        bias=module.bias is not None,
        lut_dtype=lut_dtype,
        device="meta",
        dtype=dtype,
    )


def _shaped(module: nn.Module, record: SketchRecord, dtype: torch.dtype) -> ShapedLinear:
    if not isinstance(module, nn.Linear):
        raise LoadError(
            f"{record.name} has a shaped sketch, but belongs to a {type(module).__name__}; only "
            "Linear has a shaped form"
        )
    rows, columns = record.shape
    return ShapedLinear(
        *(columns, rows, record.bits, record.grid, record.groups),
        bias=module.bias is not None,
        device="meta",
        dtype=dtype,
    )


def copy_scale(module: nn.Embedding, sketch: SketchEmbedding) -> None:
    """Take over the factor of embeddings that scale their rows (Gemma 3, BART and others).

    Raises:
        LoadError: the embedding does something else of its own.
    """
    if not has_sketched_form(module):
        raise LoadError(f"an embedding of type {type(module).__name__} has no sketched form")
    if type(module).forward is not nn.Embedding.forward:
        scale, sketch.round_scale = _scale(module)
        sketch.scale = None if scale is None else float(scale)


def has_sketched_form(module: nn.Module) -> bool:
    """Whether a sketch module can do what this module does with its weight."""
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward
        return plain or ("Scaled" in type(module).__name__ and _scale(module)[0] is not None)
    if isinstance(module, Conv1D):
        return type(module).forward is Conv1D.forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _scale(module: nn.Embedding) -> tuple[float | None, bool]:
    """The factor of an embedding that scales, and whether it is rounded to the model's dtype."""
    rounded = getattr(module, "scalar_embed_scale", None)
    scale = getattr(module, "embed_scale", None) if rounded is None else rounded
    return (scale if isinstance(scale, int | float) else None), rounded is not None
