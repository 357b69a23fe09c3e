"""bitsandbytes checkpoints of 4 bits (NF4 and FP4; Dettmers et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sketchconv.errors import SourceError
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import DTYPES, F32Array, U8Array, f32_to_bf16
from sketchconv.importers.base import Carrier, Checkpoint, ImportOptions, Weight, record_of
from sketchconv.sources.config import parse_json

_STATE: Final = ".weight.quant_state.bitsandbytes__"
_MAX_STATE: Final = 1 << 16
_BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES: Final = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Twelfths, by a sign bit, two bits of exponent and one of mantissa.
_FP4: Final = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _tables() -> Mapping[str, F32Array]:
    half = np.array(_FP4, np.float32) / np.float32(12)
    # The peer's own zero with a sign bit has none.
    negative = np.where(half == 0, np.float32(0), -half)
    fp4 = np.concatenate([half, negative]).astype(np.float32)
    return MappingProxyType({"nf4": np.array(_NF4, np.float32), "fp4": fp4})


LEVELS: Final = _tables()
"""The 16 levels of each type by index, float32."""


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """One module: ``weight``, nibbles (high first) of the flattened matrix, and ``weight.absmax``
    with one scale for each block of so many values.

    Attributes:
        kind: nf4 or fp4.
        block: values per block.
        nested: block of the scales, if these are 8-bit codes themselves; else 0.
        offset: added to nested scales.
    """

    checkpoint: Checkpoint
    record: SketchRecord
    parts: tuple[str, ...]
    kind: str
    block: int
    nested: int
    offset: float

    def rows(self, begin: int, end: int) -> tuple[U8Array, Carrier]:
        """Indices and tables of rows [begin, end); see `importers.base.Weight`."""
        name, (_, width) = self.record.name, self.record.shape
        raw = self.checkpoint.store.read(name, begin * width // 2, end * width // 2)
        packed = np.frombuffer(raw, np.uint8).reshape(end - begin, -1)
        codes = np.empty((end - begin, width), np.uint8)
        codes[:, 0::2] = packed >> 4
        codes[:, 1::2] = packed & 15
        size = self.record.group_size
        starts = np.arange(begin * width, end * width, size, dtype=np.int64)
        scales = self._scales(starts // self.block).reshape(end - begin, -1, 1)
        return codes, _stored(scales * LEVELS[self.kind], self.record.lut_dtype)

    def _scales(self, blocks: npt.NDArray[np.int64]) -> F32Array:
        """Scales float32 of the blocks, in this order."""
        first, last = int(blocks[0]), int(blocks[-1]) + 1
        name = f"{self.record.name}.absmax"
        stored = self.checkpoint.rows(name, first, last)
        if not self.nested:
            scales: F32Array = stored.astype(np.float32)[blocks - first]
            return scales
        levels = self.checkpoint.array(f"{self.record.name}.nested_quant_map")
        outer = self.checkpoint.array(f"{self.record.name}.nested_absmax")
        at = np.arange(first, last) // self.nested
        # Two roundings: the peer adds the offset to finished products.
        found = levels[stored] * outer[at] + np.float32(self.offset)
        result: F32Array = found.astype(np.float32)[blocks - first]
        return result


def _stored(values: F32Array, dtype: str) -> Carrier:
    if dtype == "BF16":
        return f32_to_bf16(values)
    with np.errstate(over="ignore"):
        return values.astype("<f2" if dtype == "F16" else "<f4")


class BitsAndBytes:
    """One scale per block of the flattened matrix, ``W = level[q] * absmax[block]``.

    Layout followed: bitsandbytes 0.50 (`QuantState.as_dict(packed=True)`, `dequantize_4bit`), as
    transformers saves it; with and without double quantization of the scales. The peer multiplies
    in float32 and rounds the product to the dtype of the quantization state, which is that of the
    weight before it was quantized. Blocks that cross rows become groups of the greatest common
    divisor of block and row.
    """

    name = "bitsandbytes"
    layout = "bitsandbytes 0.50, 4 bits, packed quant_state"
    formula = "float32 level * absmax, rounded to the dtype of the quant_state"
    complete = True

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether config or names are those of bitsandbytes."""
        method = checkpoint.quantization.get("quant_method")
        if method is not None:
            return bool(method == "bitsandbytes")
        return any(_STATE in name for name in checkpoint.store.infos)

    def weights(self, checkpoint: Checkpoint, options: ImportOptions) -> Sequence[Weight]:
        """Every module with a quantization state; see `importers.base.Importer`."""
        eight = next(
            (n for n in checkpoint.store.infos if n.endswith((".SCB", ".weight_format"))), ""
        )
        if eight:
            raise SourceError(
                f"{checkpoint.id}: {eight}: bitsandbytes of 8 bits; only 4 bits (NF4, FP4) are"
                " known. Convert the dense model"
            )
        return [
            _weight(checkpoint, name.partition(_STATE)[0], name.partition(_STATE)[2])
            for name in checkpoint.store.infos
            if _STATE in name
        ]


def _weight(checkpoint: Checkpoint, stem: str, kind: str) -> BlockWeight:
    name = f"{stem}.weight"
    where = f"{checkpoint.id}: {stem}{_STATE}{kind}"
    state = _state(checkpoint, f"{stem}{_STATE}{kind}")
    if kind not in LEVELS or state.get("quant_type") != kind:
        raise SourceError(f"{where}: quant_type {state.get('quant_type')!r}; nf4 or fp4 expected")
    block, dtype = state.get("blocksize"), _DTYPES.get(str(state.get("dtype")))
    if type(block) is not int or block not in _BLOCKS or dtype is None:
        raise SourceError(f"{where}: blocks of {block!r} in {state.get('dtype')!r} are unknown")
    shape = _shape(state.get("shape"), where)
    _check_nibbles(checkpoint, name, shape)
    parts = [name, f"{stem}{_STATE}{kind}", f"{name}.absmax", f"{name}.quant_map"]
    _check_levels(checkpoint, f"{name}.quant_map", kind)
    blocks = -(-math.prod(shape) // block)
    nested, offset = _nested(checkpoint, name, state, blocks, where)
    if nested:
        parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    else:
        checkpoint.expect(f"{name}.absmax", (blocks,), dtypes=("F32",))
    groups = shape[1] // math.gcd(shape[1], block)
    record = record_of(stem, shape, 4, groups, dtype)
    return BlockWeight(checkpoint, record, tuple(parts), kind, block, nested, offset)


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The settings that stand as JSON text in a tensor."""
    info = checkpoint.info(name, dtypes=("U8",), rank=1)
    where = f"{checkpoint.id}: {name}"
    if info.nbytes > _MAX_STATE:
        raise SourceError(f"{where}: {info.nbytes} bytes, at most {_MAX_STATE} expected")
    state = parse_json(checkpoint.array(name).tobytes(), where)
    if not isinstance(state, dict):
        raise SourceError(f"{where}: expected a JSON object")
    return state


def _shape(value: Any, where: str) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(type(v) is not int or not 0 < v < 1 << 31 for v in value)
    ):
        raise SourceError(f"{where}: shape {value!r}; two positive integers expected")
    if value[1] % 2:
        raise SourceError(
            f"{where}: rows of {value[1]} columns, an odd number: they begin inside a byte and have"
            " no exact sketch of useful size; convert the dense model"
        )
    return value[0], value[1]


def _check_nibbles(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> None:
    info = checkpoint.info(name, dtypes=tuple(DTYPES))
    if info.nbytes != math.prod(shape) // 2:
        raise SourceError(
            f"{checkpoint.id}: {name}: {info.nbytes} bytes, but 4 bits of {list(shape)} take"
            f" {math.prod(shape) // 2}"
        )


def _check_levels(checkpoint: Checkpoint, name: str, kind: str) -> None:
    """The stored levels are for reference; the peer multiplies by its own table."""
    checkpoint.expect(name, (16,), dtypes=("F32",))
    if not np.allclose(checkpoint.array(name), LEVELS[kind], rtol=0, atol=1e-6):
        raise SourceError(f"{checkpoint.id}: {name}: not the levels of {kind}")


def _nested(
    checkpoint: Checkpoint, name: str, state: Mapping[str, Any], blocks: int, where: str
) -> tuple[int, float]:
    """Block and offset of quantized scales; zeros where the scales are stored as they are."""
    if not checkpoint.has(f"{name}.nested_absmax"):
        return 0, 0.0
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(block) is not int or block < 1 or not isinstance(offset, int | float):
        raise SourceError(f"{where}: nested_blocksize {block!r} and nested_offset {offset!r}")
    if state.get("nested_dtype", "float32") != "float32":
        raise SourceError(f"{where}: nested_dtype {state['nested_dtype']!r}, expected float32")
    checkpoint.expect(f"{name}.absmax", (blocks,), dtypes=("U8",))
    checkpoint.expect(f"{name}.nested_absmax", (-(-blocks // block),), dtypes=("F32",))
    checkpoint.expect(f"{name}.nested_quant_map", (256,), dtypes=("F32",))
    return block, float(offset)
