"""A loopback Hub, a process that talks to it, and tiny models to send."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Test folders are no packages (see the notes on the name `kernels`), so helpers are found so.
_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))

from hub_client import Client  # noqa: E402
from loopback import TOKEN, Hub  # noqa: E402


@pytest.fixture(scope="session")
def server():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="session")
def process(server, tmp_path_factory):
    client = Client(server.address, tmp_path_factory.mktemp("hf-home"))
    yield client
    client.close()


@pytest.fixture
def hub(server):
    """The Hub, empty and without faults."""
    server.repos.clear()
    server.lfs.clear()
    server.faults.clear()
    server.requests.clear()
    server.received.clear()
    server.put_bytes = 0
    server.stalled.clear()
    return server


@pytest.fixture
def client(hub, process):
    process("setting", token=TOKEN)
    return process


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"hub_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Tiny models: `folder`, `shards`, `dense`, `delta`, `model.sktch`, `delta.sktch`, `*.gguf`."""
    from sketchconv.deltas import create
    from sketchconv.formats.reader import SktchModel

    root = tmp_path_factory.mktemp("made")
    makers = _module(_HERE.parent / "runtime" / "conftest.py")
    tiny = _module(_HERE.parent / "export" / "tiny.py")
    tiny.make_tokenizer(root, "gpt-2")
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: (root / name).read_bytes() for name in names}
    files["LICENSE"] = (
        b"                                 Apache License\n                  Version 2.0"
    )
    model = makers.build("LlamaForCausalLM", vocab_size=tiny.VOCABULARY)
    makers.write(model, root / "folder", files=files)
    makers.write(model, root / "shards", files=files, shard=60_000)
    makers.write(model, root / "model.sktch", files=files)
    model.save_pretrained(root / "dense")
    with SktchModel.open(root / "folder") as sketch:
        name = "model.layers.0.mlp.up_proj.weight"
        table = sketch.sketch(name).lut.copy()
    table[0] = np.sort(table[0] + np.asarray(0.01, table.dtype))
    create(root / "folder", {name: table}, root / "delta", task={"name": "french"})
    create(root / "folder", {name: table}, root / "delta.sktch", task={"name": "french"})
    for kind in ("Q8_0", "Q4_K"):
        _write_gguf(root / f"tiny-{kind}.gguf", kind)
    return root


def _write_gguf(path: Path, kind: str) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("mit")
    writer.add_source_url("https://huggingface.co/org/base")
    writer.add_description(kind)
    writer.add_tensor("token_embd.weight", np.full((4, 32), len(kind), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def writer():
    """Write a bundle with these files, and these changes of its config."""
    makers = _module(_HERE.parent / "runtime" / "conftest.py")
    model = makers.build("LlamaForCausalLM")

    def write(path: Path, files: dict[str, bytes], config: dict[str, Any] | None = None) -> None:
        makers.write(model, path, files=files, config=config)

    return write
