"""Extraction: tuned weights to LUTs, what is refused, and what is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fine_tunes import Trio, codes_of, load, noise, plain_projection, retuned, save
from tiny import make_model

import sketchconv
from sketchconv.calibration.options import Calibration
from sketchconv.errors import PlanError, ProjectionError, RecipeError, SourceError, WeightError
from sketchconv.projection.extract import Extraction
from sketchconv.projection.options import ExtractOptions
from sketchconv.recipe import Recipe, SketchSpec

UP = "model.layers.0.mlp.up_proj.weight"


def extracted(base, tuned, dense=None, **options):
    with Extraction(base, tuned, dense, ExtractOptions(**options)) as work:
        luts = dict(work.luts())
        return luts, work.report()


def calibration(text, **changes):
    given = {"tokens": 1024, "seq_len": 64, "device": "cpu", **changes}
    return Calibration((str(text),), **given)


@pytest.mark.parametrize("target", ["relative", "absolute"])
def test_luts_are_those_of_plain_least_squares(llama, target):
    luts, report = extracted(llama.base, llama.tuned, llama.dense, target=target)
    assert len(luts) == 14 == report.changed
    dense, tuned = load(llama.dense), load(llama.tuned)
    for name in (UP, "model.layers.1.self_attn.q_proj.weight"):
        codes, lut = codes_of(llama.base, name)
        rows, groups, entries = lut.shape
        index = (np.arange(rows)[:, None], np.arange(codes.shape[1]) // (codes.shape[1] // groups))
        start = dense[name].numpy() if target == "relative" else lut[(*index, codes)]
        change = tuned[name].numpy() - start
        expected = lut + plain_projection(codes, groups, entries, change, None)
        assert luts[name].dtype == torch.float16
        # Half an ulp of float16 at 0.5, and a little for ties.
        np.testing.assert_allclose(luts[name].float().numpy(), expected, atol=2.6e-4)
        taken = (luts[name].float().numpy() - lut)[(*index, codes)]
        captured = 1 - ((change - taken) ** 2).sum() / (change**2).sum()
        layer = next(layer for layer in report.layers if layer.name == name)
        assert layer.captured == pytest.approx(captured, rel=1e-4)
    assert not report.unheld
    # Rounding to float16 costs something, and no more than that.
    assert 0 < report.captured < report.captured_unrounded < report.captured + 1e-3


def test_relative_is_the_default_beside_a_dense_base_and_needs_one(llama):
    with Extraction(llama.base, llama.tuned, llama.dense) as work:
        assert work.target == "relative"
    with Extraction(llama.base, llama.tuned) as work:
        assert work.target == "absolute"
    with pytest.raises(RecipeError, match="--dense-base"):
        Extraction(llama.base, llama.tuned, options=ExtractOptions(target="relative"))


def test_a_change_that_the_maps_can_hold_is_captured_whole(llama, tmp_path):
    codes, lut = codes_of(llama.base, UP)
    rows, groups, _ = lut.shape
    # Exact in float16 on top of any entry: LUTs of this model are below 1.
    steps = np.random.default_rng(0).integers(-3, 4, lut.shape).astype(np.float32) / 64
    group = np.arange(codes.shape[1]) // (codes.shape[1] // groups)
    wanted = steps[np.arange(rows)[:, None], group, codes]
    tuned = retuned(
        llama.dense, tmp_path / "tuned", lambda n, v: v + torch.from_numpy(wanted) if n == UP else v
    )
    luts, report = extracted(llama.base, tuned, llama.dense)
    assert set(luts) == {UP}
    used = np.zeros(lut.shape, bool)
    used[np.arange(rows)[:, None], group, codes] = True
    found = luts[UP].float().numpy()
    np.testing.assert_allclose(found[used], (lut + steps)[used], atol=5e-4)
    assert (found[~used] == lut[~used]).all()
    layer = next(layer for layer in report.layers if layer.name == UP)
    assert layer.captured > 0.999
    others = [layer for layer in report.layers if layer.name != UP]
    assert all(layer.captured is None for layer in others)


def test_no_change_is_refused_and_names_what_changed_beside(llama, tmp_path):
    with pytest.raises(ProjectionError, match="no LUT would change from the dense base"):
        extracted(llama.base, llama.dense, llama.dense)
    tuned = retuned(
        llama.dense, tmp_path / "norm", lambda n, v: v * 1.5 if n == "model.norm.weight" else v
    )
    with pytest.raises(ProjectionError, match=r"model\.norm\.weight \(not sketched, .*5\.00e-01"):
        extracted(llama.base, tuned, llama.dense)


def test_what_a_delta_cannot_hold_is_named_and_refused_if_strict(llama, tmp_path):
    def change(name, value):
        return value * 1.25 if name in ("model.norm.weight", UP) else value

    tuned = retuned(llama.dense, tmp_path / "tuned", change)
    luts, report = extracted(llama.base, tuned, llama.dense)
    assert set(luts) == {UP}
    assert [(u.name, u.change) for u in report.unheld] == [
        ("model.norm.weight", pytest.approx(0.25))
    ]
    with pytest.raises(ProjectionError, match=r"cannot hold: model\.norm\.weight"):
        extracted(llama.base, tuned, llama.dense, strict=True)


def test_a_head_that_is_stored_beside_its_embedding_must_be_equal_to_it(tmp_path):
    dense = make_model(tmp_path / "dense", "qwen2")  # tied: no head is stored
    base = tmp_path / "base.sktch"
    sketchconv.convert(dense, base, Recipe(SketchSpec(3, 2)))

    def stored_twice(out, factor):
        tuned = retuned(dense, tmp_path / out, noise())
        state = load(tuned)
        state["lm_head.weight"] = state["model.embed_tokens.weight"] * factor
        return save(tuned, state)

    luts, report = extracted(base, stored_twice("same", 1), dense)
    assert len(luts) == 14
    assert not report.unheld
    _, report = extracted(base, stored_twice("untied", 1.5), dense)
    (entry,) = report.unheld
    assert (entry.name, entry.change) == ("lm_head.weight", pytest.approx(0.5))
    assert entry.reason == "no longer tied to model.embed_tokens.weight"


def test_tensors_that_the_base_has_not_are_named(llama, tmp_path):
    tuned = retuned(llama.dense, tmp_path / "tuned", noise())
    state = load(tuned)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "mlp_bias": True}))
    for layer in (0, 1):
        for part, size in (("gate", 160), ("up", 160), ("down", 64)):
            state[f"model.layers.{layer}.mlp.{part}_proj.bias"] = torch.zeros(size)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # of no parameter
    _, report = extracted(llama.base, save(tuned, state), llama.dense)
    assert len(report.unheld) == 6
    assert {entry.reason for entry in report.unheld} == {"the base has no such tensor"}


def test_chunks_of_rows_do_not_change_the_luts(llama, monkeypatch):
    whole, report = extracted(llama.base, llama.tuned, llama.dense)
    monkeypatch.setattr("sketchconv.projection.extract.chunk_budget", lambda limit: 1)
    cut, rows = extracted(llama.base, llama.tuned, llama.dense)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert rows.captured == pytest.approx(report.captured, rel=1e-12)


def test_too_little_memory_is_refused_first(llama):
    with pytest.raises(PlanError, match="max-memory"):
        Extraction(llama.base, llama.tuned, options=ExtractOptions(max_memory=1 << 20))


@pytest.mark.parametrize("hessian", ["diagonal", "full"])
def test_a_text_says_which_columns_matter(llama, text, hessian):
    plain, _ = extracted(llama.base, llama.tuned, llama.dense)
    options = {"calibration": calibration(text), "hessian": hessian}
    luts, report = extracted(llama.base, llama.tuned, llama.dense, **options)
    metric = "hessian" if hessian == "full" else "diagonal"
    assert {report.metric, *(layer.metric for layer in report.layers)} == {metric}
    assert set(luts) == set(plain)
    assert not torch.equal(luts[UP], plain[UP])
    assert 0 < report.captured < 1
    assert [layer.name for layer in report.layers] == [
        *sorted(plain, key=list(_order(llama)).index)
    ]


def _order(trio):
    from sketchconv.sources.sketch import SketchSource

    with SketchSource(trio.base) as base:
        return list(base.records)


def test_a_gguf_file_of_the_fine_tune_gives_the_same_luts(llama, tmp_path):
    from sketchconv.export.run import export_gguf

    export_gguf(llama.tuned, tmp_path / "tuned.gguf")
    expected, _ = extracted(llama.base, llama.tuned, llama.dense)
    found, report = extracted(llama.base, tmp_path / "tuned.gguf", llama.dense)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not report.unheld


def test_another_shape_architecture_or_an_unmerged_adapter_is_refused_by_name(llama, tmp_path):
    wide = make_model(tmp_path / "wide", "llama", intermediate_size=192)
    with pytest.raises(ProjectionError, match=r"mlp\.down_proj\.weight has the shape \[64, 192\]"):
        Extraction(llama.base, wide)
    with pytest.raises(ProjectionError, match=r"'qwen3' model, .* a 'llama' model"):
        Extraction(llama.base, make_model(tmp_path / "qwen", "qwen3"))
    short = make_model(tmp_path / "short", "llama", num_hidden_layers=1)
    with pytest.raises(ProjectionError, match=r"TUNED\): 9 tensors .* model\.layers\.1\."):
        Extraction(llama.base, short)
    adapted = retuned(llama.dense, tmp_path / "adapted", lambda n, v: v)
    state = {n.replace("up_proj", "up_proj.base_layer"): v for n, v in load(adapted).items()}
    with pytest.raises(ProjectionError, match=r"up_proj\.base_layer.*merge_and_unload"):
        Extraction(llama.base, save(adapted, state))
    with pytest.raises(SourceError, match="no such file"):
        Extraction(llama.base, tmp_path / "nowhere")


def test_weights_of_another_training_are_refused_by_name(llama, tmp_path):
    def shuffled(name, value):
        return value.flip(0) if name == UP else value

    other = retuned(llama.dense, tmp_path / "other", shuffled)
    with pytest.raises(
        ProjectionError, match=r"up_proj\.weight: TUNED lies 1\.\d+ times .* sketch"
    ):
        extracted(llama.base, other)
    with pytest.raises(ProjectionError, match=r"up_proj\.weight: .* away from the dense base"):
        extracted(llama.base, llama.tuned, other)


def test_values_that_no_lut_can_hold_are_refused_by_name(llama, tmp_path):
    def broken(value):
        def change(name, tensor):
            if name == UP:
                tensor = tensor.clone()
                tensor[3] = value
            return tensor

        return change

    nan = retuned(llama.dense, tmp_path / "nan", broken(float("nan")))
    with pytest.raises(WeightError, match=r"TUNED\): model\.layers\.0\.mlp\.up_proj.*NaN.*row 3"):
        extracted(llama.base, nan, llama.dense)
    huge = retuned(llama.dense, tmp_path / "huge", broken(1e6))
    with pytest.raises(WeightError, match=r"up_proj\.weight: row 3: 1e\+06 .*float16 LUTs"):
        extracted(llama.base, huge)


def test_shaped_sketches_are_refused_by_name(llama, tmp_path):
    base = tmp_path / "shaped.sktch"
    sketchconv.convert(llama.dense, base, Recipe(SketchSpec(4, grid="iq4_nl")))
    with pytest.raises(ProjectionError, match=r"proj\.weight has grid iq4_nl"):
        Extraction(base, llama.tuned)


def test_bf16_luts_stay_bf16(llama, tmp_path):
    base = tmp_path / "base.sktch"
    sketchconv.convert(llama.dense, base, Recipe(SketchSpec(3, 2, lut_dtype="BF16")))
    luts, _ = extracted(base, llama.tuned, llama.dense)
    assert {lut.dtype for lut in luts.values()} == {torch.bfloat16}


def test_transposed_weights_are_projected_by_their_outputs(tmp_path):
    dense = make_model(tmp_path / "dense", "gpt2")
    tuned = retuned(dense, tmp_path / "tuned", noise(only="c_fc.weight"))
    base = tmp_path / "base.sktch"
    sketchconv.convert(dense, base, Recipe(SketchSpec(3, 2)))
    luts, report = extracted(base, tuned, dense)
    assert set(luts) == {f"transformer.h.{n}.mlp.c_fc.weight" for n in (0, 1)}
    name = "transformer.h.1.mlp.c_fc.weight"
    codes, lut = codes_of(base, name)
    change = (load(tuned)[name] - load(dense)[name]).numpy().T
    expected = lut + plain_projection(codes, 2, 8, change, None)
    np.testing.assert_allclose(luts[name].float().numpy(), expected, atol=2.6e-4)
    assert not report.unheld


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_are_projected_one_by_one(tmp_path, stacked):
    trio = mixture(tmp_path, stacked=stacked)
    luts, report = extracted(trio.base, trio.tuned, trio.dense)
    assert len(luts) == 2 * 4 * (2 if stacked else 3)
    assert 0 < report.captured < 1
    assert not report.unheld


def mixture(root, *, stacked):
    """A tiny Mixtral, its experts as transformers saves them or as it holds them."""
    import transformers

    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
    config = transformers.MixtralConfig(**settings, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(root / "dense")
    if stacked:
        save(root / "dense", {n: t.contiguous() for n, t in model.state_dict().items()})
    generator = torch.Generator().manual_seed(1)

    def change(name, value):
        expert = "experts" in name
        return value + 0.01 * torch.randn(value.shape, generator=generator) if expert else value

    tuned = retuned(root / "dense", root / "tuned", change)
    sketchconv.convert(root / "dense", root / "base.sktch", Recipe(SketchSpec(3, 2)))
    return Trio(root / "dense", tuned, root / "base.sktch")


def test_the_command_writes_a_delta_with_these_luts(llama, tmp_path):
    from click.testing import CliRunner

    from sketchconv.cli.delta_extract import command
    from sketchconv.deltas import resolve

    out = tmp_path / "task.sktch"
    args = [str(llama.base), str(llama.tuned), str(out), "--dense-base", str(llama.dense)]
    result = CliRunner().invoke(command, [*args, "--json", "--quiet"], catch_exceptions=False)
    value = json.loads(result.stdout)
    assert value["target"] == "relative"
    assert value["delta"]["exact"] is True
    expected, report = extracted(llama.base, llama.tuned, llama.dense)
    assert value["captured"] == pytest.approx(report.captured)
    found = resolve(out, llama.base)
    assert set(found) == set(expected)
    assert all((found[name] == expected[name].numpy()).all() for name in found)
    result = CliRunner().invoke(command, [*args, "--force"], catch_exceptions=False)
    assert "captured" in result.output
    assert "14 of 14 changed" in result.output
    small = [*args[:2], str(tmp_path / "small"), *args[3:], "--values", "i8", "--name", "mine"]
    result = CliRunner().invoke(command, [*small, "--json", "--quiet"], catch_exceptions=False)
    value = json.loads(result.stdout)["delta"]
    assert (value["values"], value["task"]["name"]) == ("I8", "mine")
    for wrong in (["--tokens", "9"], ["--hessian", "full"]):
        assert CliRunner().invoke(command, [*args, *wrong]).exit_code == 2


def test_a_refused_extraction_leaves_nothing(llama, tmp_path):
    from click.testing import CliRunner

    from sketchconv.cli.delta_extract import command

    args = [str(llama.base), str(llama.dense), str(tmp_path / "none.sktch")]
    result = CliRunner().invoke(command, [*args, "--dense-base", str(llama.dense), "--quiet"])
    assert isinstance(result.exception, ProjectionError)
    assert not list(tmp_path.iterdir())
