"""Small checkpoints of 8-bit floats, made by torch alone, and the values that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
CODES = torch.float8_e4m3fn


def settings(kind: str) -> dict[str, Any]:
    """The `quantization_config` of a layout."""
    if kind in ("blocks", "odd blocks"):
        size = [128, 128] if kind == "blocks" else [48, 40]
        return {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": size,
                "activation_scheme": "dynamic"}  # fmt: skip
    if kind in ("tensor", "tensor, inverse"):
        return {"quant_method": "fp8", "activation_scheme": "static"}
    strategy = kind.removeprefix("compressed ")
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True,
               "block_structure": [48, 40] if strategy == "block" else None}  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": group}, "sparsity_config": {}}  # fmt: skip


KINDS = ("blocks", "odd blocks", "tensor", "tensor, inverse", "compressed tensor",
         "compressed channel", "compressed block")  # fmt: skip


def quantize(weight: torch.Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensors, torch.Tensor]:
    """Tensors by leaf, and the values: each code times its scale in float32."""
    given = settings(kind)
    height, width = weight.shape
    rows, columns = {"compressed channel": (1, width)}.get(kind, (height, width))
    if "blocks" in kind:
        rows, columns = given["weight_block_size"]
    if kind == "compressed block":
        rows, columns = 48, 40
    down, across = -(-height // rows), -(-width // columns)
    padded = torch.zeros(down * rows, across * columns)
    padded[:height, :width] = weight.float()
    largest = padded.view(down, rows, across, columns).abs().amax((1, 3))
    scale = (largest / 448).clamp(min=1e-8).to(dtype)
    spread = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    spread = spread[:height, :width]
    codes = (weight.float() / spread).to(CODES)
    leaf = "weight_scale_inv" if "blocks" in kind or "inverse" in kind else "weight_scale"
    stored = scale.reshape(()) if kind.startswith("tensor") else scale
    stored = scale.reshape(1) if kind == "compressed tensor" else stored
    tensors = {"weight": codes, leaf: stored.clone()}
    if kind.startswith("tensor"):
        tensors["input_scale"] = torch.tensor(0.5)
    return tensors, codes.float() * spread


def make_fp8(
    dense: Path, folder: Path, kind: str = "blocks", dtype: torch.dtype = torch.float32
) -> Tensors:
    """Write a folder's linear layers in 8-bit floats; returns the values of all tensors."""
    folder.mkdir()
    tensors: Tensors = {}
    values: Tensors = {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = values[name] = weight
            continue
        made, values[name] = quantize(weight, kind, dtype)
        stem = name.removesuffix("weight")
        tensors.update({stem + leaf: tensor for leaf, tensor in made.items()})
    write(dense, folder, tensors, settings(kind))
    return values


def write(
    dense: Path, folder: Path, tensors: Mapping[str, torch.Tensor], found: Mapping[str, Any]
) -> None:
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    text = json.dumps({**config, "quantization_config": dict(found)})
    (folder / "config.json").write_text(text)
    for path in dense.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
