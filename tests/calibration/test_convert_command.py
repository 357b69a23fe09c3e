"""`sketchconv convert --calibration`: options, progress, report, exit codes."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from sketchconv.cli.main import cli

SHORT = ("--tokens", "128", "--seq-len", "32", "--device", "cpu", "--threads", "1")


def run(*args):
    return CliRunner().invoke(cli, ["convert", *map(str, args)])


def test_progress_goes_to_stderr_and_the_report_to_stdout(llama, text, tmp_path):
    out = tmp_path / "tiny.sktch"
    result = run(llama, out, "--calibration", text, *SHORT, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["calibration"]["method"] == "sketch"
    assert report["calibration"]["tokens"] == 128
    assert "block 3/3" in result.stderr or "ETA" in result.stderr
    assert out.stat().st_size == report["output_bytes"]


def test_a_table_says_what_was_done(llama, text, tmp_path):
    options = (
        "--calibration",
        text,
        "--method",
        "gptq",
        "--bits",
        "3",
        "--recover",
        "0",
        "--quiet",
    )
    result = run(llama, tmp_path / "tiny", *options, *SHORT)
    assert result.exit_code == 0, result.output
    assert "gptq, 128 tokens, 21 weights in 3 blocks" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("option", ["--tokens", "--seq-len", "--seed", "--recover"])
def test_options_of_a_calibration_need_a_text(llama, tmp_path, option):
    result = run(llama, tmp_path / "tiny.sktch", option, "8")
    assert result.exit_code == 2
    assert f"{option} goes with --calibration TEXT" in result.output


def test_an_unknown_method_is_refused_before_any_work(llama, text, tmp_path):
    result = run(llama, tmp_path / "tiny.sktch", "--calibration", text, "--method", "magic")
    assert result.exit_code == 1
    assert "method must be one of rtn, kmeans, gptq, leanquant, sketch" in result.output


def test_a_dry_run_finds_a_text_that_is_missing(llama, text, tmp_path):
    result = run(llama, tmp_path / "tiny.sktch", "--calibration", "nowhere.txt", "--dry-run")
    assert result.exit_code == 1
    assert "calibration text nowhere.txt: no such file" in result.output
    result = run(llama, tmp_path / "tiny.sktch", "--calibration", text, "--dry-run")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
