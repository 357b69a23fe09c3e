"""What is kept out: foreign hosts, keys that cannot be sent, clients that leave, too much work."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading

import pytest
from click.testing import CliRunner

from sketchconv.cli.main import cli
from sketchconv.errors import ServingError
from sketchconv.serving import run
from sketchconv.serving.hosts import LOCAL
from sketchconv.serving.problems import Problem
from sketchconv.serving.wanted import Sampling, Wanted

ENDLESS = Sampling(100, 0.0, 1.0, None, ())


def wanted(prompt, messages=(), sampling=ENDLESS):
    return Wanted("talker", prompt, messages, sampling, False, False)


@pytest.fixture
def app(service):
    """An application that answers for this machine alone, and what it serves."""
    pytest.importorskip("fastapi")
    from sketchconv.serving.app import make_app

    made = service()
    return make_app(made, hosts=frozenset({*LOCAL, "bound.example"})), made


def answer(app, path, host):
    httpx = pytest.importorskip("httpx")

    async def ask():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
            return await http.get(path, headers={"Host": host})

    return asyncio.run(ask())


@pytest.mark.parametrize("port", ["", ":8000"])
def test_hosts_of_this_machine_are_answered_and_no_others(app, port):
    for host in (*LOCAL, "LocalHost", "bound.example"):
        assert answer(app[0], "/v1/models", host + port).status_code == 200
    evil = ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", "::1", "")
    for host in evil:
        for path in ("/v1/models", "/health", "/none"):
            found = answer(app[0], path, host + port)
            assert found.status_code == 403
            assert found.json()["error"]["code"] == "unknown_host"
            assert "127.0.0.1" in found.json()["error"]["message"]


def test_hosts_are_those_of_the_address():
    with run.listen("127.0.0.1", 0) as place:
        assert run.hosts_of(place, "My.Name") == {*LOCAL, "my.name"}
    with run.listen("127.0.0.1", 0) as place:
        assert run.hosts_of(place, "localhost") == set(LOCAL)
    with run.listen("0.0.0.0", 0) as place:
        assert run.hosts_of(place, "0.0.0.0") is None
        allowed = run.hosts_of(place, "0.0.0.0", ["Proxy.example:443"])
        assert allowed == {*LOCAL, "0.0.0.0", "proxy.example"}
    if socket.has_ipv6:
        try:
            place = run.listen("::1", 0)
        except ServingError:
            return
        with place:
            assert run.hosts_of(place, "::1") == set(LOCAL)


@pytest.mark.parametrize("key", ["hémlich", "hidden\n", " hidden", "hid\tden"])
def test_a_key_that_cannot_be_sent_is_refused_at_the_start(monkeypatch, key):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    monkeypatch.setenv("THE_KEY", key)
    options = ["--port", "0", "--api-key-env", "THE_KEY"]
    result = CliRunner().invoke(cli, ["serve", "none.sktch", *options])  # before it is looked for
    assert result.exit_code != 0
    assert "the API key must be of printable ASCII characters" in result.output
    assert "Traceback" not in result.output
    assert key.strip() not in result.output


def test_usual_keys_may_be():
    for key in ("secret", "sk-a_b.c~D/9+8=", "two words"):
        run.check_key(key)


def half_sent(app, then):
    """The status of a request whose body begins; what comes next is up to `then`."""
    path = "/v1/completions"
    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"", "http_version": "1.1",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "scheme": "http", "server": ("t", 80), "client": ("c", 1), "root_path": "",
        "raw_path": path.encode(),
    }  # fmt: skip
    messages = [{"type": "http.request", "body": b"{", "more_body": True}]
    sent = []

    async def receive():
        return messages.pop(0) if messages else await then()

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # what it raises would be a traceback in the log
    return sent[0]["status"]


def test_a_client_that_leaves_within_its_body_is_no_error(app):
    async def leaves():
        return {"type": "http.disconnect"}

    assert half_sent(app[0], leaves) == 499


def test_a_body_that_does_not_end_is_given_up(app, monkeypatch):
    monkeypatch.setattr("sketchconv.serving.app.BODY_SECONDS", 0.05)

    async def stays():
        await asyncio.Event().wait()

    assert half_sent(app[0], stays) == 408


def test_a_full_queue_refuses_before_there_is_work(service, monkeypatch):
    made = service(concurrent=1, queue=0)
    forward, begun, gate = made.engine._forward, threading.Event(), threading.Event()

    def held(*args):
        begun.set()
        assert gate.wait(60)
        return forward(*args)

    monkeypatch.setattr(made.engine, "_forward", held)
    events = queue.Queue()
    job = made.job(wanted("w5"), events.put)
    made.engine.submit(job)
    assert begun.wait(60)  # its prompt is being read, and it is not among those that run

    def tokenize(*_args, **_options):
        raise RuntimeError("a prompt was read for nothing")

    monkeypatch.setattr(made, "_prompt", tokenize)
    for prompt, messages in (("w5", ()), (None, ({"role": "user", "content": "w5"},))):
        with pytest.raises(Problem, match="too many requests") as refused:
            made.job(wanted(prompt, messages), events.put)
        assert refused.value.status == 429
    made.engine.cancel(job)
    gate.set()


def test_prompts_have_a_limit_where_the_model_has_none(service):
    made = service(tokens=4096)
    made._positions = None
    made.job(wanted((5,) * 8192), print)
    with pytest.raises(Problem, match="has 8193 tokens, this server takes 8192") as refused:
        made.job(wanted((5,) * 8193), print)
    assert refused.value.code == "context_length_exceeded"
