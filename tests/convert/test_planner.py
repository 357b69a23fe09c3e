"""The plan: every tensor has one fate and one reason, and mistakes are found before any work."""

from __future__ import annotations

import math

import pytest

from sketchconv.architecture import ModelMap
from sketchconv.errors import PlanError
from sketchconv.formats.tensors import TensorInfo
from sketchconv.planner import make_plan
from sketchconv.recipe import Override, Recipe, SketchSpec

SHAPES = {
    "embed.weight": (500, 64),
    "layers.0.up.weight": (96, 64),
    "layers.0.down.weight": (64, 96),
    "layers.0.norm.weight": (64,),
    "layers.0.up.bias": (96,),
    "head.weight": (500, 64),
    "old_buffer": (1, 512),
}


def infos(**changes):
    shapes = {**SHAPES, **changes}
    return {name: TensorInfo(name, "BF16", shape) for name, shape in shapes.items()}


def model(**changes):
    values = {
        "linears": ("layers.0.up.weight", "layers.0.down.weight"),
        "heads": ("head.weight",),
        "embeddings": ("embed.weight",),
        "aliases": {},
        "ties": {},
        "parameters": {n: s for n, s in SHAPES.items() if n != "old_buffer"},
        "modules": {},
        "transposed": (),
        "unsupported": {},
        "extra": ("old_buffer",),
    }
    return ModelMap(**{**values, **changes})


def fates(plan):
    return {step.name: step.action for step in plan.steps}


def test_by_default_linears_are_sketched_and_the_rest_is_copied():
    plan = make_plan(infos(), model(), Recipe())
    assert fates(plan) == {
        "embed.weight": "copy",
        "layers.0.up.weight": "sketch",
        "layers.0.down.weight": "sketch",
        "layers.0.norm.weight": "copy",
        "layers.0.up.bias": "copy",
        "head.weight": "copy",
        "old_buffer": "drop",
    }
    assert (plan.coverage.sketched, plan.coverage.eligible) == (2 * 64 * 96, 2 * 64 * 96)
    assert all(step.reason for step in plan.steps)
    assert sum(s.parameters for s in plan.steps) == sum(map(math.prod, SHAPES.values()))


def test_the_size_of_a_sketch_follows_from_bits_and_groups():
    plan = make_plan(infos(), model(), Recipe(SketchSpec(bits=3, groups=2)))
    sizes = {s.name: s.nbytes for s in plan.steps if s.action == "sketch"}
    # per group of 32 columns: 8 bytes of 2-bit plane, 4 of 1-bit plane, 8 LUT entries of 2 bytes
    assert sizes["layers.0.up.weight"] == 96 * 2 * (8 + 4 + 16)
    assert sizes["layers.0.down.weight"] == 64 * 2 * (12 + 6 + 16)


def test_embed_bits_reach_embeddings_and_heads_but_not_linears():
    plan = make_plan(infos(), model(), Recipe(embed_bits=2))
    bits = {record.name: record.bits for record in plan.sketches}
    assert bits == {
        "embed.weight": 2,
        "head.weight": 2,
        "layers.0.up.weight": 4,
        "layers.0.down.weight": 4,
    }


def test_filters_choose_and_are_given_as_reasons():
    recipe = Recipe(include=("layers.*", "head"), exclude=("*.down",))
    steps = {s.name: s for s in make_plan(infos(), model(), recipe).steps}
    assert steps["layers.0.up.weight"].action == "sketch"
    assert steps["head.weight"].action == "sketch"
    assert steps["layers.0.down.weight"].reason == "excluded: *.down"
    assert steps["embed.weight"].reason == "not included"


def test_an_override_decides_before_the_filters():
    recipe = Recipe(exclude=("layers.*",), overrides=(Override("*.down", action="sketch", bits=5),))
    plan = make_plan(infos(), model(), recipe)
    assert [(r.name, r.bits) for r in plan.sketches] == [("layers.0.down.weight", 5)]


def test_an_override_with_bits_asks_for_an_embedding():
    plan = make_plan(infos(), model(), Recipe(overrides=(Override("embed", bits=3),)))
    assert {r.name: r.bits for r in plan.sketches}["embed.weight"] == 3


def test_equal_tied_tensors_and_absent_ones_become_aliases():
    tied = model(aliases={"gone.weight": "embed.weight"})
    plan = make_plan(infos(), tied, Recipe(), equal_tensors={"head.weight": "embed.weight"})
    assert fates(plan)["head.weight"] == "alias"
    assert dict(plan.aliases) == {"gone.weight": "embed.weight", "head.weight": "embed.weight"}
    assert "head.weight" not in {info.name for info in plan.plain}


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe(SketchSpec(groups=5)), "5 groups per row do not divide its rows of 64 columns"),
        (Recipe(SketchSpec(group_size=40)), "groups of 40 columns"),
        (Recipe(SketchSpec(group_size=64)), "layers.0.down.weight"),
        (Recipe(exclude=("layer.*",)), "'layer.*' names no tensor"),
        (Recipe(overrides=(Override("x", bits=2),)), "'x' names no tensor"),
        (Recipe(exclude=("*",)), "nothing would be sketched"),
        (Recipe(SketchSpec(bits=8, groups=8)), "0 of 12,288 linear parameters"),
    ],
)
def test_what_cannot_work_is_refused(recipe, says):
    with pytest.raises(PlanError) as caught:
        make_plan(infos(), model(), recipe)
    assert says in str(caught.value)


def test_low_coverage_counts_what_is_unsupported_but_not_what_the_user_excluded():
    experts = {"experts": (4, 64, 96)}
    moe = model(unsupported={"experts": 4 * 64 * 96})
    with pytest.raises(PlanError, match=r"12,288 of 36,864 .*mixture of experts"):
        make_plan(infos(**experts), moe, Recipe())
    plan = make_plan(infos(), model(), Recipe(exclude=("*.down",)))
    assert plan.coverage.fraction == 1


def test_transposed_weights_are_sketched_by_outputs_and_copied_as_they_are():
    turned = model(transposed=("layers.0.up.weight", "layers.0.down.weight"))
    plan = make_plan(infos(), turned, Recipe(exclude=("*.down",)))
    up, down = (s for s in plan.steps if s.name in turned.transposed)
    assert (up.action, up.record.shape, up.info.shape) == ("sketch", (64, 96), (64, 96))
    assert (down.action, down.info.shape) == ("copy", (64, 96))
    assert plan.forms.transposed == {"layers.0.up.weight"}
    assert plan.coverage.sketched == 64 * 96


@pytest.mark.parametrize(("dtype", "shape"), [("BOOL", (96,)), ("F32", (0,))])
def test_a_tensor_that_no_sketch_can_hold_is_refused_by_name(dtype, shape):
    odd = {**infos(), "layers.0.up.bias": TensorInfo("layers.0.up.bias", dtype, shape)}
    with pytest.raises(PlanError, match=r"layers\.0\.up\.bias: .* cannot be stored"):
        make_plan(odd, model(), Recipe())


def test_a_note_warns_of_luts_that_dwarf_their_indices():
    assert make_plan(infos(), model(), Recipe(SketchSpec(bits=2))).notes == ()
    (note,) = make_plan(infos(), model(), Recipe(SketchSpec(bits=4, groups=2))).notes
    assert note.startswith("linear: LUTs take")
