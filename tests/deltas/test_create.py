"""Making deltas and resolving them: what comes back, and what is refused."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sketchconv.deltas import binding_of, create, info, merge, resolve
from sketchconv.deltas.making import plain_task
from sketchconv.errors import DeltaError, FormatError, OutputError, SketchconvError
from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.delta_validate import validate_delta

SPEC = Path(__file__).resolve().parents[2] / "spec"
OPTIONS = [
    {"dtype": "same"},
    {"dtype": "same", "mode": "replace"},
    {"dtype": "same", "mode": "add"},
    {"dtype": "f16"},
    {"dtype": "f16", "mode": "replace"},
    {"dtype": "bf16"},
    {"dtype": "bf16", "mode": "replace"},
    {"dtype": "i8"},
    {"dtype": "i8", "span": 3},
]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def decoder():
    sys.path.insert(0, str(SPEC))
    try:
        yield importlib.import_module("decode_delta")
    finally:
        sys.path.remove(str(SPEC))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("form", ["d.sktch", "adapter"])
def test_round_trip(tmp_path, mixed, tools, form, options):
    toy, base = mixed
    tuned = tools.tune(toy)
    made = create(base, tuned, tmp_path / form, task={"name": "t"}, **options)
    assert list(validate_delta(tmp_path / form)) == []
    got, same = resolve(tmp_path / form, base), resolve(tmp_path / form, toy.luts)
    assert {n: t.tobytes() for n, t in got.items()} == {n: t.tobytes() for n, t in same.items()}
    assert made.weights == len(got) == len(toy.records)
    assert all(table.flags.writeable for table in got.values())
    exact = all(got[n].tobytes() == tuned[n].tobytes() for n in tuned)
    assert exact == made.exact
    if options["dtype"] == "same" and options.get("mode") != "add":
        assert exact
    assert made.largest_error < (0.02 if options["dtype"] == "bf16" else 0.003)
    told = info(tmp_path / form)
    assert (told.seal, told.nbytes, told.changed) == (made.seal, made.nbytes, made.changed)
    assert told.nbytes == sum(p.stat().st_size for p in files(tmp_path / form))


def files(path):
    return [path] if path.is_file() else list(path.iterdir())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_our_tables_are_those_of_the_independent_decoder(tmp_path_factory, tools, decoder, data):
    """Random finite bit patterns, odd shapes, any share of groups, every coding."""
    lut = data.draw(st.sampled_from(["F16", "BF16", "F32"]))
    options = data.draw(st.sampled_from(OPTIONS))
    rows, groups = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([1, 3, 7]))
    toy = tools.make_toy(lut, rows=rows, columns=21, groups=groups, bits=(1, 3))
    seed = data.draw(st.integers(0, 2**32))
    rng, tuned = np.random.default_rng(seed), {}
    scale = data.draw(st.sampled_from([1e-6, 1e-3, 1.0, 100.0]))
    for record in toy.records:
        table = toy.luts[record.name]
        mask = rng.random(table.shape[:2]) < data.draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
        values = tools.carried(rng.normal(size=table.shape) * scale, lut)
        tuned[record.name] = np.where(mask[..., None], values, table).astype(table.dtype)
    folder = tmp_path_factory.mktemp("any")
    base, out = toy.bundle(folder / "b.sktch"), folder / "d.sktch"
    create(base, tuned, out, **options)
    assert list(validate_delta(out)) == []
    delta, model = decoder.Delta(out), decoder.File(base)
    delta.check_base(model)
    found = resolve(out, base)
    assert found.keys() == delta.document["weights"].keys()
    for name, table in found.items():
        assert delta.tuned(name, model) == table.tobytes()
    if options["dtype"] == "same" and options.get("mode") != "add":
        for name, table in tuned.items():
            whole = found.get(name, toy.luts[name])
            assert whole.tobytes() == table.tobytes()


def test_from_a_tuned_sketch(tmp_path, mixed, tools):
    toy, base = mixed
    tuned, other = tools.tune(toy, names={"l.3.weight", "s.4.weight"}), tools.make_mixed()
    other.luts.update(tuned)
    path = other.bundle(tmp_path / "tuned.sktch")
    made = create(base, path, tmp_path / "d.sktch")
    assert made.weights == 2
    got = resolve(tmp_path / "d.sktch", base)
    assert {n: t.tobytes() for n, t in got.items()} == {n: t.tobytes() for n, t in tuned.items()}


def test_a_sketch_that_differs_in_more_than_tables_is_refused(tmp_path, bundle, tools):
    _, base = bundle
    norm, index, record = tools.make_mixed(), tools.make_mixed(), tools.make_mixed()
    info_, data = norm.plain["norm.weight"]
    norm.plain["norm.weight"] = (info_, data[::-1])
    index.codes["l.2.weight"] = index.codes["l.2.weight"] ^ 1
    record.records.pop()
    for toy, text in ((norm, "norm.weight differs"), (index, "l.2.sketch_index"), (record, "s.8")):
        path = toy.bundle(tmp_path / "tuned.sktch", overwrite=True)
        with pytest.raises(DeltaError, match=text):
            create(base, path, tmp_path / "d.sktch")
    assert names(tmp_path) == ["tuned.sktch"]


def test_tensors_of_torch(tmp_path, bundle, tools):
    import torch

    toy, base = bundle
    tuned = tools.tune(toy)
    as_torch = {n: torch.from_numpy(t.copy()) for n, t in tuned.items()}
    as_torch["l.2.weight"] = as_torch["l.2.weight"].view(torch.bfloat16)
    parameters = {n: torch.nn.Parameter(t, requires_grad=True) for n, t in as_torch.items()}
    create(base, tuned, tmp_path / "a.sktch")
    create(base, iter(parameters.items()), tmp_path / "b.sktch")
    assert (tmp_path / "a.sktch").read_bytes() == (tmp_path / "b.sktch").read_bytes()
    with_torch = dict(toy.luts)
    bits = torch.from_numpy(toy.luts["l.2.weight"].copy())
    with_torch["l.2.weight"] = bits.view(torch.bfloat16)
    assert resolve(tmp_path / "a.sktch", with_torch).keys() == tuned.keys()


def test_nothing_changed(tmp_path, bundle):
    toy, base = bundle
    made = create(base, toy.luts, tmp_path / "d.sktch")
    assert (made.weights, made.changed, made.exact) == (0, 0, True)
    assert resolve(tmp_path / "d.sktch", base) == {}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x.weight": np.zeros((4, 2, 4), np.float16)}, "no sketch x.weight"),
        ({"head.weight": np.zeros((4, 2, 4), np.float16)}, "no sketch head.weight"),
        ({"l.4.weight": np.zeros((4, 2, 8), np.float16)}, "the base's table is"),
        ({"l.4.weight": np.zeros((4, 2, 16), np.float32)}, "got float32; convert it"),
        ({"l.2.weight": np.zeros((4, 2, 4), np.float32)}, "uint16 bits"),
        ({"l.4.weight": np.full((4, 2, 16), np.nan, np.float16)}, "128 entries .* not finite"),
        ({"l.2.weight": np.full((4, 2, 4), 0x7F80, np.uint16)}, "32 entries .* not finite"),
        ({"l.4.weight": [[1.0]]}, "got list"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, bundle, change, text):
    _, base = bundle
    with pytest.raises(DeltaError, match=text):
        create(base, change, tmp_path / "d.sktch")
    with pytest.raises(DeltaError, match=text):
        create(base, iter(change.items()), tmp_path / "d")
    assert names(tmp_path) == []


def test_bad_options(tmp_path, bundle, tools):
    toy, base = bundle
    tuned = tools.tune(toy)
    for options, text in (
        ({"dtype": "f64"}, "no value type"),
        ({"mode": "mul"}, "mode must be one of"),
        ({"dtype": "i8", "mode": "replace"}, "need mode add"),
        ({"dtype": "f16", "mode": "xor"}, "must be 'same'"),
        ({"span": 2}, "span must be 0"),
        ({"dtype": "i8", "span": 0}, "bad span"),
        ({"task": {"lr": float("nan")}}, "no JSON"),
        ({"task": {"x": object()}}, "no JSON"),
    ):
        with pytest.raises(DeltaError, match=text):
            create(base, tuned, tmp_path / "d.sktch", **options)
    pairs = [*tuned.items(), next(iter(tuned.items()))]
    with pytest.raises(DeltaError, match="given twice"):
        create(base, pairs, tmp_path / "d.sktch")
    with pytest.raises(OutputError, match="a source"):
        create(base, tuned, base, force=True)
    with pytest.raises(FormatError, match="SKT-053"):
        create(create(base, tuned, tmp_path / "d.sktch").path, tuned, tmp_path / "e.sktch")
    assert names(tmp_path) == ["d.sktch"]


def test_the_task_is_kept_as_it_is_but_for_odd_numbers(tmp_path, bundle, tools):
    toy, base = bundle
    task = {"name": "é", "training": {"lr": 3e-4, "steps": 10, "seed": -1, "ok": True, "x": None}}
    create(base, tools.tune(toy), tmp_path / "d.sktch", task=task)
    want = {"name": "é", "training": {"lr": "0.0003", "steps": 10, "seed": "-1", "ok": True}}
    want["training"]["x"] = None
    assert info(tmp_path / "d.sktch").task == want == plain_task(task)
    assert info(tmp_path / "d.sktch").base["id"] == "a/toy"


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("task", "match"),
    [
        ({"name": "caf\udce9"}, "surrogate"),
        ({"caf\udce9": 1}, "surrogate"),
        (deep(20), "levels"),
        (deep(100_000), "too deep"),
        ({"x": float("nan")}, "no JSON"),
    ],
)
def test_a_task_that_no_reader_takes_is_refused_before_anything_is_written(
    tmp_path, bundle, tools, task, match
):
    toy, base = bundle
    good = tmp_path / "d.sktch"
    create(base, tools.tune(toy), good)
    before = good.read_bytes()
    for call in (
        lambda: create(base, tools.tune(toy), good, task=task, force=True),
        lambda: merge([(good, 1.0)], tmp_path / "m.sktch", base, task=task),
    ):
        with pytest.raises(DeltaError, match=match):
            call()
    assert good.read_bytes() == before
    assert names(tmp_path) == ["d.sktch"]


def test_same_bytes_from_any_order_and_any_base_form(tmp_path, bundle, tools):
    toy, base = bundle
    tuned = tools.tune(toy)
    folder = toy.folder(tmp_path / "base", 500)
    create(base, tuned, tmp_path / "a.sktch")
    create(folder, dict(reversed(tuned.items())), tmp_path / "b.sktch")
    assert (tmp_path / "a.sktch").read_bytes() == (tmp_path / "b.sktch").read_bytes()


def test_a_damaged_base_is_found(tmp_path, bundle, tools):
    from sketchconv.formats.reader import SktchFile

    toy, base = bundle
    tuned = tools.tune(toy)
    create(base, tuned, tmp_path / "d.sktch")
    raw = bytearray(base.read_bytes())
    with SktchFile.open(base) as file:
        raw[file.container.entries["l.4.sketch_lut"].begin] ^= 1
    bad = tmp_path / "bad.sktch"
    bad.write_bytes(raw)
    with pytest.raises(FormatError, match="SKT-081"):
        create(bad, tuned, tmp_path / "e.sktch")
    with pytest.raises(FormatError, match="SKT-081"):
        resolve(tmp_path / "d.sktch", bad)


# ---------------------------------------------------------------- binding


def test_every_member_of_the_binding_is_checked(tmp_path, bundle, tools):
    """Each base that differs in one digest, dtype, shape, name or form of table is refused."""
    toy, base = bundle
    create(base, tools.tune(toy), tmp_path / "d.sktch")
    need, refused, tried = binding_of(tmp_path / "d.sktch"), 0, 0
    for name in need.weights:
        for change in ("codes", "luts", "name", "groups", "dtype"):
            other = tools.make_mixed()
            if not changed(other, name, change):
                continue
            path = other.bundle(tmp_path / "other.sktch", overwrite=True)
            tried += 1
            with pytest.raises(DeltaError, match="was not made for"):
                resolve(tmp_path / "d.sktch", path)
            misfits = list(need.misfits(binding_of(path)))
            assert [n for n, _ in misfits] == [name]
            refused += 1
    assert (refused, tried) == (tried, 5 * 6 - 2 - 2)
    need.require(binding_of(base), "d", "base")


def changed(toy, name, change):
    from dataclasses import replace

    at = next(i for i, r in enumerate(toy.records) if r.name == name)
    record = toy.records[at]
    if change == "codes":
        toy.codes[name] = toy.codes[name] ^ 1
    elif change == "luts":
        toy.luts[name] = toy.luts[name].copy()
        toy.luts[name].reshape(-1).view(np.uint8)[-2] ^= 1
    elif change == "name":
        toy.records[at] = replace(record, name="z" + name)
        for part in (toy.codes, toy.luts):
            part["z" + name] = part.pop(name)
    elif record.shaped:
        return False
    elif change == "groups":
        toy.records[at] = replace(record, groups=1)
        toy.codes[name] = toy.codes[name].reshape(4, 1, 64)
        toy.luts[name] = toy.luts[name][:, :1].copy()
    else:
        toy.records[at] = replace(record, lut_dtype="BF16" if record.lut_dtype != "BF16" else "F16")
        kind = np.uint16 if record.lut_dtype != "BF16" else np.float16
        toy.luts[name] = np.ones(toy.luts[name].shape, kind)
    return True


def test_tables_in_memory_are_checked_too(tmp_path, bundle, tools):
    toy, base = bundle
    tuned = tools.tune(toy)
    create(base, tuned, tmp_path / "d.sktch")
    for name in tuned:
        other = {**toy.luts, name: toy.luts[name].copy()}
        other[name].reshape(-1).view(np.uint8)[0] ^= 1
        with pytest.raises(DeltaError, match=f"{name} has another digest"):
            resolve(tmp_path / "d.sktch", other)
        with pytest.raises(SketchconvError, match=r"DLT-04[12]"):
            resolve(tmp_path / "d.sktch", other, check=False)
        with pytest.raises(DeltaError, match="no table of"):
            resolve(tmp_path / "d.sktch", {n: t for n, t in toy.luts.items() if n != name})
    assert resolve(tmp_path / "d.sktch", toy.luts, check=False).keys() == tuned.keys()


def test_a_config_cannot_point_at_another_base(tmp_path, bundle, tools):
    """Of an adapter folder only the weights' file counts."""
    toy, base = bundle
    create(base, tools.tune(toy), tmp_path / "d", task={"name": "t"})
    (tmp_path / "d/sketch_adapter_config.json").write_text('{"base_model_name_or_path": "evil"}')
    with DeltaFile.open(tmp_path / "d") as delta:
        assert delta.document.base["id"] == "a/toy"
    assert resolve(tmp_path / "d", base)


KILLED = """
    import os, signal, sys
    from sketchconv.deltas import create
    from sketchconv.formats.reader import SktchModel
    from sketchconv.deltas.tables import stored_table
    count = 0
    real = {name: getattr(os, name) for name in ("pwrite", "fsync", "rename", "replace")}
    def counted(name):
        def call(*args, **kwargs):
            global count
            count += 1
            if count == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*args, **kwargs)
        return call
    for name in real:
        setattr(os, name, counted(name))
    with SktchModel.open(sys.argv[1]) as model:
        luts = {n: -stored_table(model, n) for n in ("l.4.weight", "l.5.weight", "s.4.weight")}
    create(sys.argv[1], luts, sys.argv[2])
"""


@pytest.mark.parametrize("form", ["d.sktch", "d"])
@pytest.mark.parametrize("at", [1, 2, 4, 5, 6, 7, 99])
def test_killed_at_any_point_the_output_is_absent_or_complete(tmp_path, bundle, form, at):
    import textwrap

    _, base = bundle
    path = tmp_path / form
    command = [sys.executable, "-c", textwrap.dedent(KILLED), base, path, str(at)]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode in (0, -9), done.stderr
    if done.returncode == 0 or path.exists():
        assert list(validate_delta(path)) == []
    else:
        assert names(tmp_path) == [f".{form}.sktch-partial"]
        assert done.returncode == -9
