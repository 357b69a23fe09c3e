"""How a source stores the matrices of a sketch: as they are, transposed, or several in a stack."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sketchconv.errors import SourceError
from sketchconv.formats.tensors import TensorInfo

WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Forms:
    """Sketched weights whose tensor in the source is not the matrix ``[out, in]`` itself.

    Attributes:
        transposed: names of weights that the source stores as ``[in, out]`` (GPT-2's `Conv1D`).
        stacked: names of tensors ``[E, out, in]`` of the source, each with E: such a tensor
            `S.leaf` stands for the weights `S.0.leaf.weight`, `S.1.leaf.weight`, and so on.
    """

    transposed: frozenset[str] = frozenset()
    stacked: Mapping[str, int] = field(default_factory=dict)

    def parts(self, tensor: str) -> list[str]:
        """Names of the weights that a stacked tensor stands for, in their order."""
        return [part_name(tensor, number) for number in range(self.stacked[tensor])]

    @property
    def members(self) -> dict[str, tuple[str, int]]:
        """Weight -> (stacked tensor, number) of every member of a stack."""
        return {
            name: (tensor, number)
            for tensor in self.stacked
            for number, name in enumerate(self.parts(tensor))
        }

    def to_json(self) -> dict[str, Any]:
        """Members of a document's `source`; none where every tensor is the matrix itself."""
        found: dict[str, Any] = {}
        if self.transposed:
            found["transposed"] = sorted(self.transposed)
        if self.stacked:
            found["stacked"] = dict(sorted(self.stacked.items()))
        return found

    @classmethod
    def of(cls, source: Mapping[str, Any], sketches: Collection[str], where: str) -> Forms:
        """Read what `to_json` wrote.

        Args:
            source: the document's member `source`.
            sketches: names of all sketched weights.
            where: the sketch, for errors.

        Raises:
            SourceError: a value of another kind, or a name that is not that of a sketch.
        """
        transposed, stacked = source.get("transposed", []), source.get("stacked", {})
        if not isinstance(transposed, list) or not set(map(str, transposed)) <= set(sketches):
            raise SourceError(f"{where}: source.transposed must list sketched weights")
        counts = stacked.items() if isinstance(stacked, dict) else [("", 0)]
        # A stack is no larger than the number of sketches, so that its names can be spelled out.
        if any(type(n) is not int or not 0 < n <= len(sketches) or "." not in s for s, n in counts):
            raise SourceError(f"{where}: source.stacked must map tensor names to counts")
        forms = cls(frozenset(transposed), stacked)
        absent = next((name for name in forms.members if name not in sketches), None)
        if absent is not None:
            raise SourceError(f"{where}: source.stacked stands for {absent}, which is not sketched")
        return forms


def part_name(tensor: str, number: int) -> str:
    """The weight that is one matrix of a stacked tensor.

    >>> part_name("model.layers.0.mlp.experts.down_proj", 3)
    'model.layers.0.mlp.experts.3.down_proj.weight'
    """
    stem, _, leaf = tensor.rpartition(".")
    return f"{stem}.{number}.{leaf}{WEIGHT}"


def part_infos(info: TensorInfo) -> list[TensorInfo]:
    """The matrices of a stacked tensor ``[E, out, in]``."""
    return [TensorInfo(part_name(info.name, n), info.dtype, info.shape[1:])
            for n in range(info.shape[0])]  # fmt: skip


def turned(info: TensorInfo) -> TensorInfo:
    """A matrix with its two axes exchanged."""
    return TensorInfo(info.name, info.dtype, info.shape[::-1])


def expanded(infos: Iterable[TensorInfo], stacked: Collection[str]) -> dict[str, TensorInfo]:
    """Infos by name, with the parts of stacked tensors in place of the stacks."""
    found: dict[str, TensorInfo] = {}
    for info in infos:
        for part in part_infos(info) if info.name in stacked else (info,):
            found[part.name] = part
    return found
