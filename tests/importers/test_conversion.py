"""The whole way: `convert` takes over a tiny model, and the sketch computes what the peer does."""

from __future__ import annotations

import hashlib
import json
import pickle
from types import SimpleNamespace

import peer_layouts as peers
import pytest
import torch
from imported import assert_same, linears, quantize, sketched, tiny_llama, write_folder
from safetensors.torch import load_file, save_file

import sketchconv
from sketchconv.errors import PlanError, RecipeError, SketchconvError, SourceError
from sketchconv.importers.base import ImportOptions
from sketchconv.job import prepare
from sketchconv.recipe import Recipe, SketchSpec
from sketchconv.verify import verify

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ANYPREC = {"seed_precision": 3, "parent_precision": 4, "group_count": 1, "arch_config": {}}
IDS = torch.arange(12)[None] * 7 % 99


def made(folder, name):
    """A peer's checkpoint, the model that it stands for, its weights, and how to open it."""
    model = tiny_llama(torch.float32 if name == "squeezellm" else torch.float16)
    makers = {
        "gptq": lambda o, w, s: peers.gptq(o, w, 4, 32, seed=s),
        "awq": lambda o, w, s: peers.awq(o, w, 32, seed=s),
        "bitsandbytes": lambda o, w, s: peers.bits_and_bytes(o, w, nested=256, seed=s),
        "leanquant": lambda o, w, s: peers.lean_quant(o, w, 3, seed=s),
        "squeezellm": lambda o, w, s: peers.squeeze_llm(o, w, 3, seed=s),
        "anyprec": lambda o, w, s: peers.any_precision(o, w, 3, parent=4, seed=s),
    }
    if name == "sketchtune":
        return sketch_tune(folder, model)
    tensors, weights = quantize(model, makers[name])
    base = write_folder(folder / "base", model, None)
    config = {
        "gptq": {"quantization_config": GPTQ},
        "awq": {"quantization_config": AWQ},
        "bitsandbytes": {"quantization_config": BNB},
        "anyprec": {"anyprec": ANYPREC},
    }.get(name, {})
    source, options = write_folder(folder / "peer", model, tensors, **config), ImportOptions()
    if name == "leanquant":
        source, options = source / "model.safetensors", ImportOptions(base)
    if name == "squeezellm":
        source, options = folder / "sq.pt", ImportOptions(base)
        torch.save({**tensors, "sparse_threshold.none": 3}, source)
    if name == "anyprec":
        (source / "model.safetensors").unlink()
        torch.save(tensors, source / "pytorch_model.bin")
        options = ImportOptions(None, 3)
    return SimpleNamespace(model=model, weights=weights, source=source, options=options)


def sketch_tune(folder, model):
    base = write_folder(folder / "base", model, dict(model.state_dict()))
    pairs, weights = {}, {}
    for seed, (name, (out, width)) in enumerate(linears(model).items()):
        pairs[name], weights[f"{name}.weight"] = peers.sketch_tune(out, width, 2, seed=seed)
    with (folder / "llama-int4-gpr4.pkl").open("wb") as file:
        pickle.dump(pairs, file)
    model.load_state_dict({**model.state_dict(), **weights})
    source, options = folder / "llama-int4-gpr4.pkl", ImportOptions(base)
    return SimpleNamespace(model=model, weights=weights, source=source, options=options)


PEERS = ["gptq", "awq", "bitsandbytes", "leanquant", "squeezellm", "anyprec", "sketchtune"]


@pytest.mark.parametrize("name", PEERS)
def test_a_model_is_taken_over(tmp_path, name):
    case, out = made(tmp_path, name), tmp_path / "m.sktch"
    before = digest(case.source)
    report = sketchconv.convert(case.source, out, imports=case.options)
    assert report.relative_error == 0
    assert report.plan.coverage.fraction == 1
    assert report.output_bytes == out.stat().st_size
    found = sketched(out)
    assert found.keys() == case.weights.keys()
    for weight, expected in case.weights.items():
        assert_same(found[weight], expected)
    checked = verify(out, against=str(case.source), base=case.options.base)
    assert not checked.findings
    assert checked.relative_error == 0
    assert digest(case.source) == before
    loaded = sketchconv.load(out, dtype=torch.float32)
    # A new model: `float()` would leave the rotary frequencies as they were rounded.
    dense = tiny_llama(torch.float32)
    dense.load_state_dict({n: t.float() for n, t in case.model.state_dict().items()})
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


def test_affine_grids_go_to_mlx_where_its_sums_are_theirs(tmp_path):
    """GPTQ rounds each product; only of scales with few bits nothing is lost by it."""
    case = made(tmp_path, "gptq")
    sketchconv.convert(case.source, tmp_path / "a.sktch", imports=case.options)
    with pytest.raises(PlanError, match="14 of 14 linear weights have no exact form"):
        sketchconv.export_mlx(tmp_path / "a.sktch", tmp_path / "out")
    path = case.source / "model.safetensors"
    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith(".scales")]:
        tensors[name] = tensors[name].log2().round().exp2()
    save_file(tensors, path)
    sketchconv.convert(case.source, tmp_path / "b.sktch", imports=case.options)
    report = sketchconv.export_mlx(tmp_path / "b.sktch", tmp_path / "out")
    assert any(kind.startswith("affine, 4 bits, groups of 32, F16") for kind in report.types)


def digest(path):
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]


def test_a_folder_comes_out_too_and_runs_in_the_peers_dtype(tmp_path):
    case = made(tmp_path, "gptq")
    sketchconv.convert(case.source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {
        **{"quant_method": "sktch", "format": "1.0", "bits": 4, "groups": None, "group_size": 32}
    }
    loaded = sketchconv.load(tmp_path / "out")
    assert loaded.dtype is torch.float16
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, case.model(IDS).logits, atol=2e-3)


def test_chunks_change_no_byte(tmp_path, monkeypatch):
    case = made(tmp_path, "awq")
    sketchconv.convert(case.source, tmp_path / "a.sktch")
    monkeypatch.setattr("sketchconv.job.chunk_budget", lambda limit: 20_000)
    sketchconv.convert(case.source, tmp_path / "b.sktch", threads=1)
    assert (tmp_path / "a.sktch").read_bytes() == (tmp_path / "b.sktch").read_bytes()


@pytest.mark.parametrize("at", [3, 9, 17])
def test_an_interrupted_import_goes_on(tmp_path, at):
    case, seen = made(tmp_path, "bitsandbytes"), []
    sketchconv.convert(case.source, tmp_path / "a.sktch")

    def stop(event):
        seen.append(event)
        if len(seen) == at:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SketchconvError)):
        sketchconv.convert(case.source, tmp_path / "b.sktch", progress=stop)
    assert not (tmp_path / "b.sktch").exists()
    sketchconv.convert(case.source, tmp_path / "b.sktch")
    assert (tmp_path / "a.sktch").read_bytes() == (tmp_path / "b.sktch").read_bytes()


def test_the_plan_is_complete_before_anything_is_written(tmp_path):
    case = made(tmp_path, "bitsandbytes")
    job = prepare(case.source, tmp_path / "m.sktch", Recipe(exclude=("*.down_proj",)))
    job.source.close()
    actions = {step.name: step.action for step in job.plan.steps}
    assert actions["model.layers.0.mlp.down_proj.weight"] == "copy"
    assert actions["model.layers.0.mlp.up_proj.weight"] == "sketch"
    assert sum(info.count for info in job.source.infos.values()) == sum(
        step.parameters for step in job.plan.steps
    )
    assert not (tmp_path / "m.sktch").exists()


def test_an_excluded_weight_is_stored_with_the_peers_values(tmp_path):
    case, name = made(tmp_path, "gptq"), "model.layers.1.mlp.down_proj.weight"
    sketchconv.convert(case.source, tmp_path / "m.sktch", Recipe(exclude=(name,)))
    from sketchconv.formats.reader import SktchModel

    with SktchModel.open(tmp_path / "m.sktch") as model:
        assert name not in model.manifest.sketches
        stored = torch.from_numpy(model.array(name).copy())
        assert model.manifest.recipe["import"]["bits"] == [4]
        assert model.manifest.source["format"] == "gptq"
    assert torch.equal(stored, case.weights[name])


def test_weights_that_a_sketch_would_not_make_smaller_are_named(tmp_path):
    """Eight bits in short groups: the tables alone are larger than the weight."""
    model = tiny_llama()
    tensors, _ = quantize(model, lambda o, w, s: peers.gptq(o, w, 8, 32, seed=s))
    settings = {**GPTQ, "bits": 8}
    source = write_folder(tmp_path / "peer", model, tensors, quantization_config=settings)
    with pytest.raises(sketchconv.errors.PlanError, match="a sketch would not be smaller"):
        sketchconv.convert(source, tmp_path / "m.sktch")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peer"]


def test_old_settings_beside_the_weights(tmp_path):
    case = made(tmp_path, "gptq")
    config = json.loads((case.source / "config.json").read_text())
    settings = config.pop("quantization_config")
    (case.source / "config.json").write_text(json.dumps(config))
    (case.source / "quantize_config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "quant_method"})
    )
    sketchconv.convert(case.source, tmp_path / "m.sktch")
    for weight, found in sketched(tmp_path / "m.sktch").items():
        assert_same(found, case.weights[weight])


def test_the_source_and_the_base_are_never_replaced(tmp_path):
    case = made(tmp_path / "a", "leanquant")
    folder = made(tmp_path / "b", "gptq").source
    base = case.options.base
    for source, output in (
        *((case.source, case.source.parent), (case.source, base), (case.source, base / "x.sktch")),
        *((folder, folder), (folder, folder / "x.sktch"), (folder, folder.parent)),
    ):
        options = case.options if source == case.source else ImportOptions()
        with pytest.raises(SketchconvError, match="would overwrite the source"):
            sketchconv.convert(source, output, imports=options, force=True)


def test_nothing_is_compressed_again(tmp_path):
    case = made(tmp_path, "gptq")
    for recipe in (Recipe(embed_bits=4), Recipe(include=("*",)), Recipe(exact=True)):
        with pytest.raises(RecipeError, match="taken over"):
            sketchconv.convert(case.source, tmp_path / "m.sktch", recipe)
    sketchconv.convert(case.source, tmp_path / "m.sktch", Recipe(SketchSpec(bits=3)))
    assert {r.bits for r in prepared(case, tmp_path).plan.sketches} == {4}


def prepared(case, tmp_path):
    job = prepare(case.source, tmp_path / "n.sktch", Recipe(), imports=case.options)
    job.source.close()
    return job


def test_a_bias_that_the_model_lacks(tmp_path):
    """Some writers give every module a bias of zeros; one that is not zero would be lost."""
    model = tiny_llama()
    tensors, _ = quantize(model, lambda o, w, s: peers.gptq(o, w, 4, 32, seed=s))
    bias = {"model.layers.0.mlp.up_proj.bias": torch.zeros(96).half()}
    source = write_folder(tmp_path / "a", model, {**tensors, **bias}, quantization_config=GPTQ)
    sketchconv.convert(source, tmp_path / "m.sktch")
    bias["model.layers.0.mlp.up_proj.bias"][3] = 1
    source = write_folder(tmp_path / "b", model, {**tensors, **bias}, quantization_config=GPTQ)
    with pytest.raises(SourceError, match=r"up_proj\.bias: not zero, but the model has no such"):
        sketchconv.convert(source, tmp_path / "n.sktch")


def test_the_command(tmp_path):
    from click.testing import CliRunner

    from sketchconv.cli.main import cli

    case, run = made(tmp_path, "leanquant"), CliRunner()
    arguments = ["convert", str(case.source), str(tmp_path / "m.sktch")]
    base = ["--base", str(case.options.base)]
    done = run.invoke(cli, arguments)
    assert done.exit_code != 0
    assert "--base FOLDER" in done.stderr
    done = run.invoke(cli, [*arguments, *base, "--dry-run", "--json"])
    assert done.exit_code == 0, done.stderr
    assert not (tmp_path / "m.sktch").exists()
    steps = json.loads(done.stdout)["steps"]
    assert any(step["reason"] == "taken over: 3 bits, 1 group per row, F16" for step in steps)
    done = run.invoke(cli, [*arguments, *base, "--bits", "4"])
    assert "has 3 bits, not 4, and is taken over" in done.stderr
    done = run.invoke(cli, [*arguments, *base, "--grid", "affine"])
    assert done.exit_code == 2
    assert "--grid" in done.stderr
    assert run.invoke(cli, [*arguments, *base, "--quiet"]).exit_code == 0
    against = ["--against", str(case.source), *base]
    assert run.invoke(cli, ["verify", str(tmp_path / "m.sktch"), *against]).exit_code == 0
    shown = run.invoke(cli, ["inspect", str(tmp_path / "m.sktch")]).stdout
    assert "3-bit F16 G=1" in shown
    assert "leanquant" in shown


def test_inspect_names_the_peer(tmp_path):
    from sketchconv.summary import summarise

    case = made(tmp_path, "gptq")
    assert dict(summarise(case.source).facts)["quantized by"].startswith("gptq: AutoGPTQ 0.8")
    dense = write_folder(tmp_path / "dense", case.model, dict(case.model.state_dict()))
    assert "quantized by" not in dict(summarise(dense).facts)


def test_what_the_hub_may_download_is_what_the_table_knows():
    from sketchconv.importers.table import IMPORTERS
    from sketchconv.sources.config import IMPORTED_METHODS

    by_config = {i.name for i in IMPORTERS} - {"leanquant", "sketchtune", "squeezellm", "anyprec"}
    assert by_config == IMPORTED_METHODS


def test_base_is_for_imports(tmp_path):
    model = tiny_llama()
    dense = write_folder(tmp_path / "dense", model, dict(model.state_dict()))
    with pytest.raises(SourceError, match="not a checkpoint that is imported; drop --base"):
        sketchconv.convert(dense, tmp_path / "m.sktch", imports=ImportOptions(dense))
