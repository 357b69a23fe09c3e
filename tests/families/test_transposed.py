"""GPT-2's transposed `Conv1D`, and phi3's fused projections: in, out, and everything between."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import sketchconv
from sketchconv.calibration.options import Calibration
from sketchconv.errors import LoadError, PlanError, SourceError
from sketchconv.export.dense import export_dense
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.run import export_gguf
from sketchconv.formats.reader import SktchModel
from sketchconv.recipe import Recipe, SketchSpec
from sketchconv.runtime.conv1d import SketchConv1D
from sketchconv.sources.forms import Forms
from sketchconv.sources.matrices import Matrices
from sketchconv.sources.open import open_source
from sketchconv.verify import verify

C_PROJ = "transformer.h.0.attn.c_proj.weight"


def calibration(text, **changes):
    given = {"tokens": 1024, "seq_len": 64, "device": "cpu", "recover": 0, **changes}
    return Calibration((str(text),), **given)


def recipe(bits=3, groups=2, **changes):
    return Recipe(SketchSpec(bits, groups), **changes)


def dense_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sketch(families, tmp_path_factory):
    """GPT-2 without data, 3 bits, 2 groups."""
    out = tmp_path_factory.mktemp("gpt2") / "tiny.sktch"
    return out, sketchconv.convert(families("gpt2"), out, recipe())


def test_every_transposed_weight_is_sketched_by_its_outputs(sketch, families):
    path, report = sketch
    assert report.plan.coverage.fraction == 1
    with SktchModel.open(path) as model:
        record = model.manifest.sketches["transformer.h.0.attn.c_attn.weight"]
        assert (record.shape, record.groups) == ((192, 64), 2)
        assert model.manifest.source["transposed"] == sorted(model.manifest.sketches)
    assert not verify(path, against=str(families("gpt2"))).findings


@pytest.mark.parametrize("kind", ["gpt2", "phi3"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_sketch_computes_what_its_dense_export_computes(
    families, kind, calibrated, text, ids, tmp_path
):
    source, out = families(kind), tmp_path / "tiny.sktch"
    given = calibration(text) if calibrated else None
    report = sketchconv.convert(source, out, recipe(), calibration=given, threads=1)
    assert not verify(out, against=str(source)).findings
    if report.calibration is not None:
        assert not report.calibration.skipped
        assert len(report.calibration.weights) == 8
    export_dense(out, tmp_path / "dense")
    model, dense, before = sketchconv.load(out), dense_of(tmp_path / "dense"), dense_of(source)
    with torch.no_grad():
        wanted, found, first = (m(ids).logits for m in (dense, model, before))
    assert torch.allclose(wanted, found, atol=2e-5 * float(wanted.abs().max()))
    assert 0 < (wanted - first).square().mean() < 0.5 * first.var()


def test_calibration_brings_gpt2_closer(families, text, tmp_path):
    """On the text's own tokens; were inputs and outputs mixed up, it would be worse than none."""
    source = families("gpt2")
    plain, fitted = tmp_path / "plain.sktch", tmp_path / "fitted.sktch"
    sketchconv.convert(source, plain, recipe(2, 1))
    sketchconv.convert(source, fitted, recipe(2, 1), calibration=calibration(text), threads=1)
    tokens = torch.frombuffer(bytearray(text.read_bytes()[:4000]), dtype=torch.uint8)
    from sketchconv.runtime.load import load_tokenizer

    tokenizer = load_tokenizer(fitted)
    ids = torch.tensor(tokenizer(bytes(tokens.tolist()).decode())["input_ids"]).view(-1, 80)
    with torch.no_grad():
        wanted = dense_of(source)(ids).logits
        lost = [(sketchconv.load(p)(ids).logits - wanted).square().mean() for p in (plain, fitted)]
    assert lost[1] < 0.8 * lost[0]


def test_recovery_trains_the_luts_of_gpt2(families, text, tmp_path):
    given = calibration(text, recover=4096)
    report = sketchconv.convert(
        families("gpt2"), tmp_path / "r.sktch", recipe(2, 1), calibration=given, threads=1
    )
    assert report.calibration.recovery.kept
    assert report.calibration.recovery.after < report.calibration.recovery.before


def test_the_module_stands_in_for_conv1d(sketch, families, tmp_path):
    path, _ = sketch
    export_dense(path, tmp_path / "dense")
    dense = dense_of(tmp_path / "dense").transformer.h[0]
    model = sketchconv.load(path).transformer.h[0]
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        ours, theirs = model.get_submodule(name), dense.get_submodule(name)
        assert isinstance(ours, SketchConv1D)
        assert (ours.nf, ours.nx) == (theirs.nf, theirs.nx)
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
        x = torch.randn(3, 5, ours.nx)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_orientation_survives_save_pretrained_and_dequantize(sketch, families, ids, tmp_path):
    path, _ = sketch
    source = families("gpt2")
    model = sketchconv.load(path)
    model.save_pretrained(tmp_path / "saved")
    assert not verify(tmp_path / "saved", against=str(source)).findings
    again = sketchconv.load(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    dense = copy.deepcopy(model).dequantize()
    assert type(dense.transformer.h[0].attn.c_attn) is Conv1D
    assert torch.allclose(dense(ids).logits, model(ids).logits, atol=1e-5)
    dense.save_pretrained(tmp_path / "plain")
    export_dense(path, tmp_path / "dense")
    first, second = dense_of(tmp_path / "plain"), dense_of(tmp_path / "dense")
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_luts_can_be_trained(sketch, ids):
    model = sketchconv.load(sketch[0])
    luts = [p for n, p in model.named_parameters() if n.endswith("sketch_lut")]
    for lut in luts:
        lut.requires_grad_(True)
    model(ids, labels=ids).loss.backward()
    assert len(luts) == 8
    assert all(lut.grad.abs().sum() > 0 for lut in luts)


def test_chunks_do_not_change_the_bytes(sketch, families, tmp_path, monkeypatch):
    """Columns are gathered for one chunk of rows at a time; a square weight must be turned too."""
    from sketchconv import job
    from sketchconv.sources import matrices

    monkeypatch.setattr(matrices, "_PIECE", 1 << 10)
    monkeypatch.setattr(job, "chunk_budget", lambda _: 60_000)
    sketchconv.convert(families("gpt2"), tmp_path / "again.sktch", recipe())
    assert (tmp_path / "again.sktch").read_bytes() == sketch[0].read_bytes()
    with open_source(str(families("gpt2"))) as source:
        seen = Matrices(source, Forms(frozenset({C_PROJ})))
        whole = source.float32(C_PROJ, source.rows(C_PROJ, 0, 64))
        part = seen.float32(C_PROJ, seen.rows(C_PROJ, 5, 9))
        assert np.array_equal(part, whole[:, 5:9].T)


def test_gguf_of_a_sketch_is_gguf_of_its_dense_export(models_gpt2, tmp_path):
    sketchconv.convert(models_gpt2, tmp_path / "tiny.sktch", recipe())
    export_dense(tmp_path / "tiny.sktch", tmp_path / "dense")
    for kind in ("F32", "Q8_0"):
        export_gguf(tmp_path / "tiny.sktch", tmp_path / f"{kind}.gguf", ExportRecipe(kind))
        export_gguf(tmp_path / "dense", tmp_path / f"{kind}-dense.gguf", ExportRecipe(kind))
        ours, theirs = tensors(tmp_path / f"{kind}.gguf"), tensors(tmp_path / f"{kind}-dense.gguf")
        assert ours.keys() == theirs.keys()
        assert "blk.0.attn_qkv.weight" in ours
        for name, (form, data) in ours.items():
            assert form == theirs[name][0], name
            assert np.array_equal(data, theirs[name][1]), name


def tensors(path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    return {t.name: ((t.tensor_type, tuple(t.shape)), np.array(t.data)) for t in reader.tensors}


@pytest.fixture
def models_gpt2(tmp_path):
    """GPT-2 with a tokenizer that GGUF knows."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent.parent / "export"))
    from tiny import make_model

    return make_model(tmp_path / "tiny-gpt2", "gpt2")


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"transposed": ["no.such.weight"]}, "must list sketched weights"),
        ({"transposed": "a.weight"}, "must list sketched weights"),
        ({"stacked": {"x": 2}}, "must map tensor names"),
        ({"stacked": {"m.x": 10**12}}, "must map tensor names"),
        ({"stacked": {"m.x": True}}, "must map tensor names"),
        ({"stacked": ["m.x"]}, "must map tensor names"),
        ({"stacked": {"m.x": 1}}, "m.0.x.weight, which is not sketched"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(members, says):
    with pytest.raises(SourceError, match=says):
        Forms.of(members, {"a.weight", "b.weight"}, "model.sktch")


def test_plain_transformers_does_not_load_the_sketch_quietly(sketch, families, tmp_path):
    """Without the plugin, the sentinel's shape stops it."""
    import json

    sketchconv.convert(families("gpt2"), tmp_path / "folder", recipe())
    config = json.loads((tmp_path / "folder/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "folder")


def test_a_sketch_that_was_not_turned_is_refused():
    """A record with the shape of the checkpoint belongs to no `Conv1D`."""
    from sketchconv.formats.sketches import SketchRecord
    from sketchconv.runtime.replace import sketched

    record = SketchRecord("c.weight", (64, 192), "F32", 4, 1, "F16")
    with pytest.raises(LoadError, match=r"\[64, 192\], the model expects \[192, 64\]"):
        sketched(Conv1D(192, 64), record, torch.float32)


def test_shaped_sketches_of_transposed_weights_are_refused(families, tmp_path):
    with pytest.raises(PlanError, match="stores transposed have no shaped sketches yet"):
        sketchconv.convert(
            families("gpt2"),
            tmp_path / "g.sktch",
            Recipe(SketchSpec(4, group_size=32, grid="iq4_nl")),
        )
    assert not (tmp_path / "g.sktch").exists()
