"""Sketches that a source has already, and what a conversion must not ask of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sketchconv.errors import RecipeError, SourceError
from sketchconv.recipe import Recipe, SketchSpec
from sketchconv.sources.base import ReadySource

if TYPE_CHECKING:
    from sketchconv.architecture import ModelMap
    from sketchconv.calibration.options import Calibration
    from sketchconv.formats.sketches import SketchRecord
    from sketchconv.sources.base import Source

# Bytes of a bias that are read at a time.
_PIECE = 1 << 20


def ready_records(source: Source) -> Mapping[str, SketchRecord]:
    """How each weight is stored that the source has as a sketch already; none as a rule."""
    return source.records if isinstance(source, ReadySource) else {}


def ready_origin(source: Source) -> Mapping[str, Any]:
    """Whose sketches they are, as plain JSON; empty where there are none."""
    return source.origin if isinstance(source, ReadySource) else {}


def recorded_bits(recipe: Mapping[str, Any]) -> int | None:
    """The precision that a sketch was imported at, from its document; None if it was not."""
    found = recipe.get("import")
    bits = found.get("bits") if isinstance(found, dict) else None
    return bits[0] if isinstance(bits, list) and len(bits) == 1 and type(bits[0]) is int else None


def most_common_spec(records: Mapping[str, SketchRecord]) -> SketchSpec | None:
    """Bits and group size of most weights, for the config; None without records."""
    counts = Counter((r.bits, r.groups, r.group_size) for r in records.values())
    if not counts:
        return None
    (bits, groups, size), _ = counts.most_common(1)[0]
    return SketchSpec(bits=bits, group_size=None if groups == 1 else size)


def check_ready(
    source: Source, model: ModelMap, recipe: Recipe, calibration: Calibration | None
) -> None:
    """Refuse what cannot be done with sketches that are taken over.

    Raises:
        RecipeError: something would be fitted.
        SourceError: a weight is transposed in the model, or a bias would be lost.
    """
    records = ready_records(source)
    if not records:
        return
    left = replace(recipe, default=SketchSpec(), exclude=())
    if left != Recipe() or calibration is not None:
        raise RecipeError(
            f"{source.id}: its sketches are taken over ({source.format}) and nothing is fitted;"
            " drop the calibration, and all of the recipe but exclude"
        )
    turned = next((name for name in model.transposed if name in records), None)
    if turned is not None:
        raise SourceError(f"{source.id}: {turned}: weights of Conv1D are not imported")
    for name in model.extra:
        stem = name.removesuffix(".bias")
        if stem != name and f"{stem}.weight" in records and not _is_zero(source, name):
            raise SourceError(f"{source.id}: {name}: not zero, but the model has no such bias")


def _is_zero(source: Source, name: str) -> bool:
    info = source.infos[name]
    rows = info.shape[0] if info.shape else 1
    step = max(1, _PIECE * rows // max(1, info.nbytes))
    return not any(
        source.float32(name, source.rows(name, at, min(at + step, rows))).any()
        for at in range(0, rows, step)
    )
