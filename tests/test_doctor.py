"""`sketchconv doctor`: the facts it tells, and that its self-test can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from sketchconv import doctor, machine, selftest
from sketchconv.cli.main import cli
from sketchconv.kernels import dequantize, dispatch, gemv
from sketchconv.kernels.gpu import support


def run(*arguments):
    return CliRunner().invoke(cli, ["doctor", *arguments])


def doctor_json(**environment):
    """The document of a fresh process."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sketchconv", "doctor", "--json"],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def few_bits(monkeypatch):
    """The self-test of the command at 3 bits only: kernels of all bits take long to compile."""
    everything = selftest.self_test
    monkeypatch.setattr(selftest, "self_test", lambda: everything(bits=(3,)))


def test_text_names_the_chosen_kernels_and_why():
    result = run()
    chosen = dispatch.choose()
    assert result.exit_code == 0, result.output
    assert f"chosen: {chosen.reason}" in result.output
    for rejected in chosen.rejected:
        assert f"rejected: {rejected.reason}" in result.output
    assert torch.__version__ in result.output
    assert "prefill tiles" in result.output


def test_json_holds_every_fact():
    document = json.loads(run("--json").output)
    assert document["versions"]["torch"] == torch.__version__
    assert document["threads"]["usable"] == machine.available_threads()
    states = [kernel["state"] for kernel in document["kernels"]]
    assert states.count("chosen") == 1
    assert document["kernels"][-1]["name"] == "portable"
    assert document["tiles"]["dtype"] == ("bfloat16" if gemv._fast_bf16() else "float32")
    assert "self_test" not in document


def test_generic_cpu_gets_portable_kernels_with_the_reason():
    document = doctor_json(NUMBA_CPU_NAME="generic", OMP_WAIT_POLICY="PASSIVE")
    kernels = {kernel["name"]: kernel for kernel in document["kernels"]}
    assert kernels["portable"]["state"] == "chosen"
    assert kernels["avx512"]["state"] == "rejected"
    assert "NUMBA_CPU_NAME is set" in kernels["avx512"]["reason"]
    assert document["overrides"]["NUMBA_CPU_NAME"] == "generic"
    assert any("NUMBA_CPU_NAME is set" in hint for hint in document["hints"])
    assert not any("OMP_WAIT_POLICY" in hint for hint in document["hints"])


def test_the_cache_folder_is_where_numba_writes(tmp_path):
    cache = doctor_json(NUMBA_CACHE_DIR=str(tmp_path))["cache"]
    assert cache["folder"].startswith(str(tmp_path))
    assert cache["writable"]


def test_wait_policy_is_hinted_at_unless_passive():
    hints = doctor_json()["hints"]
    assert any("OMP_WAIT_POLICY=PASSIVE" in hint for hint in hints)


def facts(quota=None, writable=True):
    threads = machine.Threads(cores=8, usable=8, quota=quota, torch=8, wait_policy="PASSIVE")
    return threads, doctor.Cache("somewhere" if writable else None, writable), {}


def test_hints_name_a_small_quota_and_a_cache_that_cannot_be_written():
    assert doctor.find_hints(*facts()) == ()
    assert doctor.find_hints(*facts(quota=8.0)) == ()
    (hint,) = doctor.find_hints(*facts(quota=1.5))
    assert "8 threads" in hint
    assert "1.5 cores" in hint
    (hint,) = doctor.find_hints(*facts(writable=False))
    assert "NUMBA_CACHE_DIR" in hint


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000", None), ("150000 100000", 1.5), ("", None), ("a b", None)]
)
def test_cpu_quota(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    assert machine.cpu_quota(tmp_path / "cpu.max") == expected
    assert machine.cpu_quota(tmp_path / "missing") is None


def test_an_unknown_cpu_is_no_error(monkeypatch):
    import llvmlite.binding as llvm

    def unknown():
        raise RuntimeError("no features")

    monkeypatch.setattr(llvm, "get_host_cpu_features", unknown)
    assert machine.find_machine().features is None
    assert "does not know the features" in run().output


@pytest.mark.parametrize("reason", [None, "capability 7.5 is below 8.0"])
def test_gpus_are_shown_with_the_reason_not_to_use_them(monkeypatch, reason):
    asked = {torch.device("cuda", 0): reason}
    monkeypatch.setattr(support, "why_not", lambda device: asked[device])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _number: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _number: "Planted GPU")
    assert doctor.find_gpu().devices == (doctor.GpuDevice("Planted GPU", "7.5", reason),)
    shown = run().output
    assert "Planted GPU, 7.5" in shown
    assert ("kernels run" in shown) == (reason is None)
    assert reason is None or f"not used: {reason}" in shown


def test_without_a_gpu_the_reason_is_shown(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(support, "why_not", lambda device: f"no {device.type} here")
    assert doctor.find_gpu().devices == ()
    assert "not used: no cuda here" in run().output


@pytest.mark.usefixtures("few_bits")
def test_self_test_passes_and_counts():
    result = run("--self-test")
    assert result.exit_code == 0, result.output
    each = 2 * (1 + len(selftest.TOKENS))
    woven = sum(columns // groups >= 512 for _, groups, columns in selftest.SHAPES)
    for kernel in doctor.find_kernels():
        comparisons = each * (len(selftest.SHAPES) + woven * (kernel.name == "avx512"))
        expected = f"{comparisons} of {comparisons} comparisons passed"
        if kernel.state == "rejected":
            expected = f"not run: {kernel.reason}"
        assert f"{kernel.name}: {expected}" in result.output


@pytest.mark.usefixtures("few_bits")
@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_wrong_product_fails_the_self_test(monkeypatch, arguments):
    right = gemv.multiply

    def wrong(matrix, x, kernel=None):
        y = right(matrix, x, kernel)
        if kernel == "portable" and x.dtype is torch.float32 and x.shape[0] == 5:
            y[4, 0] += 0.01
        return y

    monkeypatch.setattr(gemv, "multiply", wrong)
    result = run("--self-test", *arguments)
    assert result.exit_code == 1
    if arguments:
        outcome = json.loads(result.output)["self_test"][-1]
        assert outcome["kernel"] == "portable"
        assert outcome["passed"] == outcome["total"] - len(outcome["failures"])
        assert len(outcome["failures"]) == len(selftest.SHAPES)
        assert all("5 tokens in float32" in what for what in outcome["failures"])
    else:
        assert "FAILED 3 bits, F16 LUT, 5x1x7: 5 tokens in float32" in result.output


def test_one_wrong_bit_of_a_decoded_row_fails(monkeypatch):
    right = dequantize.decode

    def wrong(matrix, dtype=torch.float32, kernel=None):
        rows = right(matrix, dtype, kernel=kernel)
        if dtype is torch.float32:
            rows[1, -1] = torch.nextafter(rows[1, -1], torch.tensor(9.0))
        return rows

    monkeypatch.setattr(dequantize, "decode", wrong)
    (*_, outcome) = selftest.self_test(bits=(3,))
    assert [what.split(": ")[1] for what in outcome.failures] == ["rows in float32"] * 4


def test_kernels_that_cannot_run_are_named_and_not_counted(monkeypatch):
    chosen = doctor.find_kernels()[-1]
    lacking = replace(chosen, name="special", state="rejected", reason="this CPU lacks it")
    monkeypatch.setattr(doctor, "find_kernels", lambda: (lacking,))
    (outcome,) = selftest.self_test()
    assert outcome.not_run == "this CPU lacks it"
    assert (outcome.passed, outcome.checks, outcome.failures) == (0, (), ())
