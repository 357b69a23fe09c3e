"""The command on a real port: a stream that is broken off, signals, what it refuses to start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from sketchconv.cli.main import cli
from sketchconv.serving import run

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@contextmanager
def server(*args):
    """A server in a process of its own, and its URL."""
    command = [sys.executable, "-P", "-m", "sketchconv", "serve", *map(str, args), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        for line in child.stderr:
            if line.startswith("Serving"):
                break
        else:
            raise AssertionError(f"it ended with {child.wait()}")
        yield child, line.split(" on ")[1].split("/v1")[0]
    finally:
        child.kill()
        child.wait()


def health(url):
    with urllib.request.urlopen(f"{url}/health") as answer:
        return json.load(answer)


def asked(url, **more):
    body = {"model": "one", "prompt": "w5", "max_tokens": 100, "temperature": 0, **more}
    headers = {"Content-Type": "application/json"}
    data = json.dumps(body).encode()
    return urllib.request.Request(f"{url}/v1/completions", data=data, headers=headers)


def test_a_server_answers_notices_who_leaves_and_ends_on_a_signal(talker, alone):
    options = ("--delta", f"one={talker['one']}", "--delta", f"two={talker['two']}")
    with server(talker["base"], *options, "--allow-host", "Proxy.example") as (child, url):
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(asked(url, max_tokens=8)) as answer:
            text = json.load(answer)["choices"][0]["text"]
        assert text.split() == alone("one", "w5", 8).split()
        foreign = asked(url)
        foreign.add_header("Host", "evil.example")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(foreign)
        assert refused.value.code == 403
        by_proxy = asked(url, max_tokens=1)
        by_proxy.add_header("Host", "proxy.example")
        with urllib.request.urlopen(by_proxy) as answer:
            assert answer.status == 200
        stream = urllib.request.urlopen(asked(url, stream=True))
        assert stream.readline().startswith(b"data: ")
        stream.close()
        host, port = url.removeprefix("http://").split(":")
        plain = socket.create_connection((host, int(port)))
        request = asked(url)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        )
        plain.sendall(f"{head}Content-Length: {len(request.data)}\r\n\r\n".encode() + request.data)
        plain.close()
        deadline = time.monotonic() + 60
        while health(url)["running"] + health(url)["waiting"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=60) == 0
        assert "Interrupted" not in child.stderr.read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--delta", "one"), "expected NAME=PATH"),
        (("--delta", "a=x", "--delta", "a=y"), "given twice"),
        (("--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY is not set"),
        (("--delta", "a=/none.sktch"), "no such delta"),
        (("--host", "203.0.113.7"), "cannot listen on 203.0.113.7"),
    ],
)
def test_what_cannot_start_says_why(talker, options, message):
    result = CliRunner().invoke(cli, ["serve", str(talker["base"]), "--port", "0", *options])
    assert result.exit_code != 0
    assert message in result.output


def test_a_missing_extra_is_named(talker, monkeypatch):
    monkeypatch.setattr(run, "NEEDED", ("fastapi", "no_such_package"))
    result = CliRunner().invoke(cli, ["serve", str(talker["base"])])
    assert result.exit_code != 0
    assert "pip install 'sketchconv[serve]'" in result.output


def test_a_taken_port_is_named(talker):
    with run.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(cli, ["serve", str(talker["base"]), "--port", port])
    assert result.exit_code != 0
    assert f"cannot listen on 127.0.0.1:{port}" in result.output


def test_loopback_is_known():
    assert run.is_loopback("localhost")
    assert run.is_loopback("127.0.0.9")
    assert run.is_loopback("::1")
    assert not run.is_loopback("0.0.0.0")
    assert not run.is_loopback("example.com")


def test_the_base_is_served_by_name_and_tasks_may_not_bear_it(talker):
    with pytest.raises(ValueError, match="the base's name"):
        run.open_service(talker["base"], {"talker": str(talker["one"])}, run.Limits())
