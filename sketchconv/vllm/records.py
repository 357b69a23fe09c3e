"""Which sketched weights a layer of vLLM stands for, told from names and shapes alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sketchconv.errors import FormatError, LoadError, SourceError
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.rules import WEIGHT_SUFFIX
from sketchconv.formats.sketches import SketchRecord

METHOD: Final = "sktch"
HEADS: Final = ("lm_head", "embed_out", "output")  # last parts of the names of output heads
_SHOWN: Final = 3
_WAY: Final = (
    "copy these weights, or serve a dense export (`sketchconv convert SKETCH DIR --dense`)"
)


@dataclass(frozen=True, slots=True)
class Records:
    """What a sketch holds, by the names of modules in vLLM.

    Attributes:
        sketches: record of each sketched weight by its module's name.
        sentinels: modules whose dense name bears a sentinel tensor.
        aliases: module without a weight of its own -> the one whose weight it shares.
        tied: whether the model's config ties the output head to the embedding.
    """

    sketches: Mapping[str, SketchRecord] = field(default_factory=dict)
    sentinels: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False

    def renamed(self, mapper: Any) -> Records:
        """The same by the names that vLLM's `WeightsMapper` makes of them."""

        def new(stem: str) -> str:
            found = mapper.apply_list([stem + WEIGHT_SUFFIX])
            return str(found[0]).removesuffix(WEIGHT_SUFFIX) if found else stem

        return Records(
            {new(stem): record for stem, record in self.sketches.items()},
            frozenset(map(new, self.sentinels)),
            {new(stem): new(target) for stem, target in self.aliases.items()},
            self.tied,
        )

    def of_linear(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """The sketched modules that a linear layer is made of, in their order; none if it is plain.

        Args:
            prefix: the layer's name.
            fused: vLLM's `packed_modules_mapping`: last part of a name -> those of its parts.

        Raises:
            LoadError: the parts are not alike, so that one matrix cannot hold them.
        """
        if prefix in self.sketches:  # also what is fused in the checkpoint itself
            return (prefix,)
        parent, _, last = prefix.rpartition(".")
        parts = tuple(f"{parent}.{name}" if parent else name for name in fused.get(last, ()))
        sketched = tuple(part for part in parts if part in self.sketches)
        if sketched:
            self._check_alike(prefix, parts)
        return sketched

    def _check_alike(self, prefix: str, parts: Sequence[str]) -> None:
        """Bits, groups and LUT dtype of the parts of one matrix must be the same."""
        found = [self.sketches.get(part) for part in parts]
        kinds = {None if r is None else (r.bits, r.groups, r.lut_dtype) for r in found}
        if len(kinds) == 1:
            return
        told = ", ".join(
            f"{part.rpartition('.')[2]} "
            + ("plain" if r is None else f"{r.bits} bits in {r.groups} groups ({r.lut_dtype} LUT)")
            for part, r in zip(parts, found, strict=True)
        )
        raise LoadError(
            f"{prefix}: vLLM fuses {told}; they must agree in bits, groups and LUT dtype. "
            "Compress with one setting for all of them"
        )

    def of_head(self, prefix: str, rows: int, columns: int) -> str | None:
        """The sketched module of an output head; that of the embedding where both are tied."""
        if prefix in self.sketches:
            return prefix
        target = self.aliases.get(prefix)
        if target in self.sketches:
            return target
        return self.of_embedding("", rows, columns) if self.tied else None

    def of_embedding(self, prefix: str, rows: int, columns: int) -> str | None:
        """The sketched module of an embedding of `rows` words, by name where it has one.

        Many of vLLM's models give their embedding no prefix: it is then the only sketched matrix
        of that shape that is no output head.

        Raises:
            LoadError: several would do.
        """
        if prefix:
            return prefix if prefix in self.sketches else None
        found = [
            name
            for name, record in self.sketches.items()
            if record.shape == (rows, columns) and name.rpartition(".")[2] not in HEADS
        ]
        if len(found) > 1:
            shown = ", ".join(found[:_SHOWN])
            raise LoadError(
                f"an embedding of {rows} words has no name in vLLM, and {shown} all have its shape "
                f"[{rows}, {columns}]; {_WAY}"
            )
        return found[0] if found else None

    def check_no_experts(self, prefix: str) -> None:
        """Refuse a layer of experts that are sketched.

        Raises:
            LoadError: names one of them.
        """
        start = prefix + "."
        below = (name for name in self.sketches if name.startswith(start))
        expert = next((name for name in below if name[len(start)].isdigit()), None)
        if prefix and expert is not None:
            raise LoadError(f"{expert}: the plugin cannot run sketched experts; {_WAY}")


def read_records(model: str, revision: str | None, *, tied: bool) -> Records:
    """Read the headers of a sketch's weight files; of a hub id those of its local copy.

    Args:
        model: a folder, or `user/repo`, which is downloaded into the cache of the Hub.
        revision: branch, tag or commit on the Hub.
        tied: as `Records.tied`.

    Raises:
        LoadError: no sketch in folder form, or one that the plugin cannot serve.
    """
    from sketchconv.hub.fetching import fetch

    try:
        path = fetch(model, None if os.path.exists(model) else revision)  # noqa: PTH110
        if not Path(path).is_dir():
            raise LoadError(
                f"{model}: vLLM reads a sketch in folder form; make one with "
                "`sketchconv convert SRC DIR`"
            )
        with SktchModel.open(path) as sketch:
            manifest, stored = sketch.manifest, frozenset(sketch.tensors)
    except (FormatError, SourceError, OSError) as error:
        raise LoadError(f"{model}: not a sketch that vLLM can read: {error}") from error
    for name, record in manifest.sketches.items():
        if record.shaped:
            raise LoadError(f"{name} is of the grid {record.grid}, which vLLM cannot run; {_WAY}")
    cut = len(WEIGHT_SUFFIX)
    return Records(
        {record.stem: record for record in manifest.sketches.values()},
        frozenset(name[:-cut] for name in manifest.sketches if name in stored),
        {
            name[:-cut]: target[:-cut]
            for name, target in manifest.aliases.items()
            if name.endswith(WEIGHT_SUFFIX) and target.endswith(WEIGHT_SUFFIX)
        },
        tied,
    )
