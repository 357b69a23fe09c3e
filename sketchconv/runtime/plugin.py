"""The plugin that lets transformers load and save sketches: quantization method `sktch`.

Importing this module registers it; `quantizer.register_quantizer` does so when transformers loads.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

# This module is imported while transformers itself is half loaded: only what is ready then.
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sketchconv.errors import LoadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from sketchconv.formats.manifest import Manifest
    from sketchconv.formats.sketches import SketchRecord
    from sketchconv.runtime.stored import Stored

METHOD = "sktch"
FORMAT = "1.0"


class SktchConfig(QuantizationConfigMixin):
    """The `quantization_config` of a sketch's `config.json`.

    It names the method and, for people, the default bits and groups; what counts for each tensor is
    the document in the weight files. Other keys are kept.
    """

    def __init__(
        self,
        format: str = FORMAT,
        bits: int | None = None,
        groups: int | None = None,
        **others: Any,
    ) -> None:
        others.pop("quant_method", None)
        self.quant_method: Any = METHOD
        self.format = format
        self.bits = bits
        self.groups = groups
        self.__dict__.update(others)
        if str(format).split(".")[0] != FORMAT.split(".")[0]:
            raise LoadError(f"the sketch has format {format}, this version knows {FORMAT}")


class SktchQuantizer(HfQuantizer):
    """Builds sketch modules before the weights are loaded, and checks that everything fits."""

    requires_calibration = True  # a sketch is made by `sketchconv convert`, not while loading

    def __init__(self, quantization_config: SktchConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.manifest: Manifest | None = None
        self.records: dict[str, SketchRecord] = {}

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **_: Any,
    ) -> None:
        from sketchconv.formats.rules import RESERVED_PREFIX
        from sketchconv.runtime.complete import check_complete
        from sketchconv.runtime.experts import experts_of
        from sketchconv.runtime.names import places
        from sketchconv.runtime.stored import read_stored
        from sketchconv.unfold import FUSED

        stored = read_stored(checkpoint_files or ())
        self._build(model, stored, dtype or model.dtype)
        state = model.state_dict()
        check_complete(model, state, stored.weights, places(model, state, stored.weights))
        keys = [place.key for place in places(model, state, stored.sentinels).values()]
        keys += [f"{path}.{name}" for path in experts_of(model) for name in FUSED]
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        own = {f"^{re.escape(key)}$" for key in keys} | {f"^{re.escape(RESERVED_PREFIX)}"}
        model._keys_to_ignore_on_load_unexpected = known | own
        self.manifest = stored.manifest

    def _build(self, model: PreTrainedModel, stored: Stored, dtype: torch.dtype) -> None:
        from sketchconv.runtime.names import places
        from sketchconv.runtime.replace import replace_modules
        from sketchconv.runtime.ties import tie_modules
        from sketchconv.sources.forms import Forms
        from sketchconv.unfold import unfold_experts

        manifest = stored.manifest
        forms = Forms.of(manifest.source, manifest.sketches, "the sketch")
        unfold_experts(model, [*manifest.sketches, *forms.stacked], forms.stacked)
        aliases = manifest.aliases
        named = {*manifest.sketches, *stored.weights, *aliases, *aliases.values()}
        at = places(model, model.state_dict(), named)
        there = {*manifest.sketches, *stored.weights}
        keys = {place.key for name, place in at.items() if place.there and name in there}
        ties = dict(model.all_tied_weights_keys)
        for absent, target in aliases.items():
            if at[absent].there and at[target].there and at[absent].key != at[target].key:
                ties.setdefault(at[absent].key, at[target].key)
        self.records = replace_modules(model, manifest.sketches, at, dtype)
        tie_modules(model, ties, keys, dtype)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        """Settle the sketches, freeze the model, let it decode fast and take adapters."""
        from sketchconv.adapters import methods
        from sketchconv.runtime.compiled_generate import install
        from sketchconv.runtime.modules import SketchModule

        methods.install()
        methods.hook(model)
        for module in model.modules():
            if isinstance(module, SketchModule):
                module.settle()
        model.requires_grad_(False)
        install(model)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """A LUT is loaded as it is, also where a model keeps some modules in float32."""
        from sketchconv.formats.rules import LUT_SUFFIX, SCALE_SUFFIX

        if any(
            str(name).endswith((LUT_SUFFIX, SCALE_SUFFIX)) for name in converter.source_patterns
        ):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and file metadata for `save_pretrained`."""
        from sketchconv.runtime.saving import state_and_metadata

        if self.manifest is None:
            raise LoadError("this model was not loaded from a sketch, so it cannot be saved as one")
        return state_and_metadata(model, self.manifest, self.records)

    def is_serializable(self) -> bool:
        """Sketches can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """LUTs, biases and everything that is not sketched can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """As `is_trainable`: the LUTs are ordinary parameters."""
        return True

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> nn.Module:
        import torch

        from sketchconv.runtime.dense import dense_modules

        # A config that was saved has it as text.
        named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return dense_modules(model, named or model.dtype)


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, SktchConfig)
AUTO_QUANTIZER_MAPPING.setdefault(METHOD, SktchQuantizer)
