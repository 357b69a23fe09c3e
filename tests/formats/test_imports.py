"""`sketchconv.formats` needs NumPy and the standard library, and no more."""

import subprocess
import sys
from pathlib import Path

MODULES = sorted(p.stem for p in Path(__file__).resolve().parents[2].glob("formats/[a-z]*.py"))


def test_nothing_heavy_is_imported():
    heavy = ["torch", "numba", "triton", "transformers", "gguf", "safetensors", "rich", "click"]
    script = (
        "import importlib, sys\n"
        f"for name in {MODULES!r}: importlib.import_module('sketchconv.formats.' + name)\n"
        f"print([m for m in {heavy!r} if m in sys.modules])\n"
        "print([m for m in sys.modules if m.startswith('sketchconv.') and "
        "not m.startswith('sketchconv.formats')])"
    )
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert len(MODULES) > 15
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
