"""The house: dependency direction, light imports, and a wheel that works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "numba", "triton", "transformers", "gguf", "huggingface_hub", "safetensors")


def python(code: str, *, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked where nothing else of ours is."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves a build folder behind that would outlive renamed modules.
    checkout = folder / "checkout"
    for part in ("sketchconv", "formats", "kernels"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, checkout / part)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(folder), str(checkout)], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_the_wheel_holds_every_module_of_the_three_folders(installed):
    for source, target in (("sketchconv", ""), ("formats", "formats"), ("kernels", "kernels")):
        for module in (ROOT / source).rglob("*.py"):
            place = installed / "sketchconv" / target / module.relative_to(ROOT / source)
            assert place.read_bytes() == module.read_bytes(), module
    assert not (installed / "kernels").exists()
    assert not (installed / "formats").exists()
    assert not (installed / "tests").exists()


def test_the_installed_package_imports_without_the_checkout(installed, tmp_path):
    code = (
        "import sketchconv, sketchconv.formats.packing, sketchconv.kernels;"
        "print(sketchconv.formats.__file__); print(sketchconv.kernels.__file__)"
    )
    done = python(code, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(installed) for line in done.stdout.split())


def test_imports_point_in_one_direction(installed, tmp_path):
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--config", ROOT / "pyproject.toml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("folder", ["formats", "kernels"])
def test_formats_and_kernels_import_nothing_of_ours_but_themselves(installed, folder):
    code = (
        "import grimp; graph = grimp.build_graph('sketchconv', cache_dir=None);"
        f"own = 'sketchconv.{folder}';"
        "found = {(m, i) for m in graph.modules if m.startswith(own)"
        " for i in graph.find_modules_directly_imported_by(m) if not i.startswith(own)};"
        "print(len([m for m in graph.modules if m.startswith(own)]), sorted(found))"
    )
    done = python(code, cwd=installed, path=installed)
    assert done.returncode == 0, done.stderr
    modules, rest = done.stdout.split(maxsplit=1)
    assert int(modules) > 10
    assert rest.strip() == "[]"


@pytest.mark.parametrize(
    "module",
    [
        "sketchconv",
        "sketchconv.cli.main",
        "sketchconv.cli.convert",
        "sketchconv.cli.push",
        "sketchconv.formats.reader",
        "sketchconv.hub",
    ],
)
def test_nothing_heavy_is_imported_at_start(module, tmp_path):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_other_package_can_mistake_our_folder_for_the_kernels_package(tmp_path):
    code = (
        "import importlib.util as u, sketchconv;"
        "s = u.find_spec('kernels'); print(s.origin if s else None)"
    )
    done = python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout


def test_importing_sketchconv_registers_the_quantizer_before_and_after_transformers(tmp_path):
    check = (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m;print('sktch' in m)"
    )
    first = python(f"import sketchconv; {check}", cwd=tmp_path)
    second = python(f"import transformers.quantizers, sketchconv; {check}", cwd=tmp_path)
    assert (first.stdout.strip(), second.stdout.strip()) == ("True", "True"), (
        first.stderr + second.stderr
    )


def test_help_answers_for_every_command(tmp_path):
    for command in ("", "convert", "inspect", "verify", "generate", "push", "doctor"):
        arguments = [word for word in (command, "--help") if word]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "sketchconv", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Usage:" in done.stdout
