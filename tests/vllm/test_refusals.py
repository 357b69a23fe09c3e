"""What the plugin refuses, and how it comes to vLLM."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sketchconv.errors import LoadError
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.sketches import SketchRecord
from sketchconv.kernels import plain
from sketchconv.kernels.planes import pack_rows
from sketchconv.vllm import register
from sketchconv.vllm.records import Records, read_records
from sketchconv.vllm.split import cut_index, cut_lut, parts_for

ROOT = Path(__file__).resolve().parent.parent.parent
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def record(name="a.q_proj", bits=4, groups=1, shape=(8, 64), lut="F16"):
    return SketchRecord(f"{name}.weight", shape, "F32", bits, groups, lut)


def records(*made, **options):
    return Records({r.stem: r for r in made}, **options)


def test_registering_twice_is_registering_once(vllm):
    from vllm.model_executor.layers import quantization

    register()
    register()
    assert quantization.QUANTIZATION_METHODS.count("sktch") == 1
    config = quantization.get_quantization_config("sktch")
    assert config.from_config({"format": "1.1"}).get_name() == "sktch"
    assert config.get_min_capability() == 75
    assert config.get_config_filenames() == []
    assert torch.bfloat16 in config.from_config({}).get_supported_act_dtypes()
    with pytest.raises(LoadError, match=r"format 2\.0"):
        config.from_config({"format": "2.0"})
    with pytest.raises(LoadError, match="too old for this plugin"):
        config.from_config({}).get_quant_method(nn.Module(), "")


def test_without_vllm_nothing_heavy_is_imported_and_the_reason_is_given():
    code = (
        "import sys, sketchconv.vllm as plugin\n"
        "heavy = {'torch', 'numba', 'transformers', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.modules['vllm'] = None\n"
        "try: plugin.register()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("LoadError vLLM cannot be imported")


def test_vllm_finds_the_plugin():
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {
        "sketchconv": "sketchconv.vllm:register"
    }


@pytest.mark.parametrize("other", [{"bits": 3}, {"groups": 2}, {"lut": "F32"}])
def test_fused_parts_must_agree(other):
    made = [record("a.q_proj"), record("a.k_proj"), record("a.v_proj", **other)]
    with pytest.raises(LoadError, match=r"a\.qkv_proj: vLLM fuses q_proj 4 bits in 1 groups"):
        records(*made).of_linear("a.qkv_proj", FUSED)
    with pytest.raises(LoadError, match="v_proj plain; they must agree"):
        records(*made[:2]).of_linear("a.qkv_proj", FUSED)


def test_names_of_vllm():
    class Mapper:
        def apply_list(self, values):
            return [v.replace("a.", "language_model.", 1) for v in values]

    made = records(record(), sentinels=frozenset({"a.q_proj"}), aliases={"lm_head": "a.q_proj"})
    renamed = made.renamed(Mapper())
    assert renamed.of_linear("language_model.q_proj", {}) == ("language_model.q_proj",)
    assert renamed.of_linear("a.q_proj", {}) == ()
    assert renamed.sentinels == {"language_model.q_proj"}
    assert renamed.of_head("lm_head", 8, 64) == "language_model.q_proj"


def test_an_embedding_without_a_name_is_found_by_its_shape():
    made = [record("m.words"), record("lm_head"), record("m.other", shape=(8, 32))]
    assert records(*made).of_embedding("", 8, 64) == "m.words"
    assert records(*made).of_embedding("", 9, 64) is None
    assert records(*made).of_embedding("m.gone", 8, 64) is None
    assert records(*made[:1]).of_head("lm_head", 8, 64) is None
    assert records(*made[:1], tied=True).of_head("lm_head", 8, 64) == "m.words"
    with pytest.raises(LoadError, match=r"m\.words, m\.more all have its shape"):
        records(*made, record("m.more")).of_embedding("", 8, 64)


def test_sketched_experts_are_refused_by_name(vllm):
    register()
    from sketchconv.vllm.config import SketchQuantConfig

    config = SketchQuantConfig()
    config.records = records(record("m.mlp.experts.3.up_proj"), record("m.mlp.gate"))
    with pytest.raises(LoadError, match=r"m\.mlp\.experts\.3\.up_proj: the plugin cannot run"):
        config.get_quant_method(vllm.RoutedExperts(), "m.mlp.experts")
    assert config.get_quant_method(vllm.RoutedExperts(), "m.other.experts") is None


def test_what_cannot_be_served_is_refused(makers, tmp_path, monkeypatch):
    with pytest.raises(LoadError, match="no such file or folder"):
        read_records(str(tmp_path / "none"), None, tied=False)
    sketch = makers.write(makers.build("LlamaForCausalLM"), tmp_path / "m.sktch")
    with pytest.raises(LoadError, match="reads a sketch in folder form"):
        read_records(str(sketch.path), None, tied=False)
    dense = tmp_path / "dense"
    sketch.dense.save_pretrained(dense)
    with pytest.raises(LoadError, match="not a sketch that vLLM can read"):
        read_records(str(dense), None, tied=False)


def test_sketches_of_grids_are_refused_by_name(tmp_path, monkeypatch):
    made = SketchRecord("a.q_proj.weight", (8, 64), "F32", 4, 2, "F16", "affine")
    manifest = SimpleNamespace(sketches={made.name: made}, aliases={})
    opened = nullcontext(SimpleNamespace(manifest=manifest, tensors={}))
    monkeypatch.setattr(SktchModel, "open", lambda _: opened)
    with pytest.raises(LoadError, match=r"a\.q_proj\.weight is of the grid affine"):
        read_records(str(tmp_path), None, tied=False)


def test_what_does_not_fit_is_refused(vllm):
    register()
    from sketchconv.vllm.method import SketchMethod

    layer = nn.Module()
    sizes = {"params_dtype": torch.float32, "weight_loader": lambda *_: None}
    with pytest.raises(LoadError, match="the sketch has 64 columns, the layer 32"):
        SketchMethod([record()]).create_weights(layer, 32, [8], 32, 8, **sizes)
    method = SketchMethod([record()], sentinel=True)
    method.create_weights(layer, 64, [8], 64, 8, **sizes)
    index, lut = layer.sketch_index, layer.sketch_lut
    with pytest.raises(LoadError, match=r"a\.q_proj\.sketch_lut: expected torch\.float16"):
        lut.weight_loader(lut, torch.zeros(8, 1, 16))
    with pytest.raises(LoadError, match=r"expected torch\.uint8 \(8, 1, 32\)"):
        index.weight_loader(index, torch.zeros(8, 1, 16, dtype=torch.uint8))
    with pytest.raises(LoadError, match="a sentinel is one byte"):
        layer.weight.weight_loader(layer.weight, torch.zeros(8, 64))
    with pytest.raises(LoadError, match="no parts that vLLM calls"):
        index.weight_loader(index, torch.zeros(8, 1, 32, dtype=torch.uint8), (0, 1))
    with pytest.raises(LoadError, match=r"a\.q_proj\.sketch_index was not loaded"):
        method.process_weights_after_loading(layer)
    with pytest.raises(LoadError, match="tied to another embedding"):
        method.tie_weights(layer, nn.Module())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("groups", "degree"), [(1, 2), (1, 4), (2, 4), (3, 2), (4, 2)])
def test_cut_groups_hold_the_same_weights(bits, groups, degree):
    columns = 32 * groups * degree
    made = record(bits=bits, groups=groups, shape=(5, columns))
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8).numpy()
    index, lut = torch.from_numpy(pack_rows(codes, bits, groups)), torch.randn(5, groups, 2**bits)
    parts = parts_for(made, degree)
    assert groups * parts % degree == 0
    cut = cut_index(index, bits, columns // groups, parts), cut_lut(lut, parts)
    expected = plain.decode(index, lut, columns, torch.float32)
    assert torch.equal(plain.decode(*cut, columns, torch.float32), expected)
    share = groups * parts // degree
    for rank in range(degree):
        own = [t.narrow(1, rank * share, share) for t in cut]
        width = columns // degree
        there = expected[:, rank * width : (rank + 1) * width]
        assert torch.equal(plain.decode(*own, width, torch.float32), there)


def test_groups_that_do_not_end_at_bytes_are_not_cut():
    assert parts_for(record(bits=4, shape=(8, 12)), 2) == 2  # six columns are three bytes
    with pytest.raises(LoadError, match="cannot be split among 2 ranks"):
        parts_for(record(bits=3, shape=(8, 12)), 2)  # six columns of a one-bit plane
    with pytest.raises(LoadError, match="cannot be split among 4 ranks"):
        parts_for(record(bits=8, shape=(8, 10)), 4)
