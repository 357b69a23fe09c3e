"""Tiny random models, and sketches of them written without the solver.

Codes and LUTs are random; the dense twin of a sketch holds exactly the decoded weights, so that
its outputs are what the sketch must give.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sketchconv.formats import grids
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import TensorInfo
from sketchconv.formats.writer import BundleWriter, Draft, FolderWriter, Results
from sketchconv.kernels.planes import pack_rows

NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
Shape = tuple[str, int, int]
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 151,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 40,
}


def build(kind: str, **changes: Any) -> Any:
    """A tiny model by the name of its class, in float32, with weights from a fixed seed."""
    import transformers

    cls = getattr(transformers, kind)
    values = {**(BERT if kind.startswith("Bert") else LLAMA), **changes}
    torch.manual_seed(0)
    return cls(cls.config_class(**values)).eval()


@dataclass(frozen=True)
class Sketch:
    """A written sketch: its path, its dense twin, and the stored bytes by tensor name."""

    path: Path
    dense: Any
    records: dict[str, SketchRecord]


def is_linear(name: str, module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def write(
    model: Any,
    out: Path,
    *,
    bits: int | Mapping[str, int] = 4,
    groups: int = 1,
    lut: torch.dtype = torch.float16,
    shapes: Mapping[str, Shape] | None = None,
    embeddings: bool = False,
    head: bool = False,
    shard: int | None = None,
    leave_out: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Sketch:
    """Sketch `model` with random codes, put the decoded weights into it, and write it to `out`.

    `out` that ends in .sktch becomes a bundle. `leave_out` names tensors not to store. `shapes`
    gives the ends of modules' paths shaped sketches: grid, bits and columns of a group.
    """
    rng = np.random.default_rng(7)
    records, blobs = {}, {}
    for path, module in model.named_modules():
        wanted = (
            is_linear(path, module)
            or (embeddings and isinstance(module, torch.nn.Embedding) and "word" in path + "word")
            or (head and "lm_head" in path and isinstance(module, torch.nn.Linear))
        )
        if not wanted:
            continue
        name = f"{path}.weight"
        width = bits if isinstance(bits, int) else bits.get(path, 4)
        shape = next((s for end, s in (shapes or {}).items() if path.endswith(end)), None)
        if shape is not None:
            records[name], *tensors = shaped_state(rng, module, name, *shape)
            blobs[records[name].index_name] = tensors[0].tobytes()
            blobs[records[name].lut_name] = tensors[1].tobytes()
            continue
        rows, columns = module.weight.shape
        codes = rng.integers(0, 2**width, (rows, columns)).astype(np.uint8)
        table = torch.from_numpy(np.sort(rng.standard_normal((rows, groups, 2**width)) * 0.1, -1))
        table = table.to(lut)
        record = SketchRecord(name, (rows, columns), "F32", width, groups, NAMES[lut])
        records[name] = record
        blobs[record.index_name] = pack_rows(codes, width, groups).tobytes()
        blobs[record.lut_name] = table.view(torch.uint8).numpy().tobytes()
        wide = codes.reshape(rows, groups, -1).astype(np.int64)
        with torch.no_grad():
            decoded = table.float().gather(2, torch.from_numpy(wide)).reshape(rows, columns)
            module.weight.copy_(decoded)
    stored, aliases = plain_tensors(model, records)
    stored = {name: tensor for name, tensor in stored.items() if name not in leave_out}
    infos = [TensorInfo(n, NAMES[t.dtype], tuple(t.shape)) for n, t in stored.items()]
    for name, tensor in stored.items():
        blobs[name] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    text = json.loads(model.config.to_json_string())
    text["architectures"] = [type(model).__name__]
    text["dtype"] = "float32"
    text["quantization_config"] = {
        "quant_method": "sktch",
        "format": draft_version(records),
        "bits": 4,
    }
    text.update(config or {})
    others = {"config.json": json.dumps(text).encode(), **(files or {})}
    draft = Draft(
        sketches=tuple(records.values()),
        plain=tuple(infos),
        aliases=aliases,
        recipe={"bits": 4},
        source={"id": "tiny"},
    )
    put(out, draft, others, blobs, shard)
    return Sketch(out, model, records)


def shaped_state(
    rng: np.random.Generator, module: Any, name: str, grid: str, bits: int, width: int
) -> tuple[SketchRecord, Any, Any]:
    """A random shaped sketch of a module, which gets its weight: record, index and scales."""
    rows, columns = module.weight.shape
    groups, fields = columns // width, grids.GRIDS[grid].fields
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    table = rng.standard_normal((rows, groups, fields)) * 0.1
    table[..., 0] /= np.abs(grids.levels(grid, bits)).max()
    table = table.astype(np.float16)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(grids.decode(codes, table, grid, bits)))
    record = SketchRecord(name, (rows, columns), "F32", bits, groups, "F16", grid)
    return record, pack_rows(codes, bits, groups), table


def put(out: Path, draft: Draft, files: dict[str, bytes], blobs: dict[str, bytes], shard: Any):
    writer: Any
    if out.suffix == ".sktch":
        writer = BundleWriter(out, draft, files)
    else:
        writer = FolderWriter(out, draft, files, shard or 10**9)
    with writer:
        for record in draft.sketches:
            for name in (record.index_name, record.lut_name):
                writer.append(name, blobs[name])
        for info in draft.plain:
            writer.append(info.name, blobs[info.name])
        errors = {record.name: 0.125 for record in draft.sketches}
        writer.commit(Results(errors, "0" * 64))


def draft_version(records: Mapping[str, SketchRecord]) -> str:
    """The version of the format that such sketches need."""
    return "1.1" if any(record.shaped for record in records.values()) else "1.0"


def plain_tensors(model: Any, records: Mapping[str, SketchRecord]) -> tuple[dict, dict]:
    """What a checkpoint stores densely, and the aliases of its tied weights."""
    stored, aliases, seen = {}, {}, {}
    for name, tensor in model.state_dict().items():
        first = seen.setdefault(tensor.data_ptr(), name)
        if first != name:
            aliases[name] = first
        elif name not in records:
            stored[name] = tensor.detach()
    return stored, aliases


@pytest.fixture(scope="session")
def tiny():
    """Makers: `tiny.build(kind)` and `tiny.write(model, out)`."""

    class Makers:
        build = staticmethod(build)
        write = staticmethod(write)

    return Makers


@pytest.fixture
def ids():
    """Two sequences of ten tokens."""
    return torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(4))


def filled(module: Any, seed: int = 0) -> Any:
    """A sketch module with random codes, LUT and bias."""
    torch.manual_seed(seed)
    module.sketch_index.random_(0, 256)
    with torch.no_grad():
        module.sketch_lut.normal_()
        if getattr(module, "bias", None) is not None:
            module.bias.normal_()
    return module


@pytest.fixture(scope="session")
def layers():
    """Makers of filled layers: `layers.linear()`, 48 to 20, and `layers.embedding()`, 30 by 48."""
    from sketchconv.runtime.modules import SketchEmbedding, SketchLinear

    class Makers:
        @staticmethod
        def linear(columns=48, rows=20, bits=4, groups=2, lut=torch.float32, **options):
            return filled(SketchLinear(columns, rows, bits, groups, lut_dtype=lut, **options))

        @staticmethod
        def embedding(rows=30, columns=48, bits=3, groups=2, lut=torch.float32, **options):
            return filled(SketchEmbedding(rows, columns, bits, groups, lut_dtype=lut, **options))

    return Makers
