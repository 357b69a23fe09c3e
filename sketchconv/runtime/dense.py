"""Turn a sketched model into a dense one, in place: `model.dequantize()`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from sketchconv.errors import LoadError
from sketchconv.runtime.conv1d import SketchConv1D
from sketchconv.runtime.experts import experts_of
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear, SketchModule
from sketchconv.runtime.tied import Tied


def dense_modules(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Replace every sketch module of `model` by a dense one in `dtype`, and tie weights again.

    Raises:
        LoadError: a sketched embedding scales its rows; its dense form is a class of the model.
    """
    made: dict[SketchModule, nn.Module] = {}
    modules = [(p, m) for p, m in model.named_modules() if isinstance(m, SketchModule)]
    for path, module in sorted(modules, key=lambda pair: isinstance(pair[1], Tied)):
        dense = _dense(module, dtype)
        if isinstance(module, Tied):
            dense.weight = made[module.owner].weight
        made[module] = dense
        model.set_submodule(path, dense)
    for path, experts in experts_of(model).items():
        model.set_submodule(path, experts.fused())
    for part in model.modules():
        part.__dict__.pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


def _dense(module: SketchModule, dtype: torch.dtype) -> nn.Module:
    weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
    if isinstance(module, SketchEmbedding):
        if module.scale is not None:
            raise LoadError("an embedding that scales its rows cannot be dequantized in place")
        with torch.device("meta"):
            embedding = nn.Embedding(module.rows, module.columns, module.padding_idx, dtype=dtype)
        embedding.weight = weight
        return embedding
    if isinstance(module, SketchConv1D):
        return module.dense(weight)
    if not isinstance(module, SketchLinear):
        raise LoadError(f"a {type(module).__name__} has no dense form")
    with torch.device("meta"):
        linear = nn.Linear(module.columns, module.rows, bias=False, dtype=dtype)
    linear.weight = weight
    linear.register_parameter("bias", module.bias)
    return linear
