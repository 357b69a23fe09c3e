"""Hostile input that is not a committed vector: too large, not a file, links, changing files.

The committed vectors (see test_spec.py) hold the other cases, one broken requirement each.
"""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sketchconv.formats.container import Container
from sketchconv.formats.errors import FormatError
from sketchconv.formats.folder import find_shards
from sketchconv.formats.reader import SktchFile, SktchModel
from sketchconv.formats.sniff import describe_head, kind_of_head
from sketchconv.formats.validate import validate


def refused(requirement, action, *arguments, **options):
    with pytest.raises(FormatError) as caught:
        action(*arguments, **options)
    assert caught.value.requirement == requirement
    assert len(str(caught.value)) < 600
    return caught.value


# ---------------------------------------------------------------- not a file


def test_folder_is_no_file(tmp_path):
    refused("SKT-001", Container.open, tmp_path)


def test_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "p.sktch")
    refused("SKT-001", SktchModel.open, tmp_path / "p.sktch")


def test_device():
    refused("SKT-001", Container.open, "/dev/zero")


def test_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.sktch")
        refused("SKT-001", Container.open, "s.sktch")


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        SktchModel.open(tmp_path / "none.sktch")


def test_pipe_as_a_shard(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    refused("SKT-001", SktchModel.open, tmp_path)


# ---------------------------------------------------------------- what a file looks like


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"<!doctype html><html>", "web page"),
        (b"GGUF\3\0\0\0", "GGUF"),
        (b"PK\3\4", "pickle"),
        (b"\x80\2}q\0X\1\0\0\0aq", "pickle"),
        (b"\x7fELF\2\1\1\0", "ELF"),
        (b"%PDF-1.7", "PDF"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "gzip"),
    ],
)
def test_the_error_says_what_the_file_is(tmp_path, head, word):
    path = tmp_path / "model.safetensors"
    path.write_bytes(head + bytes(2000))
    for profile in ("sktch", "safetensors"):
        with pytest.raises(FormatError, match=word):
            Container.open(path, profile=profile)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\xef\xbb\xbf\n<!DOCTYPE html>", "web"),
        (b"<?xml version", "web"),
        (b"GGUF", "gguf"),
        (b"PK\5\6", "empty-zip"),
        (b"\x80\5", "pickle"),
        (b"\x89HDF\r\n", "hdf5"),
        (b"{}", "json"),
        (b"\x40\0\0\0\0\0\0\0{", None),
        (b"", None),
    ],
)
def test_kinds_of_heads(head, kind):
    assert kind_of_head(head) == kind
    assert bool(describe_head(head)) == (kind is not None)


# ---------------------------------------------------------------- size


def test_sparse_terabyte(tmp_path, raw_file):
    path = tmp_path / "a.sktch"
    path.write_bytes(raw_file('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"))
    os.truncate(path, 2**40)
    refused("SKT-029", Container.open, path)
    path.write_bytes(b"")
    os.truncate(path, 2**40)
    refused("SKT-003", Container.open, path)


def tensors(count, text='"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{j}]}}'):
    return "{" + ",".join(text.format(i=i, j=i + 1) for i in range(count)) + "}"


def test_too_many_tensors(tmp_path, raw_file):
    path = tmp_path / "a.sktch"
    path.write_bytes(raw_file(tensors(200_001), bytes(200_001)))
    refused("SKT-020", Container.open, path)


def test_the_most_tensors(tmp_path, raw_file):
    path = tmp_path / "a.sktch"
    path.write_bytes(raw_file(tensors(200_000), bytes(200_000)))
    with Container.open(path) as container:
        assert len(container.entries) == 200_000


def test_a_million_tensors_are_refused_before_they_are_parsed(tmp_path, raw_file):
    path = tmp_path / "a.sktch"
    path.write_bytes(raw_file(tensors(1_000_001, '"{i}":{{}}')))
    refused("SKT-020", Container.open, path)
    path.write_bytes(raw_file('{"a":[' + "1," * 4_000_000 + "1]}"))
    refused("SKT-012", Container.open, path)


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"a":{"dtype":"U8","shape":[' + "1," * 100_000 + "1]}}",
        '{"a":"' + '\\"' * 500_000,
        '{"a":' + '"",' * 300_000,
        '{"' + "\\" * 1_000_001,
        '{"a":' + "9" * 1_000_000 + "}",
        '{"a":-' + "9" * 1_000_000 + "}",
        '{"a":1e' + "9" * 1_000_000 + "}",
        '{"a":0.' + "9" * 1_000_000 + "}",
    ],
    ids=[
        "arrays",
        "objects",
        "rank",
        "escapes",
        "strings",
        "backslashes",
        "int",
        "neg",
        "exp",
        "frac",
    ],
)
def test_long_texts_end_in_a_format_error(tmp_path, raw_file, body):
    path = tmp_path / "a.sktch"
    path.write_bytes(raw_file(body))
    with pytest.raises(FormatError):
        Container.open(path)
    with pytest.raises(FormatError):
        Container.open(path, profile="safetensors")


def test_memory_is_bounded_by_the_file_not_by_what_it_claims(tmp_path, raw_file):
    """Every claim of 2^40 and more is refused under an address space limit of 1 GiB more."""
    claims = [
        b"\xff\xff\xff\xff\xff\x00\x00\x00{",
        raw_file('{"a":{"dtype":"F64","shape":[1099511627776],"data_offsets":[0,8796093022208]}}'),
        raw_file('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,9223372036854775807]}}'),
        raw_file('{"a":' + "[]," * 7_000_000 + "[]}"),
        raw_file('{"a":' + '"",' * 7_000_000 + '""}'),
        raw_file('{"a":' + '{"":0},' * 3_000_000 + "0}"),
    ]
    for i, content in enumerate(claims):
        (tmp_path / f"{i}.sktch").write_bytes(content)
    script = """
        import resource, sys
        from sketchconv.formats.container import Container
        from sketchconv.formats.errors import FormatError
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
        for path in sys.argv[1:]:
            for profile in ("sktch", "safetensors"):
                try:
                    Container.open(path, profile=profile)
                except FormatError:
                    continue
                sys.exit(path)
    """
    paths = [tmp_path / f"{i}.sktch" for i in range(len(claims))]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), *paths], check=True)


# ---------------------------------------------------------------- changing files


def test_file_that_shrinks_while_open(tmp_path, toy):
    path = toy.bundle(tmp_path / "a.sktch")
    with SktchFile.open(path) as file:
        os.truncate(path, file.container.data_begin + 10)
        refused("SKT-013", file.decode, "l.8.weight")
        refused("SKT-013", file.container.array, "norm.weight")


def test_validate_reports_a_file_that_shrinks(tmp_path, toy):
    path = toy.bundle(tmp_path / "a.sktch")
    size = path.stat().st_size

    def shrink(done, total):
        os.truncate(path, size // 2)

    found = {f.requirement for f in validate(path, shrink)}
    assert "SKT-013" in found


def test_closed_container(tmp_path, toy):
    file = SktchFile.open(toy.bundle(tmp_path / "a.sktch"))
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.decode("l.1.weight")


@pytest.mark.parametrize("span", [(-1, 2), (0, 13), (5, 4), (13, 13)])
def test_ranges_outside_a_tensor(tmp_path, toy, span):
    with (
        SktchFile.open(toy.bundle(tmp_path / "a.sktch")) as file,
        pytest.raises(ValueError, match="not in"),
    ):
        file.container.read("norm.weight", *span)


# ---------------------------------------------------------------- folders


def test_link_out_of_the_folder(tmp_path, toy):
    outside, inside = tmp_path / "out.safetensors", tmp_path / "model"
    toy.bundle(tmp_path / "a.sktch").rename(outside)
    inside.mkdir()
    (inside / "model.safetensors").symlink_to(outside)
    refused("SKT-103", SktchModel.open, inside)
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to("../out.safetensors")
    refused("SKT-103", SktchModel.open, inside)


def test_shard_link_out_of_the_folder(tmp_path, toy):
    folder = toy.folder(tmp_path / "model", 500)
    shard = sorted(folder.glob("model-*"))[0]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    refused("SKT-103", SktchModel.open, folder)


def test_index_link_out_of_the_folder(tmp_path, toy):
    folder = toy.folder(tmp_path / "model", 500)
    index = folder / "model.safetensors.index.json"
    index.rename(tmp_path / "index")
    index.symlink_to(tmp_path / "index")
    refused("SKT-103", SktchModel.open, folder)


def test_config_link_out_of_the_folder(tmp_path, toy):
    folder = toy.folder(tmp_path / "model")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/hostname")
    with SktchModel.open(folder) as model:
        refused("SKT-103", model.config)
    assert [f.requirement for f in validate(folder)] == ["SKT-103"]


def test_link_in_a_circle_and_dangling_link(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    refused("SKT-103", find_shards, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("nothing")
    refused("SKT-104", find_shards, tmp_path)


def test_link_inside_the_folder(tmp_path, toy):
    folder = toy.folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert list(validate(folder)) == []


def as_cache(folder, repo):
    """Move a folder's files into `blobs` and link a snapshot to them, one file by two hops."""
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    (blobs / "0").rename(blobs / "0-real")
    (blobs / "0").symlink_to("0-real")
    return snapshot


@pytest.mark.parametrize("limit", [500, 10**9])
def test_hugging_face_cache(tmp_path, toy, limit):
    folder = toy.folder(tmp_path / "model", limit)
    snapshot = as_cache(folder, tmp_path / "models--a--b")
    assert list(validate(snapshot)) == []
    (tmp_path / "link").symlink_to(snapshot)
    assert list(validate(tmp_path / "link")) == []


def test_only_the_snapshot_itself_may_lead_to_the_blobs(tmp_path, toy):
    folder = toy.folder(tmp_path / "model")
    snapshot = as_cache(folder, tmp_path / "snapshots" / "x" / "models--a--b")
    assert list(validate(snapshot)) == []
    inner = snapshot / "inner"
    inner.mkdir()
    (inner / "model.safetensors").symlink_to((snapshot / "model.safetensors").resolve())
    refused("SKT-103", SktchModel.open, inner)


def test_another_repository_s_blobs_are_outside(tmp_path, toy):
    folder = toy.folder(tmp_path / "model")
    snapshot = as_cache(folder, tmp_path / "models--a--b")
    other = tmp_path / "models--c--d" / "snapshots" / "abc"
    other.mkdir(parents=True)
    (other / "model.safetensors").symlink_to((snapshot / "model.safetensors").resolve())
    refused("SKT-103", SktchModel.open, other)


def test_index_with_any_white_space_and_numbers(tmp_path, toy):
    folder = toy.folder(tmp_path / "model", 500)
    index = folder / "model.safetensors.index.json"
    numbers = '"x": [-1, 2.5E+3, 1e400, 9999999999999999999, -0, 1' + "0" * 5000 + "], "
    text = index.read_text().replace('"total_size"', numbers + '"total_size"')
    index.write_text("\r\n\t " + text + " \t\r\n")
    assert list(validate(folder)) == []


def test_index_that_is_too_large(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b"")
    os.truncate(path, 2**40)
    refused("SKT-101", find_shards, tmp_path)


def test_config_that_is_too_large_or_deep(tmp_path, toy):
    folder = toy.folder(tmp_path / "model")
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with SktchModel.open(folder) as model:
        refused("SKT-108", model.config)
        os.truncate(folder / "config.json", 2**40)
        refused("SKT-108", model.config)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "..\\x", "C:\\x", "a/../../x", "x\0y", "", ".", "..", "con.json"],
)
def test_folder_writer_refuses_paths_that_leave_it(tmp_path, toy, name):
    from sketchconv.formats.writer import FolderWriter

    refused("SKT-090", FolderWriter, tmp_path / "m", toy.draft, {name: b"x"}, 10**9)
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_with_a_climbing_index(tmp_path):
    for name in ("../x.safetensors", "/x.safetensors", "a\\x.safetensors", "x\0.safetensors"):
        index = {"weight_map": {"a": name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        refused("SKT-102", find_shards, tmp_path)


def test_only_pickles_are_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\2}q\0.")
    assert "pytorch_model.bin" in str(refused("SKT-100", SktchModel.open, tmp_path))


def test_pickle_renamed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x80\2}q\0X\1\0\0\0aq\1K\1s." + bytes(3000))
    assert "pickle" in str(refused("SKT-003", SktchModel.open, tmp_path))


# ---------------------------------------------------------------- what the writer refuses


def test_drafts_that_break_a_requirement(tmp_path, small_toy):
    from dataclasses import replace

    from sketchconv.formats.tensors import TensorInfo
    from sketchconv.formats.writer import BundleWriter, FolderWriter

    draft, record = small_toy.draft, small_toy.records[0]
    norm = draft.plain[0]
    bad = {
        "SKT-063": replace(draft, sketches=(replace(record, bits=9),)),
        "SKT-064": replace(draft, sketches=(replace(record, groups=2),)),
        "SKT-065": replace(draft, sketches=(replace(record, lut_dtype="F64"),)),
        "SKT-060": replace(draft, sketches=(replace(record, name="x.bias"),)),
        "SKT-062": replace(draft, sketches=(replace(record, shape=(0, 3)),)),
        "SKT-066": replace(draft, sketches=(replace(record, dtype="I8"),)),
        "SKT-023": replace(draft, plain=(TensorInfo("m", "BOOL", (1,)),)),
        "SKT-024": replace(draft, plain=(TensorInfo("m", "F32", (1,) * 9),)),
        "SKT-025": replace(draft, plain=(TensorInfo("m", "F32", (0,)),)),
        "SKT-009": replace(draft, plain=(norm, norm)),
        "SKT-085": replace(draft, aliases={norm.name: record.name}),
        "SKT-086": replace(draft, aliases={"x": "nothing"}),
        "SKT-092": replace(draft, plain=(TensorInfo("sktch.x", "F32", (1,)),)),
        "SKT-069": replace(draft, plain=(TensorInfo("q.sketch_lut", "F16", (1, 1, 2)),)),
    }
    for requirement, broken in bad.items():
        refused(requirement, BundleWriter, tmp_path / "a.sktch", broken, {})
        refused(requirement, FolderWriter, tmp_path / "a", broken, {}, 10**9)
    for name in ("a/b", "x.²", "x.٣", "9" * 5000):
        broken = replace(draft, plain=(TensorInfo(name, "F32", (1,)),))
        refused("SKT-021", BundleWriter, tmp_path / "a.sktch", broken, {})
        refused("SKT-021", FolderWriter, tmp_path / "a", broken, {}, 10**9)
    dense = replace(draft, plain=(TensorInfo(record.name, "F32", (1, 3)),))
    refused("SKT-009", BundleWriter, tmp_path / "a.sktch", dense, {})
    assert list(Path(tmp_path).iterdir()) == []
