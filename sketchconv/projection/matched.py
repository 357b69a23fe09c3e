"""Dense checkpoints beside a sketch of the same model, checked name by name before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from sketchconv.errors import ProjectionError
from sketchconv.export.rows import check_finite
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import TensorInfo
from sketchconv.sources.base import FLOATS, Float32, Source
from sketchconv.sources.forms import Forms
from sketchconv.sources.matrices import Matrices

_SHOWN = 3


class Frame(Protocol):
    """A sketch, or the plan of one: which matrices it holds and how its source stores them.

    Attributes:
        id: for messages.
    """

    id: str

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor: sketched weights as matrices ``[out, in]``, and all others."""

    @property
    def records(self) -> Mapping[str, SketchRecord]:
        """How each sketched weight is, or would be, stored."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied weights: absent name -> stored name."""

    @property
    def origin(self) -> Mapping[str, Any]:
        """Format and forms of the source, as `Forms.of` reads them."""

    def config(self) -> dict[str, Any]:
        """The dense model's config."""


class Matched:
    """A dense checkpoint of the model that a sketch was made from, with the sketch's names.

    Its weights are matrices ``[out, in]`` as the sketch has them, however the checkpoint stores
    them: transposed (GPT-2's `Conv1D`), in stacks of experts, or under the other name of a tied
    pair.

    Args:
        source: the checkpoint.
        base: the sketch, or the plan of one.
        role: what the checkpoint is, for messages: "TUNED" or "the dense base".

    Raises:
        ProjectionError: another architecture, or tensors that are missing or have another shape;
            names them.
    """

    def __init__(self, source: Source, base: Frame, role: str) -> None:
        self.source, self.role = source, role
        _check_type(base, source, role)
        forms = _forms(base, source)
        self._matrices = Matrices(source, forms)
        self._names = _resolved(base, self._matrices.infos, self._where)
        self._check_shapes(base.infos)
        used = set(self._names.values())
        self.surplus = tuple(name for name in self._matrices.infos if name not in used)

    @property
    def _where(self) -> str:
        return f"{self.source.id} ({self.role})"

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by the checkpoint's name, weights of the sketch as matrices."""
        return MappingProxyType(dict(self._matrices.infos))

    def info(self, name: str) -> TensorInfo:
        """The tensor that the sketch calls `name`."""
        return self._matrices.infos[self._names[name]]

    def own_name(self, name: str) -> str:
        """What the checkpoint calls the tensor that the sketch calls `name`."""
        return self._names[name]

    def rows(self, name: str, begin: int, end: int) -> Float32:
        """Rows of a matrix or vector by the sketch's name: float32, writable, ``[rows, ...]``.

        Raises:
            WeightError: a value is NaN or infinite.
            SourceError: the file cannot be read.
        """
        return self.surplus_rows(self._names[name], begin, end)

    def surplus_rows(self, own: str, begin: int, end: int) -> Float32:
        """Rows by the checkpoint's own name, as `rows`."""
        raw = self._matrices.rows(own, begin, end)
        values = np.require(self._matrices.float32(own, raw), requirements=["C", "W"])
        flat = values.reshape(len(values), -1) if values.ndim > 1 else values.reshape(1, -1)
        if own.endswith((".weight", ".bias")):
            check_finite(f"{self._where}: {own}", flat, begin)
        return values

    def raw(self, name: str, begin: int, end: int) -> bytes:
        """Stored bytes of rows of a tensor by the sketch's name."""
        own = self._names[name]
        return self._matrices.stored(own, self._matrices.rows(own, begin, end))

    def close(self) -> None:
        """Close the checkpoint."""
        self.source.close()

    def _check_shapes(self, wanted: Mapping[str, TensorInfo]) -> None:
        wrong = [n for n, info in wanted.items() if self.info(n).shape != info.shape]
        if wrong:
            name = wrong[0]
            raise ProjectionError(
                f"{self._where}: {name} has the shape {list(self.info(name).shape)}, the base "
                f"sketch has {list(wanted[name].shape)} ({len(wrong)} such tensors: "
                f"{_some(wrong)}); it must be a fine-tune of the very model that was sketched"
            )
        odd = [
            n for n, i in wanted.items() if i.dtype in FLOATS and self.info(n).dtype not in FLOATS
        ]
        if odd:
            raise ProjectionError(
                f"{self._where}: {odd[0]} holds {self.info(odd[0]).dtype}, expected floats"
            )


def _check_type(base: Frame, source: Source, role: str) -> None:
    """Compare the architectures; a GGUF file tells no more than its own family's."""
    if "gguf" in (source.format, base.origin.get("format")):
        return
    ours, theirs = (_type(config) for config in (base.config(), source.config()))
    if ours != theirs:
        raise ProjectionError(
            f"{source.id} ({role}) is a {theirs!r} model, the base {base.id} a {ours!r} "
            "model; only checkpoints of the model that was sketched can be compared"
        )


def _type(config: Mapping[str, Any]) -> str:
    return str(config.get("model_type"))


def _forms(base: Frame, source: Source) -> Forms:
    """How the checkpoint stores the sketch's matrices: stacks may have been taken apart since."""
    forms = Forms.of(base.origin, base.records, base.id)
    known = source.infos
    stacked = {tensor: count for tensor, count in forms.stacked.items() if tensor in known}
    if source.format == "gguf":  # read as matrices already
        return Forms(frozenset(), stacked)
    return Forms(frozenset(name for name in forms.transposed if name in known), stacked)


def _resolved(base: Frame, found: Mapping[str, TensorInfo], where: str) -> Mapping[str, str]:
    """The checkpoint's name of every tensor of the sketch."""
    partners: dict[str, list[str]] = {}
    for absent, stored in base.aliases.items():
        partners.setdefault(stored, []).append(absent)
    names, missing = {}, []
    for name in base.infos:
        own = next((n for n in (name, *partners.get(name, ())) if n in found), None)
        if own is None:
            missing.append(name)
        else:
            names[name] = own
    if missing:
        example = next((n for n in found if n not in base.infos), None)
        hint = "" if example is None else f"; its own names look like {example!r}"
        raise ProjectionError(
            f"{where}: {len(missing)} tensors of the base are missing: {_some(missing)}"
            f"{hint}; give a merged checkpoint (of LoRA: after `merge_and_unload`) of that model"
        )
    return names


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")
