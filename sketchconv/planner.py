"""The planner: source metadata and a recipe in, a plan out; pure, and complete before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sketchconv.architecture import ModelMap
from sketchconv.errors import PlanError
from sketchconv.formats.manifest import SketchRecord
from sketchconv.formats.tensors import SKTCH_DTYPES, TensorInfo
from sketchconv.matrix_plan import as_matrices, as_stored
from sketchconv.plan import Coverage, Plan, Role, Step
from sketchconv.recipe import Recipe, SketchSpec, matches
from sketchconv.sources.base import FLOATS

MIN_COVERAGE = 0.95


def make_plan(
    infos: Mapping[str, TensorInfo],
    model: ModelMap,
    recipe: Recipe,
    *,
    equal_tensors: Mapping[str, str] | None = None,
    ready: Mapping[str, SketchRecord] | None = None,
) -> Plan:
    """Decide every tensor's fate.

    Args:
        infos: the source's tensors.
        model: what the architecture says of them.
        recipe: what the user wants.
        equal_tensors: stored tied weights whose bytes were found equal: name -> the one to keep.
        ready: weights that the source has as sketches already; where it is not empty, no other
            weight is sketched.

    Raises:
        PlanError: groups do not divide a row, a pattern names nothing, the coverage is too low.
    """
    matrices = as_matrices(infos, model)
    _check_patterns(matrices, recipe)
    duplicates = dict(equal_tensors or {})
    planner = _Planner(model, recipe, duplicates, ready or {})
    found = [planner.step(info) for info in matrices.values()]
    if planner.indivisible:
        raise PlanError(_indivisible_message(planner.indivisible))
    steps, forms = as_stored(found, infos, model)
    _check_storable(steps)
    coverage = _coverage(steps, model)
    if not any(step.action == "sketch" for step in steps) and coverage.eligible == 0:
        raise PlanError("nothing would be sketched: the filters leave no weight; loosen them")
    _check_coverage(coverage, steps, model)
    aliases = {**{k: v for k, v in model.aliases.items() if v in infos}, **duplicates}
    return Plan(steps, aliases, coverage, tuple(_notes(steps)), forms)


class _Planner:
    """Decides one tensor at a time, and collects the rows that cannot be divided into groups."""

    def __init__(
        self,
        model: ModelMap,
        recipe: Recipe,
        duplicates: Mapping[str, str],
        ready: Mapping[str, SketchRecord],
    ) -> None:
        self.recipe = recipe
        self.ready = ready
        self.duplicates = duplicates
        self.extra = frozenset(model.extra)
        self.unsupported = frozenset(model.unsupported)
        self.roles: dict[str, Role] = {
            **dict.fromkeys(model.embeddings, "embedding"),
            **dict.fromkeys(model.heads, "head"),
            **dict.fromkeys(model.linears, "linear"),
        }
        self.indivisible: list[tuple[str, int, SketchSpec]] = []

    def step(self, info: TensorInfo) -> Step:
        role = self.roles.get(info.name, "other")
        if info.name in self.duplicates:
            reason = f"the same bytes as {self.duplicates[info.name]}"
            return Step(info, "alias", reason, role)
        if info.name in self.extra:
            return Step(info, "drop", "the model has no such tensor", role)
        obstacle = self._cannot_sketch(info, role)
        if obstacle is not None:
            return _copy(info, role, obstacle)
        refusal = self._not_wanted(info.name)
        if refusal is not None:
            return _copy(info, role, refusal, by_user=True)
        if self.ready:
            return self._ready(info, role)
        if role != "linear" and self.recipe.embed_bits is None and not self._asked_for(info.name):
            return _copy(info, role, f"{role}: copied unless --embed-bits is given")
        return self._sketch(info, role)

    def _cannot_sketch(self, info: TensorInfo, role: Role) -> str | None:
        if info.name in self.unsupported:
            return (
                "part of a module without a sketched form (a mixture of experts of its own kind?)"
            )
        if role == "other":
            return "not the weight of a linear or embedding module, or one that routes experts"
        if info.dtype not in FLOATS or len(info.shape) != 2 or not info.name.endswith(".weight"):
            return f"not a 2-D floating-point weight: {info.dtype} {list(info.shape)}"
        return None

    def _not_wanted(self, name: str) -> str | None:
        """Why the user keeps this weight dense; an override decides before the filters."""
        override = self.recipe.override_for(name)
        if override is not None and override.action is not None:
            return f"recipe: {override.match}" if override.action == "copy" else None
        excluded = next((p for p in self.recipe.exclude if matches(p, name)), None)
        if excluded is not None:
            return f"excluded: {excluded}"
        if self.recipe.include and not any(matches(p, name) for p in self.recipe.include):
            return "not included"
        return None

    def _asked_for(self, name: str) -> bool:
        """Whether the user named this embedding or head to be sketched."""
        override = self.recipe.override_for(name)
        by_override = override is not None and (
            override.action == "sketch" or override.bits is not None
        )
        return by_override or any(matches(p, name) for p in self.recipe.include)

    def _ready(self, info: TensorInfo, role: Role) -> Step:
        """Take over what the source has; its makers chose what stays dense."""
        record = self.ready.get(info.name)
        if record is None:
            return _copy(info, role, "dense in the source too", by_user=True)
        nbytes = record.index_info.nbytes + record.lut_info.nbytes
        if nbytes >= info.nbytes:
            reason = f"a sketch would not be smaller: {nbytes:,} bytes for {info.nbytes:,}"
            return _copy(info, role, f"decoded; {reason}")
        groups = f"{record.groups} group{'s' if record.groups > 1 else ''} per row"
        reason = f"taken over: {record.bits} bits, {groups}, {record.lut_dtype}"
        return Step(info, "sketch", reason, role, record=record, nbytes=nbytes, ready=True)

    def _sketch(self, info: TensorInfo, role: Role) -> Step:
        spec = self.recipe.spec_for(info.name, embedding=role != "linear")
        rows, columns = info.shape
        groups = spec.groups_for(columns)
        if groups is None:
            self.indivisible.append((info.name, columns, spec))
            return _copy(info, role, "groups do not divide the row")
        record = SketchRecord(
            name=info.name,
            shape=(rows, columns),
            dtype=info.dtype,
            bits=spec.bits,
            groups=groups,
            lut_dtype=spec.lut_dtype,
            grid=spec.grid,
        )
        nbytes = record.index_info.nbytes + record.lut_info.nbytes
        if nbytes >= info.nbytes:
            reason = f"a sketch would not be smaller: {nbytes:,} bytes for {info.nbytes:,}"
            return _copy(info, role, reason)
        if record.shaped and role == "embedding":
            raise PlanError(f"{info.name}: embeddings have no shaped sketches yet; use grid free")
        reason = f"{spec.bits} bits, {groups} group{'s' if groups > 1 else ''} per row"
        reason += f", grid {spec.grid}" if record.shaped else ""
        return Step(info, "sketch", reason, role, record=record, nbytes=nbytes)


def _copy(info: TensorInfo, role: Role, reason: str, *, by_user: bool = False) -> Step:
    return Step(info, "copy", reason, role, by_user=by_user, nbytes=info.nbytes)


def _check_patterns(infos: Mapping[str, TensorInfo], recipe: Recipe) -> None:
    for pattern in recipe.patterns():
        if not any(matches(pattern, name) for name in infos):
            example = next((n for n in infos if n.endswith(".weight")), next(iter(infos), "none"))
            raise PlanError(
                f"pattern {pattern!r} names no tensor of the source; names look like {example!r}"
            )


def _check_storable(steps: Sequence[Step]) -> None:
    for step in steps:
        info = step.info
        if step.action == "copy" and (info.dtype not in SKTCH_DTYPES or 0 in info.shape):
            raise PlanError(
                f"{info.name}: {info.dtype} {list(info.shape)} cannot be stored in a sketch; "
                "save the checkpoint without this tensor, or as U8 if its model can load that"
            )


def _indivisible_message(found: Sequence[tuple[str, int, SketchSpec]]) -> str:
    name, columns, spec = found[0]
    size = spec.group_size or (32 if spec.grid != "free" else None)
    asked = f"groups of {size} columns" if size else f"{spec.groups} groups per row"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return (
        f"{name}{more}: {asked} do not divide its rows of {columns} columns; "
        "choose a divisor of every row length, or set an override for this weight"
    )


def _coverage(steps: Sequence[Step], model: ModelMap) -> Coverage:
    linears = [step for step in steps if step.role == "linear"]
    kept = [step for step in linears if not step.by_user]
    unsupported = sum(model.unsupported.values())
    return Coverage(
        sketched=sum(step.parameters for step in kept if step.action == "sketch"),
        eligible=sum(step.parameters for step in kept) + unsupported,
    )


def _check_coverage(coverage: Coverage, steps: Sequence[Step], model: ModelMap) -> None:
    if coverage.fraction >= MIN_COVERAGE:
        return
    left = [
        step
        for step in steps
        if step.action == "copy" and (step.role == "linear" or step.name in model.unsupported)
    ]
    example = f"{left[0].name}: {left[0].reason}" if left else "none"
    raise PlanError(
        f"only {coverage.sketched:,} of {coverage.eligible:,} linear parameters "
        f"({100 * coverage.fraction:.1f} %) would be sketched, at least {100 * MIN_COVERAGE:.0f} % "
        f"are required; for instance {example}; exclude by name what is to stay dense"
    )


def _notes(steps: Sequence[Step]) -> list[str]:
    """Hints that a user would want before an overnight run."""
    notes = []
    for role in ("embedding", "head", "linear"):
        chosen = [s for s in steps if s.role == role and not s.ready]
        records = [s.record for s in chosen if s.record is not None]
        luts = sum(r.lut_info.nbytes for r in records)
        total = luts + sum(r.index_info.nbytes for r in records)
        if any(not r.shaped for r in records) and 3 * luts > total:
            weights = sum(math.prod(r.shape) for r in records)
            notes.append(
                f"{role}: LUTs take {luts:,} of {total:,} bytes "
                f"({8 * total / weights:.2f} bits per weight); fewer bits or groups save more"
            )
    return notes
