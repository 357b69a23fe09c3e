"""The specification of deltas, its vectors, its decoder and the code say the same."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sketchconv.deltas.binding import check_fit
from sketchconv.deltas.tables import stored_table
from sketchconv.errors import DeltaError
from sketchconv.formats import rules
from sketchconv.formats.delta import DeltaFile, is_delta
from sketchconv.formats.delta_coding import MODES, VALUES
from sketchconv.formats.delta_document import DELTA_MEMBERS
from sketchconv.formats.delta_record import RECORD_MEMBERS
from sketchconv.formats.delta_validate import validate_delta
from sketchconv.formats.errors import FormatError
from sketchconv.formats.reader import SktchModel
from sketchconv.formats.validate import validate

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "spec/vectors/delta"
TEXT = (ROOT / "spec/delta.md").read_text("utf-8")
VALID = sorted(p.stem for p in VECTORS.glob("valid/*.json"))
INVALID = json.loads((VECTORS / "invalid.json").read_text())
BOUND = [case for case in INVALID if "base" in case]
ALONE = [case for case in INVALID if "base" not in case]
LEFT_TO_VALIDATORS = {"SKT-030", "SKT-031", "SKT-043", "SKT-081", "DLT-051"}
LEFT_TO_USE = {"DLT-030", "DLT-031", "DLT-032", "DLT-033", "SKT-081"}


def named(case):
    return f"{case['requirement']}-{case['file']}"


def vector(name):
    path = VECTORS / "valid" / name
    return path if path.is_dir() else path.with_suffix(".sktch")


def wanted(name):
    return json.loads((VECTORS / "valid" / f"{name}.json").read_text())


def base_of(want):
    return VECTORS / "bases" / f"{want['base']}.sktch"


@pytest.mark.parametrize("name", VALID)
def test_valid_vector(name):
    want = wanted(name)
    assert list(validate_delta(vector(name))) == []
    assert list(validate(base_of(want))) == []
    with DeltaFile.open(vector(name)) as delta, SktchModel.open(base_of(want)) as base:
        check_fit(delta, base)
        found = {
            n: {
                "dtype": e.info.dtype,
                "shape": list(e.info.shape),
                "hex": delta.container.read(n).hex(),
            }
            for n, e in delta.container.entries.items()
        }
        assert found == want["tensors"]
        assert {n: r.changed for n, r in delta.document.weights.items()} == want["changed"]
        for weight, table in want["tuned"].items():
            before = stored_table(base, weight)
            tuned = delta.tuned(weight, before)
            assert tuned.tobytes().hex() == table
            if delta.document.coding.invertible:
                assert delta.reverted(weight, tuned).tobytes() == before.tobytes()


@pytest.mark.parametrize("name", VALID)
def test_the_independent_decoder_agrees(name):
    want, path = wanted(name), vector(name)
    file = path / "sketch_adapter.safetensors" if path.is_dir() else path
    for weight, table in want["tuned"].items():
        shown = decoded(file, base_of(want), weight, "--hex")
        assert shown.returncode == 0, shown.stderr
        assert "".join(shown.stdout.split()) == table


def decoded(*arguments):
    command = [sys.executable, ROOT / "spec/decode_delta.py", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("case", ALONE, ids=named)
def test_invalid_vector(case):
    found = [f.requirement for f in validate_delta(VECTORS / "invalid" / case["file"])]
    assert found == [case["requirement"]]


@pytest.mark.parametrize("case", ALONE, ids=named)
def test_readers_refuse_it_when_it_is_opened_or_used(case):
    path, requirement = VECTORS / "invalid" / case["file"], case["requirement"]
    if requirement not in LEFT_TO_VALIDATORS | LEFT_TO_USE:
        with pytest.raises(FormatError) as caught:
            DeltaFile.open(path)
        assert caught.value.requirement == requirement
        assert len(str(caught.value)) < 600
        return
    with DeltaFile.open(path) as delta, SktchModel.open(base_of({"base": "f16"})) as base:
        if requirement in LEFT_TO_USE:
            with pytest.raises(FormatError) as caught:
                delta.tuned("m.weight", stored_table(base, "m.weight"))
            assert caught.value.requirement == requirement


@pytest.mark.parametrize("case", BOUND, ids=named)
def test_a_base_that_does_not_fit(case):
    path = VECTORS / "invalid" / case["file"]
    base = VECTORS / "bases" / f"{case['base']}.sktch"
    assert list(validate_delta(path)) == []
    with DeltaFile.open(path) as delta, SktchModel.open(base) as model:
        if case["requirement"] == "DLT-040":
            with pytest.raises(DeltaError, match="was not made for"):
                check_fit(delta, model)
        else:
            check_fit(delta, model)
            with pytest.raises(FormatError) as caught:
                delta.tuned("m.weight", stored_table(model, "m.weight"))
            assert caught.value.requirement == case["requirement"]
    shown = decoded(path, base, "m.weight")
    assert shown.returncode == 1
    # The decoder may meet a number that F16 does not have before it looks at the result.
    assert case["requirement"] in shown.stderr or case["file"] == "sum-infinite.sktch"


def test_models_and_deltas_are_told_apart():
    model, delta = base_of({"base": "f16"}), vector("minimal")
    assert [is_delta(p) for p in (model, delta, vector("adapter"))] == [False, True, True]
    with pytest.raises(FormatError, match="this is a delta, not a model") as caught:
        SktchModel.open(delta)
    assert caught.value.requirement == "SKT-053"
    with pytest.raises(FormatError, match="an adapter folder, a delta"):
        SktchModel.open(vector("adapter"))
    with pytest.raises(FormatError, match="this is a model, not a delta") as caught:
        DeltaFile.open(model)
    assert caught.value.requirement == "DLT-001"


def test_every_requirement_is_defined_once_and_has_a_vector_or_a_test():
    defined = re.findall(r"^- \*\*(DLT-\d{3})\.\*\*", TEXT, re.MULTILINE)
    assert len(set(defined)) == len(defined)
    in_vectors = {case["requirement"] for case in INVALID}
    assert set(defined) - in_vectors == {"DLT-060"}
    assert {r for r in in_vectors if r.startswith("DLT")} <= set(defined)
    named_in_code: set[str] = set()
    for path in [*(ROOT / "formats").glob("*.py"), *(ROOT / "sketchconv/deltas").glob("*.py")]:
        named_in_code |= set(re.findall(r"DLT-\d{3}", path.read_text()))
    assert named_in_code == set(defined)


def test_the_tables_are_the_code_s():
    section = TEXT.split("## 5 Document", 1)[1].split("## 6 Values", 1)[0]
    root, record = section.split("| member of a record |", 1)
    assert set(re.findall(r"^\| `(\w+)` \| ", root, re.MULTILINE)) == DELTA_MEMBERS
    assert set(re.findall(r"^\| `(\w+)` \| ", record, re.MULTILINE)) == RECORD_MEMBERS
    values = TEXT.split("## 6 Values", 1)[1].split("## 7 Binding", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", values, re.MULTILINE)
    assert {mode for mode, _ in rows} == set(MODES)
    assert {v.strip("` ") for _, cell in rows for v in cell.split(",")} == set(VALUES)
    assert TEXT.startswith(f"# Deltas of `.sktch` models, version {rules.DELTA_VERSION}\n")


def test_the_size_example():
    groups, entries = 204672, 16
    sizes = re.findall(r"(\d{7}) bytes of data as `xor`; (\d{7}) as `I8`", TEXT)
    assert sizes == [(str(groups * entries * 2), str(groups * (entries + 2)))]


def test_the_bytes_shown_are_those_of_the_vector():
    shown = TEXT.split("hexdump:begin -->")[1].split("<!-- hexdump:end")[0]
    raw = vector("minimal").read_bytes()
    header = "".join(line[10:] for line in shown.splitlines() if line.startswith(" " * 10))
    size = int.from_bytes(raw[:8], "little")
    assert raw[8 : 8 + size].decode().rstrip(" ") == header
    seen = 0
    for offset, text in re.findall(r"^([0-9a-f]{8})  ((?:[0-9a-f]{2} )+)", shown, re.MULTILINE):
        data = bytes.fromhex(text)
        assert raw[int(offset, 16) :][: len(data)] == data
        seen += len(data)
    assert seen + size == len(raw)


def test_the_decoder_s_command_line():
    base, delta = base_of({"base": "two"}), vector("two-weights")
    assert decoded(delta, base).stdout.split() == ["l.0.q.weight", "l.1.q.weight"]
    lines = decoded(delta, base, "l.1.q.weight").stdout.splitlines()
    assert [len(line.split()) for line in lines] == [16] * 4
    bad = decoded(delta, base_of({"base": "f16"}), "l.1.q.weight")
    assert bad.returncode == 1
    assert "DLT-040" in bad.stderr
