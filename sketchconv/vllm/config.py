"""The quantization config that vLLM makes of a sketch's `config.json`.

Interface as in vLLM 0.33.0 (`layers/quantization/base_config.py`). What each weight has for bits
and groups is not in `config.json` but in the document of the weight files, as everywhere: vLLM
calls `maybe_update_config` with the model's path before it makes a layer, and the headers are read
there. The object travels to vLLM's worker processes by pickle, with the records in it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from sketchconv.errors import LoadError
from sketchconv.kernels.gpu.support import SMALLEST
from sketchconv.vllm.method import SketchMethod
from sketchconv.vllm.records import METHOD, Records, read_records

FORMAT_MAJOR = "1"


class SketchQuantConfig(QuantizationConfig):  # type: ignore[misc]
    """Chooses the method of each layer by what the weight files say of it."""

    def __init__(self) -> None:
        super().__init__()
        self.records: Records | None = None

    def get_name(self) -> str:
        """The method's name in `config.json`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations that the kernels take."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest NVIDIA GPU that Triton makes code for."""
        return SMALLEST[0] * 10 + SMALLEST[1]

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in `config.json` and in the weight files."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SketchQuantConfig:
        """Make it from `quantization_config`.

        Raises:
            LoadError: a format that this version does not know.
        """
        found = str(config.get("format", FORMAT_MAJOR))
        if found.split(".")[0] != FORMAT_MAJOR:
            raise LoadError(f"the sketch has format {found}, this version knows {FORMAT_MAJOR}.x")
        return cls()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read what the weight files say of each weight.

        Raises:
            LoadError: as `read_records`.
        """
        text = getattr(hf_config, "text_config", None) or hf_config
        tied = bool(getattr(text, "tie_word_embeddings", False))
        self.records = read_records(model_name, revision, tied=tied)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over vLLM's own names of modules."""
        self.records = self._known().renamed(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of a layer: ours, vLLM's for plain weights, None where vLLM chooses.

        Raises:
            LoadError: the layer is sketched in a way that vLLM cannot run.
        """
        records = self._known()
        if isinstance(layer, LinearBase):
            names = records.of_linear(prefix, self.packed_modules_mapping)
            return self._method(names) if names else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            choose = records.of_head if isinstance(layer, ParallelLMHead) else records.of_embedding
            name = choose(prefix, layer.org_vocab_size, layer.embedding_dim)
            if name is None:
                return None
            own = not isinstance(layer, ParallelLMHead) or name == prefix
            return self._method((name,), sentinels=own)
        records.check_no_experts(prefix)
        return None

    def _method(self, names: tuple[str, ...], *, sentinels: bool = True) -> SketchMethod:
        records = self._known()
        sentinel = sentinels and not records.sentinels.isdisjoint(names)
        return SketchMethod([records.sketches[name] for name in names], sentinel=sentinel)

    def _known(self) -> Records:
        if self.records is None:
            raise LoadError(
                "vLLM did not say where the sketch lies (`maybe_update_config`); its version is "
                "too old for this plugin, which is written for 0.33"
            )
        return self.records
