"""The analysis of a fine-tune, against plain numpy on a sketch that `convert` writes."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from fine_tunes import codes_of, load, noise, plain_projection, retuned
from tiny import make_model

import sketchconv
from sketchconv.errors import EvaluationError, PlanError, ProjectionError
from sketchconv.projection.analysis import SHARES
from sketchconv.projection.analyze import analyze, analyze_sketch
from sketchconv.projection.plot import save_plot
from sketchconv.recipe import Recipe, SketchSpec

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"

plots = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="plots need matplotlib"
)


def errors(codes, change, groups, entries, rank):
    """Relative errors of the best sketch update and of the best one of a rank."""
    best = plain_projection(codes, groups, entries, change, None)
    group = np.arange(codes.shape[1]) // (codes.shape[1] // groups)
    taken = best[np.arange(len(codes))[:, None], group, codes]
    values = np.linalg.svd(change.astype(np.float64), compute_uv=False) ** 2
    return ((change - taken) ** 2).sum() / values.sum(), values[rank:].sum() / values.sum()


@pytest.fixture(scope="module")
def found(llama):
    return analyze(llama.dense, llama.tuned, bits=3, groups=(1, 2))


def test_ranks_and_errors_are_those_of_plain_numpy(found, llama):
    dense, tuned = load(llama.dense), load(llama.tuned)
    layers = {layer.name: layer for layer in found.layers}
    assert len(layers) == 14
    for name in (UP, DOWN):
        layer, (rows, columns) = layers[name], dense[name].shape
        change = tuned[name].numpy() - dense[name].numpy()
        values = np.linalg.svd(change.astype(np.float64), compute_uv=False) ** 2
        shares = np.cumsum(values) / values.sum()
        assert layer.ranks == {share: int((shares < share).sum()) + 1 for share in SHARES}
        norms = np.linalg.norm(change), np.linalg.norm(dense[name])
        assert layer.relative == pytest.approx(norms[0] / norms[1], rel=1e-5)
        codes, lut = codes_of(llama.base, name)  # 3 bits, 2 groups, as `convert` makes them
        comparison = layer.comparisons["G = 2"]
        assert comparison.parameters == lut.size == rows * 2 * 8
        assert comparison.rank == -(-lut.size // (rows + columns))
        assert comparison.low_rank_parameters == comparison.rank * (rows + columns) >= lut.size
        expected = errors(codes, change, 2, 8, comparison.rank)
        assert (comparison.sketch, comparison.low_rank) == pytest.approx(expected, rel=1e-5)


def test_totals_are_of_all_energy_together(found):
    assert list(found.totals) == ["G = 1", "G = 2"]
    total = found.totals["G = 2"]
    energy = sum(layer.energy for layer in found.layers)
    left = sum(layer.energy * layer.comparisons["G = 2"].sketch for layer in found.layers)
    assert total.sketch == pytest.approx(left / energy)
    assert (total.bits, total.groups) == (3, 2)
    assert found.totals["G = 2"].sketch < found.totals["G = 1"].sketch
    shares = [layer.ranks[0.9] / min(layer.shape) for layer in found.layers]
    assert found.mean_ranks[0.9] == pytest.approx(sum(shares) / 14)
    assert found.dense == ("lm_head.weight", "model.embed_tokens.weight")


def test_a_sketch_as_base_has_its_own_maps(found, llama):
    own = analyze_sketch(llama.base, llama.tuned, llama.dense)
    assert own.start == "tuned - dense base"
    for ours, theirs in zip(own.layers, sorted(found.layers, key=_order(own)), strict=True):
        assert ours.name == theirs.name
        assert ours.comparisons["its own maps"] == theirs.comparisons["G = 2"]
    against = analyze_sketch(llama.base, llama.tuned)
    assert against.start == "tuned - decoded base sketch"
    assert all(a.energy > b.energy for a, b in zip(against.layers, own.layers, strict=True))


def _order(analysis):
    names = [layer.name for layer in analysis.layers]
    return lambda layer: names.index(layer.name)


def test_weights_without_a_change_need_no_rank(llama, tmp_path):
    tuned = retuned(llama.dense, tmp_path / "tuned", noise(only="0.mlp.up_proj.weight"))
    result = analyze(llama.dense, tuned, bits=3, groups=(1,))
    for layer in result.layers:
        if layer.name != UP:
            assert set(layer.ranks.values()) == {0}
            assert (layer.energy, layer.relative, layer.comparisons) == (0.0, 0.0, {})
    up = next(layer for layer in result.layers if layer.name == UP)
    assert result.totals["G = 1"].sketch == pytest.approx(up.comparisons["G = 1"].sketch)


def test_an_update_of_rank_two_needs_rank_two(llama, tmp_path):
    import torch

    generator = torch.Generator().manual_seed(0)

    def change(name, value):
        if name != UP:
            return value
        left = torch.randn(value.shape[0], 2, generator=generator)
        return value + 0.1 * left @ torch.randn(2, value.shape[1], generator=generator)

    result = analyze(llama.dense, retuned(llama.dense, tmp_path / "t", change), groups=(1,))
    up = next(layer for layer in result.layers if layer.name == UP)
    assert max(up.ranks.values()) == 2
    assert up.comparisons["G = 1"].low_rank < 1e-9
    assert up.comparisons["G = 1"].sketch > 0.1


def test_pairs_that_do_not_belong_together_are_refused(llama, tmp_path):
    wide = make_model(tmp_path / "wide", "llama", intermediate_size=192)
    with pytest.raises(ProjectionError, match=r"down_proj\.weight has the shape"):
        analyze(llama.dense, wide, groups=(1,))
    with pytest.raises(PlanError, match="7 groups per row do not divide"):
        analyze(llama.dense, llama.tuned, groups=(1, 7))


def test_transposed_weights_are_compared_as_matrices(tmp_path):
    dense = make_model(tmp_path / "dense", "gpt2")
    tuned = retuned(dense, tmp_path / "tuned", noise(only="h.0.mlp.c_fc.weight"))
    base = tmp_path / "base.sktch"
    sketchconv.convert(dense, base, Recipe(SketchSpec(3, 2)))
    name = "transformer.h.0.mlp.c_fc.weight"
    result = analyze(dense, tuned, bits=3, groups=(2,))
    layer = next(layer for layer in result.layers if layer.name == name)
    assert layer.shape == (256, 64)
    change = (load(tuned)[name] - load(dense)[name]).numpy().T
    comparison = layer.comparisons["G = 2"]
    expected = errors(codes_of(base, name)[0], change, 2, 8, comparison.rank)
    assert (comparison.sketch, comparison.low_rank) == pytest.approx(expected, rel=1e-5)


@plots
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_analysis_gives_the_same_chart(found, tmp_path, kind):
    for name in ("a", "b"):
        save_plot(found, tmp_path / f"{name}.{kind}")
    data = (tmp_path / f"a.{kind}").read_bytes()
    assert data == (tmp_path / f"b.{kind}").read_bytes()
    assert b"svg" in data[:400] or data.startswith(b"\x89PNG")


@plots
def test_a_chart_of_nothing_is_refused(llama, tmp_path):
    nothing = analyze(llama.dense, llama.dense, groups=(1,))
    with pytest.raises(EvaluationError, match="no weight differs"):
        save_plot(nothing, tmp_path / "none.png")
    with pytest.raises(EvaluationError, match=r"\.png or \.svg"):
        save_plot(nothing, tmp_path / "none.pdf")
    assert not list(tmp_path.iterdir())


def test_the_command(llama, tmp_path):
    from click.testing import CliRunner

    from sketchconv.cli.delta_analyze import command

    def invoke(*args):
        return CliRunner().invoke(command, [*map(str, args), "--quiet"])

    pair = llama.dense, llama.tuned
    plot = ("--plot", tmp_path / "f.png") if importlib.util.find_spec("matplotlib") else ()
    result = invoke(*pair, "--groups", 2, "--bits", 3, "--json", *plot)
    value = json.loads(result.stdout)
    assert list(value["totals"]) == ["G = 2"]
    assert value["layers"][0]["full_rank"] == 64
    assert not plot or (tmp_path / "f.png").stat().st_size > 1000
    result = invoke(llama.base, llama.tuned, "--dense-base", llama.dense)
    assert "its own maps" in result.output
    assert "% of the full rank" in result.output
    for wrong in ((llama.base, llama.tuned, "--bits", 3), (*pair, "--dense-base", llama.dense)):
        assert invoke(*wrong).exit_code == 2
