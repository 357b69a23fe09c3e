"""The benchmark of adaptation runs from start to end on a tiny model, and goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench" / "bench_adaptation.py"


def bench(work, *arguments):
    done = subprocess.run(
        [sys.executable, "-P", str(BENCH), "--work", str(work), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_rows_are_kept(makers, tmp_path):
    pytest.importorskip("peft")
    folder, text = tmp_path / "dense", tmp_path / "text.txt"
    makers.dense(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    makers.tokenizer().save_pretrained(folder)
    text.write_text(makers.text)
    words = ["--model", folder, "--train", text, "--test", text, "--shapes", "4x4"]
    words += ["--steps", 4, "--batch", 2, "--length", 32, "--windows", 4, "--ranks"]
    words += ["--lut-rates", 1e-3, "--lora-rates", 1e-3, "--absolute-rates"]
    printed = bench(tmp_path, *words)
    store = tmp_path / "runs.jsonl"
    rows = [json.loads(line) for line in store.read_text().splitlines()]
    kinds, schedules = [row["kind"] for row in rows], [row["schedule"] for row in rows]
    assert kinds == ["none", "lut", "lora", "lut", "lora", *["lut"] * 5]
    assert schedules[1:5] == ["cosine", "cosine", "linear", "linear"]
    assert rows[1]["test"] != rows[3]["test"]
    assert rows[1]["trained"] <= rows[2]["trained"]
    assert rows[1]["test"] < rows[0]["test"]
    assert [row["cautious"] for row in rows if row["kind"] == "lut"] == [True] * 6 + [False]
    assert printed.count("test ppl") == len(rows) + 4
    before = store.read_bytes()
    assert bench(tmp_path, *words) == printed
    assert store.read_bytes() == before
