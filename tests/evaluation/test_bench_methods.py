"""The benchmark of methods: it runs, goes on where it stopped, and counts sizes rightly."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    """The script as a module, with its folder on the path only meanwhile."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location(
        "bench_methods", ROOT / "bench" / "bench_methods.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_rows_are_measured_once_and_printed_in_order(bench, makers, tmp_path, monkeypatch, capsys):
    makers.folder(tmp_path / "dense", makers.model(vocab_size=93))
    for name in ("calibration", "words"):
        (tmp_path / f"{name}.txt").write_text(makers.text(400, seed=len(name)))
    arguments = [
        "bench", "--calibration", tmp_path / "calibration.txt", "--text", tmp_path / "words.txt",
        "--model", tmp_path / "dense", "--windows", "2", "--seq-len", "16", "--tokens", "64",
        "--only", "free 4 G=1", "rtn 4 G=1", "sketch 2 G=1", "self 2 G=4",
        "--results", tmp_path / "rows.jsonl",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
    bench.main()
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    records = {r["row"]: r for r in map(json.loads, lines)}
    assert list(records) == ["free 4 G=1", "rtn 4 G=1", "sketch 2 G=1", "self 2 G=4"]
    for record in records.values():
        assert record["texts"]["words"]["divergence"]["kl"]["mean"] > 0
        assert set(record["dense"]) == {"words", "python"}
    # 2 layers; rows of 32 columns, of the down projection 48
    weights = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 2 * 48 * 32 + 32 * 48)
    rows = 2 * (32 + 2 * 16 + 32 + 2 * 48 + 32)
    assert records["free 4 G=1"]["bits_per_weight"] == pytest.approx(4 + 16 * 16 * rows / weights)
    assert records["rtn 4 G=1"]["bits_per_weight"] == pytest.approx(4 + 32 * rows / weights)
    first = capsys.readouterr().out
    bench.main()
    assert (tmp_path / "rows.jsonl").read_text().splitlines() == lines
    again = capsys.readouterr()
    assert again.out == first
    assert "..." not in again.err
    titles = [line.split("  ")[0] for line in first.splitlines()[3:]]
    assert set(titles) == set(records)


def test_a_peer_changes_every_decoder_weight_and_no_other(bench, makers):
    import torch
    from peers import Peer, apply

    model, before = makers.model(), makers.model()
    apply(model, Peer(1.0, lambda weight: weight.sign()))
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        changed = not torch.equal(new, old)
        assert changed == ("_proj" in name), name


def test_conditions_part_results(bench, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"row": "a", "conditions": {"windows": n}, "n": n} for n in (1, 2)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert bench.finished(path, {"windows": 2}) == {"a": rows[1]}
    assert bench.finished(tmp_path / "none.jsonl", {}) == {}
