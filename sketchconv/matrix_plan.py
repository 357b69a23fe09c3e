"""Planning of weights that the source stores transposed or in stacks, and of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from sketchconv.architecture import ModelMap
from sketchconv.errors import PlanError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.plan import Step
from sketchconv.sources.forms import Forms, expanded, turned


def as_matrices(infos: Mapping[str, TensorInfo], model: ModelMap) -> dict[str, TensorInfo]:
    """The source's tensors with every linear weight as a matrix ``[out, in]``, by name."""
    seen = expanded(infos.values(), model.stacked)
    flat = {name for name in model.transposed if len(seen[name].shape) == 2}
    return {name: turned(info) if name in flat else info for name, info in seen.items()}


def as_stored(
    steps: Sequence[Step], infos: Mapping[str, TensorInfo], model: ModelMap
) -> tuple[tuple[Step, ...], Forms]:
    """Steps for matrices to steps for tensors: what is copied has the source's own form.

    Experts of one module are sketched all or none: transformers fuses those that stay dense.

    Args:
        steps: one for each of `as_matrices`.
        infos: the source's tensors.
        model: what the architecture says of them.

    Returns:
        The steps, and the forms of the matrices that are sketched.

    Raises:
        PlanError: a transposed weight is to have a shaped sketch.
    """
    settled = _together(steps, model)
    _refuse_shaped(settled, model)
    sketched = {step.name for step in settled if step.action == "sketch"}
    forms = Forms(
        frozenset(name for name in model.transposed if name in sketched),
        {t: n for t, n in model.stacked.items() if sketched.issuperset(_parts(model, t))},
    )
    members = Forms(stacked=model.stacked).members
    found: dict[str, Step] = {}
    for step in settled:
        tensor = step.name
        if step.action != "sketch" and step.name in members:
            tensor = members[step.name][0]
        if tensor not in found:
            found[tensor] = step if step.action == "sketch" else _own_form(step, infos[tensor])
    return tuple(found.values()), forms


def _refuse_shaped(steps: Sequence[Step], model: ModelMap) -> None:
    for step in steps:
        if step.record is not None and step.record.shaped and step.name in model.transposed:
            raise PlanError(
                f"{step.name}: weights that the source stores transposed have no shaped sketches "
                "yet; use grid free"
            )


def _parts(model: ModelMap, tensor: str) -> list[str]:
    return Forms(stacked=model.stacked).parts(tensor)


def _own_form(step: Step, info: TensorInfo) -> Step:
    nbytes = info.nbytes if step.action == "copy" else step.nbytes
    return dataclasses.replace(step, info=info, nbytes=nbytes)


def _together(steps: Sequence[Step], model: ModelMap) -> list[Step]:
    """Copy all weights of a module of experts of which one is copied."""
    dense: dict[str, Step] = {}
    for step in steps:
        module = model.experts.get(step.name)
        if module is not None and step.action == "copy":
            known = dense.get(module)
            if known is None or (step.by_user and not known.by_user):
                dense[module] = step
    return [_settled(step, dense.get(model.experts.get(step.name, ""))) for step in steps]


def _settled(step: Step, cause: Step | None) -> Step:
    if cause is None or step.action != "sketch":
        return step
    reason = f"its experts are sketched all or none, and {cause.name} is copied ({cause.reason})"
    return Step(
        step.info, "copy", reason, step.role, by_user=cause.by_user, nbytes=step.info.nbytes
    )
