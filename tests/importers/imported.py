"""Open single modules through an importer, and tiny models through the whole conversion."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_layouts import Tensors
from safetensors.torch import save_file

from sketchconv.formats.decode import SketchTensor
from sketchconv.formats.reader import SktchModel
from sketchconv.importers.base import Checkpoint, ImportOptions
from sketchconv.importers.stores import SafetensorsStore
from sketchconv.importers.table import importer_of

DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def checkpoint(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    quantization: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """A safetensors file of these tensors, as an importer gets it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    store = SafetensorsStore([(path, None)])
    return Checkpoint(path.name, store, config or {}, quantization or {})


def decode(found: Checkpoint, bits: int | None = None, step: int = 7) -> dict[str, Any]:
    """Weight name -> (float32 values, dtype of the tables), read in pieces of `step` rows."""
    importer = importer_of(found)
    assert importer is not None
    values = {}
    for weight in importer.weights(found, ImportOptions(None, bits)):
        record, pieces = weight.record, []
        for begin in range(0, record.shape[0], step):
            codes, lut = weight.rows(begin, min(begin + step, record.shape[0]))
            assert lut.shape == (len(codes), record.groups, 1 << record.bits)
            pieces.append(SketchTensor(codes, lut, record.bits, record.lut_dtype).decode())
        values[record.name] = np.concatenate(pieces), record.lut_dtype
    return values


def assert_same(found: Any, expected: torch.Tensor) -> None:
    """Bit for bit, in the peer's dtype."""
    values, dtype = found
    assert dtype == DTYPES[expected.dtype]
    assert values.shape == tuple(expected.shape)
    assert np.array_equal(values.view(np.uint32), expected.float().numpy().view(np.uint32))


def tiny_llama(dtype: torch.dtype = torch.float16) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).to(dtype).eval()


def linears(model: Any) -> dict[str, tuple[int, int]]:
    """Shape of every linear module but the head, by name."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def quantize(
    model: Any, make: Callable[[int, int, int], tuple[Tensors, torch.Tensor]]
) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """All tensors of the peer's checkpoint, and the peer's weights, which `model` gets too."""
    tensors = {n: t for n, t in model.state_dict().items()}
    weights = {}
    for seed, (name, (out, width)) in enumerate(linears(model).items()):
        parts, weight = make(out, width, 10 * seed)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in parts.items()}
        weights[f"{name}.weight"] = weight
    model.load_state_dict({**model.state_dict(), **weights})
    return tensors, weights


def write_folder(folder: Path, model: Any, tensors: Tensors | None, **config: Any) -> Path:
    """A model folder; without tensors there is only the config."""
    folder.mkdir(parents=True)
    architectures = [type(model).__name__]
    values = {**model.config.to_dict(), "architectures": architectures, **config}
    values["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values))
    if tensors is not None:
        held = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sketched(path: Path) -> dict[str, Any]:
    """Decoded weights of a written sketch and the dtype of their tables, by name."""
    with SktchModel.open(path) as model:
        records = model.manifest.sketches
        return {n: (model.sketch(n).decode(), r.lut_dtype) for n, r in records.items()}
