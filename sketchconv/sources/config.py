"""A checkpoint's `config.json`: read with limits, stripped of remote code, refused if quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sketchconv.errors import SourceError

MAX_CONFIG_BYTES = 8 << 20
IMPORTED_METHODS = frozenset({"gptq", "awq", "bitsandbytes"})
"""Values of `quant_method` that an importer knows (`sketchconv.importers`)."""
OLD_SETTINGS = ("quantize_config.json", "quant_config.json")
"""Settings of a quantization, from before configs had a place for them."""
_QUANTIZED = ("quantization_config", "compression_config")
_QUANTIZED_SUFFIXES = (
    *(".qweight", ".qzeros", ".absmax", ".weight_packed", ".weight_scale_inv"),
    *(".weight_codes", ".lookup_table"),
)


class QuantizedError(SourceError):
    """The weights are quantized by something else: perhaps an importer knows them."""


def parse_json(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        SourceError: `data` is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not valid JSON ({error}); download it again") from None


def parse_config(data: bytes, where: str) -> dict[str, Any]:
    """The config as a dict without `auto_map`, the key that names code to download and run.

    Raises:
        SourceError: not a JSON object, or the checkpoint is already quantized.
    """
    return checked_config(parse_json(data, where), where)


def checked_config(config: Any, where: str) -> dict[str, Any]:
    """As `parse_config`, of a value that has been parsed."""
    if not isinstance(config, dict):
        raise SourceError(f"{where}: expected a JSON object, found {type(config).__name__}")
    refuse_quantized(config, where)
    stripped: dict[str, Any] = strip_remote_code(config)
    return stripped


def quantized_by(data: bytes) -> str | None:
    """The `quant_method` of a config's text, or None if there is none to be read."""
    try:
        method = json.loads(data)["quantization_config"]["quant_method"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return str(method)


def strip_remote_code(value: Any) -> Any:
    """A copy of a JSON value without any `auto_map` key."""
    if isinstance(value, dict):
        return {key: strip_remote_code(item) for key, item in value.items() if key != "auto_map"}
    if isinstance(value, list):
        return [strip_remote_code(item) for item in value]
    return value


def refuse_quantized(config: dict[str, Any], where: str) -> None:
    """Raise if the config, or the config of a part such as `text_config`, says how it is quantized.

    Raises:
        SourceError: names the method and says what to do.
    """
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in parts:
        for key in _QUANTIZED:
            found = part.get(key)
            if found is None:
                continue
            method = found if not isinstance(found, dict) else found.get("quant_method")
            if method is None:
                # MLX names no method, only its mode.
                method = "mlx" if "mode" in found else "unknown"
            raise SourceError(f"{where}: {_already_quantized(str(method), key)}")


def _already_quantized(method: str, key: str) -> str:
    if method == "sktch":
        return (
            "this is already a sketch (quant_method 'sktch'); load, inspect or verify it,"
            " or convert the dense model that it was made from"
        )
    return (
        f"the checkpoint is already quantized (quant_method {method!r} in {key});"
        " convert the original bf16, fp16 or fp32 checkpoint instead"
    )


def refuse_quantized_names(names: list[str], where: str) -> None:
    """Raise if tensor names are those of a quantized checkpoint whose config does not say so.

    Raises:
        SourceError: names the first such tensor.
    """
    for name in names:
        if name.endswith(_QUANTIZED_SUFFIXES):
            raise QuantizedError(
                f"{where}: tensor {name!r} belongs to a quantized checkpoint;"
                " convert the original bf16, fp16 or fp32 checkpoint instead"
            )


def dump_json(value: Any) -> bytes:
    """JSON as the Hugging Face libraries write it: UTF-8, two spaces, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_limited(path: Path, limit: int) -> bytes:
    """The whole of a small regular file.

    Raises:
        SourceError: not a regular file, unreadable, or larger than `limit` bytes.
    """
    try:
        if not path.is_file():
            raise SourceError(f"{path.name}: not a regular file")
        size = path.stat().st_size
        if size > limit:
            raise SourceError(f"{path.name}: {size} bytes, more than the limit of {limit}")
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path.name}: cannot be read ({error.strerror})") from None
