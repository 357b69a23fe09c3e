"""Calibrated exports: columns count by the mean squares of what they are multiplied with."""

from __future__ import annotations

import random

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_types import blocks_of
from tiny import CORPUS

from sketchconv.calibration.options import Calibration
from sketchconv.calibration.squares import mean_squares
from sketchconv.cli.main import cli
from sketchconv.errors import RecipeError, ResumeError, Suspended
from sketchconv.export.recipe import ExportRecipe, parse_choice
from sketchconv.export.run import export_gguf
from sketchconv.kernels.ggml.blocks import encode
from sketchconv.sources.open import open_source

SMALL = {"tokens": 512, "seq_len": 32}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of words in random order."""
    words = " ".join(CORPUS).split()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=2000)), encoding="utf-8")
    return path


def measured(folder, text, tmp_path, room=1 << 30):
    with open_source(str(folder)) as source:
        return mean_squares(source, Calibration(text, **SMALL), tmp_path, room)


def by_hooks(folder, text):
    """The same of the whole model in one go."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from sketchconv.calibration.inputs import load_tokenizer
    from sketchconv.calibration.windows import text_windows

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with open_source(str(folder)) as source:
        tokenizer = load_tokenizer(source)
    rows = model.get_input_embeddings().weight.shape[0]
    windows = text_windows(
        str(text), tokenizer, (16, 16), 32, seed=0, vocabulary=rows, strict=True
    ).gathered
    found = {}

    def hook(name):
        def keep(_module, args):
            found[name] = args[0].detach().double().square().mean((0, 1)).numpy()

        return keep

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        model(windows)
    return found


@pytest.mark.parametrize("kind", ["llama", "llama-untied", "gemma2", "phi3", "gpt2"])
def test_the_squares_are_those_of_the_whole_model(kind, models, text, tmp_path):
    found, expected = measured(models(kind), text, tmp_path), by_hooks(models(kind), text)
    tied = kind in ("gemma2", "gpt2")
    assert set(found) == {name for name in expected if not (tied and "lm_head" in name)}
    for name, squares in found.items():
        assert squares.dtype == np.float32
        assert np.allclose(squares, expected[name], rtol=1e-4), name


def test_activations_on_disk_change_nothing(models, text, tmp_path):
    found = measured(models("llama"), text, tmp_path)
    for name, squares in measured(models("llama"), text, tmp_path, room=0).items():
        assert np.array_equal(squares, found[name])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["Q4_0", "IQ4_NL", "Q5_1"])
def test_the_blocks_are_those_of_the_encoder_with_these_weights(kind, models, text, tmp_path):
    folder = models("qwen2")  # its rows are in one order everywhere
    squares = measured(folder, text, tmp_path)
    path = tmp_path / "out.gguf"
    export_gguf(folder, path, ExportRecipe(kind), calibration=Calibration(text, **SMALL))
    plain = tmp_path / "plain.gguf"
    export_gguf(folder, plain, ExportRecipe(kind))
    found, others = blocks_of(path), blocks_of(plain)
    for target, name in (
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
    ):
        with open_source(str(folder)) as source:
            rows = source.float32(name, source.rows(name, 0, source.infos[name].shape[0]))
        assert found[target][:2] == (kind, encode(kind, rows, squares[name]).tobytes())
        loss, before = (
            float((squares[name] * (blocks[target][2] - rows) ** 2).sum())
            for blocks in (found, others)
        )
        assert loss < before
    assert found["token_embd.weight"][1] == others["token_embd.weight"][1]
    field = gguf.GGUFReader(path).fields["quantize.imatrix.dataset"]
    assert field.contents() == "words.txt"


def test_a_sketch_and_a_gguf_are_measured_as_well(models, text, tmp_path):
    from sketchconv import convert
    from sketchconv.recipe import Recipe, SketchSpec

    sketch, whole = tmp_path / "m.sktch", tmp_path / "whole.gguf"
    convert(models("llama"), sketch, Recipe(SketchSpec(3)))
    export_gguf(models("llama"), whole)
    recipe = ExportRecipe(choices=(parse_choice("ffn_down=Q4_0"),))
    for source in (sketch, whole):
        pair = []
        for name, calibration in (("a", Calibration(text, **SMALL)), ("b", None)):
            path = tmp_path / f"{name}.gguf"
            report = export_gguf(source, path, recipe, calibration=calibration, force=True)
            assert not report.notes
            pair.append(blocks_of(path))
        changed = [name for name in pair[0] if pair[0][name][1] != pair[1][name][1]]
        assert changed == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]


def test_the_command(models, text, tmp_path):
    arguments = ["convert", models("llama"), tmp_path / "out.gguf", "--type", "Q4_0", "--quiet"]
    arguments += ["--calibration", text, "--tokens", 512, "--seq-len", 32]
    found = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert found.exit_code == 0, found.output
    assert "columns weighed alike, as the text says nothing of them: token_embd" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--type", "F16", "--calibration"), "no tensor gets one; choose a --type such as Q4_K_M"),
        (("--type", "Q4_0", "--recover", "64", "--calibration"), "--recover is about sketches"),
        (("--type", "Q4_0", "--calibration", "none.txt", "--calibration"), "none.txt: no such"),
    ],
)
def test_what_cannot_be_calibrated(arguments, message, models, text, tmp_path):
    out = tmp_path / "out.gguf"
    line = ["convert", str(models("llama")), str(out), "--quiet", *arguments, str(text)]
    found = CliRunner().invoke(cli, line)
    assert found.exit_code != 0
    assert message in found.output
    assert not any(tmp_path.iterdir())


def test_an_interrupted_export_is_gone_on_with_by_the_same_text_alone(models, text, tmp_path):
    def export(folder, stop=0, text=text):
        def progress(event):
            nonlocal stop
            stop -= event.action == "encode"
            if stop == 0 and event.action == "encode":
                raise KeyboardInterrupt

        folder.mkdir(exist_ok=True)
        recipe, calibration = ExportRecipe("Q4_K"), Calibration(text, **SMALL)
        args = models("llama"), folder / "m.gguf", recipe
        export_gguf(*args, calibration=calibration, threads=1, progress=progress)
        return (folder / "m.gguf").read_bytes()

    whole = export(tmp_path / "whole")
    with pytest.raises(Suspended):
        export(tmp_path / "cut", stop=9)
    other = tmp_path / text.name
    other.write_text(text.read_text()[::-1])
    with pytest.raises(ResumeError, match="what a text says of its columns, has other values"):
        export(tmp_path / "cut", text=other)
    assert export(tmp_path / "cut") == whole


def test_a_calibration_without_a_text_is_refused(models, tmp_path):
    with pytest.raises(RecipeError, match="needs a text"):
        export_gguf(
            models("llama"), tmp_path / "o.gguf", ExportRecipe("Q4_0"), calibration=Calibration()
        )
