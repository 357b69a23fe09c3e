"""S1: every bad input is refused by one line of ours that names the file or the broken rule."""

from __future__ import annotations

from collections import Counter

from rows.base import Count, Outcome, Row, Setting
from rows.hostile import variants
from rows.readers import READERS, attempt, warm
from sketchconv.deltas.binding import check_fit
from sketchconv.deltas.tables import stored_table
from sketchconv.errors import FormatError, SketchconvError
from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.delta_validate import validate_delta
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.validate import validate


def _refusal(variant):
    """The error for a variant: of a vector the validator's finding, else the reader's error."""
    if variant.base is not None:
        return attempt(lambda path: _bound(path, variant.base), variant.path)
    if "vectors" in variant.path.parts:
        check = validate if variant.kind == "sktch" else validate_delta

        def first(path):
            for found in check(path):
                raise FormatError(found.requirement, found.where, found.message)

        return attempt(first, variant.path)
    return attempt(READERS[variant.kind], variant.path)


def _bound(path, base):
    with DeltaFile.open(path) as delta, SktchModel.open(base) as model:
        check_fit(delta, model)
        delta.tuned("m.weight", stored_table(model, "m.weight"))


def problem_of(variant):
    """What is wrong with how a variant was refused, or None."""
    error, name = _refusal(variant), f"{variant.kind} {variant.name}"
    if not isinstance(error, SketchconvError):
        return f"{name}: {'accepted' if error is None else error}"
    message = str(error)
    if len(message) > 1000 or ("\n" in message and variant.kind != "recipe"):
        return f"{name}: not one short line: {message[:200]}"
    if variant.base is None and variant.word and variant.word not in message:
        return f"{name}: expected {variant.word} in: {message[:200]}"
    return None


def run(setting: Setting) -> Outcome:
    """Every variant once."""
    count, kinds = Count(), Counter()
    warm(setting.room("bad-warm"))
    for variant in variants(setting):
        kinds[variant.kind] += 1
        count.add(problem_of(variant))
    count.notes.append(", ".join(f"{n} of {kind}" for kind, n in sorted(kinds.items())))
    return count.outcome()


S1 = Row(
    "S1",
    "bad inputs refused by an error of ours, one line that names the file or the rule",
    "all of >= 300",
    run,
)
