"""Recipes: precedence of defaults, file and overrides, and one clear error per mistake."""

from __future__ import annotations

import pytest

from sketchconv.errors import RecipeError
from sketchconv.recipe import Override, Recipe, SketchSpec, matches
from sketchconv.recipe_file import load_recipe

DOWN = "model.layers.3.mlp.down_proj.weight"


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head.weight", True),
        ("lm_head.weight", "lm_head.weight", True),
        ("*.down_proj", DOWN, True),
        ("*.DOWN_proj", DOWN, False),
        ("model.layers.[0-2].*", DOWN, False),
        ("down_proj", DOWN, False),
    ],
)
def test_patterns_name_tensors_with_or_without_the_weight_suffix(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_a_file_sets_defaults_and_overrides_and_the_last_match_wins(tmp_path):
    path = write(
        tmp_path,
        """
        embed_bits = 6
        exclude = ["*.gate_proj"]
        [default]
        bits = 3
        group_size = 64
        [[override]]
        match = "*.mlp.*"
        bits = 5
        [[override]]
        match = "*.down_proj"
        groups = 2
        lut_dtype = "BF16"
        """,
    )
    recipe = load_recipe(path)
    assert recipe.default == SketchSpec(bits=3, group_size=64)
    assert recipe.exclude == ("*.gate_proj",)
    # only the last match counts: the bits of the first override do not reach down_proj
    assert recipe.spec_for(DOWN, embedding=False) == SketchSpec(3, 2, None, "BF16")
    up = recipe.spec_for("model.layers.0.mlp.up_proj.weight", embedding=False)
    assert up == SketchSpec(5, 1, 64)
    assert recipe.spec_for("model.embed_tokens.weight", embedding=True).bits == 6


def test_keys_that_a_file_does_not_name_keep_their_values(tmp_path):
    base = Recipe(default=SketchSpec(bits=2), embed_bits=4)
    recipe = load_recipe(write(tmp_path, 'weighting = "equal"'), base)
    assert recipe.default.bits == 2
    assert recipe.embed_bits == 4
    assert recipe.weighting == "equal"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bits = 3", "unknown key 'bits'"),
        ("[default]\nbits = 9", "between 1 and 8, got 9"),
        ("[default]\nbits = 0", "at least 1, got 0"),
        ("[default]\nbits = true", "integer"),
        ("[default]\nbits = 4.0", "integer"),
        ("[default]\ngroups = 2\ngroup_size = 2", "not both"),
        ("[default]\nlut_dtype = 'F64'", "F16, BF16, F32"),
        ("default = 4", "must be a table"),
        ("embed_bits = 12", "between 1 and 8"),
        ("weighting = 'magic'", "moments, equal"),
        ("exact = 1", "true or false"),
        ("include = 'x'", "list of patterns"),
        ("include = [1]", "strings only"),
        ("override = 3", "[[override]]"),
        ("override = [3]", "must be a table"),
        ("[[override]]\nbits = 4", "match"),
        ("[[override]]\nmatch = 'x'\nbit = 4", "unknown key 'bit'"),
        ("[[override]]\nmatch = 'x'\naction = 'melt'", "sketch, copy"),
        ("[[override]]\nmatch = 'x'\ngroups = 2\ngroup_size = 2", "not both"),
        ("[[override]]\nmatch = ''", "match"),
        ("= 3", "not a TOML file"),
        ("a = " + "[" * 5000, "nested too deeply"),
        ("embed_bits = " + "9" * 5000, "not a TOML file"),
    ],
)
def test_each_mistake_in_a_recipe_file_gets_one_line_that_names_the_file(tmp_path, text, says):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert says in message
    assert str(path) in message
    assert "\n" not in message.removeprefix(str(path)) or "TOML" in message


def test_a_missing_or_huge_recipe_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="at most"):
        load_recipe(write(tmp_path, "#" * ((1 << 20) + 1)))


def test_the_recipe_becomes_plain_json():
    recipe = Recipe(overrides=(Override("a*", bits=2),), exclude=("b",))
    assert recipe.to_json() == {
        "default": {"bits": 4, "groups": 1, "lut_dtype": "F16"},
        "exact": False,
        "include": [],
        "exclude": ["b"],
        "overrides": [{"match": "a*", "bits": 2}],
    }


@pytest.mark.parametrize(
    ("spec", "columns", "groups"),
    [
        (SketchSpec(), 7, 1),
        (SketchSpec(groups=4), 12, 4),
        (SketchSpec(groups=4), 13, None),
        (SketchSpec(group_size=5), 15, 3),
        (SketchSpec(group_size=5), 16, None),
    ],
)
def test_groups_divide_the_row_or_there_are_none(spec, columns, groups):
    assert spec.groups_for(columns) == groups


@pytest.mark.parametrize(
    ("recipe", "calibrated", "wanted"),
    [
        (Recipe(), False, "moments"),
        (Recipe(SketchSpec(bits=3)), False, "covariances"),
        (Recipe(SketchSpec(bits=3)), True, "moments"),
        (Recipe(SketchSpec(bits=2), exact=True), False, "moments"),
        (Recipe(SketchSpec(bits=2), weighting="equal"), False, "equal"),
        (Recipe(weighting="covariances"), True, "covariances"),
    ],
)
def test_the_weighting_suits_the_bits_unless_it_is_asked_for(recipe, calibrated, wanted):
    assert recipe.weighting_for(calibrated=calibrated) == wanted


def test_exact_k_means_and_covariances_do_not_go_together():
    with pytest.raises(RecipeError, match="drop one"):
        Recipe(weighting="covariances", exact=True)
