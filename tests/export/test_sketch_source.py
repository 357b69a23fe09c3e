"""A sketch as a source: names, shapes and rows of the dense model that it stands for."""

from __future__ import annotations

import numpy as np
import pytest

from sketchconv.errors import FormatError, SourceError
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.tensors import carried_to_f32
from sketchconv.pipeline import convert
from sketchconv.recipe import Override, Recipe, SketchSpec
from sketchconv.sources.open import open_source
from sketchconv.sources.sketch import SketchSource


@pytest.fixture(scope="module", params=["file", "folder"])
def sketch(models, tmp_path_factory, request):
    """A sketch with several widths, groups and LUT dtypes, in both forms."""
    out = tmp_path_factory.mktemp("sketch") / "tiny"
    path = out.with_suffix(".sktch") if request.param == "file" else out
    overrides = (
        Override("*.q_proj", bits=3, groups=2),
        Override("*.k_proj", bits=2, lut_dtype="BF16"),
        Override("*.up_proj", bits=8, lut_dtype="F32", action="copy"),
        Override("*.down_proj", bits=1, groups=5, lut_dtype="F32"),
    )
    recipe = Recipe(SketchSpec(groups=1), weighting="equal", exclude=(), overrides=overrides)
    convert(models("llama"), path, recipe, max_shard_size=40_000)
    return path


def test_infos_are_those_of_the_dense_model(sketch, models):
    with SketchSource(sketch) as source, SktchModel.open(sketch) as model:
        dense = open_source(str(models("llama")))
        assert source.infos.keys() == dense.infos.keys()
        for name, info in source.infos.items():
            assert info.shape == dense.infos[name].shape
            record = model.manifest.sketches.get(name)
            assert info.dtype == (record.lut_dtype if record else dense.infos[name].dtype)
        assert {r.bits for r in source.records.values()} == {1, 2, 3, 4}
        dense.close()


def test_rows_are_the_decoded_ones_bit_for_bit(sketch):
    with SketchSource(sketch) as source, SktchModel.open(sketch) as model:
        for name, info in source.infos.items():
            if name in source.records:
                expected = model.decode(name)
            else:
                expected = carried_to_f32(model.array(name), info.dtype)
            rows = info.shape[0]
            for begin, end in ((0, rows), (1, min(4, rows)), (rows - 1, rows), (2, 2)):
                raw = source.rows(name, begin, end)
                assert np.array_equal(source.float32(name, raw), expected[begin:end]), name
                exact = np.frombuffer(source.stored(name, raw), _carrier(info.dtype))
                decoded = carried_to_f32(exact, info.dtype).reshape(-1, *info.shape[1:])
                assert np.array_equal(decoded, expected[begin:end]), name


def _carrier(dtype):
    return {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype]


def test_config_and_files_are_those_of_the_dense_model(sketch, models):
    with SketchSource(sketch) as source:
        dense = open_source(str(models("llama")))
        config = source.config()
        assert "quantization_config" not in config
        assert config["model_type"] == "llama"
        assert source.files().keys() == dense.files().keys()
        assert source.files()["tokenizer.json"] == dense.files()["tokenizer.json"]
        assert b"quantization_config" not in source.files()["config.json"]
        assert source.origin["id"] == models("llama").name
        dense.close()


def test_rows_that_are_not_there_are_refused(sketch):
    with SketchSource(sketch) as source:
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
            with pytest.raises(SourceError, match="rows 60 to 70"):
                source.rows(name, 60, 70)
        with pytest.raises(SourceError, match="no tensor 'x'"):
            source.rows("x", 0, 1)


def test_sketches_are_sources_only_where_they_are_asked_for(sketch):
    with pytest.raises(SourceError, match="sketch"):
        open_source(str(sketch))
    open_source(str(sketch), sketches=True).close()


def test_a_damaged_sketch_is_refused(sketch, tmp_path):
    if sketch.is_dir():
        return
    broken = tmp_path / "broken.sktch"
    broken.write_bytes(sketch.read_bytes()[:-100])
    with pytest.raises(FormatError):
        open_source(str(broken), sketches=True)
