"""The sketch that adapters are made for: its weights in a loaded model, and their digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sketchconv.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

    from sketchconv.deltas.binding import BaseBinding
    from sketchconv.runtime.sketch import SketchModule


@dataclass(frozen=True, slots=True)
class BaseSketch:
    """The weights of a loaded sketch that adapters may change.

    Attributes:
        paths: logical weight name, a key of `Manifest.sketches` -> path of the module.
        binding: the digests of their tensors, as the file that was loaded states them.
    """

    paths: Mapping[str, str]
    binding: BaseBinding

    def module(self, model: nn.Module, name: str) -> SketchModule:
        """The module that holds weight `name`.

        Raises:
            AdapterError: the base has no such sketch.
        """
        from sketchconv.runtime.sketch import SketchModule

        path = self.paths.get(name)
        found: Any = None if path is None else model.get_submodule(path)
        if not isinstance(found, SketchModule):
            raise AdapterError(f"the adapter has {name}, which is no sketched weight of this model")
        return found


def is_sketch(model: Any) -> bool:
    """Whether a model was loaded from a sketch, by `load` or `from_pretrained`."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return str(getattr(config, "quant_method", "")) == "sktch"


def base_of(model: Any) -> BaseSketch:
    """The sketch that `model` was loaded from.

    Raises:
        AdapterError: it was not loaded from one.
    """
    from sketchconv.deltas.binding import BaseBinding

    quantizer = getattr(model, "hf_quantizer", None)
    manifest = getattr(quantizer, "manifest", None)
    if not is_sketch(model) or quantizer is None or manifest is None:
        raise AdapterError(f"this {type(model).__name__} was not loaded from a sketch")
    paths = {record.name: path for path, record in quantizer.records.items()}
    return BaseSketch(paths, BaseBinding.of(manifest))
