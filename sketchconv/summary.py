"""What a model file or folder holds, read from its headers alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sketchconv.errors import SourceError

Storage = Literal["sketch", "dense", "alias", "file", "sentinel", "delta"]


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One line of the tensor table; `count` tensors alike when layers are folded together."""

    name: str
    storage: Storage
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    bits: int | None = None
    groups: int | None = None
    error: float | None = None
    count: int = 1

    @property
    def parameters(self) -> int:
        """Number of values that the row stands for; files and aliases hold none."""
        counted = self.storage in ("sketch", "dense", "delta")
        return self.count * math.prod(self.shape) if counted else 0


@dataclass(frozen=True, slots=True)
class Summary:
    """A readable account of one model: facts first, then the tensors."""

    path: str
    format: str
    nbytes: int
    facts: tuple[tuple[str, str], ...]
    rows: tuple[TensorRow, ...]

    @property
    def parameters(self) -> int:
        """Parameters in all tensors, aliases counted once."""
        return sum(row.parameters for row in self.rows)

    @property
    def bits_per_weight(self) -> float:
        """All bytes on disk over all parameters."""
        return 8 * self.nbytes / max(1, self.parameters)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values for ``--json``."""
        return {
            "path": self.path,
            "format": self.format,
            "bytes": self.nbytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "facts": dict(self.facts),
            "tensors": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
        }


def summarise(path: str | Path) -> Summary:
    """Read the headers of a sketch, a delta, a safetensors file or folder, or a GGUF file.

    Raises:
        SourceError: nothing is there, or it is none of these formats.
        FormatError: a sketch or safetensors file breaks a rule of its format.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        return _gguf(path)
    if _is_delta(path):
        return _delta(path)
    if is_sketch(path):
        return _sketch(path)
    return _safetensors(path)


def is_sketch(path: Path) -> bool:
    """Whether a path is a `.sktch` file or a folder whose config names our quantizer."""
    if path.is_file():
        return path.suffix == ".sktch" or "sktch" in _metadata(path)
    try:
        config = json.loads((path / "config.json").read_bytes())
        return bool(config["quantization_config"]["quant_method"] == "sktch")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def fold_layers(rows: Sequence[TensorRow]) -> list[TensorRow]:
    """Fold rows that differ only in numbers of their names; errors become the largest."""
    folded: dict[tuple[object, ...], list[TensorRow]] = {}
    for row in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.name)
        key = (pattern, row.storage, row.dtype, row.shape, row.bits, row.groups)
        folded.setdefault(key, []).append(row)
    return [_fold(str(key[0]), group) for key, group in folded.items()]


def _fold(pattern: str, group: Sequence[TensorRow]) -> TensorRow:
    first = group[0]
    errors = [row.error for row in group if row.error is not None]
    return TensorRow(
        name=pattern if len(group) > 1 else first.name,
        storage=first.storage,
        dtype=first.dtype,
        shape=first.shape,
        nbytes=sum(row.nbytes for row in group),
        bits=first.bits,
        groups=first.groups,
        error=max(errors, default=None),
        count=sum(row.count for row in group),
    )


def _metadata(path: Path) -> dict[str, str]:
    from sketchconv.formats.container import Container

    if path.suffix != ".safetensors":
        return {}
    with Container.open(path, profile="safetensors") as container:
        return dict(container.metadata)


def _sketch(path: Path) -> Summary:
    from sketchconv.formats.reader import SktchModel

    with SktchModel.open(path) as model:
        manifest, tensors = model.manifest, model.tensors
    rows = [
        TensorRow(
            record.name,
            "sketch",
            record.grid if record.shaped else record.lut_dtype,
            record.shape,
            record.index_info.nbytes + record.lut_info.nbytes,
            record.bits,
            record.groups,
            manifest.errors.get(record.name),
        )
        for record in manifest.sketches.values()
    ]
    parts = {r.index_name for r in manifest.sketches.values()}
    parts |= {r.lut_name for r in manifest.sketches.values()}
    files = {tensor: name for name, tensor in manifest.files.items()}
    for name, info in tensors.items():
        if name in parts:
            continue
        storage: Storage = "file" if name in files else "dense"
        storage = "sentinel" if name in manifest.sketches else storage
        rows.append(TensorRow(files.get(name, name), storage, info.dtype, info.shape, info.nbytes))
    rows += [TensorRow(f"{a} = {b}", "alias", "", (), 0) for a, b in manifest.aliases.items()]
    source = manifest.source
    facts = (
        ("format", f"sktch {manifest.version}, {manifest.kind}, packing {manifest.packing}"),
        ("made by", manifest.tool),
        ("source", f"{source.get('id')} ({source.get('format')})"),
        ("revision", str(source.get("revision") or "none recorded")),
        ("source digest", str(source.get("digest"))),
        ("column weights", str(manifest.recipe.get("column_weights"))),
    )
    return Summary(str(path), "sktch", _disk_bytes(path), facts, tuple(rows))


def _is_delta(path: Path) -> bool:
    from sketchconv.formats.delta import is_delta

    likely = path.is_dir() or path.suffix in (".sktch", ".safetensors")
    return likely and is_delta(path)


def _delta(path: Path) -> Summary:
    from sketchconv.deltas.summary import facts, info
    from sketchconv.formats.delta import DeltaFile

    with DeltaFile.open(path) as delta:
        document = delta.document
    coding = document.coding
    rows = []
    for record in document.weights.values():
        stored = f"{coding.stored_dtype(record.bound.lut)} {coding.mode}"
        shape = (record.changed, record.bound.shape[2])
        nbytes = sum(i.nbytes for i in record.infos(coding))
        rows.append(TensorRow(record.name, "delta", stored, shape, nbytes))
    text = f"sktch {document.version}, delta: changed LUTs of one base, no model by itself"
    shown = [("format", text), ("made by", document.tool), *facts(info(path))]
    return Summary(str(path), "delta", _disk_bytes(path), tuple(shown), tuple(rows))


def _safetensors(path: Path) -> Summary:
    from sketchconv.formats.container import Container
    from sketchconv.importers.open import layout_of

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if files == [path] and path.suffix != ".safetensors":
        raise SourceError(f"{path}: not a .sktch, .safetensors or .gguf file")
    if not files:
        raise SourceError(f"{path}: holds no .safetensors, .sktch or .gguf file")
    rows: list[TensorRow] = []
    facts: list[tuple[str, str]] = [("format", f"safetensors, {len(files)} file(s)")]
    layout = layout_of(path)
    if layout is not None:
        facts.append(("quantized by", f"{layout}; convert takes it over"))
    for file in files:
        with Container.open(file, profile="safetensors") as container:
            infos = [entry.info for entry in container.entries.values()]
            facts += [(f"metadata {k}", v) for k, v in container.metadata.items()][:8]
        rows += [TensorRow(i.name, "dense", i.dtype, i.shape, i.nbytes) for i in infos]
    return Summary(str(path), "safetensors", _disk_bytes(path), tuple(facts), tuple(rows))


def _gguf(path: Path) -> Summary:
    from sketchconv.formats.gguf_types import GGML_NUMBERS
    from sketchconv.sources.gguf_parts import read_parts

    parts = read_parts(path)
    header, rows = parts.header, []
    for tensor in header.tensors.values():
        kind = GGML_NUMBERS.get(tensor.kind)
        name, block, size = (
            (f"type {tensor.kind}", 1, 0)
            if kind is None
            else (kind.name, kind.block, kind.block_bytes)
        )
        nbytes = math.prod(tensor.shape) // block * size
        if tensor.offset + nbytes > parts.sizes[tensor.part]:
            raise SourceError(f"{path}: cut off inside tensor {tensor.name!r}; download it again")
        rows.append(TensorRow(tensor.name, "dense", name, tensor.shape, nbytes))
    split = f" in {len(parts.paths)} parts" if len(parts.paths) > 1 else ""
    count = f"{len(rows)} tensors{split}, {len(header.values)} metadata keys"
    facts = [("format", f"GGUF, {count}")]
    facts += [(k, v) for k, v in header.values.items() if isinstance(v, str) and len(v) < 200]
    return Summary(str(path), "gguf", header.size, tuple(facts), tuple(rows))


def _disk_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)
