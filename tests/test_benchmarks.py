"""The benchmarks run from start to end on tiny models and print their ratios."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent / "bench"
NUMBER = r"-?[\d.]+"
RATIO = rf"{NUMBER} / {NUMBER} [\w/]+ = {NUMBER}"


def bench(name, *arguments, code=0, **environment):
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, "-P", str(BENCH / name), *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A two-layer Llama with a tokenizer of 301 words, as a folder of bfloat16 weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bench") / "tiny"
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(301)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=301,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_the_readmes_tables_are_those_of_the_rows(tmp_path):
    known = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    copy = tmp_path / "README.md"
    copy.write_text(known.replace("**ours, calibrated, LUTs trained** |", "nobody |"))
    assert copy.read_text() != known
    bench("tables.py", "--write", copy)
    assert copy.read_text() == known


def test_products(tmp_path):
    shape = ("--shapes", "24x96", "--tokens", 1, 12, "--threads", 1)
    printed = bench("bench_gemv.py", *shape, "--bits", 4, "--rounds", 2)
    assert re.search(rf"24x96, 12 token\(s\), 1 thread; read loop, [\w ]+: {NUMBER} GB/s", printed)
    for dtype in ("fp32", "bf16"):
        ours = f"4 bits, portable, planes-le, {dtype}"
        line = rf"{ours} +torch {dtype} / ours: {RATIO}; {RATIO} of the"
        assert len(re.findall(line, printed)) == 2, printed


def test_products_with_shaped_sketches():
    printed = bench("bench_shaped_gemv.py", "--shapes", "24x96", "--tokens", 2, "--rounds", 1)
    line = rf"bits: +{NUMBER} us; tiles {NUMBER} / ours = {NUMBER}; float32 / ours = {NUMBER}"
    assert len(re.findall(line, printed)) == 5, printed


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="there is no peer to compare with"
)
def test_blocks():
    printed = bench("bench_blocks.py", "--kinds", "Q4_1", "--rows", 8, "--rounds", 1, "--folders")
    pair = rf"{NUMBER} / +{NUMBER}"
    errors, speed = rf"{pair} = {NUMBER}", rf"{pair} MB/s = {NUMBER}"
    for rows in ("gaussian", "heavy"):
        for weighting in ("plain", "weighted"):
            line = rf"^Q4_1 +5.00 +{rows} +{weighting} +{errors} +{speed}$"
            assert re.search(line, printed, re.MULTILINE), printed
    assert re.search(rf"^Q4_1 +{speed}$", printed, re.MULTILINE), printed
    assert re.search(rf"^Q4_1 +{speed} +{speed}$", printed, re.MULTILINE), printed


def test_tasks(tiny, tmp_path):
    import sketchconv

    base = tmp_path / "tiny.sktch"
    sketchconv.convert(tiny, base)
    printed = bench("bench_tasks.py", base, "--rounds", 1, "--tasks", 4, "--prompts", 8)
    assert re.search(rf"^memory of 4 tasks / their LUTs: {RATIO}$", printed, re.MULTILINE), printed
    assert re.search(rf"^set_adapter {NUMBER} ms, first forward {NUMBER} ms", printed, re.MULTILINE)
    for what in ("products, 1 token each", "decoding step", "prompt of 8"):
        assert re.search(rf"^{what}, 4 tasks: {RATIO}$", printed, re.MULTILINE), printed


def test_deltas(tiny, tmp_path):
    import sketchconv

    base = tmp_path / "tiny.sktch"
    sketchconv.convert(tiny, base)
    printed = bench("bench_deltas.py", base, "--rounds", 1, "--work", tmp_path)
    assert "xor same: delta / tuned LUTs: " in printed
    for line in ("create / safetensors", "apply / copy", "apply / safetensors", "revert / copy"):
        assert len(re.findall(rf"{line}: {RATIO}", printed)) == 5, printed
    assert printed.count("reverted file is the base: yes") == 5
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.sktch"]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc"
)
def test_memory_of_a_calibration(tiny, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"w{n % 300}" for n in range(7000)))
    short = ("--tokens", 512, "--seq-len", 64, "--threads", 1, "--work", tmp_path)
    printed = bench("bench_calibrated_memory.py", "--model", tiny, "--text", text, *short)
    assert "14 weights in 2 of 2 blocks, 512 tokens, 4 bits" in printed
    peak, stated, ratio = re.search(
        rf"peak / stated: ({NUMBER}) / ({NUMBER}) MB = ({NUMBER})", printed
    ).groups()
    assert float(ratio) == pytest.approx(float(peak) / float(stated), rel=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]


@pytest.mark.slow
def test_decoding(tiny, tmp_path):
    short = ("--tokens", 12, "--rounds", 2, "--threads", 1, "--embed-bits", 8, "--work", tmp_path)
    printed = bench("bench_decode.py", tiny, *short, "--peers", "bf16", "gguf", "llama.cpp")
    for ours in ("modules-8", "sketch-8", "generate-8"):
        assert re.search(rf"{ours} / bf16: {RATIO}", printed), printed
    for peer in ("gguf", "llama.cpp"):
        assert f"skipped {peer}: the model is not a .gguf file" in printed


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
def test_tuning(tiny, tmp_path):
    short = ("--batch", 2, "--length", 32, "--rounds", 2, "--threads", 1, "--work", tmp_path)
    printed = bench("bench_tuning.py", tiny, *short, "--contenders", "lut", "lora", "gather")
    for key in ("seconds", "peak"):
        assert re.search(rf"lut / gather, {key}: {RATIO}", printed), printed
    installed = importlib.util.find_spec("peft") is not None
    assert ("lut / lora, seconds" in printed) == installed
    assert ("skipped lora: peft is not installed" in printed) != installed
    losses = re.findall(rf"^  (lut|gather) .*loss ({NUMBER}) -> ({NUMBER})$", printed, re.MULTILINE)
    (_, first, last), (_, gathered_first, _) = losses
    assert float(last) < float(first)
    # the same network, with sums in another order: within the rounding of bfloat16 logits
    assert abs(float(first) - float(gathered_first)) < 2**-8 * float(first)


def test_layer_errors(tiny, tmp_path):
    pytest.importorskip("sklearn")
    from transformers import AutoTokenizer, BertConfig, BertModel

    bert = tmp_path / "bert"
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
    config = BertConfig(num_hidden_layers=1, vocab_size=301, max_position_embeddings=128, **shape)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(bert)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(bert)
    words = torch.randint(0, 301, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    for name, part in (("calibration", words[:2000]), ("text", words[2000:])):
        (tmp_path / name).write_text(" ".join(f"w{n}" for n in part))
    texts = ("--calibration", tmp_path / "calibration", "--text", tmp_path / "text")
    models = ("--smollm2", tiny, "--minilm", bert, "--blocks", 1, 0)
    printed = bench("bench_layer_error.py", *texts, *models, "--window", 64, "--bits", 3)
    found = re.findall(rf"3 bits: error ours / LeanQuant ({NUMBER} / {NUMBER} = {NUMBER})", printed)
    ratios = [float(ratio.split(" = ")[1]) for ratio in found]
    assert len(ratios) == 8
    mean = float(re.search(rf"mean of 8 ratios: ({NUMBER})", printed)[1])
    assert mean == pytest.approx(sum(ratios) / 8, abs=1e-3)
    assert mean < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_that_there_is_no_gpu():
    assert bench("bench_gpu.py", code=1).strip() == "no GPU: nothing was measured"


INTERPRETED = f"""
import sys, torch
sys.path.append({str(BENCH)!r})
import bench_gpu, gpu_cases
done = []
for bits, groups, layout in ((4, 1, "device"), (3, 2, "device"), (3, 1, "planes-le")):
    setting = gpu_cases.Setting("cpu", torch.float32, bits, groups, layout)
    for case in gpu_cases.cases(16, 128, (1, 12), 2, setting):
        assert bench_gpu.difference(case) < 1e-5, (case.title, bench_gpu.difference(case))
        assert case.ours(1).shape == case.check()[1].shape, case.title
        case.theirs(1)
        assert 0 < case.nbytes and 0 < case.dense_nbytes
        done.append(case.title)
print(len(done))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("sketchconv.kernels.gpu.ops") is None
    or importlib.util.find_spec("triton") is None,
    reason="needs the GPU kernels and Triton",
)
def test_what_the_gpu_benchmark_times_is_right():
    """In Triton's interpreter, which knows no time: results only."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(3 * 7)
