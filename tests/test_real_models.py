"""The main job on real models from the package index: SmolLM2 as GGUF, MiniLM as a folder."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sketchconv
from sketchconv.formats.reader import SktchModel
from sketchconv.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.model


def module(path):
    """Import a file by its path; tests and spec are no packages."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    return loaded


models = module(ROOT / "tests" / "models.py")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2 at 4 bits with 8-bit embeddings, and the report of its conversion."""
    out = tmp_path_factory.mktemp("smollm2") / "smollm2.sktch"
    report = sketchconv.convert(models.fetch(models.SMOLLM2), out, Recipe(embed_bits=8))
    return out, report


def test_smollm2_is_sketched_whole(smollm2):
    out, report = smollm2
    assert out.stat().st_size == report.output_bytes
    assert len(report.results) == 211
    assert report.plan.coverage.fraction == 1
    assert report.parameters == 134_515_008
    assert "second moments" in report.weighting
    # the source has 16 levels per 32 columns, a row here has 16 in all
    assert 0.05 < report.relative_error < 0.12


def test_the_independent_decoder_agrees_bit_for_bit(smollm2):
    decode = module(ROOT / "spec" / "decode.py")
    out, report = smollm2
    names = [r.name for r in report.results]
    chosen = [names[0], *(n for n in names if ".29." in n)]
    file = decode.File(out)
    with SktchModel.open(out) as model:
        for name in chosen:
            end = 256 if "embed" in name else None
            theirs = b"".join(decode.raw_bytes(row) for row in file.rows(name, 0, end))
            assert theirs == model.decode(name)[:end].tobytes(), name


def test_smollm2_writes_english_in_a_fresh_process(smollm2, tmp_path):
    prompt = "Explain in three sentences why the sky is blue."
    command = [sys.executable, "-P", "-m", "sketchconv", "generate", str(smollm2[0]), prompt]
    done = subprocess.run(
        [*command, "--max-new-tokens", "48"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.lower().split()
    # What the question names: which reasons come after it depends on the CPU's rounding.
    assert {"the", "sky", "is", "blue"} <= {word.strip(".,") for word in words}
    assert "tokens/s" in done.stderr


def test_verify_accepts_it_and_finds_one_flipped_bit(smollm2, tmp_path):
    data = bytearray(smollm2[0].read_bytes())
    command = [sys.executable, "-P", "-m", "sketchconv", "verify"]
    good = subprocess.run([*command, smollm2[0]], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout + good.stderr
    data[len(data) // 2] ^= 4
    broken = tmp_path / "broken.sktch"
    broken.write_bytes(data)
    bad = subprocess.run([*command, broken], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "SKT-081" in bad.stdout


def test_minilm_embeddings_stay_close_to_the_dense_ones(tmp_path):
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = models.fetch(models.MINILM)
    out = tmp_path / "minilm"
    report = sketchconv.convert(source, out)
    assert report.plan.coverage.fraction == 1
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer(
        ["A man is eating food.", "Shares fell on Monday."], return_tensors="pt", padding=True
    )
    vectors = []
    for model in (AutoModel.from_pretrained(source), AutoModel.from_pretrained(out)):
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    similarity = (vectors[0] * vectors[1]).sum(-1).numpy()
    assert np.all(similarity > 0.95)
    assert np.all(similarity < 0.99999)
