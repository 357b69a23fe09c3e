"""Deltas as files: every changed byte is found, hostile ones are refused, nothing is left."""

import errno
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sketchconv.formats import rules
from sketchconv.formats.container import Container
from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.delta_coding import CODES, Coding, finite
from sketchconv.formats.delta_record import Bound
from sketchconv.formats.delta_validate import validate_delta
from sketchconv.formats.delta_writer import DeltaWriter
from sketchconv.formats.document import LIMITS, sealed
from sketchconv.formats.errors import FormatError, OutputFailure
from sketchconv.formats.header import canonical_header
from sketchconv.formats.strict_json import dumps, loads
from sketchconv.formats.tensors import DTYPES, f32_to_bf16

CODINGS = [Coding(), Coding("replace"), Coding("add", "BF16"), Coding("add", CODES, 2)]


def bound(shape=(3, 3, 4), lut="F16"):
    return Bound("sketch_lut", lut, shape, "a" * 64, "b" * 64)


def tables(shape=(3, 3, 4), seed=0, share=0.5):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape).astype(np.float16)
    tuned = base.copy()
    tuned[rng.random(shape[:2]) < share] += np.float16(0.25)
    return base, tuned


def write(path, coding=CODINGS[0], names=("m.weight",), **options):
    with DeltaWriter(path, coding, **options) as writer:
        for seed, name in enumerate(names):
            writer.add(name, bound(), *tables(seed=seed))
        writer.commit({"id": "a/b"}, {"name": "t"}, "test 1")
    return path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: c.mode + c.values)
def test_every_flipped_byte_is_found(tmp_path, coding):
    path = write(tmp_path / "d.sktch", coding)
    good, rng, missed = path.read_bytes(), np.random.default_rng(7), []
    # All of them in one mode; in the others, whose header is alike, every seventh.
    for at in range(0, len(good), 1 if coding == CODINGS[0] else 7):
        raw = bytearray(good)
        raw[at] ^= int(rng.integers(1, 256))
        path.write_bytes(raw)
        if not list(validate_delta(path)):
            missed.append(at)
    assert missed == []
    path.write_bytes(good)
    assert list(validate_delta(path)) == []


def test_every_length_is_refused_but_the_right_one(tmp_path):
    path = write(tmp_path / "d.sktch")
    good = path.read_bytes()
    for size in range(0, len(good), 37):
        path.write_bytes(good[:size])
        assert list(validate_delta(path)), size
    for tail in (b"\0", b" ", good):
        path.write_bytes(good + tail)
        assert list(validate_delta(path)), tail[:2]


def test_same_bytes_in_any_order_and_under_both_names(tmp_path):
    every = ("a.weight", "b.weight", "c.weight")
    with DeltaWriter(tmp_path / "1.sktch", Coding()) as writer:
        for seed, name in reversed(list(enumerate(every))):
            writer.add(name, bound(), *tables(seed=seed))
        writer.commit({"id": "a/b"}, {"name": "t"}, "test 1")
    second = write(tmp_path / "2.sktch", names=every)
    folder = write(tmp_path / "adapter", names=every)
    assert (tmp_path / "1.sktch").read_bytes() == second.read_bytes()
    assert (folder / "sketch_adapter.safetensors").read_bytes() == second.read_bytes()
    assert names(folder) == ["sketch_adapter.safetensors", "sketch_adapter_config.json"]
    assert list(validate_delta(folder)) == []


def test_weights_and_groups_that_do_not_change_are_not_stored(tmp_path):
    base, tuned = tables(share=0.0)
    with DeltaWriter(tmp_path / "d.sktch", Coding()) as writer:
        assert writer.add("same.weight", bound(), base, tuned).record is None
        tuned = base.copy()
        tuned[1, 2, 0] = -tuned[1, 2, 0]
        record = writer.add("one.weight", bound(), base, tuned).record
        writer.commit({}, {}, "test 1")
    assert record.changed == 1
    with DeltaFile.open(tmp_path / "d.sktch") as delta:
        assert delta.container.entries["one.delta_lut"].info.shape == (1, 4)
        assert np.flatnonzero(delta.groups(record)).tolist() == [5]


def test_a_negative_zero_is_a_change(tmp_path):
    base = np.zeros((3, 3, 4), np.float16)
    tuned = base.copy()
    tuned[0, 0, 0] = -0.0
    with DeltaWriter(tmp_path / "d.sktch", Coding()) as writer:
        writer.add("m.weight", bound(), base, tuned)
        writer.commit({}, {}, "test 1")
    with DeltaFile.open(tmp_path / "d.sktch") as delta:
        assert delta.tuned("m.weight", base).tobytes() == tuned.tobytes()


@pytest.mark.parametrize(
    ("coding", "lut", "most"),
    [
        (Coding("replace", "F16"), "BF16", 1e30),
        (Coding("add", "F16"), "F32", 1e30),
        (Coding("add", CODES, 1), "F32", 1e30),
        (Coding("replace", "BF16"), "F32", 3.4e38),
    ],
)
def test_values_beyond_the_range_are_refused(tmp_path, coding, lut, most):
    base = np.ones((3, 3, 4), np.float32)
    tuned = base.copy()
    tuned[1, 1, 1] = most
    if lut == "BF16":
        base, tuned = f32_to_bf16(base), f32_to_bf16(tuned)
    with (
        pytest.raises(FormatError) as caught,
        DeltaWriter(tmp_path / "d.sktch", coding) as writer,
    ):
        writer.add("m.weight", bound(lut=lut), base, tuned)
    assert caught.value.requirement in ("DLT-032", "DLT-041")
    assert names(tmp_path) == []


def test_codes_are_within_half_a_step():
    rng = np.random.default_rng(3)
    base = rng.normal(size=(40, 16)).astype(np.float16)
    tuned = (base + rng.normal(size=base.shape) * 0.01).astype(np.float16)
    # Hard rows: nothing changes, one outlier, the least difference, all alike.
    tuned[0] = base[0]
    tuned[1, 3] += 8
    tuned[2] = np.nextafter(base[2], np.float16(9))
    tuned[3] = base[3] + np.float16(0.5)
    for span in (1, 3, 40, 2**62):
        coding = Coding("add", CODES, span)
        stored, scales = coding.encode(base, tuned, "F16")
        assert scales.shape == (-(-40 // span),)
        assert stored.dtype == np.int8
        assert finite(scales, "F16").all()
        got = coding.decode(base, stored, scales, "F16").astype(np.float64)
        change = tuned.astype(np.float64) - base
        most = np.abs(change).max(axis=1)
        blocks = [slice(i, min(i + span, 40)) for i in range(0, 40, span)]
        step = np.concatenate([np.full(b.stop - b.start, most[b].max() / 127) for b in blocks])
        # Half a step, the rounding of the scale, and half a unit of the result in F16.
        room = 0.5 * step + most * 2.0**-10 + 2.0**-24 * 127
        unit = np.spacing(np.abs(tuned).max(axis=1)).astype(np.float64)
        assert (np.abs(got - tuned).max(axis=1) <= room + unit).all()
        assert (stored[0] == 0).all()


def test_a_span_of_any_size_takes_no_memory(tmp_path):
    path = write(tmp_path / "d.sktch", Coding("add", CODES, 2**63 - 1))
    assert list(validate_delta(path)) == []
    with DeltaFile.open(path) as delta:
        assert delta.tuned("m.weight", tables()[0]).shape == (3, 3, 4)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
@pytest.mark.parametrize("form", ["d.sktch", "d"])
def test_a_failing_disk_leaves_nothing(tmp_path, form, call, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputFailure, match="full"):
        write(tmp_path / form)
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_outputs_are_kept_unless_asked_for(tmp_path):
    for form in ("d.sktch", "d"):
        write(tmp_path / form)
        with pytest.raises(OutputFailure, match="exists"):
            write(tmp_path / form)
        write(tmp_path / form, overwrite=True)
    (tmp_path / "d" / "mine.txt").write_text("x")
    with pytest.raises(OutputFailure, match="not a folder that sketchconv wrote"):
        write(tmp_path / "d", overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("x")
    with pytest.raises(OutputFailure, match="not a folder that sketchconv wrote"):
        write(tmp_path / "notes", overwrite=True)


def test_one_writer_per_output(tmp_path):
    with (
        DeltaWriter(tmp_path / "d.sktch", Coding()),
        pytest.raises(OutputFailure, match="another process"),
    ):
        DeltaWriter(tmp_path / "d.sktch", Coding())
    assert names(tmp_path) == []


def test_wrong_tables_are_refused_by_the_reader(tmp_path):
    path = write(tmp_path / "d.sktch")
    with DeltaFile.open(path) as delta:
        for bad in (np.zeros((3, 3, 5), np.float16), np.zeros((3, 3, 4), np.float32)):
            with pytest.raises(ValueError, match="expected"):
                delta.tuned("m.weight", bad)
        with pytest.raises(FormatError) as caught:
            delta.tuned("m.weight", np.ones((3, 3, 4), np.float16))
        assert caught.value.requirement in ("DLT-041", "DLT-042")


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0, 2**63 - 1),
    st.sampled_from([0, 1, 2, 3, 8, 9, 10, 2**31, 2**62]),
    st.text(max_size=4),
    st.sampled_from(["xor", "add", "replace", "same", "F16", "BF16", "F32", "I8", "a" * 64]),
    st.lists(st.integers(0, 2**40), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
)
MEMBERS = ["mode", "values", "span", "weights", "digests", "version", "kind", "task", "base"]
RECORD = ["base", "changed", "index", "lut", "shape", "table", "tuned"]


@pytest.fixture(scope="module", params=CODINGS, ids=lambda c: c.mode + c.values)
def small(request, tmp_path_factory):
    """A delta's path, document (as JSON), tensors and data."""
    path = write(tmp_path_factory.mktemp("small") / "d.sktch", request.param)
    with Container.open(path) as container:
        document = loads(container.metadata[rules.DOCUMENT_KEY].encode(), "d", LIMITS)
        infos = [entry.info for entry in container.entries.values()]
        data = path.read_bytes()[container.data_begin :]
    return path, document, infos, data


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.lists(st.tuples(st.sampled_from([*MEMBERS, *RECORD]), ODD), max_size=3))
def test_any_document_is_taken_or_refused_and_nothing_else(small, changes):
    """Members of other types and values, canonical and sealed: only the format's own errors."""
    path, document, infos, data = small
    value = {**document, "weights": {"m.weight": dict(document["weights"]["m.weight"])}}
    for member, odd in changes:
        record = value["weights"].get("m.weight") if isinstance(value["weights"], dict) else None
        if member in RECORD and isinstance(record, dict):
            record[member] = odd
        elif member in MEMBERS:
            value[member] = odd
    text = sealed({k: dumps(v) for k, v in value.items()})
    other = path.with_name("other.sktch")
    metadata = {"format": "pt", rules.DOCUMENT_KEY: text}
    other.write_bytes(canonical_header(metadata, infos) + data)
    requirement = refused(other)
    if requirement in ("DLT-041", "DLT-042"):
        assert list(validate_delta(other)) == []
    elif requirement is not None:
        assert [f.requirement for f in validate_delta(other)][:1] == [requirement]


def refused(path):
    """The requirement that a reader names, None if it takes the file; other errors go through."""
    try:
        with DeltaFile.open(path) as delta:
            for name, record in delta.document.weights.items():
                carrier = DTYPES[record.bound.lut].numpy
                delta.tuned(name, np.ones(record.bound.shape, carrier))
    except FormatError as error:
        return error.requirement
    return None
