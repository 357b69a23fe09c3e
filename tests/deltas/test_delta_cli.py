"""`sketchconv delta`, and `inspect` and `verify` on deltas."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from sketchconv.cli import delta as group
from sketchconv.cli.main import cli
from sketchconv.deltas import create, info
from sketchconv.summary import summarise
from sketchconv.verify import verify


def run(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


def ok(*arguments):
    done = run(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.fixture(scope="module")
def made(bundle, tools, tmp_path_factory):
    """Base, tuned sketch and a delta between them; read only."""
    toy, base = bundle
    folder = tmp_path_factory.mktemp("made")
    other = tools.make_mixed()
    other.luts.update(tools.tune(toy))
    tuned = other.bundle(folder / "tuned.sktch")
    create(base, tuned, folder / "d.sktch", task={"name": "t"})
    return base, tuned, folder / "d.sktch"


def test_help_lists_what_is_there_and_loads_nothing_heavy():
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "sketchconv", "delta", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in ("create", "apply", "revert", "merge", "info"):
        assert f"  {name} " in shown
    code = (
        "import sys; from sketchconv.cli import delta; from sketchconv.cli import main; "
        "main.cli(['delta', '--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'numpy', 'numba', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_commands_whose_module_is_not_there_are_not_listed(monkeypatch):
    commands = {"info": ("sketchconv.cli.delta_info", "x"), "no": ("sketchconv.cli.no_such", "y")}
    monkeypatch.setattr(group.command, "_lazy", commands)
    shown = ok("delta", "--help")
    assert "info" in shown
    assert "y" not in shown.split("Commands:")[1]
    assert run("delta", "no").exit_code == 2


def test_the_whole_way(tmp_path, made):
    base, tuned, _ = made
    task = tmp_path / "task.json"
    task.write_text('{"training": {"steps": 3, "lr": 0.001}}')
    options = ["--name", "demo", "--description", "for a test", "--task", task, "--json"]
    told = json.loads(ok("delta", "create", base, tuned, tmp_path / "d.sktch", *options))
    assert (told["mode"], told["exact"], told["weights"]) == ("xor", True, 6)
    assert told["task"]["training"] == {"steps": 3, "lr": "0.001"}
    ok("delta", "apply", base, tmp_path / "d.sktch", tmp_path / "t.sktch", "--dry-run")
    assert not (tmp_path / "t.sktch").exists()
    ok("delta", "apply", base, tmp_path / "d.sktch", tmp_path / "t.sktch")
    back = tmp_path / "b.sktch"
    shown = ok("delta", "revert", tmp_path / "t.sktch", tmp_path / "d.sktch", back, "--json")
    assert json.loads(shown)["applied"] == []
    assert back.read_bytes() == base.read_bytes()
    again = run("delta", "apply", base, tmp_path / "d.sktch", tmp_path / "t.sktch")
    assert again.exit_code == 1
    assert "exists" in again.output


def test_reverting_with_the_base(tmp_path, made):
    base, tuned, _ = made
    ok("delta", "create", base, tuned, tmp_path / "d", "--values", "i8", "--span", "2")
    ok("delta", "apply", base, tmp_path / "d", tmp_path / "t.sktch")
    arguments = ["delta", "revert", tmp_path / "t.sktch", tmp_path / "d", tmp_path / "b.sktch"]
    assert "name the base" in run(*arguments).output
    ok(*arguments, "--base", base)
    assert (tmp_path / "b.sktch").read_bytes() == base.read_bytes()


def test_merging(tmp_path, made):
    base, _, delta = made
    odd = tmp_path / "a=b.sktch"
    odd.write_bytes(delta.read_bytes())
    ok("delta", "merge", base, tmp_path / "m.sktch", delta, f"{odd}=0.5", "--name", "both")
    task = info(tmp_path / "m.sktch").task
    assert task["name"] == "both"
    assert [m["weight"] for m in task["merged"]] == ["0.5", "1.0"]
    assert run("delta", "merge", base, tmp_path / "n.sktch", f"{delta}=x").exit_code == 2


def test_info_and_inspect_and_verify(made):
    base, tuned, delta = made
    shown = ok("delta", "info", delta, "--base", base)
    assert "fits" in shown
    assert json.loads(ok("delta", "info", delta, "--json"))["weights"] == 6
    wrong = run("delta", "info", delta, "--base", tuned)
    assert wrong.exit_code == 1
    assert "was not made for" in wrong.output
    summary = summarise(delta)
    assert (summary.format, len(summary.rows)) == ("delta", 6)
    assert summary.parameters == info(delta).parameters
    assert "no model by itself" in ok("inspect", delta)
    assert verify(delta).findings == ()
    checked = verify(delta, against=str(base))
    assert (checked.findings, checked.tensors) == ((), len(list_of(delta)))
    assert checked.compared == 4 * 2 * (4 + 8 + 16 + 32 + 2 + 1)
    bad = verify(delta, against=str(tuned))
    assert {f.requirement for f in bad.findings} == {"DLT-040"}
    assert len(bad.findings) == 6
    assert "OK" in ok("verify", delta, "--against", base)


def list_of(delta):
    from sketchconv.formats.delta import DeltaFile

    with DeltaFile.open(delta) as file:
        return file.container.entries


def test_an_adapter_folder_is_inspected_and_verified(tmp_path, made):
    base, tuned, _ = made
    ok("delta", "create", base, tuned, tmp_path / "d", "--values", "bf16")
    assert summarise(tmp_path / "d").format == "delta"
    assert summarise(tmp_path / "d" / "sketch_adapter.safetensors").format == "delta"
    assert verify(tmp_path / "d", against=str(base)).findings == ()
    config = tmp_path / "d" / "sketch_adapter_config.json"
    config.write_text(config.read_text().replace('"add"', '"xor"'))
    assert [f.requirement for f in verify(tmp_path / "d").findings] == ["DLT-051"]
    assert run("verify", tmp_path / "d").exit_code == 1


def test_models_and_deltas_are_refused_by_name_where_the_other_is_asked_for(tmp_path, made):
    base, tuned, delta = made
    for arguments in (
        ("delta", "info", base),
        ("delta", "apply", base, tuned, tmp_path / "x.sktch"),
        ("delta", "apply", delta, delta, tmp_path / "x.sktch"),
        ("delta", "create", delta, tuned, tmp_path / "x.sktch"),
        ("convert", delta, tmp_path / "x.gguf"),
        ("delta", "info", tmp_path / "nothing.sktch"),
    ):
        done = run(*arguments)
        assert done.exit_code == 1, arguments
        line = done.output.strip().splitlines()[-1]
        assert line.startswith("Error: "), done.output
        assert "not a" in line or "No such file" in line or "no such file" in line, line
    assert not list(tmp_path.iterdir())


def test_a_task_file_that_is_none(tmp_path, made):
    base, tuned, _ = made
    for text in ("[]", "{", "[" * 100_000):
        (tmp_path / "task.json").write_text(text)
        options = ["--task", tmp_path / "task.json"]
        done = run("delta", "create", base, tuned, tmp_path / "d.sktch", *options)
        assert done.exit_code == 1
        assert "JSON" in done.output
    assert not (tmp_path / "d.sktch").exists()
