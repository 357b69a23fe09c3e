"""Grids in recipes, plans and conversions without data."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from sketchconv.errors import RecipeError
from sketchconv.formats import grids
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.validate import validate
from sketchconv.memory import anonymous_bytes
from sketchconv.pipeline import convert
from sketchconv.recipe import Override, Recipe, SketchSpec
from sketchconv.recipe_file import load_recipe
from sketchconv.sources.open import open_source

FORMS = [(grid, bits) for grid, known in grids.GRIDS.items() for bits in known.bits]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": "nf4"}, "grid must be one of free, iq4_nl, affine, symmetric"),
        ({"grid": "iq4_nl", "bits": 3}, "grid iq4_nl has 4 bits, got 3"),
        ({"grid": "affine", "bits": 8}, "grid affine has 4 or 5 bits, got 8"),
        ({"grid": "symmetric", "bits": 6}, "grid symmetric has 4 or 5 or 8 bits, got 6"),
        ({"grid": "affine", "groups": 4}, "groups of 32 columns.*got 4 groups"),
        ({"grid": "affine", "group_size": 48}, "got groups of 48 columns"),
        ({"grid": "affine", "lut_dtype": "F32"}, "has F16 scales, got lut_dtype F32"),
    ],
)
def test_settings_that_a_grid_has_not_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        SketchSpec(**settings)


def test_groups_have_32_columns_or_a_multiple():
    assert SketchSpec(grid="iq4_nl").groups_for(576) == 18
    assert SketchSpec(grid="iq4_nl", group_size=64).groups_for(576) == 9
    assert SketchSpec(grid="iq4_nl").groups_for(100) is None


def test_overrides_change_grids_both_ways():
    spec = SketchSpec(bits=4, groups=2)
    changed = Override("*", grid="affine", bits=5).applied(spec)
    assert (changed.grid, changed.bits, changed.groups_for(64)) == ("affine", 5, 2)
    assert Override("*", grid="free", bits=3).applied(changed) == SketchSpec(bits=3)
    same = Override("*", bits=8).applied(SketchSpec(grid="symmetric", group_size=64))
    assert (same.grid, same.group_size) == ("symmetric", 64)


def test_embeddings_keep_free_luts():
    recipe = Recipe(SketchSpec(grid="iq4_nl"), embed_bits=8)
    assert recipe.spec_for("embed.weight", embedding=True) == SketchSpec(bits=8)
    assert recipe.spec_for("q.weight", embedding=False).grid == "iq4_nl"


def test_a_recipe_of_free_luts_is_described_as_before():
    assert "grid" not in Recipe().to_json()["default"]
    assert Recipe(SketchSpec(grid="affine")).to_json()["default"]["grid"] == "affine"


def test_recipe_files_name_grids(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('[default]\ngrid = "iq4_nl"\n[[override]]\nmatch = "*.v"\ngrid = "affine"\n')
    recipe = load_recipe(file)
    assert recipe.default.grid == "iq4_nl"
    assert recipe.spec_for("a.v.weight", embedding=False).grid == "affine"


@pytest.mark.parametrize(("grid", "bits"), FORMS)
def test_a_conversion_holds_the_nearest_levels(llama, tmp_path, grid, bits):
    out = tmp_path / "tiny.sktch"
    recipe = Recipe(SketchSpec(bits=bits, grid=grid), weighting="equal")
    report = convert(llama, out, recipe)
    assert list(validate(out)) == []
    assert report.output_bytes == out.stat().st_size
    source = open_source(str(llama))
    with SktchModel.open(out) as model:
        assert model.manifest.version == "1.1"
        assert model.config()["quantization_config"]["format"] == "1.1"
        for name, record in model.manifest.sketches.items():
            assert (record.grid, record.group_size) == (grid, 32)
            rows = source.infos[name].shape[0]
            dense = source.float32(name, source.rows(name, 0, rows))
            found = model.sketch(name)
            lut = grids.expand(found.lut, grid, bits)[..., int(bits == 8) :]  # -128 is left alone
            parts = dense.reshape(rows, record.groups, -1, 1)
            gap = np.abs(parts - lut[:, :, None, :]).min(axis=3).reshape(dense.shape)
            np.testing.assert_allclose(np.abs(dense - model.decode(name)), gap, atol=1e-6)
            error = np.linalg.norm(dense - model.decode(name)) / np.linalg.norm(dense)
            assert model.manifest.errors[name] == pytest.approx(error, rel=1e-5)
            assert error < {4: 0.14, 5: 0.07, 8: 0.01}[bits]
    source.close()


def test_bytes_depend_neither_on_threads_nor_on_chunks(llama, tmp_path):
    recipe, found = Recipe(SketchSpec(grid="affine")), set()
    # Beside what this process holds after other tests, which may be more than a limit by itself.
    limit = anonymous_bytes() + (1 << 30)
    for number, settings in enumerate(({"threads": 1}, {"threads": 3, "max_memory": limit})):
        out = tmp_path / f"{number}.sktch"
        convert(llama, out, recipe, **settings)
        found.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(found) == 1


def test_covariances_compensate_shaped_weights_too(llama, tmp_path):
    out = tmp_path / "tiny.sktch"
    convert(llama, out, Recipe(SketchSpec(grid="symmetric"), weighting="covariances"))
    assert list(validate(out)) == []


def test_rows_that_32_does_not_divide_are_named(llama, tmp_path):
    with pytest.raises(Exception, match="groups of 256 columns do not divide its rows of"):
        convert(llama, tmp_path / "x.sktch", Recipe(SketchSpec(grid="affine", group_size=256)))


def test_the_command_plans_a_grid(llama, tmp_path):
    from click.testing import CliRunner

    from sketchconv.cli.main import cli

    arguments = ["convert", str(llama), str(tmp_path / "x.sktch"), "--grid", "affine", "--dry-run"]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert "grid affine" in result.output
    wrong = CliRunner().invoke(cli, [*arguments, "--bits", "3"])
    assert wrong.exit_code != 0
    assert "grid affine has 4 or 5 bits, got 3" in wrong.output + str(wrong.exception)
