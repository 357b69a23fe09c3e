"""Task arithmetic against a plain formula, entry by entry."""

import struct

import numpy as np
import pytest

from sketchconv.deltas import create, info, merge, resolve
from sketchconv.deltas.merging import combine
from sketchconv.errors import DeltaError, OutputError
from sketchconv.formats.tensors import carried_to_f32

WEIGHTS = [0.5, -0.25, 1.0]


def single(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def plain(base, tuned, weights):
    """The formula on Python numbers: every step rounded to binary32, the result to binary16."""
    total = 0.0
    for value, weight in zip(tuned, weights, strict=True):
        change = single(value - base)
        total = single(total + single(single(weight) * change))
    return np.float16(np.float32(single(base + total)))


def make(tmp_path, toy, base, tools, count=3):
    paths = []
    for i in range(count):
        path = tmp_path / f"d{i}.sktch"
        some = [r.name for r in toy.records][i:]
        create(base, tools.tune(toy, seed=10 + i, names=some), path, task={"name": f"d{i}"})
        paths.append(path)
    return paths


def test_it_is_the_plain_formula(tmp_path, bundle, tools):
    toy, base = bundle
    paths = make(tmp_path, toy, base, tools)
    merge(list(zip(paths, WEIGHTS, strict=True)), tmp_path / "m.sktch", base)
    got = resolve(tmp_path / "m.sktch", base)
    order = sorted(zip(paths, WEIGHTS, strict=True), key=lambda pair: info(pair[0]).seal)
    single_ = [(resolve(path, base), weight) for path, weight in order]
    for record in toy.records:
        if record.lut_dtype != "F16":
            continue
        before = toy.luts[record.name]
        own = [(t[record.name], w) for t, w in single_ if record.name in t]
        after = got.get(record.name, before)
        for at in np.ndindex(before.shape):
            values = [float(table[at]) for table, _ in own]
            want = plain(float(before[at]), values, [w for _, w in own])
            same = all(table[at].tobytes() == before[at].tobytes() for table, _ in own)
            assert after[at].tobytes() == (before[at] if same else want).tobytes()


@pytest.mark.parametrize("lut", ["F16", "BF16", "F32"])
def test_hard_rows(tools, lut):
    """Nothing changes, negative zeros, ties, one outlier, changes that cancel out."""
    base = tools.carried(np.array([[[1.0, -0.0, 0.5, -2.0]]], np.float32), lut)
    moved = tools.carried(np.array([[[1.5, 0.0, 0.5, 100.0]]], np.float32), lut)
    back = tools.carried(np.array([[[0.5, -0.0, 0.5, -104.0]]], np.float32), lut)
    assert combine(base, [base, base], [3.0, -7.0], lut).tobytes() == base.tobytes()
    assert combine(base, [moved], [1.0], lut)[0, 0, 2:].tobytes() == moved[0, 0, 2:].tobytes()
    halved = carried_to_f32(combine(base, [moved], [0.5], lut), lut)[0, 0]
    assert halved.tolist() == [1.25, 0.0, 0.5, 49.0]
    zero = carried_to_f32(combine(base, [moved, back], [1.0, 1.0], lut), lut)[0, 0]
    assert zero.tolist() == [1.0, 0.0, 0.5, -2.0]


def test_one_delta_of_weight_one_is_itself(tmp_path, bundle, tools):
    toy, base = bundle
    (path,) = make(tmp_path, toy, base, tools, 1)
    merge([(path, 1.0)], tmp_path / "m.sktch", base)
    one, merged = resolve(path, base), resolve(tmp_path / "m.sktch", base)
    assert {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in merged.items()}


def test_the_order_and_the_form_of_the_arguments_do_not_matter(tmp_path, bundle, tools):
    toy, base = bundle
    paths = list(zip(make(tmp_path, toy, base, tools), WEIGHTS, strict=True))
    merge(paths, tmp_path / "a.sktch", base, task={"name": "all"})
    merge(paths[::-1], tmp_path / "b.sktch", base, task={"name": "all"})
    assert (tmp_path / "a.sktch").read_bytes() == (tmp_path / "b.sktch").read_bytes()
    told = info(tmp_path / "a.sktch").task
    assert told["name"] == "all"
    assert {(m["name"], m["weight"]) for m in told["merged"]} == {
        ("d0", "0.5"),
        ("d1", "-0.25"),
        ("d2", "1.0"),
    }


def test_what_is_refused(tmp_path, bundle, tools):
    toy, base = bundle
    paths = make(tmp_path, toy, base, tools, 2)
    other = tools.make_mixed()
    other.luts["l.4.weight"] = -other.luts["l.4.weight"]
    wrong = other.bundle(tmp_path / "other.sktch")
    out = tmp_path / "m.sktch"
    for deltas, on, text in (
        ([], base, "nothing to merge"),
        ([(paths[0], 1.0)], wrong, "was not made for other"),
        ([(paths[0], float("nan"))], base, "not finite"),
        ([(paths[0], 1e39)], base, "not finite"),
        ([(paths[0], 1e30)], base, "take smaller weights"),
    ):
        with pytest.raises(DeltaError, match=text):
            merge(deltas, out, on)
    with pytest.raises(OutputError, match="a source"):
        merge([(paths[0], 1.0)], paths[0], base, force=True)
    assert not out.exists()
