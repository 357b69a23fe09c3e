"""Every kernel compiles for every target and stays within its resources; nothing runs here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _module(name: str):
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


aot = _module("aot")
resources = _module("resources")


TARGETS = [
    pytest.param(each, id=each.name, marks=() if each.always else pytest.mark.slow)
    for each in aot.TARGETS
]


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return request.param


@pytest.fixture(scope="module")
def costs(target):
    """What each variant costs on the target."""
    return aot.in_a_child(target.name)[target.name]


@pytest.fixture(scope="module")
def catalogue():
    return resources.catalogue()


def test_every_variant_compiles(costs, catalogue, target):
    assert set(costs) == {n for n, each in catalogue.items() if target.backend in each["backends"]}


def test_nothing_spills(costs):
    assert {name: cost for name, cost in costs.items() if cost.stack or cost.spills} == {}


def test_shared_memory_is_within_the_device(costs, target):
    assert {name: c.shared for name, c in costs.items() if c.shared > target.shared} == {}


def test_instructions_per_weight(costs, catalogue, target):
    over = {
        name: (cost.per_weight, limit)
        for name, cost in costs.items()
        if (limit := catalogue[name]["most"].get(str(target.arch))) is not None
        and not cost.per_weight <= limit
    }
    assert over == {}


def test_the_gates_of_the_design_are_set(catalogue):
    """A gate that is dropped by mistake would not fail; these are the figures to hold."""
    assert {name: each["most"] for name, each in catalogue.items() if each["most"]} == {
        "gemv-4bit": {"80": 8.7, "89": 8.7},
        "gemv-8bit": {"80": 8.7, "89": 8.7},
        "fragments-4bit": {"80": 3.5},
        "fragments-4bit-down": {"80": 3.5},
        "fragments-3bit": {"80": 2.2},
        "permute-4bit-1tok": {"80": 4.5},
        "permute-4bit-8groups": {"80": 5.5},
        "permute-3bit-1tok": {"80": 3.4},
        "permute-3bit-4groups": {"80": 3.4},
        "permute-2bit-1tok": {"80": 3.4},
        "permute-1bit-1tok": {"80": 3.4},
        "permute-4bit-64tok": {"80": 10.0},
        "permute-3bit-64tok": {"80": 10.0},
        "matmul-4bit": {"80": 15.0},
        "matmul-8bit": {"80": 15.0},
    }


def test_the_committed_table_is_what_the_compiler_says(costs, catalogue, target):
    import triton

    text = resources.PATH.read_text(encoding="utf-8")
    assert text.startswith(resources.HEAD.partition("{version}")[0])
    if f"Triton {triton.__version__}" in text:
        section = resources.section(target.name, costs, catalogue)
        assert f"{section}\n## " in f"{text}\n## ", "run python tests/gpu/resources.py"
    else:  # another compiler, other registers: the same kernels at least
        assert [name for name in catalogue if f"| {name} |" not in text] == []


def test_the_inner_loop_is_found():
    def line(place: int, text: str) -> str:
        return f"        /*{place:04x}*/                   {text} ;   /* 0x00 */\n"

    body = "".join(line(16 * i, "FFMA R0, R0, R0, R0") for i in range(64))
    waits = line(0x400, "BRA 0x3f0")
    inner = line(0x410, "@P0 BRA 0x100")
    outer = line(0x420, "@!P1 BRA 0x000")
    assert aot.inner_loop(body + waits + inner + outer) == 50
