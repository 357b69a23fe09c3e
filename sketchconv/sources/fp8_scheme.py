"""What a config says of weights in 8-bit floats: which values share a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sketchconv.errors import SourceError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.config import checked_config, parse_json

FP8_METHODS: Final = frozenset({"fp8", "compressed-tensors"})
"""Values of `quant_method` whose weights may be float8_e4m3fn with scales beside them."""
_ADVICE: Final = "convert the original bf16, fp16 or fp32 checkpoint instead"
_E4M3: Final = (None, "e4m3", "e4m3fn", "float8_e4m3fn")
_FORMATS: Final = ("float-quantized", "naive-quantized")


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """How a checkpoint's float8_e4m3fn weights ``[out, in]`` are scaled.

    A weight's value is its 8-bit float times the scale of its block, as the layout's own runtimes
    have it (DeepSeek-V3 technical report, section 3.3; compressed-tensors).

    Attributes:
        leaves: what the tensor of scales is called where the weight is `weight`.
        rows: that share a scale; None: all.
        columns: that share a scale; None: all.
    """

    leaves: tuple[str, ...]
    rows: int | None
    columns: int | None

    def block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of one block of a weight of this shape."""
        return self.rows or shape[0], self.columns or shape[1]

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of its scales; blocks at the edges may be cut."""
        rows, columns = self.block(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def fits(self, scales: TensorInfo, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has the shape of such scales; one value may have any number of axes."""
        grid = self.grid(shape)
        return scales.shape == grid or (grid == (1, 1) and scales.count == 1)


def split_config(data: bytes, where: str) -> tuple[dict[str, Any], Fp8Scheme]:
    """The dense model's config, without `auto_map`, and the scheme of its weights.

    Args:
        data: the text of a `config.json`.
        where: its name, for errors.

    Raises:
        SourceError: as `fp8_scheme`, or no config of a quantized model.
    """
    config = parse_json(data, where)
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise SourceError(f"{where}: no quantization_config; download it again")
    scheme = fp8_scheme(settings, where)
    dense = {key: value for key, value in config.items() if key != "quantization_config"}
    return checked_config(dense, where), scheme


def fp8_scheme(settings: Mapping[str, Any], where: str) -> Fp8Scheme:
    """Read a `quantization_config`.

    Raises:
        SourceError: another kind of weights, or a member that makes no sense; names it.
    """
    method = settings.get("quant_method")
    if method == "fp8":
        return _fine_grained(settings, where)
    if method == "compressed-tensors":
        return _compressed(settings, where)
    raise _refusal(where, f"the checkpoint is already quantized (quant_method {method!r})")


def _fine_grained(settings: Mapping[str, Any], where: str) -> Fp8Scheme:
    """DeepSeek's and Qwen's layout, and the same without blocks."""
    for key, known in {"fmt": _E4M3, "expert_dtype": (None, "fp8")}.items():
        if settings.get(key) not in known:
            raise _refusal(where, f"quant_method 'fp8' with {key} {settings.get(key)!r}")
    block = settings.get("weight_block_size")
    if block is None:
        return Fp8Scheme(("weight_scale_inv", "weight_scale"), None, None)
    return Fp8Scheme(("weight_scale_inv",), *_sizes(block, "weight_block_size", where))


def _compressed(settings: Mapping[str, Any], where: str) -> Fp8Scheme:
    """What llm-compressor writes: one scheme for all weights."""
    if settings.get("format") not in _FORMATS:
        found = settings.get("format")
        raise _refusal(where, f"quant_method 'compressed-tensors' with format {found!r}")
    for key in ("sparsity_config", "transform_config"):
        if not _is_nothing(settings.get(key)):
            raise _refusal(where, f"quant_method 'compressed-tensors' with a {key}")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refusal(where, "quant_method 'compressed-tensors' without config_groups")
    schemes = {_group(name, group, where) for name, group in groups.items()}
    if len(schemes) > 1:
        raise _refusal(where, "quant_method 'compressed-tensors' with several kinds of weights")
    return schemes.pop()


def _group(name: str, group: Any, where: str) -> Fp8Scheme:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise _refusal(where, f"config_groups.{name} says nothing of weights")
    if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        found = f"type {weights.get('type')!r}, num_bits {weights.get('num_bits')!r}"
        raise _refusal(where, f"config_groups.{name}.weights with {found}")
    strategy = weights.get("strategy")
    if strategy == "block":
        sizes = _sizes(weights.get("block_structure"), "block_structure", where)
        return Fp8Scheme(("weight_scale",), *sizes)
    if strategy not in ("tensor", "channel"):
        raise _refusal(where, f"config_groups.{name}.weights with strategy {strategy!r}")
    return Fp8Scheme(("weight_scale",), 1 if strategy == "channel" else None, None)


def _sizes(value: Any, key: str, where: str) -> tuple[int, int]:
    known = isinstance(value, list) and len(value) == 2
    if not known or not all(type(size) is int and 0 < size < 1 << 31 for size in value):
        raise SourceError(
            f"{where}: {key} must be two positive integers, rows and columns, got {value!r:.80};"
            f" {_ADVICE}"
        )
    return value[0], value[1]


def _is_nothing(value: Any) -> bool:
    """Whether a part of a config says nothing; sparsity of format `dense` is none."""
    return not value or (isinstance(value, dict) and value.get("format") == "dense")


def _refusal(where: str, what: str) -> SourceError:
    return SourceError(f"{where}: {what:.200}; {_ADVICE}")
