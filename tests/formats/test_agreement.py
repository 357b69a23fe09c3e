"""safetensors 0.8 opens all that we write and all that we accept, and sees the same."""

import json
import struct

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sketchconv.formats.container import Container
from sketchconv.formats.errors import FormatError
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.tensors import DTYPES, TensorInfo
from sketchconv.formats.validate import validate


def seen_by_safetensors(raw):
    return {
        n: (t["dtype"], tuple(t["shape"]), bytes(t["data"]))
        for n, t in safetensors.deserialize(raw)
    }


def seen_by_us(path, profile):
    with Container.open(path, profile=profile) as c:
        return {n: (e.info.dtype, e.info.shape, c.read(n)) for n, e in c.entries.items()}


def test_bundle(tmp_path, toy):
    path = toy.bundle(tmp_path / "a.sktch")
    assert seen_by_us(path, "sktch") == seen_by_safetensors(path.read_bytes())
    with safetensors.safe_open(path, "numpy") as file:
        for name, data in toy.tensors().items():
            if name != "scale":  # NumPy has no bfloat16
                assert file.get_tensor(name).tobytes() == data
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("limit", [300, 2000, 10**9])
def test_folder(tmp_path, toy, limit):
    folder = toy.folder(tmp_path / "m", limit)
    found = {}
    for path in folder.glob("*.safetensors"):
        seen = seen_by_us(path, "sktch")
        assert seen == seen_by_safetensors(path.read_bytes())
        with safetensors.safe_open(path, "numpy") as file:
            assert set(file.keys()) == set(seen)
        found |= seen
    for name, data in toy.tensors().items():
        assert found[name][2] == data


def test_data_is_aligned(tmp_path, toy):
    with Container.open(toy.bundle(tmp_path / "a.sktch")) as container:
        assert container.data_begin % 64 == 0
        for entry in container.entries.values():
            assert entry.begin % DTYPES[entry.info.dtype].itemsize == 0


def rewrite(folder, out, cut):
    """What save_pretrained does: the same tensors and document, through the safetensors library."""
    out.mkdir()
    with SktchModel.open(folder) as model:
        document = model.manifest.to_json()
        sentinels = {s.manifest.sentinel for s in model.shards.values()} - {model.manifest.sentinel}
        names = [n for n in model.tensors if n not in sentinels]
        tensors = {n: model.array(n) for n in names if model.tensors[n].dtype != "BF16"}
    parts = [dict(list(tensors.items())[i::cut]) for i in range(cut)]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        name = "model.safetensors" if cut == 1 else f"model-{i:05d}-of-{cut:05d}.safetensors"
        save_file(part, out / name, {"format": "pt", "sktch": document})
        weight_map |= dict.fromkeys(part, name)
    if cut > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_rewritten_folder_is_valid(tmp_path, toy_factory, cut):
    toy = toy_factory()
    del toy.plain["scale"]
    folder = toy.folder(tmp_path / "m")
    out = rewrite(folder, tmp_path / "r", cut)
    assert list(validate(out)) == []
    with SktchModel.open(folder) as a, SktchModel.open(out) as b:
        for name in a.manifest.sketches:
            assert (a.decode(name) == b.decode(name)).all()
        assert a.manifest == b.manifest


def test_flipped_bytes_in_a_rewritten_folder_are_found(tmp_path, small_toy, toy_factory):
    toy = toy_factory(rows=1, columns=3, groups=1, bits=(2,))
    del toy.plain["scale"]
    out = rewrite(toy.folder(tmp_path / "m"), tmp_path / "r", 1)
    path = out / "model.safetensors"
    good = path.read_bytes()
    for at in range(0, len(good), 3):
        raw = bytearray(good)
        raw[at] ^= 1 << at % 8
        path.write_bytes(raw)
        assert list(validate(out)), at


# ---------------------------------------------------------------- foreign checkpoints


def test_foreign_files_are_read(tmp_path):
    arrays = {
        "a b/ç": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 3), np.float16),
        "mask": np.array([True, False]),
        "scalar": np.array(3, np.int64),
        "": np.zeros(1, np.uint8),
        "many": np.zeros((1,) * 12, np.int8),
    }
    path = tmp_path / "a.safetensors"
    save_file(arrays, path, {"x": "y"})
    with Container.open(path, profile="safetensors") as container:
        assert dict(container.metadata) == {"x": "y"}
        for name, array in arrays.items():
            got = container.array(name)
            assert got.shape == array.shape
            assert got.tobytes() == array.tobytes()
            assert not got.flags.writeable
    with pytest.raises(FormatError):
        Container.open(path)


def test_foreign_file_without_metadata_and_with_white_space(tmp_path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, indent=1)
    raw = header.encode() + b"\n\t \r\n"
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"ab")
    assert seen_by_us(path, "safetensors") == seen_by_safetensors(path.read_bytes())


def test_sub_byte_dtypes_come_flat(tmp_path, raw_file):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file('{"a":{"dtype":"F4","shape":[3,2],"data_offsets":[0,3]}}', b"abc"))
    with Container.open(path, profile="safetensors") as container:
        assert container.array("a").tobytes() == b"abc"
        assert container.entries["a"].info == TensorInfo("a", "F4", (3, 2))
    path.write_bytes(raw_file('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}', b"ab"))
    with pytest.raises(FormatError, match="SKT-027"):
        Container.open(path, profile="safetensors")


# ---------------------------------------------------------------- fuzz

names = st.sampled_from(["a", "b", "__metadata__", "..", "x" * 600, "é"])
dims = st.one_of(
    st.integers(0, 4), st.sampled_from([-1, 2**32, 2**63, 2**64, True, None, 1.0, "1"])
)
shapes = st.one_of(st.lists(dims, max_size=10), st.none(), st.integers())
spans = st.one_of(st.lists(st.integers(-1, 40), max_size=3), st.none())
dtypes = st.sampled_from([*DTYPES, "f32", "", None, 3])
entry = st.one_of(
    st.fixed_dictionaries({"dtype": dtypes, "shape": shapes, "data_offsets": spans}),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.none(),
)


def check_agreement(path, raw):
    path.write_bytes(raw)
    for profile in ("sktch", "safetensors"):
        try:
            ours = seen_by_us(path, profile)
        except FormatError:
            continue
        assert ours == seen_by_safetensors(raw)


@settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    st.dictionaries(names, entry, max_size=3), st.integers(0, 40), st.sampled_from(["", " ", "\t"])
)
def test_fuzz_structured_headers(tmp_path, header, size, tail):
    text = json.dumps(header, separators=(",", ":")).encode() + tail.encode()
    check_agreement(tmp_path / "a", struct.pack("<Q", len(text)) + text + bytes(size))


@settings(
    max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4)), min_size=1, max_size=4
    )
)
def test_fuzz_changed_files_raise_only_format_errors(tmp_path, small_toy, edits):
    path = tmp_path / "a.sktch"
    if not (tmp_path / "good").exists():
        small_toy.bundle(tmp_path / "good")
    raw = bytearray((tmp_path / "good").read_bytes())
    for where, data in edits:
        at = int(where * len(raw))
        raw[at : at + len(data)] = data
    check_agreement(path, bytes(raw))
    changed = bytes(raw) != (tmp_path / "good").read_bytes()
    assert bool(list(validate(path))) == changed


@settings(
    max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(st.binary(max_size=200))
def test_fuzz_any_bytes(tmp_path, raw):
    (tmp_path / "a").write_bytes(raw)
    for profile in ("sktch", "safetensors"):
        try:
            Container.open(tmp_path / "a", profile=profile).close()
        except FormatError:
            continue
        assert seen_by_safetensors(raw) == seen_by_us(tmp_path / "a", profile)
