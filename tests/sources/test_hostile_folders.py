"""Folders that must be refused in the first second, with a line that says why."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from sketchconv.errors import FormatError, SketchconvError, SourceError
from sketchconv.sources.checkpoint import CheckpointSource
from sketchconv.sources.open import open_source

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def refused(folder, match, error=SourceError):
    with pytest.raises(error, match=match) as caught:
        CheckpointSource(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_never_loaded(make_folder, name):
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x02not opened")
    refused(folder, rf"only pickled weights \({name}\).*save_pretrained")


IMPOSTORS = {
    "pickle": (b"\x80\x02}q\x00.", "a pickle; pickles run code"),
    "new pickle": (b"\x80\x04\x95" + bytes(20), "a pickle"),
    "zipped pickle": (b"PK\x03\x04" + bytes(60), "a ZIP archive, as PyTorch's pickles are"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>no such model</html>", "a web page"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(60), "give that file itself"),
    "program": (b"\x7fELF" + bytes(60), "a program, not weights"),
    "nothing": (b"", "the file is empty"),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_impostors(make_folder, kind):
    folder = make_folder()
    data, match = IMPOSTORS[kind]
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, match)


def test_length_that_looks_like_a_pickle_is_no_false_alarm(make_folder):
    folder = make_folder()
    body = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    header = body + b" " * (0x0280 - len(body))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    assert struct.pack("<Q", len(header)).startswith(b"\x80\x02")
    with CheckpointSource(folder) as source:
        assert list(source.infos) == ["a"]


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_truncated_file(make_folder, cut):
    folder = make_folder()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    refused(folder, "model.safetensors", FormatError)


def test_missing_shard(two_shards):
    (two_shards / SECOND).unlink()
    refused(two_shards, rf"1 of 2 shards .* missing: {SECOND}")


def test_dangling_link_as_shard(two_shards):
    (two_shards / SECOND).unlink()
    (two_shards / SECOND).symlink_to("nowhere")
    refused(two_shards, "no such file")


def test_index_is_missing(two_shards):
    (two_shards / INDEX).unlink()
    refused(two_shards, "download the index too")


def test_tensor_in_the_index_but_not_in_its_shard(two_shards):
    names = {"a.weight": FIRST, "b.weight": SECOND, "c.weight": SECOND, "d.weight": SECOND}
    write_index(two_shards, names)
    refused(two_shards, "says that it holds 'd.weight'")


def test_tensor_in_a_shard_but_not_in_the_index(two_shards):
    write_index(two_shards, {"a.weight": FIRST, "b.weight": SECOND})
    refused(two_shards, "'c.weight' is not in")


def test_tensor_in_two_shards(two_shards):
    save_file(
        {n: np.zeros((4, 8), np.float32) for n in ("a.weight", "b.weight")}, two_shards / FIRST
    )
    refused(two_shards, "'b.weight' is not in .* for this file")


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/model.safetensors",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "a\\..\\b.safetensors",
        "x\0.safetensors",
        "sub/../../outside.safetensors",
    ],
)
def test_shard_names_that_leave_the_folder(two_shards, shard):
    (two_shards.parent / "outside.safetensors").write_bytes((two_shards / FIRST).read_bytes())
    write_index(two_shards, {"a.weight": shard})
    refused(two_shards, "must be relative and stay in the model folder")


@pytest.mark.parametrize("shard", [7, None, "weights.bin", ["a.safetensors"]])
def test_shard_names_of_the_wrong_kind(two_shards, shard):
    write_index(two_shards, {"a.weight": shard})
    refused(two_shards, "expected a .safetensors name")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_index_without_a_map(two_shards, index):
    (two_shards / INDEX).write_text(index)
    refused(two_shards, "no weight_map")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"weight_map": ' + "9" * 5000 + "}", "\xff"])
def test_index_that_is_not_json(two_shards, text):
    (two_shards / INDEX).write_bytes(text.encode("latin-1"))
    refused(two_shards, "not valid JSON")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_links_that_leave_the_folder(make_folder, tmp_path, name):
    folder = make_folder()
    outside = tmp_path / "outside"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(SourceError, match="leaves the model folder"):
        CheckpointSource(folder).files()


def test_link_inside_the_folder_is_fine(make_folder):
    folder = make_folder()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    with CheckpointSource(folder) as source:
        assert len(source.infos) == 2


def test_link_loop(make_folder):
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    refused(folder, "no such file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pipes_do_not_block(make_folder, name):
    folder = make_folder()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(SourceError, match="not a regular file"):
        CheckpointSource(folder).files()


def test_no_config(make_folder):
    folder = make_folder()
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "{" * 50_000])
def test_bad_config(make_folder, text):
    folder = make_folder()
    (folder / "config.json").write_text(text)
    refused(folder, "not valid JSON|expected a JSON object")


def test_huge_config(make_folder):
    folder = make_folder()
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    refused(folder, "more than the limit")


@pytest.mark.parametrize("method", ["gptq", "awq", "fbgemm_fp8", "mxfp4", "bitsandbytes"])
def test_quantized_checkpoints_are_named(make_folder, method):
    folder = make_folder(
        config={"model_type": "llama", "quantization_config": {"quant_method": method}}
    )
    refused(folder, f"already quantized .quant_method '{method}'")


def test_quantized_part_of_a_model(make_folder):
    part = {"quantization_config": {"quant_method": "awq"}}
    refused(make_folder(config={"model_type": "llava", "text_config": part}), "'awq'")


def test_quantized_without_a_word_in_the_config(make_folder):
    folder = make_folder()
    save_file({"a.qweight": np.zeros((2, 2), np.int32)}, folder / "model.safetensors")
    refused(folder, "'a.qweight' belongs to a quantized checkpoint")


def test_sketch_folder_as_source(make_folder):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "sktch"}}
    refused(make_folder(config=config), "already a sketch")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"])
def test_unsupported_dtypes(make_folder, dtype):
    folder = make_folder()
    size = 16 if dtype == "C64" else 1 if dtype == "F4" else 2
    header = json.dumps({"w": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}})
    data = struct.pack("<Q", len(header)) + header.encode() + bytes(size)
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, f"'w' .*{dtype}")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "merge it into the base model"),
        (["model.Q4_K_M.gguf"], "give that file as the source"),
        (["model.sktch"], "holds a sketch"),
        (["consolidated.safetensors"], "rename it"),
        (["README.md"], "is it a model folder"),
        ([], "is it a model folder"),
    ],
)
def test_folders_that_are_something_else(tmp_path, entries, match):
    folder = tmp_path / "other"
    folder.mkdir()
    for name in entries:
        (folder / name).write_bytes(b"x")
    refused(folder, match)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("./missing", "no such file or folder"),
        ("../a/b", "no such file or folder"),
        ("/missing/folder", "no such file or folder"),
        ("~/missing-model", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("org/model.gguf", "no such file or folder"),
        ("model.safetensors", "no such file or folder"),
        ("a\\b", "no such file or folder"),
        ("", "model folder|no config.json|is it a model"),
        ("gpt2", "not a hub id of the form org/name"),
        ("org/na me", "not a hub id"),
        ("org/..", "no such|not a hub id"),
        ("x" * 5000, "not a hub id"),
        ("nul\0", "not a hub id"),
    ],
)
def test_names_of_nothing(tmp_path, monkeypatch, spec, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=match) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


def test_existing_folder_wins_over_a_hub_id(make_folder, tmp_path, monkeypatch):
    make_folder(name="org/name")
    monkeypatch.chdir(tmp_path)
    source = open_source("org/name")
    assert source.id == "name"
    source.close()
    with pytest.raises(SourceError, match="only on the Hub"):
        open_source("org/name", revision="main")


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("model.sktch", b"x", "already a sketch"),
        ("model.safetensors", b"x" * 100, "give the folder"),
        ("model.bin", b"PK\x03\x04", "a ZIP archive"),
        ("model.gguf", b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        ("notes.txt", b"hello", "expected a model folder"),
    ],
)
def test_files_that_are_no_source(tmp_path, name, data, match):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SketchconvError, match=match):
        open_source(str(tmp_path / name))


def test_device_as_source():
    with pytest.raises(SourceError, match="neither a folder nor a regular file"):
        open_source("/dev/null")
