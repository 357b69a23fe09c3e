"""The writers: exact sizes, one set of bytes, nothing left behind or overwritten by mistake."""

import errno
import math
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchconv.formats import part, staging
from sketchconv.formats.dense_folder import DenseFolderWriter, dense_layouts
from sketchconv.formats.digest import tensor_digest
from sketchconv.formats.errors import OutputFailure, SketchconvError
from sketchconv.formats.reader import SktchFile, SktchModel
from sketchconv.formats.strict_json import Fixed, Limits, loads
from sketchconv.formats.tensors import TensorInfo
from sketchconv.formats.validate import validate
from sketchconv.formats.writer import (
    BundleWriter,
    FolderWriter,
    Results,
    bundle_size,
    folder_sizes,
)

TESTS = Path(__file__).resolve().parent


def content(path):
    """The bytes of a file, or of every file of a folder by its path."""
    if path.is_file():
        return path.read_bytes()
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------- contents


@pytest.mark.parametrize("groups", [1, 3, 7, 21])
@pytest.mark.parametrize("form", ["bundle", "folder"])
def test_round_trip(tmp_path, toy_factory, form, groups):
    toy = toy_factory(rows=3, columns=21, groups=groups)
    path = getattr(toy, form)(tmp_path / "m.sktch")
    assert list(validate(path)) == []
    with SktchModel.open(path) as model:
        for record in toy.records:
            assert model.manifest.sketches[record.name] == record
            got = model.sketch(record.name)
            assert (got.indices.reshape(3, groups, -1) == toy.codes[record.name]).all()
            assert (got.lut == toy.luts[record.name]).all()
            assert got.bits == record.bits
            assert (model.decode(record.name) == toy.dense(record.name)).all()
            assert model.manifest.errors[record.name] == pytest.approx(0.01 * record.bits)
        for name, (info, data) in toy.plain.items():
            assert model.tensors[name] == info
            assert model.read(name) == data
            assert model.read(name, 1, 2) == data[1:2]
        assert model.file("config.json") == toy.files["config.json"]
        assert model.file("e.txt") == b""
        assert model.config()["quantization_config"]["quant_method"] == "sktch"
        assert model.manifest.aliases == {"head.weight": "l.1.weight"}
        assert model.manifest.source["digest"] == "a" * 64
        assert model.is_bundle == (form == "bundle")


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_lut_dtypes(tmp_path, dtype):
    from sketchconv.formats.sketches import SketchRecord
    from sketchconv.formats.writer import Draft

    record = SketchRecord("m.weight", (1, 4), "F32", 2, 1, dtype)
    values = {
        "F16": np.array([-1.5, 0, 2**-24, 65504], np.float16),
        "BF16": np.array([0xBFC0, 0, 1, 0x7F7F], np.uint16),
        "F32": np.array([-1.5, 0.1, 1e-45, 3.4028235e38], np.float32),
    }[dtype]
    with BundleWriter(tmp_path / "a", Draft(sketches=(record,)), {}) as writer:
        writer.append(record.index_name, bytes([0b11100100]))
        writer.append(record.lut_name, values)
        writer.commit(Results({"m.weight": 0.0}, "0" * 64))
    with SktchFile.open(tmp_path / "a") as file:
        got = file.decode("m.weight")
    wide = values.astype(np.uint32) << 16 if dtype == "BF16" else values.astype(np.float32)
    assert got.tobytes() == wide.tobytes()


def test_digests_are_those_of_the_tensors(tmp_path, toy):
    with SktchFile.open(toy.bundle(tmp_path / "a")) as file:
        for name, entry in file.container.entries.items():
            want = tensor_digest(entry.info, file.container.read(name))
            assert file.manifest.digests[name] == want


def test_empty_draft(tmp_path):
    from sketchconv.formats.writer import Draft

    for writer in (
        BundleWriter(tmp_path / "a", Draft(), {}),
        FolderWriter(tmp_path / "b", Draft(), {}, 9),
    ):
        with writer:
            writer.commit(Results({}, "0" * 64))
    assert list(validate(tmp_path / "a")) == []
    assert names(tmp_path / "b") == ["model.safetensors"]


# ---------------------------------------------------------------- sizes and shards


def test_sizes_are_exact(tmp_path, toy):
    path = toy.bundle(tmp_path / "a.sktch")
    assert path.stat().st_size == bundle_size(toy.draft, toy.files)
    for limit in (1, 300, 1000, 10**9):
        folder = toy.folder(tmp_path / f"m{limit}", limit)
        found = {p.name: p.stat().st_size for p in folder.iterdir()}
        assert found == folder_sizes(toy.draft, toy.files, limit)


def test_size_formula_of_the_specification(tmp_path, toy):
    from sketchconv.formats.packing import packed_size

    path = toy.bundle(tmp_path / "a.sktch")
    data = sum(
        r.shape[0] * r.groups * (packed_size(r.group_size, r.bits) + 2**r.bits * 2)
        for r in toy.records
    )
    data += 1 + sum(info.nbytes for info, _ in toy.plain.values()) + len(toy.files["config.json"])
    with SktchFile.open(path) as file:
        text = len(file.container.header()[8:].rstrip(b" "))
    n = 64 * -(-(8 + text) // 64) - 8
    assert path.stat().st_size == 8 + n + data


@pytest.mark.parametrize("limit", [1, 300, 1000])
def test_shards_keep_to_the_limit_and_sketches_stay_whole(tmp_path, toy, limit):
    folder = toy.folder(tmp_path / "m", limit)
    with SktchModel.open(folder) as model:
        assert len(model.shards) > 1
        assert sorted(model.shards) == sorted(p.name for p in folder.glob("model-*"))
        for shard in model.shards.values():
            stored = [
                e.info for n, e in shard.container.entries.items() if n != shard.manifest.sentinel
            ]
            units = {i.name.replace("sketch_index", "").replace("sketch_lut", "") for i in stored}
            assert sum(i.nbytes for i in stored) <= limit or len(units) == 1
            for record in shard.manifest.sketches.values():
                assert {record.index_name, record.lut_name} <= set(shard.container.entries)
            assert set(shard.manifest.digests) == set(shard.container.entries)
            assert shard.manifest.sentinel == min(shard.manifest.sketches, default=None)
            SktchFile.open(shard.container.path).close()


def test_shards_follow_the_layers_in_natural_order(tmp_path):
    from sketchconv.formats.tensors import TensorInfo
    from sketchconv.formats.writer import Draft

    infos = tuple(TensorInfo(f"layers.{i}.w", "U8", (4,)) for i in range(12))
    with FolderWriter(tmp_path / "m", Draft(plain=infos[::-1]), {}, 8) as writer:
        for info in infos:
            writer.append(info.name, b"abcd")
        writer.commit(Results({}, "0" * 64))
    with SktchModel.open(tmp_path / "m") as model:
        cut = [list(model.shards[name].container.entries) for name in sorted(model.shards)]
    assert cut == [[f"layers.{i}.w", f"layers.{i + 1}.w"] for i in range(0, 12, 2)]


def test_every_record_is_checked_once(tmp_path, toy, monkeypatch):
    from sketchconv.formats.sketches import SketchRecord

    path, checked = toy.bundle(tmp_path / "a.sktch"), []
    check = SketchRecord.check
    monkeypatch.setattr(SketchRecord, "check", lambda r, at: (checked.append(r.name), check(r, at)))
    SktchFile.open(path).close()
    assert sorted(checked) == sorted(r.name for r in toy.records)


def test_shard_size_must_be_positive(tmp_path, toy):
    with pytest.raises(ValueError, match="max_shard_size"):
        FolderWriter(tmp_path / "m", toy.draft, {}, 0)


# ---------------------------------------------------------------- determinism


@pytest.mark.parametrize("form", ["bundle", "folder"])
def test_same_bytes_whatever_the_order_and_the_chunks(tmp_path, toy, form):
    options = {"max_shard_size": 500} if form == "folder" else {}
    want = content(getattr(toy, form)(tmp_path / "first", **options))
    rng = random.Random(7)
    for i in range(3):
        path = tmp_path / str(i)
        if form == "bundle":
            writer = BundleWriter(path, toy.draft, toy.files)
        else:
            writer = FolderWriter(path, toy.draft, toy.files, 500)
        left = {name: memoryview(data) for name, data in toy.tensors().items()}
        with writer:
            while left:
                name = rng.choice(sorted(left))
                size = rng.randint(1, 40)
                writer.append(name, left[name][:size])
                left[name] = left[name][size:]
                if not left[name]:
                    del left[name]
            writer.commit(toy.results)
        assert content(path) == want


def test_no_clock_in_the_bytes(tmp_path, toy):
    toy.bundle(tmp_path / "a.sktch")
    script = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from pathlib import Path
        from conftest import make_toy
        make_toy().bundle(Path({str(tmp_path / "b.sktch")!r}))
    """
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "a.sktch").read_bytes() == (tmp_path / "b.sktch").read_bytes()


# ---------------------------------------------------------------- mistakes of the caller


def test_mistakes_leave_nothing(tmp_path, toy):
    norm = "norm.weight"
    with BundleWriter(tmp_path / "a", toy.draft, {}) as writer, pytest.raises(KeyError):
        writer.append("nothing", b"x")
    assert names(tmp_path) == []
    with BundleWriter(tmp_path / "a", toy.draft, {}) as writer:
        writer.append(norm, b"x" * 12)
        with pytest.raises(ValueError, match="13 bytes given, the tensor has 12"):
            writer.append(norm, b"x")
        assert names(tmp_path) == []
        with pytest.raises(ValueError, match="closed"):
            writer.append(norm, b"x")
    with BundleWriter(tmp_path / "a", toy.draft, {}) as writer:
        writer.append(norm, b"x" * 11)
        with pytest.raises(ValueError, match="bytes were given"):
            writer.commit(toy.results)
    with BundleWriter(tmp_path / "a", toy.draft, {}) as writer:
        for name, data in toy.tensors().items():
            writer.append(name, data)
        with pytest.raises(KeyError):
            writer.commit(Results({}, "0" * 64))
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [float("nan"), float("inf"), -1.0, 9.9999995e99, 1e100])
def test_bad_errors_leave_nothing(tmp_path, small_toy, error):
    with BundleWriter(tmp_path / "a", small_toy.draft, {}) as writer:
        for name, data in small_toy.tensors().items():
            writer.append(name, data)
        with pytest.raises(ValueError, match="error metric"):
            writer.commit(Results({"l.2.weight": error}, "0" * 64))
    assert names(tmp_path) == []


def test_tiny_and_huge_errors_keep_their_width(tmp_path, small_toy):
    for i, error in enumerate([0.0, 1e-300, 9.9999999e-1, 1.0, 123456.789, 9e98]):
        with BundleWriter(tmp_path / str(i), small_toy.draft, {}) as writer:
            for name, data in small_toy.tensors().items():
                writer.append(name, data)
            writer.commit(Results({"l.2.weight": error}, "0" * 64))
        with SktchFile.open(tmp_path / str(i)) as file:
            assert file.manifest.errors["l.2.weight"] == pytest.approx(error, rel=1e-6, abs=1e-99)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (0.0, "0.000000e+00"),
        (-0.0, "0.000000e+00"),
        (9.9e-100, "0.000000e+00"),
        (5e-324, "0.000000e+00"),
        (1e-99, "1.000000e-99"),
        (0.5, "5.000000e-01"),
        (0.99999999, "1.000000e+00"),
        (9.9999999, "1.000000e+01"),
        (math.nextafter(9.9999995e99, 0), "9.999999e+99"),
    ],
)
def test_each_error_has_one_text(tmp_path, small_toy, error, text):
    with BundleWriter(tmp_path / "a", small_toy.draft, {}) as writer:
        for name, data in small_toy.tensors().items():
            writer.append(name, data)
        writer.commit(Results({"l.2.weight": error}, "0" * 64))
    assert list(validate(tmp_path / "a")) == []
    with SktchFile.open(tmp_path / "a") as file:
        assert f'"errors":{{"l.2.weight":{text}}}' in file.container.metadata["sktch"]


@settings(max_examples=500, deadline=None)
@given(st.floats(0, 9.9999995e99, exclude_max=True))
def test_every_error_has_a_text_that_the_reader_takes(error):
    text = Fixed.of(error).text
    value = loads(b'{"a":' + text.encode() + b"}", "here", Limits(2, 2, fixed=True))["a"]
    assert value.text == text
    assert Fixed.of(value).text == text


def test_recipe_with_a_fraction(tmp_path, small_toy):
    from dataclasses import replace

    with pytest.raises(TypeError, match="float"):
        BundleWriter(tmp_path / "a", replace(small_toy.draft, recipe={"x": 0.5}), {})


def test_big_endian_arrays_are_refused(tmp_path, small_toy):
    with (
        BundleWriter(tmp_path / "a", small_toy.draft, {}) as writer,
        pytest.raises(ValueError, match="little-endian"),
    ):
        writer.append("norm.weight", np.zeros(3, ">f4"))


# ---------------------------------------------------------------- nothing left behind


@pytest.mark.parametrize("form", ["bundle", "folder"])
def test_abort_and_exceptions_leave_nothing(tmp_path, toy, form):
    def make():
        if form == "bundle":
            return BundleWriter(tmp_path / "m", toy.draft, toy.files)
        return FolderWriter(tmp_path / "m", toy.draft, toy.files, 500)

    writer = make()
    writer.append("norm.weight", b"abc")
    assert names(tmp_path) == [".m.sktch-partial"]
    writer.abort()
    writer.abort()
    assert names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), make():
        raise KeyboardInterrupt
    with make():
        pass
    assert names(tmp_path) == []


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from conftest import make_toy
    from sketchconv.formats import writer as w
    toy, path, count = make_toy(), Path({path!r}), 0
    if {form!r} == "bundle":
        writer = w.BundleWriter(path, toy.draft, toy.files)
    else:
        writer = w.FolderWriter(path, toy.draft, toy.files, 500)
    real = {{name: getattr(os, name) for name in ("pwrite", "fsync", "rename", "replace")}}
    def counted(name):
        def call(*args, **kwargs):
            global count
            count += 1
            if count == {at}:
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*args, **kwargs)
        return call
    for name in real:
        setattr(os, name, counted(name))
    toy.fill(writer)
"""


@pytest.mark.parametrize("form", ["bundle", "folder"])
@pytest.mark.parametrize("at", [1, 9, 19, 20, 21, 22, 24, 30])
def test_killed_at_any_point_the_output_is_absent_or_complete(tmp_path, toy, form, at):
    path = tmp_path / "m"
    script = textwrap.dedent(KILLED).format(tests=str(TESTS), path=str(path), form=form, at=at)
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    if done.returncode == 0 or path.exists():
        assert list(validate(path)) == []
    if not path.exists():
        assert names(tmp_path) == [".m.sktch-partial"]
        getattr(toy, form)(path)
        assert list(validate(path)) == []
        assert names(tmp_path) == ["m"]


# ---------------------------------------------------------------- a full or failing disk


@pytest.mark.parametrize("form", ["bundle", "folder"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
def test_failing_calls_leave_nothing(tmp_path, toy, form, code, call, monkeypatch):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputFailure) as caught:
        getattr(toy, form)(tmp_path / "m")
    word = "No" if code == errno.ENOSPC else os.strerror(code)[:5]
    assert ("full" if code != errno.EIO else word) in str(caught.value)
    monkeypatch.undo()
    assert names(tmp_path) == []


@pytest.mark.parametrize("rename_fails", [False, True])
@pytest.mark.parametrize("form", ["bundle", "folder"])
def test_a_name_that_cannot_be_made_lasting_is_taken_back(
    tmp_path, toy, form, rename_fails, monkeypatch
):
    """The last call of all: the output has its name already when the folder cannot be synced."""
    target, real = tmp_path / "m", staging.sync_folder

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def sync(path):
        if path == tmp_path:
            assert target.exists()
            if rename_fails:
                monkeypatch.setattr(os, "replace", fail)
            fail()
        real(path)

    monkeypatch.setattr(staging, "sync_folder", sync)
    with pytest.raises(OutputFailure, match=os.strerror(errno.EIO)):
        getattr(toy, form)(target)
    assert names(tmp_path) == []


def test_a_folder_that_was_there_is_back_when_its_successor_is_taken_back(
    tmp_path, toy, toy_factory, monkeypatch
):
    before = content(toy.folder(tmp_path / "m"))

    def fail(path):
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(staging, "sync_folder", fail)
    with pytest.raises(OutputFailure):
        toy_factory(rows=5).folder(tmp_path / "m", overwrite=True)
    assert content(tmp_path / "m") == before
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("form", ["bundle", "folder"])
def test_too_little_space_is_told_at_once_with_the_missing_bytes(tmp_path, toy, form, monkeypatch):
    monkeypatch.setattr(part, "free_bytes", lambda folder: 100)
    with pytest.raises(OutputFailure, match="missing") as caught:
        getattr(toy, form)(tmp_path / "m")
    sizes = folder_sizes(toy.draft, toy.files, 10**9)
    needed = bundle_size(toy.draft, toy.files) if form == "bundle" else sum(sizes.values())
    assert f"{needed} bytes needed, 100 free, {needed - 100} missing" in str(caught.value)
    assert names(tmp_path) == []


def test_without_fallocate(tmp_path, toy, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    want = content(toy.bundle(tmp_path / "a"))
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert content(toy.bundle(tmp_path / "b")) == want


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("form", ["bundle", "folder"])
def test_tiny_disk(tmp_path, toy_factory, form):
    toy = toy_factory(rows=400)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with pytest.raises(OutputFailure, match=r"[1-9][0-9]* missing"):
            getattr(toy, form)(disk / "m")
        assert names(disk) == []
        os.statvfs(disk)
        fits = toy_factory(rows=1)
        assert list(validate(getattr(fits, form)(disk / "m"))) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------- what is there already


def test_existing_outputs_are_kept(tmp_path, small_toy):
    (tmp_path / "a").write_bytes(b"mine")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"mine")
    with pytest.raises(OutputFailure, match="exists"):
        small_toy.bundle(tmp_path / "a")
    with pytest.raises(OutputFailure, match="exists"):
        small_toy.folder(tmp_path / "b")
    with pytest.raises(OutputFailure, match="not a folder that sketchconv wrote"):
        small_toy.folder(tmp_path / "b", overwrite=True)
    with pytest.raises(OutputFailure, match="not a regular file"):
        small_toy.bundle(tmp_path / "b", overwrite=True)
    with pytest.raises(OutputFailure, match="not a folder"):
        small_toy.folder(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert (tmp_path / "b" / "x").read_bytes() == b"mine"
    assert names(tmp_path) == ["a", "b"]


def test_overwrite_on_request(tmp_path, small_toy, toy):
    (tmp_path / "a").write_bytes(b"old")
    small_toy.bundle(tmp_path / "a", overwrite=True)
    assert list(validate(tmp_path / "a")) == []
    toy.folder(tmp_path / "b", 500)
    small_toy.folder(tmp_path / "b", overwrite=True)
    assert names(tmp_path / "b") == ["config.json", "e.txt", "model.safetensors"]
    (tmp_path / "c").mkdir()
    small_toy.folder(tmp_path / "c")
    assert names(tmp_path) == ["a", "b", "c"]


def test_a_repository_is_never_replaced(tmp_path, small_toy):
    folder = small_toy.folder(tmp_path / "m")
    (folder / ".git").mkdir()
    with pytest.raises(OutputFailure, match="not a folder that sketchconv wrote"):
        small_toy.folder(folder, overwrite=True)


@pytest.mark.parametrize("form", ["bundle", "folder"])
def test_output_that_appears_meanwhile_is_kept(tmp_path, small_toy, form):
    target = tmp_path / "m"
    if form == "bundle":
        writer = BundleWriter(target, small_toy.draft, {})
    else:
        writer = FolderWriter(target, small_toy.draft, {}, 10**9)
    target.write_bytes(b"mine")
    with pytest.raises(OutputFailure, match="exists"), writer:
        small_toy.fill(writer)
    assert names(tmp_path) == ["m"]
    assert target.read_bytes() == b"mine"


def test_links_and_missing_folders_are_refused(tmp_path, small_toy):
    (tmp_path / "link").symlink_to("elsewhere")
    for form in (small_toy.bundle, small_toy.folder):
        with pytest.raises(OutputFailure, match="link"):
            form(tmp_path / "link", overwrite=True)
        with pytest.raises(OutputFailure, match="no folder"):
            form(tmp_path / "none" / "m")
    assert names(tmp_path) == ["link"]


@pytest.mark.parametrize("form", ["bundle", "folder"])
def test_one_writer_per_output(tmp_path, small_toy, form):
    make = getattr(small_toy, form)
    kind = BundleWriter if form == "bundle" else FolderWriter
    more = () if form == "bundle" else (10**9,)
    with kind(tmp_path / "m", small_toy.draft, {}, *more):
        with pytest.raises(OutputFailure, match="another process"):
            make(tmp_path / "m")
        assert names(tmp_path) == [".m.sktch-partial"]
    make(tmp_path / "m")
    assert names(tmp_path) == ["m"]


def test_a_link_in_place_of_the_temporary_is_not_followed(tmp_path, small_toy):
    (tmp_path / "victim").write_bytes(b"mine")
    staging.staging_path(tmp_path / "m").symlink_to("victim")
    for form in (small_toy.bundle, small_toy.folder):
        with pytest.raises(SketchconvError):
            form(tmp_path / "m")
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_mode_follows_the_umask(tmp_path, small_toy):
    old = os.umask(0o027)
    try:
        file, folder = small_toy.bundle(tmp_path / "a"), small_toy.folder(tmp_path / "b")
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o640


def test_no_descriptor_leaks(tmp_path, toy):
    for i in range(3):
        toy.folder(tmp_path / f"m{i}", 300)
        SktchModel.open(tmp_path / f"m{i}").close()
        with pytest.raises(OutputFailure):
            toy.folder(tmp_path / f"m{i}", 300)
        with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "x", toy.draft, {}):
            raise KeyboardInterrupt
    # Not how many there are: what other tests left open may be closed at any time.
    opened = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.is_relative_to(tmp_path.resolve())]


@contextmanager
def few_descriptors(left):
    """So many more files can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (most + 1 + left, hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(left):
            os.close(taken.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)


@pytest.mark.parametrize("form", ["sketch", "dense"])
def test_too_many_shards_for_the_system_are_told_and_leave_nothing(tmp_path, toy, form):
    layouts = dense_layouts([TensorInfo(f"t{i}", "F32", (4,)) for i in range(20)], 1)
    write = {
        "sketch": lambda path: toy.folder(path, 1),
        "dense": lambda path: DenseFolderWriter(path, layouts, {}),
    }[form]
    with few_descriptors(4), pytest.raises(OutputFailure, match="files; choose larger shards"):
        write(tmp_path / "m")
    assert names(tmp_path) == []
