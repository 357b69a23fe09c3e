"""The writer of GGUF files: exact sizes, parts, and nothing by halves."""

from __future__ import annotations

import os
import resource

import gguf
import numpy as np
import pytest

from sketchconv.errors import OutputError
from sketchconv.formats import gguf_values as v
from sketchconv.formats.gguf_layout import GgufInfo, gguf_layout, part_layouts
from sketchconv.formats.gguf_types import FILE_TYPES, GGML_TYPES
from sketchconv.formats.gguf_writer import GgufWriter

F32, Q8_0 = GGML_TYPES["F32"], GGML_TYPES["Q8_0"]
VALUES = {
    "general.architecture": v.string("llama"),
    "a.text": v.string("Grüße 🚀"),
    "a.u32": v.uint32(7),
    "a.u64": v.uint64(1 << 40),
    "a.i32": v.int32(-5),
    "a.u16": v.uint16(9),
    "a.f32": v.float32(1e-5),
    "a.flag": v.boolean(True),
    "a.texts": v.strings(["x", "", "ÿ"]),
    "a.ints": v.int32s([1, -2]),
    "a.floats": v.float32s([0.5, -1.0]),
}
TENSORS = (
    GgufInfo("one", (5,), F32),
    GgufInfo("two", (3, 7), F32),
    GgufInfo("quantized", (2, 64), Q8_0),
    GgufInfo("cube", (2, 3, 32), Q8_0),
)


def data(info):
    return np.random.default_rng(len(info.name)).integers(0, 64, info.nbytes, np.uint8).tobytes()


def write(folder, layouts, tensors=TENSORS, **options):
    with GgufWriter(folder, layouts, **options) as writer:
        for info in tensors:
            for begin in range(0, info.nbytes, 50):
                writer.append(info.name, data(info)[begin : begin + 50])
        writer.commit()


def test_the_types_are_those_of_the_gguf_package():
    for number, (block, size) in gguf.GGML_QUANT_SIZES.items():
        found = GGML_TYPES[number.name]
        assert (found.number, found.block, found.block_bytes) == (int(number), block, size)
    assert len(GGML_TYPES) == len(gguf.GGML_QUANT_SIZES)
    numbers = {int(kind) for kind in gguf.LlamaFileType}
    assert set(FILE_TYPES.values()) <= numbers


@pytest.mark.parametrize("alignment", [32, 256])
def test_the_gguf_package_reads_every_value_and_tensor(tmp_path, alignment):
    values = {**VALUES, "general.alignment": v.uint32(alignment)}
    layout = gguf_layout(values, TENSORS, alignment)
    write(tmp_path, {"x.gguf": layout})
    path = tmp_path / "x.gguf"
    assert path.stat().st_size == layout.size
    reader = gguf.GGUFReader(path)
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["a.text"] == "Grüße 🚀"
    assert [found[f"a.{k}"] for k in ("u32", "u64", "i32", "u16")] == [7, 1 << 40, -5, 9]
    assert found["a.f32"] == np.float32(1e-5)
    assert found["a.flag"] is True
    assert found["a.texts"] == ["x", "", "ÿ"]
    assert found["a.ints"] == [1, -2]
    assert found["a.floats"] == [0.5, -1.0]
    assert [t.name for t in reader.tensors] == [t.name for t in TENSORS]
    for tensor, info in zip(reader.tensors, TENSORS, strict=True):
        assert tensor.tensor_type.name == info.type.name
        assert tuple(reversed(tensor.shape.tolist())) == info.shape
        assert tensor.data_offset % alignment == 0
        assert np.asarray(tensor.data).tobytes() == data(info)


def test_parts_hold_what_llama_cpp_expects(tmp_path):
    layouts = part_layouts("m.gguf", VALUES, TENSORS, 150)
    assert list(layouts) == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    write(tmp_path, layouts)
    names = []
    for number, name in enumerate(layouts):
        reader = gguf.GGUFReader(tmp_path / name)
        assert reader.fields["split.no"].contents() == number
        assert reader.fields["split.count"].contents() == 3
        assert reader.fields["split.tensors.count"].contents() == len(TENSORS)
        assert ("a.text" in reader.fields) == (number == 0)
        names += [t.name for t in reader.tensors]
        for tensor in reader.tensors:
            info = next(t for t in TENSORS if t.name == tensor.name)
            assert np.asarray(tensor.data).tobytes() == data(info)
    assert names == [t.name for t in TENSORS]


def test_one_part_keeps_its_name():
    assert list(part_layouts("a.b.GGUF", {}, TENSORS, 10**9)) == ["a.b.GGUF"]


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ([GgufInfo("x" * 64, (4,), F32)], "at most 63 bytes"),
        ([GgufInfo("é" * 32, (4,), F32)], "at most 63 bytes"),
        ([GgufInfo("x", (4,), F32)] * 2, "used twice"),
        ([GgufInfo("x", (1, 1, 1, 1, 4), F32)], "cannot be written"),
        ([GgufInfo("x", (), F32)], "cannot be written"),
        ([GgufInfo("x", (0, 4), F32)], "cannot be written"),
        ([GgufInfo("x", (2, 33), Q8_0)], "no multiple of 32"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tensors, text):
    with pytest.raises(OutputError, match=text):
        part_layouts("x.gguf", {}, tensors)


@pytest.mark.parametrize(
    "make",
    [
        lambda: v.string("\ud800"),
        lambda: v.uint32(-1),
        lambda: v.uint16(1 << 16),
        lambda: v.float32(1e39),
    ],
)
def test_values_that_do_not_fit_are_refused(make):
    with pytest.raises(OutputError, match="GGUF metadata"):
        make()


def test_a_file_without_a_name_is_refused():
    with pytest.raises(OutputError, match="needs a name"):
        part_layouts(".gguf", {}, TENSORS)


def test_incomplete_overfull_and_aborted_outputs_leave_nothing(tmp_path):
    layouts = part_layouts("m.gguf", VALUES, TENSORS, 150)
    with GgufWriter(tmp_path, layouts) as writer, pytest.raises(ValueError, match="of 20 bytes"):
        writer.commit()
    assert not any(tmp_path.iterdir())
    with GgufWriter(tmp_path, layouts) as writer:
        with pytest.raises(ValueError, match="21 bytes given"):
            writer.append("one", bytes(21))
        with pytest.raises(KeyError):
            writer.append("three", b"")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="closed"):
        writer.append("one", b"")


def test_existing_outputs_stay_unless_they_may_be_replaced(tmp_path):
    layouts = part_layouts("m.gguf", VALUES, TENSORS, 150)
    second = tmp_path / "m-00002-of-00003.gguf"
    second.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists"):
        GgufWriter(tmp_path, layouts)
    assert [p.name for p in tmp_path.iterdir()] == [second.name]
    assert second.read_bytes() == b"mine"
    write(tmp_path, layouts, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_rename_takes_new_parts_back(tmp_path, monkeypatch):
    from sketchconv.formats import staging

    layouts = part_layouts("m.gguf", VALUES, TENSORS, 150)
    publish, calls = staging.publish, []

    def fail_at_the_first_part(path, **options):
        calls.append(path.name)
        if path.name.startswith("m-00001"):
            raise OutputError("no")
        publish(path, **options)

    monkeypatch.setattr(staging, "publish", fail_at_the_first_part)
    with pytest.raises(OutputError, match="no"):
        write(tmp_path, layouts)
    assert len(calls) == 3
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupted_replacement_of_parts_leaves_the_old_model(
    tmp_path, monkeypatch, number, before
):
    from sketchconv.formats import staging

    layouts = part_layouts("m.gguf", VALUES, TENSORS, 150)
    for name in layouts:
        (tmp_path / name).write_bytes(b"old " + name.encode())
    publish = staging.publish

    def stop(path, **options):
        last = path.name.startswith(f"m-0000{number}")
        if not (last and before):
            publish(path, **options)
        if last:
            raise KeyboardInterrupt

    monkeypatch.setattr(staging, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, layouts, overwrite=True)
    found = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert found == {name: b"old " + name.encode() for name in layouts}


def test_replaced_parts_leave_nothing_beside_the_new_ones(tmp_path):
    layouts = part_layouts("m.gguf", VALUES, TENSORS, 150)
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(b"old")
    write(tmp_path, layouts, overwrite=True)
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {
        name: layout.size for name, layout in layouts.items()
    }


@pytest.mark.parametrize("limit", [None, 150])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path, limit):
    layouts = part_layouts("m.gguf", VALUES, TENSORS, limit)
    theirs = tmp_path / list(layouts)[-1]
    with GgufWriter(tmp_path, layouts) as writer:
        for info in TENSORS:
            writer.append(info.name, data(info))
        finish = writer._files[theirs].finish
        writer._files[theirs].finish = lambda: (finish(), theirs.write_bytes(b"theirs"))
        with pytest.raises(OutputError, match="exists"):
            writer.commit()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {theirs.name: b"theirs"}


def test_a_full_disk_is_told_in_bytes_and_leaves_nothing(tmp_path, monkeypatch):
    class Disk:
        f_bavail, f_frsize = 1, 100

    monkeypatch.setattr(os, "statvfs", lambda _: Disk)
    with pytest.raises(OutputError, match=r"bytes needed, 100 free, \d+ missing"):
        GgufWriter(tmp_path, part_layouts("m.gguf", VALUES, TENSORS))
    monkeypatch.undo()
    assert not any(tmp_path.iterdir())


def test_too_many_parts_for_the_system_are_told(tmp_path):
    tensors = [GgufInfo(f"t{i}", (4,), F32) for i in range(200)]
    layouts = part_layouts("m.gguf", VALUES, tensors, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        with pytest.raises(OutputError, match="no more files at once; choose larger parts"):
            GgufWriter(tmp_path, layouts)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not any(tmp_path.iterdir())


def test_two_writers_of_one_output_meet(tmp_path):
    layouts = part_layouts("m.gguf", VALUES, TENSORS)
    with GgufWriter(tmp_path, layouts) as first:
        with pytest.raises(OutputError, match="another process"):
            GgufWriter(tmp_path, layouts)
        for info in TENSORS:
            first.append(info.name, data(info))
        first.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
