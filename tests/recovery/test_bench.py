"""The benchmark runs from start to end on a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench" / "bench_recovery.py"


@pytest.mark.slow
def test_recovery_is_measured(tmp_path, tiny):
    import sketchconv
    from sketchconv.recipe import Recipe, SketchSpec

    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    dense, sketch, text = tmp_path / "dense", tmp_path / "tiny.sktch", tmp_path / "text.txt"
    model = tokenizers.models.WordLevel({f"w{n}": n for n in range(151)}, unk_token="w0")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(dense)
    tiny.build("LlamaForCausalLM").to(torch.bfloat16).save_pretrained(dense)
    sketchconv.convert(dense, sketch, Recipe(SketchSpec(2)))
    text.write_text(" ".join(f"w{n % 7}" for n in range(600)))
    arguments = [dense, sketch, "--text", text, "--measure", text, "--tokens", 320]
    short = ["--length", 32, "--exam-length", 64, "--windows", 2, "--threads", 1]
    command = [sys.executable, "-P", BENCH, *arguments, *short, "--learning-rate", 0.02]
    done = subprocess.run(map(str, command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    divergences = [float(n) for n in re.findall(r"text KL ([\d.]+)", done.stdout)]
    assert len(divergences) == 2
    assert divergences[1] < divergences[0]
    assert "backward" in done.stdout
