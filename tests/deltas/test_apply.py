"""Apply and revert: the base's own bytes again, in every form; nothing else is ever left."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sketchconv.deltas import apply, create, revert, rewriting
from sketchconv.deltas.applied import EXTENSION
from sketchconv.errors import DeltaError, FormatError, OutputError
from sketchconv.formats.reader import SktchFile, SktchModel
from sketchconv.formats.validate import validate

VECTORS = Path(__file__).resolve().parents[2] / "spec/vectors"
CODINGS = [{}, {"mode": "replace"}, {"dtype": "i8"}, {"dtype": "bf16", "mode": "replace"}]


def out_of(base, folder, name):
    return folder / (name + ".sktch" if base.is_file() else name)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: "-".join(map(str, c.values())) or "xor")
def test_reverting_gives_the_base_s_bytes(tmp_path, mixed, tools, coding):
    toy, base = mixed
    before = tools.content(base)
    made = create(base, tools.tune(toy), tmp_path / "d.sktch", task={"name": "t"}, **coding)
    tuned = out_of(base, tmp_path, "tuned")
    done = apply(base, made.path, tuned)
    assert list(validate(tuned)) == []
    assert done.nbytes == sum(map(len, parts(tools.content(tuned))))
    assert (done.applied, done.weights) == ((made.seal,), 6)
    origin = base if coding else None
    back = out_of(base, tmp_path, "back")
    undone = revert(tuned, made.path, back, base=origin)
    assert tools.content(back) == before == tools.content(base)
    assert (undone.applied, undone.nbytes) == ((), sum(map(len, parts(before))))


def parts(found):
    return [found] if isinstance(found, bytes) else found.values()


def test_the_tuned_sketch_is_what_the_delta_says(tmp_path, mixed, tools):
    toy, base = mixed
    tuned = tools.tune(toy, names={"l.3.weight", "l.4.weight", "s.4.weight"})
    create(base, tuned, tmp_path / "d.sktch", task={"name": "t"})
    out = out_of(base, tmp_path, "tuned")
    apply(base, tmp_path / "d.sktch", out)
    with SktchModel.open(out) as model, SktchModel.open(base) as origin:
        for record in toy.records:
            table = model.array(record.lut_name).tobytes()
            assert table == tuned.get(record.name, toy.luts[record.name]).tobytes()
            error = model.manifest.errors[record.name]
            assert error == (None if record.name in tuned else origin.manifest.errors[record.name])
        (entry,) = model.manifest.extensions[EXTENSION]["applied"]
        assert entry["name"] == "t"
        assert set(entry["errors"]) == set(tuned)
        same = {
            n: i for n, i in model.tensors.items() if n not in {f"{t}.sketch_lut" for t in tuned}
        }
        assert all(origin.tensors[n] == i for n, i in same.items())
    # A tuned sketch makes the same delta again, but for nothing.
    again = create(base, out, tmp_path / "e.sktch", task={"name": "t"})
    assert (tmp_path / "e.sktch").read_bytes() == (tmp_path / "d.sktch").read_bytes()
    assert again.exact


def test_several_deltas_come_off_in_any_order_if_they_share_no_weight(tmp_path, mixed, tools):
    toy, base = mixed
    every = [r.name for r in toy.records]
    deltas = []
    for i in range(3):
        path = tmp_path / f"d{i}.sktch"
        create(base, tools.tune(toy, seed=i, names=every[i::3]), path, task={"name": f"d{i}"})
        deltas.append(path)
    at = base
    for i, delta in enumerate(deltas):
        at, before = out_of(base, tmp_path, f"t{i}"), at
        apply(before, delta, at)
        assert list(validate(at)) == []
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        now = at
        for step, i in enumerate(order):
            now, before = out_of(base, tmp_path, f"r{step}"), now
            revert(before, deltas[i], now, force=True)
        assert tools.content(now) == tools.content(base)


def test_stacked_deltas_come_off_in_reverse_or_are_refused_by_name(tmp_path, mixed, tools):
    toy, base = mixed
    first, second = tmp_path / "a.sktch", tmp_path / "b.sktch"
    once, twice = out_of(base, tmp_path, "once"), out_of(base, tmp_path, "twice")
    create(base, tools.tune(toy, seed=1), first, task={"name": "A"})
    apply(base, first, once)
    tuned = {"l.4.weight": np.ones((4, 2, 16), np.float16)}
    create(once, tuned, second, task={"name": "B"})
    apply(once, second, twice)
    back = out_of(base, tmp_path, "back")
    with pytest.raises(DeltaError, match=r"l\.4\.weight: a later delta .*: revert B first"):
        revert(twice, first, back)
    with pytest.raises(DeltaError, match=r"not applied to once.*; applied are: A"):
        revert(once, second, back)
    with pytest.raises(DeltaError, match="none is applied"):
        revert(base, first, back)
    with pytest.raises(DeltaError, match="was not made for"):
        apply(base, second, back)
    with pytest.raises(DeltaError, match="was not made for"):
        apply(once, first, back)
    assert not back.exists()
    revert(twice, second, back)
    assert tools.content(back) == tools.content(once)
    revert(back, first, out_of(base, tmp_path, "all"))
    assert tools.content(out_of(base, tmp_path, "all")) == tools.content(base)


def test_a_delta_without_an_inverse_needs_the_base(tmp_path, bundle, tools):
    toy, base = bundle
    create(base, tools.tune(toy), tmp_path / "d.sktch", mode="replace")
    apply(base, tmp_path / "d.sktch", tmp_path / "t.sktch")
    with pytest.raises(DeltaError, match="mode replace cannot be undone without the base"):
        revert(tmp_path / "t.sktch", tmp_path / "d.sktch", tmp_path / "b.sktch")
    other = tools.make_mixed()
    other.luts["l.4.weight"] = -other.luts["l.4.weight"]
    wrong = other.bundle(tmp_path / "other.sktch")
    with pytest.raises(DeltaError, match="was not made for other"):
        revert(tmp_path / "t.sktch", tmp_path / "d.sktch", tmp_path / "b.sktch", base=wrong)
    assert not (tmp_path / "b.sktch").exists()


def test_folders_that_a_library_rewrote(tmp_path, tools):
    """Other order of tensors, other padding, one document in all shards (section 8)."""
    base = tmp_path / "base"
    shutil.copytree(VECTORS / "valid/folder-rewritten", base)
    (base / "sub").mkdir()
    (base / "sub/notes.txt").write_text("more")
    (base / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    with SktchModel.open(base) as model:
        luts = {r.name: -model.array(r.lut_name) for r in model.manifest.sketches.values()}
        lengths = {s.container.data_begin % 64 for s in model.shards.values()}
    assert lengths != {0}
    create(base, luts, tmp_path / "d.sktch")
    apply(base, tmp_path / "d.sktch", tmp_path / "tuned")
    assert list(validate(tmp_path / "tuned")) == []
    revert(tmp_path / "tuned", tmp_path / "d.sktch", tmp_path / "back")
    assert tools.content(tmp_path / "back") == tools.content(base)


def test_extensions_of_others_stay(tmp_path):
    base = VECTORS / "valid/extensions.sktch"
    with SktchModel.open(base) as model:
        luts = {"m.weight": -model.array("m.sketch_lut")}
        extensions = dict(model.manifest.extensions)
    create(base, luts, tmp_path / "d.sktch")
    apply(base, tmp_path / "d.sktch", tmp_path / "t.sktch")
    with SktchModel.open(tmp_path / "t.sktch") as model:
        assert {k: v for k, v in model.manifest.extensions.items() if k != EXTENSION} == extensions
    revert(tmp_path / "t.sktch", tmp_path / "d.sktch", tmp_path / "b.sktch")
    assert (tmp_path / "b.sktch").read_bytes() == base.read_bytes()


def test_a_record_of_applied_deltas_that_is_not_one(tmp_path, bundle, tools):
    from dataclasses import replace

    toy, base = bundle
    create(base, tools.tune(toy), tmp_path / "d.sktch")
    apply(base, tmp_path / "d.sktch", tmp_path / "t.sktch")
    with SktchFile.open(tmp_path / "t.sktch") as file:
        good, old = file.manifest, file.container.header()
    data = (tmp_path / "t.sktch").read_bytes()[len(old) :]
    entry = good.extensions[EXTENSION]["applied"][0]
    for bad in ([], {"applied": []}, {"applied": [1], "headers": {}}, {"applied": 1, "headers": {}},
                {"applied": [{**entry, "delta": "x"}], "headers": {}},
                {"applied": [{**entry, "errors": {"l.2.weight": "0"}}], "headers": {}},
                {"applied": [entry], "headers": {"t.sktch": "x"}}):  # fmt: skip
        document = replace(good, extensions={EXTENSION: bad}).to_json()
        quoted = json.dumps(document).encode()
        text = old[8:].replace(json.dumps(good.to_json()).encode(), quoted).rstrip(b" ")
        text += b" " * (-(8 + len(text)) % 64)
        (tmp_path / "x.sktch").write_bytes(len(text).to_bytes(8, "little") + text + data)
        assert list(validate(tmp_path / "x.sktch")) == []
        with pytest.raises(DeltaError, match="malformed"):
            revert(tmp_path / "x.sktch", tmp_path / "d.sktch", tmp_path / "b.sktch")


def test_where_outputs_may_go(tmp_path, mixed, tools):
    toy, base = mixed
    delta = tmp_path / "d.sktch"
    create(base, tools.tune(toy), delta)
    out = out_of(base, tmp_path, "tuned")
    wrong = tmp_path / ("folder" if base.is_file() else "file.sktch")
    with pytest.raises(DeltaError, match=r"is one file|is a folder"):
        apply(base, delta, wrong)
    for source in (base, base / "inside" if base.is_dir() else base, delta):
        with pytest.raises((OutputError, DeltaError)):
            apply(base, delta, source, force=True)
    apply(base, delta, out)
    with pytest.raises(OutputError, match="exists"):
        apply(base, delta, out)
    with pytest.raises(OutputError, match="a source"):
        revert(out, delta, out, force=True)
    apply(base, delta, out, force=True)
    assert names(tmp_path) == sorted(["d.sktch", out.name])


def test_a_dry_run_writes_nothing_and_knows_the_size(tmp_path, mixed, tools):
    toy, base = mixed
    delta, out = tmp_path / "d.sktch", out_of(base, tmp_path, "tuned")
    create(base, tools.tune(toy), delta)
    planned = apply(base, delta, out, dry_run=True)
    assert names(tmp_path) == ["d.sktch"]
    done = apply(base, delta, out)
    assert (planned.nbytes, planned.written, done.written) == (done.nbytes, False, True)
    back = out_of(base, tmp_path, "back")
    assert revert(out, delta, back, dry_run=True).nbytes == sum(
        map(len, parts(tools.content(base)))
    )
    assert not back.exists()


@pytest.mark.parametrize("tensor", ["norm.weight", "l.4.sketch_index", "l.4.sketch_lut"])
def test_a_damaged_base_is_found_and_nothing_is_left(tmp_path, bundle, tools, tensor):
    toy, base = bundle
    create(base, tools.tune(toy), tmp_path / "d.sktch")
    raw = bytearray(base.read_bytes())
    with SktchFile.open(base) as file:
        raw[file.container.entries[tensor].begin] ^= 1
    (tmp_path / "bad.sktch").write_bytes(raw)
    with pytest.raises(FormatError, match="SKT-081"):
        apply(tmp_path / "bad.sktch", tmp_path / "d.sktch", tmp_path / "t.sktch")
    assert names(tmp_path) == ["bad.sktch", "d.sktch"]


def test_a_damaged_delta_is_found_and_nothing_is_left(tmp_path, bundle, tools):
    toy, base = bundle
    create(base, tools.tune(toy), tmp_path / "d.sktch")
    raw = bytearray((tmp_path / "d.sktch").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "d.sktch").write_bytes(raw)
    with pytest.raises(FormatError, match="SKT-081"):
        apply(base, tmp_path / "d.sktch", tmp_path / "t.sktch")
    assert names(tmp_path) == ["d.sktch"]


def test_one_table_and_one_piece_are_in_memory(tmp_path, tools, monkeypatch):
    """16 MB of indices go through in pieces of 64 KiB; the tables are small."""
    monkeypatch.setattr(rewriting, "_CHUNK", 1 << 16)
    toy = tools.make_toy(rows=1024, columns=32768, groups=1, bits=(4,))
    base = toy.bundle(tmp_path / "base.sktch")
    create(base, {n: -t for n, t in toy.luts.items()}, tmp_path / "d.sktch")
    tracemalloc.start()
    try:
        apply(base, tmp_path / "d.sktch", tmp_path / "t.sktch")
        revert(tmp_path / "t.sktch", tmp_path / "d.sktch", tmp_path / "b.sktch")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert base.stat().st_size > 1 << 24
    assert peak < 1 << 20


KILLED = """
    import os, signal, sys
    from sketchconv.deltas import apply
    count = 0
    real = {name: getattr(os, name) for name in ("pwrite", "fsync", "rename", "replace")}
    def counted(name):
        def call(*args, **kwargs):
            global count
            count += 1
            if count == int(sys.argv[4]):
                os.kill(os.getpid(), int(sys.argv[5]))
            return real[name](*args, **kwargs)
        return call
    for name in real:
        setattr(os, name, counted(name))
    apply(*sys.argv[1:4])
"""


@pytest.mark.parametrize("at", [1, 3, 9, 17, 20, 24, 30, 999])
def test_killed_at_any_point_the_output_is_absent_or_complete(tmp_path, mixed, tools, at):
    toy, base = mixed
    delta, out = tmp_path / "d.sktch", out_of(base, tmp_path, "tuned")
    create(base, tools.tune(toy), delta)
    script = textwrap.dedent(KILLED)
    command = [sys.executable, "-c", script, base, delta, out, str(at), str(int(signal.SIGKILL))]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    if done.returncode == 0 or out.exists():
        assert list(validate(out)) == []
        return
    assert names(tmp_path) == [f".{out.name}.sktch-partial", "d.sktch"]
    apply(base, delta, out)
    assert list(validate(out)) == []
    assert names(tmp_path) == ["d.sktch", out.name]


def test_interrupted_it_cleans_up(tmp_path, bundle, tools, monkeypatch):
    toy, base = bundle
    create(base, tools.tune(toy), tmp_path / "d.sktch")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply(base, tmp_path / "d.sktch", tmp_path / "t.sktch")
    monkeypatch.undo()
    assert names(tmp_path) == ["d.sktch"]
