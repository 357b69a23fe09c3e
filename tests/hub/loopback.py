"""A Hub on the loopback interface: real HTTP, git-like commits, LFS, pull requests, and faults."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "SecretTokenOfTheTests" * 2
_COUNT = itertools.count()
LFS_SUFFIXES = (".sktch", ".safetensors", ".gguf")


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    card_data: dict[str, Any] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        # Never the same twice: the client's cache believes that a commit never changes.
        oid = hashlib.sha1(b"%d %s" % (next(_COUNT), message.encode())).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]

    def has(self, revision: str) -> bool:
        return revision in self.refs or revision in self.commits


@dataclass
class Fault:
    """What to do instead of answering requests whose method and path match, `times` times.

    kind: a status; `reset` breaks the connection; `early` does before the body was read; `stall`
    reads no more until the client has gone; `truncate` cuts the answer off; `lost` acts but
    never answers; `corrupt` stores other bytes; `html` answers 200 with a web page.
    """

    method: str
    part: str
    kind: int | str
    times: int = 1000
    headers: dict[str, str] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """The server, with everything that it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received = bytearray()
        self.put_bytes = 0
        self.lock = threading.RLock()
        self.stalled = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(
        self, name: str, files: dict[str, bytes] | None = None, *, private: bool = False
    ) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", dict(files or {}), "initial commit")
        return repo

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # broken connections are part of the tests


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._run(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self._broken():
            return
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.received += self.path.encode() + b"\n" + body + b"\n"
            if self.command == "PUT":
                self.server.put_bytes += len(body)
            for line in body.splitlines() if "/commit/" in self.path else ():
                value = json.loads(line)["value"]
                if "content" in value:
                    self.server.received += base64.b64decode(value["content"])
        self._run(body)

    do_PUT = do_POST

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().strip() or b"0", 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _broken(self) -> bool:
        """Whether the connection broke before the body was read."""
        for fault in self.server.faults:
            if self._matches(fault) and fault.kind in ("early", "stall"):
                fault.times -= 1
                if fault.kind == "stall":
                    self.server.stalled.set()
                    self.connection.recv(1)  # of the body; then until the end of the client
                    while self.connection.recv(1 << 16):
                        pass
                self._reset()
                return True
        return False

    def _matches(self, fault: Fault) -> bool:
        return fault.times > 0 and fault.method == self.command and fault.part in self.path

    def _run(self, body: bytes) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.truncated = False
        for fault in self.server.faults:
            if self._matches(fault):
                fault.times -= 1
                if isinstance(fault.kind, int):
                    text = json.dumps({"error": "refused for the test"}).encode()
                    self._reply(fault.kind, text, {"X-Error-Message": "refused", **fault.headers})
                    return
                if fault.kind == "reset":
                    self._reset()
                    return
                if fault.kind == "html":
                    self._reply(200, b"<html>a captive portal</html>", {})
                    return
                if fault.kind == "corrupt":
                    body = body[:-1] + bytes([body[-1] ^ 1])
                self.truncated = fault.kind == "truncate"
                if fault.kind == "lost":
                    self._answer(body, lost=True)
                    self._reset()
                    return
                break
        self._answer(body)

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # a real RST, no orderly end
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def _answer(self, body: bytes, *, lost: bool = False) -> None:
        with self.server.lock:
            status, value, headers = self._route(body)
        if lost:
            return
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self._reply(status, data, headers)

    def _reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.truncated:
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            else:
                self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass

    # What a Hub does -------------------------------------------------------------------------

    def _route(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            return self._error(401, "Invalid credentials in Authorization header")
        if parts[:2] == ["api", "whoami-v2"]:
            return (200, {"name": "user"}, {}) if token else self._error(401, "")
        if parts[:2] == ["api", "validate-yaml"]:
            return 200, {"errors": [], "warnings": []}, {}
        if parts[:2] == ["api", "repos"]:
            return self._create(json.loads(body)) if token else self._error(401, "")
        if parts[0] == "lfs":
            return self._store(parts[1], body)
        if parts[0] == "api":
            return self._api("/".join(parts[2:4]), parts[4:], parse_qs(url.query), body, token)
        if parts[2:3] == ["resolve"]:
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
        return self._batch(json.loads(body))

    def _error(self, status: int, message: str, code: str = "") -> tuple[int, Any, dict[str, str]]:
        return status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            return self._error(409, "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.add(name, {".gitattributes": b"*.bin filter=lfs -text\n"}, private=private)
        return 200, {"url": f"{self.server.address}/{name}"}, {}

    def _store(self, oid: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        # A real store would refuse other bytes; ours takes them, so that the client must notice.
        self.server.lfs[oid] = body
        return 200, {}, {"ETag": oid}

    def _repo(self, name: str, token: str) -> Repo | None:
        repo = self.server.repos.get(name)
        return None if repo is None or (repo.private and not token) else repo

    def _api(
        self, name: str, rest: list[str], query: dict[str, list[str]], body: bytes, token: str
    ) -> tuple[int, Any, dict[str, str]]:
        repo = self._repo(name, token)
        if repo is None:
            return self._error(404 if token else 401, "Repository not found", "RepoNotFound")
        verb, revision = (
            (rest + ["revision", "main"][len(rest) :])[:2] if rest else ("revision", "main")
        )
        if verb == "branch":
            repo.refs.setdefault(revision, repo.refs["main"])
            return 200, {}, {}
        if not repo.has(revision):
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        if verb == "revision":
            return 200, self._info(name, repo, revision), {}
        if verb == "tree":
            return 200, [self._entry(p, d) for p, d in repo.files(revision).items()], {}
        if verb == "preupload":
            return (
                200,
                {"files": [self._mode(repo, revision, f) for f in json.loads(body)["files"]]},
                {},
            )
        return self._commit(repo, name, revision, "create_pr" in query, body)

    def _info(self, name: str, repo: Repo, revision: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in repo.files(revision)]
        sha = repo.refs.get(revision, revision)
        info = {"id": name, "sha": sha, "private": repo.private, "siblings": siblings}
        return {**info, "cardData": repo.card_data, "tags": []}

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        return entry

    def _mode(self, repo: Repo, revision: str, asked: dict[str, Any]) -> dict[str, Any]:
        path, mode = asked["path"], "regular"
        if path.endswith(LFS_SUFFIXES):
            mode = "lfs"
        old = repo.files(revision).get(path)
        oid = None if old is None else sha256(old) if mode == "lfs" else blob_id(old)
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _batch(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        objects = []
        for item in asked["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.lfs:
                # As a store's presigned address: the right to write is in the query.
                href = f"{self.server.address}/lfs/{item['oid']}?X-Amz-Signature=presigned"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _commit(
        self, repo: Repo, name: str, revision: str, create_pr: bool, body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        lines = [json.loads(line) for line in body.splitlines()]
        head, files = lines[0]["value"], dict(repo.files(revision))
        if head.get("parentCommit") not in (None, repo.refs.get(revision, revision)):
            return self._error(412, "a commit has happened since")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        oid = repo.commit(f"refs/pr/{number}" if create_pr else revision, files, head["summary"])
        page = f"{self.server.address}/{name}"
        pull = f"{page}/discussions/{number}" if create_pr else None
        answer = {"commitUrl": f"{page}/commit/{oid}", "commitOid": oid, "pullRequestUrl": pull}
        return 200, answer, {}

    def _resolve(
        self, name: str, revision: str, path: str, token: str
    ) -> tuple[int, Any, dict[str, str]]:
        repo = self._repo(name, token)
        if repo is None:
            return self._error(404, "Repository not found", "RepoNotFound")
        if not repo.has(revision):
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        data = repo.files(revision).get(path)
        if data is None:
            return self._error(404, "Entry not found", "EntryNotFound")
        etag = sha256(data) if path.endswith(LFS_SUFFIXES) else blob_id(data)
        headers = {"X-Repo-Commit": repo.refs.get(revision, revision), "ETag": f'"{etag}"'}
        found = self.headers.get("Range", "")
        if found.startswith("bytes=") and not self.truncated:
            start = int(found[6:].split("-")[0])
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return 206, data[start:], {**headers, "Content-Range": span}
        return 200, data, headers
