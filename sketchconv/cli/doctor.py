"""`sketchconv doctor`: what this installation runs, and why."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sketchconv.doctor import Diagnosis
    from sketchconv.selftest import Outcome

SHOWN_FAILURES = 10


@click.command("doctor")
@click.option("--self-test", "test", is_flag=True, help="Compare the kernels with the reference.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout.")
def command(*, test: bool, as_json: bool) -> None:
    """Show versions, CPU, GPU, threads, and which kernels run and why.

    With --self-test the exit code is 1 if a kernel differs from the reference.
    """
    from sketchconv.doctor import diagnose
    from sketchconv.selftest import self_test

    diagnosis = diagnose()
    if as_json:
        outcomes = list(self_test()) if test else []
        document = diagnosis.to_json()
        if test:
            document["self_test"] = [_outcome_json(outcome) for outcome in outcomes]
        click.echo(json.dumps(document, indent=2))
    else:
        _print(diagnosis)
        outcomes = []
        if test:
            click.echo("Self-test (kernels that are new to this machine are compiled first)")
            for outcome in self_test():
                _print_outcome(outcome)
                outcomes.append(outcome)
    if any(outcome.failures for outcome in outcomes):
        sys.exit(1)


def _print(diagnosis: Diagnosis) -> None:
    from sketchconv.cli.render import print_table

    packages = [(name, text or "not installed") for name, text in diagnosis.versions.items()]
    print_table("Versions", packages)
    print_table("CPU", _cpu_rows(diagnosis))
    print_table("GPU", _gpu_rows(diagnosis))
    overrides = diagnosis.overrides or {"none": "no variable changes what runs"}
    print_table("Overrides in the environment", list(overrides.items()))
    for hint in diagnosis.hints:
        click.echo(f"hint: {hint}")


def _cpu_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    machine, tiles = diagnosis.machine, diagnosis.tiles
    rows = [
        ("system", f"{machine.system}, {machine.architecture}"),
        ("CPU", f"{machine.cpu} (LLVM: {machine.llvm_name})"),
        *_feature_rows(machine.features),
        *((f"kernels {c.name}", f"{c.state}: {c.reason}") for c in diagnosis.kernels),
        ("prefill tiles", f"{tiles.dtype}: {tiles.reason}"),
        *_thread_rows(diagnosis),
    ]
    folder = diagnosis.cache.folder
    state = "writable" if diagnosis.cache.writable else "not writable"
    rows.append(("kernel cache", f"{folder} ({state})" if folder else "none that can be written"))
    return rows


def _feature_rows(features: dict[str, bool] | None) -> list[tuple[str, str]]:
    if features is None:
        return [("features", "LLVM does not know the features of this CPU")]
    has = " ".join(name for name, there in features.items() if there)
    lacks = " ".join(name for name, there in features.items() if not there)
    return [("features", has or "none of those that matter"), ("lacking", lacks or "nothing")]


def _thread_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    threads = diagnosis.threads
    quota = "" if threads.quota is None else f", CPU time for {threads.quota:g}"
    return [
        ("cores", f"{threads.usable} of {threads.cores} may be used{quota}"),
        ("torch threads", str(threads.torch)),
        ("OMP_WAIT_POLICY", threads.wait_policy or "not set"),
    ]


def _gpu_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    gpu = diagnosis.gpu
    rows = [("torch is built for", gpu.torch_build)]
    for number, device in enumerate(gpu.devices):
        state = f"not used: {device.why_not}" if device.why_not else "kernels run"
        rows.append((f"device {number}", f"{device.name}, {device.capability}; {state}"))
    if not gpu.devices:
        rows.append(("kernels", f"not used: {gpu.why_not}"))
    return rows


def _print_outcome(outcome: Outcome) -> None:
    if outcome.not_run is not None:
        click.echo(f"  {outcome.kernel}: not run: {outcome.not_run}")
        return
    total = len(outcome.checks)
    click.echo(f"  {outcome.kernel}: {outcome.passed} of {total} comparisons passed")
    for what in outcome.failures[:SHOWN_FAILURES]:
        click.echo(f"    FAILED {what}")
    if len(outcome.failures) > SHOWN_FAILURES:
        click.echo(f"    and {len(outcome.failures) - SHOWN_FAILURES} more")


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "kernel": outcome.kernel,
        "passed": outcome.passed,
        "total": len(outcome.checks),
        "failures": list(outcome.failures),
        "not_run": outcome.not_run,
    }
