"""Several processes that convert one checkpoint: the bytes of one, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sketchconv.calibration.options import Calibration
from sketchconv.errors import (
    OutputError,
    PlanError,
    ProcessError,
    RecipeError,
    Suspended,
    WeightError,
)
from sketchconv.memory import anonymous_bytes
from sketchconv.parallel import helper
from sketchconv.parallel.room import Room
from sketchconv.pipeline import convert
from sketchconv.recipe import Override, Recipe, SketchSpec

MIXED = Recipe(
    embed_bits=6,
    exclude=("*.o_proj",),
    overrides=(
        Override("*.down_proj", bits=4, grid="iq4_nl"),
        Override("*.up_proj", bits=3, group_size=16, lut_dtype="BF16"),
    ),
)


def content(path):
    """Every byte of an output, by name."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def running(pid):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, seconds=60.0):
    """Whether all processes end in time."""
    until = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(running, pids))


@pytest.fixture
def pids(monkeypatch):
    """Process ids of the processes that are started."""
    made, start = [], helper._started

    def noted(*args):
        process = start(*args)
        made.append(process.pid)
        return process

    monkeypatch.setattr(helper, "_started", noted)
    return made


def same(source, folder, form, recipe=None, jobs=2, **options):
    """Convert twice; the reports of one process and of several."""
    (folder / "one").mkdir()
    (folder / "more").mkdir()
    one = convert(source, folder / "one" / form, recipe, **options)
    more = convert(source, folder / "more" / form, recipe, jobs=jobs, **options)
    assert content(folder / "more" / form) == content(folder / "one" / form)
    assert names(folder / "more") == [form]
    return one, more


def test_a_bundle_has_the_bytes_of_one_process(llama, tmp_path, pids):
    one, more = same(llama, tmp_path, "m.sktch", jobs=3)
    assert len(pids) == 3
    assert gone(pids)
    assert (one.jobs, more.jobs) == (1, 3)
    assert more.results == tuple(sorted(more.results, key=one.results.index))
    assert sorted(more.results, key=repr) == sorted(one.results, key=repr)
    assert more.peak_anonymous > anonymous_bytes() / 2
    assert more.solve_seconds > 0


def test_shards_grids_and_sketched_embeddings_too(untied_shards, tmp_path):
    same(untied_shards, tmp_path, "m", MIXED, max_shard_size=40_000)


def gpt2(folder):
    """Weights that are stored transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=97)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def mixtral(folder):
    """Experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def gguf(folder):
    """A file with one tensor of Q8_0 blocks for each weight."""
    # Test folders are no packages; the tiny models of exports serve here too.
    sys.path.append(str(Path(__file__).parent.parent / "export"))
    from tiny import make_model

    from sketchconv.export.recipe import ExportRecipe
    from sketchconv.export.run import export_gguf

    path = folder.parent / "source.gguf"
    export_gguf(make_model(folder, "llama"), path, ExportRecipe("Q8_0"))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "recipe", "options"),
    [
        (gpt2, None, {}),
        (mixtral, Recipe(SketchSpec(bits=3)), {}),  # equal weights: covariances are not known
        (None, Recipe(exact=True), {}),
        (None, Recipe(weighting="equal"), {}),
        (None, Recipe(SketchSpec(group_size=16)), {"calibration": Calibration(method="rtn")}),
        (gguf, None, {}),
    ],
    ids=["transposed", "experts", "exact", "equal", "rtn", "gguf"],
)
def test_every_kind_of_work_can_be_shared(untied_shards, tmp_path, make, recipe, options):
    source = untied_shards if make is None else make(tmp_path / "source")
    same(source, tmp_path, "m.sktch", recipe, **options)


class At:
    """A progress callback that does something when so many tensors are noted."""

    def __init__(self, count, action):
        self.count, self.action, self.seen = count, action, 0

    def __call__(self, event):
        self.seen += event.done > 0
        if self.seen == self.count:
            self.action()


def test_a_killed_process_is_named_and_the_rest_is_kept(llama, tmp_path, pids):
    convert(llama, tmp_path / "whole.sktch")
    (folder := tmp_path / "more").mkdir()
    out = folder / "m.sktch"
    kill = At(4, lambda: os.kill(pids[0], signal.SIGKILL))
    with pytest.raises(ProcessError, match=r"was ended by SIGKILL.*tensors are finished and kept"):
        convert(llama, out, jobs=2, progress=kill)
    assert gone(pids)
    assert names(folder) == [".m.sktch.sktch-partial", ".m.sktch.sktch-state"]
    kept = len((folder / ".m.sktch.sktch-state").read_text().splitlines()) - 1
    assert kept >= 3

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(Suspended, match="tensors are finished and kept"):
        convert(llama, out, jobs=2, progress=At(kept + 3, interrupt))
    assert gone(pids)
    convert(llama, out, jobs=2)  # and one that is resumed by several
    assert out.read_bytes() == (tmp_path / "whole.sktch").read_bytes()
    assert names(folder) == ["m.sktch"]


PARENT = """
import os, signal, sys
from sketchconv.parallel import helper
from sketchconv.pipeline import convert
pids, start, seen = [], helper._started, 0
def noted(*args):
    process = start(*args)
    pids.append(process.pid)
    return process
helper._started = noted
def progress(event):
    global seen
    seen += event.done > 0
    if seen == 5:
        os.kill(pids[0], signal.SIGSTOP)
        print(*pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], jobs=2, progress=progress)
"""


def test_a_killed_parent_leaves_nobody_and_no_room_for_a_second_writer(llama, tmp_path):
    convert(llama, tmp_path / "whole.sktch")
    out = tmp_path / "m.sktch"
    command = [sys.executable, "-P", "-c", PARENT, str(llama), str(out)]
    # Its standard error goes on in the processes that it starts, and one of them will be stopped.
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    done = subprocess.run(command, text=True, check=False, timeout=120, **quiet)
    assert done.returncode == -signal.SIGKILL
    stopped, other = map(int, done.stdout.split())
    try:
        assert gone([other])
        assert running(stopped)
        with pytest.raises(OutputError, match="another process is writing"):
            convert(llama, out)
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert gone([stopped])
    convert(llama, out)
    assert out.read_bytes() == (tmp_path / "whole.sktch").read_bytes()
    assert names(tmp_path) == ["m.sktch", "whole.sktch"]


TERMINATED = """
import contextlib, os, signal, sys
from sketchconv.cli import main, progress
seen = 0
def stop(event):
    global seen
    seen += event.done > 0
    if seen == 4:
        os.kill(os.getpid(), signal.SIGTERM)
progress.show_progress = lambda **_: contextlib.nullcontext(stop)
main.run()
"""


def test_terminated_on_the_command_line(llama, tmp_path):
    out = tmp_path / "m.sktch"
    command = [sys.executable, "-P", "-c", TERMINATED, "convert", str(llama), str(out)]
    done = subprocess.run([*command, "--jobs", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert "tensors are finished and kept: run the same command again" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_weight_that_is_no_number_is_named_and_nothing_is_left(fresh_llama, tmp_path, pids):
    path = fresh_llama / "model.safetensors"
    tensors = {name: value.copy() for name, value in _tensors(path).items()}
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors[name][3, 5] = np.nan
    save_file(tensors, path, {"format": "pt"})
    (folder := tmp_path / "out").mkdir()
    with pytest.raises(WeightError, match=f"{name}: 1 values are NaN or infinite.* row 3"):
        convert(fresh_llama, folder / "m.sktch", jobs=2)
    assert gone(pids)
    assert names(folder) == []


def _tensors(path):
    """Float32 values of a bf16 file."""
    import torch
    from safetensors.torch import load_file as load

    return {name: value.to(torch.float32).numpy() for name, value in load(path).items()}


@pytest.mark.parametrize("jobs", [0, -1, 2.0, True, "2"])
def test_what_is_no_number_of_processes_is_refused(llama, tmp_path, jobs):
    with pytest.raises(RecipeError, match="jobs must be an integer of at least 1, got"):
        convert(llama, tmp_path / "m.sktch", jobs=jobs)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (Recipe(SketchSpec(bits=3)), {}, r"--jobs 2 .*--weighting covariances, .*drop --jobs"),
        (None, {"calibration": Calibration(("self",))}, "--jobs 2 does not go with --calibration"),
        (None, {"threads": 1}, "--threads 1 is for all processes together"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(llama, tmp_path, pids, recipe, options, message):
    with pytest.raises(RecipeError, match=message):
        convert(llama, tmp_path / "m.sktch", recipe, jobs=2, **options)
    assert names(tmp_path) == []
    assert not pids


def test_a_limit_that_is_too_low_for_so_many_is_refused_with_numbers(llama, tmp_path, pids):
    limit = anonymous_bytes() + (90 << 20)
    with pytest.raises(PlanError, match=r"too little for --jobs 4: .* are needed; drop --jobs"):
        convert(llama, tmp_path / "m.sktch", jobs=4, max_memory=limit)
    assert gone(pids)
    assert names(tmp_path) == []


def test_the_limit_is_that_of_all_processes_together():
    room, mega = Room(used=200 << 20, each=80 << 20, moments=10 << 20), 1 << 20
    assert room.chunk_budget(None, 8) == 256 << 20
    for jobs in (2, 8):
        limit = room.needed(jobs)
        least = room.chunk_budget(limit, jobs)
        assert 16 * mega <= least < 17 * mega
        taken = room.used + room.moments + jobs * room.each + (jobs + 1) * least
        assert taken <= limit
        with pytest.raises(PlanError, match=f"at least {limit:,} are needed"):
            room.chunk_budget(limit - 1, jobs)
    with pytest.raises(PlanError, match="--jobs 5 fits"):
        room.chunk_budget(room.needed(5) + 1, 8)
    alone = Room(used=200 << 20, each=80 << 20, moments=0)
    assert alone.chunk_budget(800 << 20, 2) == (440 << 20) // 2 * 9 // 10


@pytest.mark.parametrize(
    ("out", "given", "message"),
    [
        ("m.sktch", ["--jobs", "0"], "'--jobs': 0 is not in the range"),
        ("m.gguf", ["--jobs", "2"], "--jobs goes with a sketch as OUT"),
        ("m", ["--jobs", "2", "--dense"], "--jobs goes with a sketch as OUT"),
    ],
)
def test_what_the_command_line_refuses(llama, tmp_path, out, given, message):
    from click.testing import CliRunner

    from sketchconv.cli.main import cli

    done = CliRunner().invoke(cli, ["convert", str(llama), str(tmp_path / out), *given])
    assert done.exit_code == 2
    assert message in done.output
    assert names(tmp_path) == []
