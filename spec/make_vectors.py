"""Write the test vectors of `sktch.md` and `delta.md`: valid files with values, invalid by number.

    python spec/make_vectors.py [FOLDER]        (default: the folder `vectors` beside this file)

Written from the specification alone, with the standard library: it shares no code with any
reader or writer, so that a mistake in one of them cannot hide in both.
"""

import json
import sys
from pathlib import Path

from vectorlib.broken_container import broken_bytes, broken_json, broken_metadata, broken_tensors
from vectorlib.broken_deltas import (
    broken_adapters,
    broken_bindings,
    broken_data,
    broken_documents,
    broken_records,
)
from vectorlib.broken_deltas import broken_tensors as broken_delta_tensors
from vectorlib.broken_document import (
    broken_document,
    broken_rest,
    broken_shaped,
    broken_sketches,
)
from vectorlib.broken_forms import broken_files, broken_folders
from vectorlib.deltas import adapter, valid_deltas
from vectorlib.deltas import expected as expected_delta
from vectorlib.material import model, with_files
from vectorlib.plain import build
from vectorlib.valid import (
    CONFIG,
    expected,
    folders,
    valid_documents,
    valid_plain,
    valid_shaped,
    valid_sketches,
)

VALID = (valid_plain, valid_sketches, valid_shaped, valid_documents)
BROKEN = (
    broken_bytes,
    broken_json,
    broken_tensors,
    broken_metadata,
    broken_document,
    broken_sketches,
    broken_shaped,
    broken_rest,
    broken_files,
)
BROKEN_DELTAS = (broken_documents, broken_records, broken_delta_tensors, broken_data)


def write(folder, path, data):
    """Write one file below a folder."""
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def write_json(folder, path, value):
    """Write one JSON file below a folder."""
    write(folder, path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_valid(out):
    """Write all valid vectors."""
    for make in VALID:
        for name, sketches, plain, members, files in make():
            document, tensors = model(sketches, plain, **members)
            if files:
                document, tensors = with_files(document, tensors, files)
            write(out, f"valid/{name}.sktch", build(document, tensors))
            write_json(out, f"valid/{name}.json", expected(document, tensors, sketches, files))
    for name, content, want in folders():
        for path, data in {**content, "config.json": CONFIG}.items():
            write(out, f"valid/{name}/{path}", data)
        write_json(out, f"valid/{name}.json", want)


def write_invalid(out):
    """Write all invalid vectors and their list."""
    listed = []
    for make in BROKEN:
        for requirement, name, data in make():
            file = f"{name.rstrip('-').lower()}.sktch"
            write(out, f"invalid/{file}", data)
            listed.append({"file": file, "requirement": requirement})
    for requirement, name, content in broken_folders():
        if not name.startswith("config-"):
            content = {**content, "config.json": CONFIG}
        for path, data in content.items():
            write(out, f"invalid/{name}/{path}", data)
        listed.append({"file": name, "requirement": requirement})
    if len({x["file"] for x in listed}) != len(listed):
        raise ValueError("two vectors of one name")
    write_json(out, "invalid.json", sorted(listed, key=lambda x: (x["requirement"], x["file"])))


def write_deltas(out):
    """Write all vectors of `delta.md`, below `delta`."""
    for name, where, base, made in valid_deltas():
        write(out, f"bases/{where}.sktch", build(*base))
        write(out, f"valid/{name}.sktch", build(*made[:2]))
        write_json(out, f"valid/{name}.json", expected_delta(made, where))
        if name == "minimal":
            for path, data in adapter(made).items():
                write(out, f"valid/adapter/{path}", data)
            write_json(out, "valid/adapter.json", expected_delta(made, where))
    listed = []
    for make in BROKEN_DELTAS:
        for requirement, name, data in make():
            write(out, f"invalid/{name}.sktch", data)
            listed.append({"file": f"{name}.sktch", "requirement": requirement})
    for requirement, name, data, base in broken_bindings():
        write(out, f"invalid/{name}.sktch", data)
        write(out, f"bases/for-{name}.sktch", build(*base))
        listed.append({"base": f"for-{name}", "file": f"{name}.sktch", "requirement": requirement})
    for requirement, name, files in broken_adapters():
        for path, data in files.items():
            write(out, f"invalid/{name}/{path}", data)
        listed.append({"file": name, "requirement": requirement})
    if len({x["file"] for x in listed}) != len(listed):
        raise ValueError("two vectors of one name")
    write_json(out, "invalid.json", sorted(listed, key=lambda x: (x["requirement"], x["file"])))


def main():
    """Write everything."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "vectors"
    write_valid(out)
    write_invalid(out)
    write_deltas(out / "delta")


if __name__ == "__main__":
    main()
