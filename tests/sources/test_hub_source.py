"""Models from the Hub, against a small server on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sketchconv.sources.hub import is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"

ASK = """
import json, sys
from sketchconv.errors import SketchconvError
from sketchconv.sources.open import open_source

answers = []
for spec, revision in json.loads(sys.argv[1]):
    try:
        source = open_source(spec, revision=revision)
        answer = {
            "id": source.id,
            "revision": source.revision,
            "tensors": sorted(source.infos),
            "files": sorted(source.files()),
            "sizes": {n: len(source.rows(n, 0, i.shape[0])) for n, i in source.infos.items()},
            "folder": sorted(p.name for p in source.paths[0].iterdir()),
        }
    except SketchconvError as error:
        answer = {"kind": type(error).__name__, "error": str(error)}
    answers.append(answer)
print(json.dumps(answers))
"""


class Hub(ThreadingHTTPServer):
    """Serves repositories {name: {file: bytes}}; statuses {name: (status, error code)}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.statuses: dict[str, tuple[int, str]] = {}
        self.requests: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            self._api(path[len("/api/models/") :].split("/"))
        else:
            parts = path.lstrip("/").split("/")
            self._file("/".join(parts[:2]), "/".join(parts[4:]))

    do_HEAD = do_GET

    def _api(self, parts: list[str]) -> None:
        name, rest = "/".join(parts[:2]), parts[2:]
        if self._refused(name):
            return
        files = self.server.repositories[name]
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": p, "size": len(d), "oid": etag(d)}
                for p, d in files.items()
            ]
            self._json(tree)
        elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            self._reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": p} for p in files]})

    def _file(self, name: str, path: str) -> None:
        if self._refused(name):
            return
        data = self.server.repositories[name].get(path)
        if data is None:
            self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._reply(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(data)}"'})

    def _refused(self, name: str) -> bool:
        status, code = self.server.statuses.get(name, (404, "RepoNotFound"))
        if name in self.server.repositories and name not in self.server.statuses:
            return False
        self._reply(status, b"", {"X-Error-Code": code} if code else {})
        return True

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(tmp_path: Path, endpoint: str, *specs: tuple[str, str | None], **environment: str):
    """What a fresh process, which reads the endpoint at import, makes of each spec."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASK, json.dumps(specs)],
        env={
            **kept,
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf-home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **environment,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def address(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


def as_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_only_what_is_needed_is_downloaded_and_kept_for_offline_use(hub, two_shards, tmp_path):
    hub.repositories["org/tiny"] = {
        **as_files(two_shards),
        "tokenizer.json": b"{}",
        "LICENSE": b"text",
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"code",
        "consolidated.safetensors": b"twice the size",
        "onnx/model.safetensors": b"other",
        ".gitattributes": b"x",
    }
    wanted = {
        "id": "org/tiny",
        "revision": COMMIT,
        "tensors": ["a.weight", "b.weight", "c.weight"],
        "files": ["LICENSE", "config.json", "tokenizer.json"],
        "sizes": dict.fromkeys(["a.weight", "b.weight", "c.weight"], 128),
        "folder": sorted([*as_files(two_shards), "tokenizer.json", "LICENSE"]),
    }
    assert ask(tmp_path, address(hub), ("org/tiny", None)) == [wanted]
    fetched = {line.split(" ")[1] for line in hub.requests if "/resolve/" in line}
    assert all(f"/resolve/{COMMIT}/" in path for path in fetched)
    assert not any(path.endswith((".py", ".bin")) for path in fetched)

    before = len(hub.requests)
    offline = ask(
        tmp_path, address(hub), ("org/tiny", None), ("org/other", None), HF_HUB_OFFLINE="1"
    )
    assert offline[0] == wanted
    assert offline[1]["kind"] == "HubError"
    assert "HF_HUB_OFFLINE is set" in offline[1]["error"]
    assert len(hub.requests) == before


def test_refusals_are_one_line_that_says_what_to_do(hub, two_shards, tmp_path):
    files = as_files(two_shards)
    shard = "model-00002-of-00002.safetensors"
    hub.repositories.update(
        {
            "org/good": files,
            "org/gated": files,
            "org/pickle": {"config.json": b"{}", "pytorch_model.bin": b"x"},
            "org/gguf": {"tiny.Q4_K_M.gguf": b"x"},
            "org/data": {"README.md": b"x"},
            "org/absent": {name: data for name, data in files.items() if name != shard},
            "org/quantized": {
                **files,
                "config.json": b'{"quantization_config": {"quant_method": "hqq"}}',
            },
        }
    )
    hub.statuses.update(
        {
            "org/gated": (403, "GatedRepo"),
            "org/private": (401, ""),
            "org/denied": (403, ""),
        }
    )
    cases = {
        ("org/gated", None): ("HubError", "accept its conditions on"),
        ("org/private", None): ("HubError", "hf auth login"),
        ("org/denied", None): ("HubError", "403"),
        ("org/missing", None): ("HubError", "not on the Hub (404), and no such folder here"),
        ("org/good", "no-branch"): ("HubError", "no revision 'no-branch'"),
        ("org/pickle", None): ("SourceError", "only pickled weights (pytorch_model.bin)"),
        ("org/gguf", None): ("HubError", "hf download org/gguf tiny.Q4_K_M.gguf"),
        ("org/data", None): ("HubError", "is it a model?"),
        ("org/absent", None): ("HubError", f"names {shard!r}"),
        ("org/quantized", None): ("SourceError", "already quantized (quant_method 'hqq'"),
    }
    answers = ask(tmp_path, address(hub), *cases)
    for (spec, _), (kind, text), answer in zip(cases, cases.values(), answers, strict=True):
        assert answer.get("kind") == kind, answer
        assert text in answer["error"]
        assert spec in answer["error"]
        assert "\n" not in answer["error"]
    weights = [line for line in hub.requests if line.endswith(".safetensors")]
    assert weights == []


def test_no_network(tmp_path):
    answer = ask(tmp_path, "http://127.0.0.1:9", ("org/tiny", None))[0]
    assert answer["kind"] == "HubError"
    assert "cannot be reached" in answer["error"]
    assert "\n" not in answer["error"]


def test_cache_that_cannot_be_written(hub, two_shards, tmp_path):
    hub.repositories["org/tiny"] = as_files(two_shards)
    (tmp_path / "file").write_bytes(b"")
    answer = ask(
        tmp_path, address(hub), ("org/tiny", None), HF_HUB_CACHE=str(tmp_path / "file" / "cache")
    )[0]
    assert answer["kind"] == "HubError"
    assert "download failed" in answer["error"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("org/name", True),
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("o/n.a_m-e", True),
        ("name", False),
        ("a/b/c", False),
        ("/name", False),
        ("org/", False),
        ("org/..", False),
        ("org/na..me", False),
        ("-org/name", False),
        ("org/" + "n" * 100, False),
        ("org/name\n", False),
    ],
)
def test_hub_ids(spec, expected):
    assert is_hub_id(spec) is expected
