"""The specification, its vectors, its decoder and the code say the same."""

import ast
import importlib.util
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sketchconv.formats import rules
from sketchconv.formats.errors import FormatError
from sketchconv.formats.grids import GRIDS, levels
from sketchconv.formats.packing import PLANES
from sketchconv.formats.reader import SktchFile, SktchModel
from sketchconv.formats.tensors import DTYPES, SKTCH_DTYPES
from sketchconv.formats.validate import validate

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "spec"
VECTORS = SPEC / "vectors"
TEXT = (SPEC / "sktch.md").read_text("utf-8")
VALID = sorted(p.stem for p in VECTORS.glob("valid/*.json"))
INVALID = json.loads((VECTORS / "invalid.json").read_text())


def load_decoder():
    spec = importlib.util.spec_from_file_location("spec_decode", SPEC / "decode.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vector(name):
    path = VECTORS / "valid" / name
    return path if path.is_dir() else path.with_suffix(".sktch")


def row_bits(row):
    return "".join(struct.pack(">f", v).hex() for v in row)


def files_below(folder):
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}


def test_the_committed_vectors_are_what_the_generator_makes(tmp_path):
    subprocess.run([sys.executable, SPEC / "make_vectors.py", tmp_path], check=True)
    made, kept = files_below(tmp_path), files_below(VECTORS)
    assert made.keys() == kept.keys()
    assert [n for n in made if made[n].read_bytes() != kept[n].read_bytes()] == []
    assert sum(p.stat().st_size for p in kept.values()) < 900_000


def test_generator_and_decoder_share_no_code_with_us():
    allowed = {"argparse", "array", "functools", "hashlib", "json", "pathlib", "re", "struct"}
    allowed |= {"copy", "decode", "sys", "vectorlib"}
    for path in [
        SPEC / "make_vectors.py",
        SPEC / "decode.py",
        SPEC / "decode_delta.py",
        *SPEC.glob("vectorlib/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= allowed, path


@pytest.mark.parametrize("name", VALID)
def test_valid_vector(name):
    want = json.loads((VECTORS / "valid" / f"{name}.json").read_text())
    assert list(validate(vector(name))) == []
    with SktchModel.open(vector(name)) as model:
        assert dict(model.manifest.aliases) == want["aliases"]
        assert {p: model.file(p).hex() for p in model.files} == want["files"]
        assert set(model.tensors) == set(want["tensors"])
        for tensor, info in model.tensors.items():
            found = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "hex": model.read(tensor).hex(),
            }
            assert found == want["tensors"][tensor]
        assert set(model.manifest.sketches) == set(want["weights"])
        for weight, values in want["weights"].items():
            assert [row_bits(row) for row in model.decode(weight)] == values["rows"]


@pytest.mark.parametrize("name", VALID)
def test_the_independent_decoder_agrees(name):
    want = json.loads((VECTORS / "valid" / f"{name}.json").read_text())
    decode, path = load_decoder(), vector(name)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in [decode.File(p) for p in files]:
        for tensor in file.entries:
            file.check_digest(tensor)
        for weight, values in want["weights"].items():
            if name != "folder-rewritten" and weight in file.document["sketches"]:
                assert [row_bits(row) for row in file.rows(weight)] == values["rows"]


@pytest.mark.parametrize("case", INVALID, ids=lambda case: f"{case['requirement']}-{case['file']}")
def test_invalid_vector(case):
    path = VECTORS / "invalid" / case["file"]
    assert [f.requirement for f in validate(path)] == [case["requirement"]]


@pytest.mark.parametrize("case", INVALID, ids=lambda case: f"{case['requirement']}-{case['file']}")
def test_readers_leave_only_to_validators_what_the_specification_says(case):
    left = {"SKT-030", "SKT-031", "SKT-043", "SKT-071", "SKT-072", "SKT-076", "SKT-081", "SKT-108"}
    path = VECTORS / "invalid" / case["file"]
    if case["requirement"] in left:
        SktchModel.open(path).close()
        return
    with pytest.raises(FormatError) as caught:
        SktchModel.open(path)
    assert caught.value.requirement == case["requirement"]
    assert case["requirement"] in str(caught.value)
    assert len(str(caught.value)) < 600


def test_every_requirement_is_defined_once_and_has_a_vector_or_a_test():
    defined = re.findall(r"^- \*\*(SKT-\d{3})\.\*\*", TEXT, re.MULTILINE)
    assert len(set(defined)) == len(defined)
    in_vectors = {case["requirement"] for case in INVALID}
    elsewhere = (ROOT / "tests/formats/test_hostile.py").read_text()
    assert [r for r in defined if r not in in_vectors and r not in elsewhere] == []
    named: set[str] = set()
    for path in (ROOT / "formats").glob("*.py"):
        found = set(re.findall(r"SKT-\d{3}", path.read_text()))
        assert found <= set(defined), path
        named |= found
    assert named == set(defined)


def table(header):
    block = TEXT.split(header, 1)[1].split("\n\n", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in block.splitlines()[2:]]
    return [[cell.strip().strip("`") for cell in row] for row in rows]


def test_the_table_of_dtypes_is_the_code_s():
    rows = table("| dtype | bytes | element |")
    assert {r[0]: int(r[1]) for r in rows} == {d: DTYPES[d].itemsize for d in SKTCH_DTYPES}
    sizes = [int(r[1]) for r in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_the_table_of_planes_is_the_code_s():
    rows = table("| bits | planes (bits per field, in stored order) |")
    assert {int(b): tuple(map(int, w.split(", "))) for b, w in rows} == dict(PLANES)


def test_the_table_of_grids_is_the_code_s():
    rows = table("| grid | bits | F | levels, by index |")
    assert {r[0]: (tuple(map(int, r[1].split(", "))), int(r[2])) for r in rows} == {
        name: (grid.bits, grid.fields) for name, grid in GRIDS.items()
    }
    codebook = next(r[3] for r in rows if r[0] == "iq4_nl")
    assert list(map(int, codebook.split(", "))) == levels("iq4_nl", 4).tolist()
    assert TEXT.startswith(f"# The `.sktch` format, version {rules.KNOWN_VERSIONS[-1]}\n")


def test_the_table_of_limits_is_the_code_s():
    limits = {name: int(value) for name, value in table("| limit | value |")}
    assert limits == {
        "bytes of the header, least": rules.MIN_HEADER,
        "bytes of the header, most": rules.MAX_HEADER,
        "tensors in a file": rules.MAX_TENSORS,
        "dimensions of a tensor": rules.MAX_RANK,
        "characters of a name": rules.MAX_NAME,
        "integer": rules.MAX_INTEGER,
        "levels of the header": rules.MAX_HEADER_DEPTH,
        "levels of the document": rules.MAX_DOCUMENT_DEPTH,
        "values of the header or document": rules.MAX_VALUES,
        "bits of an index": rules.MAX_BITS,
        "alignment of the data": rules.ALIGNMENT,
        "parts of a path": rules.MAX_PATH_PARTS,
    }


def test_the_tables_of_members_and_patterns_are_the_code_s():
    from sketchconv.formats.manifest import MEMBERS

    root, record = TEXT.split("### 6.3", 1)
    rows = re.findall(r"^\| `(\w+)` \| ", root.split("### 6.2", 1)[1], re.MULTILINE)
    assert set(rows) == MEMBERS
    rows = re.findall(r"^\| `(\w+)` \| ", record.split("### 6.4", 1)[0], re.MULTILINE)
    assert set(rows) == {"bits", "dtype", "grid", "groups", "lut", "shape"}
    for pattern in (rules.NAME_PATTERN, rules.PATH_PART_PATTERN, rules.EXTENSION_PATTERN):
        assert f"`{pattern}`" in TEXT


def test_the_bytes_shown_are_those_of_the_vector():
    shown = TEXT.split("hexdump:begin -->")[1].split("<!-- hexdump:end")[0]
    raw = (VECTORS / "valid/minimal.sktch").read_bytes()
    header = "".join(line[10:] for line in shown.splitlines() if line.startswith(" " * 10))
    size = int.from_bytes(raw[:8], "little")
    assert raw[8 : 8 + size].decode().rstrip(" ") == header
    lines = re.findall(r"^([0-9a-f]{8})  ((?:[0-9a-f]{2} )+)", shown, re.MULTILINE)
    seen = 0
    for offset, text in lines:
        data = bytes.fromhex(text)
        assert raw[int(offset, 16) :][: len(data)] == data
        seen += len(data)
    assert seen + size == len(raw)
    with SktchFile.open(VECTORS / "valid/minimal.sktch") as file:
        values = ["  ".join(f"{v:.9g}" for v in row) for row in file.decode("a.weight")]
    assert all(f"    {row}\n" in shown for row in values)


def test_the_size_example():
    from sketchconv.formats.sketches import SketchRecord

    record = SketchRecord("a.weight", (4096, 4096), "BF16", 4, 1, "F16")
    size = record.index_info.nbytes + record.lut_info.nbytes
    assert str(size) in TEXT
    assert f"{size * 8 / 4096**2:.4f} bits per weight" in TEXT


def test_the_decoder_s_command_line(tmp_path):
    path, out = VECTORS / "valid/minimal.sktch", tmp_path / "raw"
    command = [sys.executable, SPEC / "decode.py", path, "a.weight"]
    shown = subprocess.run([*command, "--hex"], check=True, capture_output=True, text=True).stdout
    want = json.loads((VECTORS / "valid/minimal.json").read_text())["weights"]["a.weight"]["rows"]
    assert shown.replace(" ", "").split() == want
    subprocess.run([*command, "--rows", "1:2", "--out", out], check=True)
    with SktchFile.open(path) as file:
        assert (np.fromfile(out, "<f4") == file.decode("a.weight")[1]).all()
    wrong = [sys.executable, SPEC / "decode.py", path, "nothing"]
    bad = subprocess.run(wrong, check=False, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "no tensor nothing" in bad.stderr


def test_the_decoder_gives_tensors_of_the_source():
    """Section 4.3: one was transposed there, one a stack of two."""
    path = VECTORS / "valid/source-forms.sktch"
    weights = json.loads(path.with_suffix(".json").read_text())["weights"]

    def shown(name):
        command = [sys.executable, SPEC / "decode.py", path, name, "--source", "--hex"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    rows = [[row[i : i + 8] for i in range(0, 32, 8)] for row in weights["a.weight"]["rows"]]
    assert shown("a.weight") == [row[c] for c in range(4) for row in rows]
    both = weights["m.0.up.weight"]["rows"] + weights["m.1.up.weight"]["rows"]
    assert "".join(shown("m.up")) == "".join(both)
