"""Folders of safetensors as sources: values, rows, side files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sketchconv.errors import SourceError
from sketchconv.sources.checkpoint import CheckpointSource
from sketchconv.sources.files import is_side_file
from sketchconv.sources.open import open_source

torch = pytest.importorskip("torch")


@pytest.fixture
def typed_folder(make_folder):
    """One tensor of each dtype that a checkpoint may hold."""
    from safetensors.torch import save_file

    folder = make_folder()
    generator = torch.Generator().manual_seed(1)
    values = torch.randn((5, 3, 4), generator=generator, dtype=torch.float64)
    tensors = {
        "f64": values,
        "f32": values.to(torch.float32),
        "f16": values.to(torch.float16),
        "bf16": values.to(torch.bfloat16),
        "i64": torch.arange(12).reshape(3, 4),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros((3, 0)),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


def test_every_float_dtype_gives_its_float32_values(typed_folder):
    folder, tensors = typed_folder
    with CheckpointSource(folder) as source:
        for name in ("f64", "f32", "f16", "bf16"):
            got = source.float32(name, source.rows(name, 1, 4))
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, tensors[name][1:4].float().numpy())


def test_stored_dtype_is_the_source_dtype_but_f64_becomes_f32(typed_folder):
    folder, tensors = typed_folder
    with CheckpointSource(folder) as source:
        assert source.infos["f64"].dtype == "F32"
        stored = source.stored("f64", source.rows("f64", 0, 5))
        assert stored == tensors["f64"].float().numpy().tobytes()
        for name, dtype in (("bf16", "BF16"), ("f16", "F16"), ("i64", "I64"), ("bool", "BOOL")):
            assert source.infos[name].dtype == dtype
            raw = source.rows(name, 0, len(tensors[name]))
            assert source.stored(name, raw) == raw
            assert len(raw) == source.infos[name].nbytes


def test_scalars_and_empty_tensors_have_rows(typed_folder):
    folder, _ = typed_folder
    with CheckpointSource(folder) as source:
        assert source.float32("scalar", source.rows("scalar", 0, 1)).tolist() == [2.5]
        assert source.rows("empty", 0, 3) == b""


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (2, 1), (0, 6)])
def test_rows_outside_the_tensor_are_refused(typed_folder, begin, end):
    with (
        CheckpointSource(typed_folder[0]) as source,
        pytest.raises(SourceError, match="the tensor has 5"),
    ):
        source.rows("f32", begin, end)


def test_integers_have_no_float_values(typed_folder):
    with (
        CheckpointSource(typed_folder[0]) as source,
        pytest.raises(SourceError, match="I64 values can be copied"),
    ):
        source.float32("i64", source.rows("i64", 0, 1))


def test_f64_beyond_float32_is_refused(make_folder):
    from safetensors.numpy import save_file

    folder = make_folder()
    save_file({"w": np.array([[1e300]])}, folder / "model.safetensors")
    with CheckpointSource(folder) as source:
        raw = source.rows("w", 0, 1)
        for read in (source.stored, source.float32):
            with pytest.raises(SourceError, match="beyond float32"):
                read("w", raw)


def test_shards_are_one_source(two_shards):
    with CheckpointSource(two_shards) as source:
        assert set(source.infos) == {"a.weight", "b.weight", "c.weight"}
        assert source.id == "tiny-model"
        assert source.revision is None
        assert source.paths[0] == two_shards.resolve()
        assert len(source.paths) == 3
        assert source.nbytes == sum(p.stat().st_size for p in two_shards.glob("*.safetensors"))


def test_reads_from_many_threads_agree(two_shards):
    with CheckpointSource(two_shards) as source, ThreadPoolExecutor(8) as pool:
        whole = source.rows("b.weight", 0, 4)
        parts = list(pool.map(lambda i: source.rows("b.weight", i % 4, i % 4 + 1), range(200)))
    for index, part in enumerate(parts):
        assert part == whole[32 * (index % 4) : 32 * (index % 4 + 1)]


def test_single_file_wins_over_an_index(two_shards):
    from safetensors.numpy import save_file

    save_file({"only": np.zeros((1, 1), np.float32)}, two_shards / "model.safetensors")
    with CheckpointSource(two_shards) as source:
        assert list(source.infos) == ["only"]


def test_files_are_copied_by_allowlist(make_folder):
    folder = make_folder()
    kept = {
        "tokenizer.json": b"{}",
        "tokenizer.model": b"\x00\x01",
        "merges.txt": b"a b",
        "chat_template.jinja": b"{{ messages }}",
        "chat_templates/tool_use.jinja": b"{{ tools }}",
        "1_Pooling/config.json": b'{"a": 1}',
        "LICENSE": b"text",
        "NOTICE.txt": b"text",
    }
    left = {
        "modeling_tiny.py": b"import os",
        ".env": b"TOKEN=1",
        "training_args.bin": b"x",
        "LICENSE.py": b"x",
        "onnx/config.json": b"{}",
        "2_Dense/model.safetensors": b"x",
        "tokenizer.json.bak": b"x",
        "id_rsa": b"x",
    }
    for name, data in {**kept, **left}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    with CheckpointSource(folder) as source:
        files = source.files()
    assert files.pop("config.json") == (folder / "config.json").read_bytes()
    assert files == kept


def test_remote_code_is_stripped_everywhere_but_in_vocabularies(make_folder):
    code = {"AutoModel": "evil--repo.modeling.Model"}
    folder = make_folder(config={"model_type": "llama", "auto_map": code, "t": {"auto_map": 1}})
    # The escape hides the key from a search for its letters.
    (folder / "tokenizer_config.json").write_text('{"auto\\u005fmap": {"AutoTokenizer": ["x"]}}')
    vocabulary = b'{"auto_map": 7}'
    (folder / "vocab.json").write_bytes(vocabulary)
    with CheckpointSource(folder) as source:
        assert source.config() == {"model_type": "llama", "t": {}}
        files = source.files()
    assert json.loads(files["config.json"]) == {"model_type": "llama", "t": {}}
    assert json.loads(files["tokenizer_config.json"]) == {}
    assert files["vocab.json"] == vocabulary


def test_config_is_a_fresh_copy(make_folder):
    with CheckpointSource(make_folder()) as source:
        source.config()["hidden_size"] = 0
        assert source.config()["hidden_size"] == 8


@pytest.mark.parametrize("name", ["config.json.py", "../config.json", "a/config.json", ".config"])
def test_names_off_the_allowlist(name):
    assert not is_side_file(name)


@pytest.fixture
def cache(two_shards, tmp_path) -> Path:
    """The same model as the Hub's cache keeps it: links into `blobs`, some over two hops."""
    repository = tmp_path / "hub" / "models--org--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(two_shards.iterdir())):
        (blobs / f"blob{index}").write_bytes(path.read_bytes())
        (blobs / f"hop{index}").symlink_to(f"blob{index}")
        (snapshot / path.name).symlink_to(f"../../blobs/{'hop' if index % 2 else 'blob'}{index}")
    return snapshot


def test_cache_snapshots_link_into_blobs(cache):
    with CheckpointSource(cache) as source:
        assert (source.id, source.revision) == ("org/tiny", "abc123")
        assert len(source.infos) == 3
        assert len(source.rows("c.weight", 0, 4)) == 128


def test_links_out_of_the_cache_are_refused(cache, tmp_path):
    outside = tmp_path / "outside.safetensors"
    target = cache / "model-00001-of-00002.safetensors"
    outside.write_bytes(target.read_bytes())
    target.unlink()
    target.symlink_to(os.path.relpath(outside, cache))
    with pytest.raises(SourceError, match="leaves the model folder"):
        CheckpointSource(cache)


def test_folder_reached_through_a_link(two_shards, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(two_shards)
    source = open_source(str(link))
    assert source.id == "link"
    assert len(source.infos) == 3
    source.close()


def test_opening_imports_nothing_heavy():
    code = (
        "import sys, sketchconv.sources.open, sketchconv.architecture, sketchconv.moments;"
        "print([m for m in ('torch', 'transformers', 'numba', 'gguf', 'huggingface_hub')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
