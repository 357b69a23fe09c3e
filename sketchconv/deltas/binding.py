"""What a delta is bound to: the digests of index and table of every weight that it changes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sketchconv.errors import DeltaError
from sketchconv.formats.delta import DeltaFile, is_delta
from sketchconv.formats.delta_record import Bound
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.reader import SktchModel


@dataclass(frozen=True, slots=True)
class BaseBinding:
    """The tables of a sketch, or those that a delta needs, by the names of their weights."""

    weights: Mapping[str, Bound]

    @classmethod
    def of(cls, manifest: Manifest) -> BaseBinding:
        """Every table of a sketch, from its document.

        Args:
            manifest: the document of the whole sketch.
        """
        digests = manifest.digests
        return cls(
            {
                name: Bound.of(r, digests[r.index_name], digests[r.lut_name])
                for name, r in manifest.sketches.items()
            }
        )

    def misfits(self, base: BaseBinding) -> Iterator[tuple[str, str]]:
        """Each weight of this delta that `base` does not have as it must be, and why."""
        for name, need in sorted(self.weights.items()):
            have = base.weights.get(name)
            if have is None:
                yield name, "the base has no such sketch"
            elif (have.table, have.lut, have.shape) != (need.table, need.lut, need.shape):
                yield name, f"expected {_table(need)}, the base has {_table(have)}"
            elif have.index != need.index:
                yield name, f"indices: expected digest {need.index}, the base has {have.index}"
            elif have.base != need.base:
                yield name, f"LUTs: expected digest {need.base}, the base has {have.base}"

    def require(self, base: BaseBinding, delta: str, where: str) -> None:
        """Refuse a base that a delta was not made for.

        Args:
            base: what is there.
            delta: the delta, for the error.
            where: the base, for the error.

        Raises:
            DeltaError: with the first weight that does not fit, and how many do not.
        """
        bad = list(self.misfits(base))
        if not bad:
            return
        name, why = bad[0]
        raise DeltaError(
            f"{delta} was not made for {where}: {name}: {why} ({len(bad)} of "
            f"{len(self.weights)} weights do not fit); use the base that it was made from"
        )


def binding_of(path: str | os.PathLike[str]) -> BaseBinding:
    """Read the digests of a sketch (all its tables), or those that a delta is bound to.

    Args:
        path: a sketch, bundle or folder; or a delta, file or folder.

    Raises:
        FormatError: it breaks a rule of its format.
        OSError: it cannot be read.
    """
    if is_delta(path):
        with DeltaFile.open(path) as delta:
            return needs(delta)
    with SktchModel.open(path) as model:
        return BaseBinding.of(model.manifest)


def needs(delta: DeltaFile) -> BaseBinding:
    """What a delta is bound to."""
    return BaseBinding({name: r.bound for name, r in delta.document.weights.items()})


def check_fit(delta: DeltaFile, model: SktchModel) -> None:
    """Refuse a base that a delta was not made for, before anything is read from either.

    Raises:
        DeltaError: as `BaseBinding.require`.
    """
    have = BaseBinding.of(model.manifest)
    needs(delta).require(have, Path(delta.path).name, Path(model.path).name)


def _table(bound: Bound) -> str:
    return f"{bound.table} {bound.lut} {list(bound.shape)}"
