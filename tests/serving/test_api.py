"""The endpoints: what they give, what they refuse, and how."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest

from sketchconv.serving.engine import Engine
from sketchconv.serving.problems import Problem

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def body(**more):
    return {"model": "talker", "prompt": "w5 w6 w7", "max_tokens": 6, "temperature": 0, **more}


def said(prompt="w5", **more):
    made = body(messages=[{"role": "user", "content": prompt}], **more)
    del made["prompt"]
    return made


def events(response):
    """The values of a stream, which must end as OpenAI's do."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_models_are_the_base_and_the_tasks(talk):
    with talk() as call:
        answer = call("GET", "/v1/models")
        assert answer.status_code == 200
        assert [one["id"] for one in answer.json()["data"]] == ["talker", "one", "two"]
        assert call("GET", "/v1/models/two").json()["id"] == "two"
        missing = call("GET", "/v1/models/three")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
        health = call("GET", "/health").json()
        assert health == {"status": "ok", "running": 0, "waiting": 0}


@pytest.mark.parametrize("model", ["talker", "one", "two"])
def test_a_completion_is_that_of_its_task(talk, alone, model):
    with talk() as call:
        answer = call("POST", TEXT, json=body(model=model)).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == model
    choice = answer["choices"][0]
    assert choice["text"].split() == alone(model, "w5 w6 w7", 6).split()
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}


def test_a_prompt_may_be_tokens(talk, alone):
    with talk() as call:
        for prompt in ([5, 6, 7], [[5, 6, 7]], ["w5 w6 w7"]):
            answer = call("POST", TEXT, json=body(prompt=prompt)).json()
            assert answer["choices"][0]["text"].split() == alone("talker", "w5 w6 w7", 6).split()


def test_a_chat_goes_through_the_template(talk, alone):
    with talk() as call:
        parts = [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w9"}]
        messages = [
            {"role": "developer", "content": "w3"},
            {"role": "user", "content": parts},
        ]
        answer = call("POST", CHAT, json={**said(model="one"), "messages": messages}).json()
    assert answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"].split() == alone("one", "system w3 user w5 w9 assistant", 6).split()
    assert answer["usage"]["prompt_tokens"] == 6


def test_streams_say_the_same_in_pieces(talk):
    with talk() as call:
        whole = call("POST", TEXT, json=body(model="two")).json()
        pieces = events(call("POST", TEXT, json=body(model="two", stream=True)))
        assert len(pieces) > 3
        assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]
        assert [p["choices"][0]["finish_reason"] for p in pieces[-2:]] == [None, "length"]
        assert len({p["id"] for p in pieces}) == 1
        whole = call("POST", CHAT, json=said()).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        pieces = events(call("POST", CHAT, json=said(**options)))
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces[:-1])
    assert text == whole["choices"][0]["message"]["content"]
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"] == whole["usage"]


def test_stop_strings_end_the_text_before_them(talk, alone):
    words = alone("talker", "w5 w6 w7", 6).split()
    stop = f"{words[2]} {words[3]}"
    with talk() as call:
        answer = call("POST", TEXT, json=body(stop=stop)).json()
        assert answer["choices"][0]["text"].split() == words[:2]
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 4
        pieces = events(call("POST", TEXT, json=body(stop=["never", stop], stream=True)))
        assert "".join(p["choices"][0]["text"] for p in pieces).split() == words[:2]
        unmet = call("POST", TEXT, json=body(stop=words[-1] + " more")).json()
        assert unmet["choices"][0]["text"].split() == words


def test_the_seed_fixes_a_sample_whatever_else_is_served(talk):
    with talk() as call:
        wanted = body(temperature=1.5, top_p=0.9, seed=7, max_tokens=12)
        first = call("POST", TEXT, json=wanted).json()["choices"][0]["text"]
        others = [(TEXT, body(model="one", prompt="w1 w2", max_tokens=20))] * 3
        found = call.many([*others, (TEXT, wanted)])[-1].json()["choices"][0]["text"]
        other = call("POST", TEXT, json={**wanted, "seed": 8}).json()["choices"][0]["text"]
    assert found == first
    assert other != first


def test_requests_of_all_tasks_together_say_what_they_say_alone(talk, alone):
    prompts = ["w5 w6 w7", "w9", "w20 w21 w22 w23 w24 w25 w26", "w40 w41"]
    asked = [(m, p, n) for n, p in enumerate(prompts) for m in ("talker", "one", "two")]
    with talk(concurrent=5) as call:  # fewer places than requests: some join others that run
        answers = call.many(
            [(TEXT, body(model=m, prompt=p, max_tokens=4 + 5 * n)) for m, p, n in asked]
        )
    for (model, prompt, number), answer in zip(asked, answers, strict=True):
        text = answer.json()["choices"][0]["text"]
        assert text.split() == alone(model, prompt, 4 + 5 * number).split()


@pytest.mark.parametrize(
    ("path", "change", "word", "param"),
    [
        (TEXT, {"n": 2}, "only n=1", "n"),
        (TEXT, {"n": True}, "only n=1", "n"),
        (TEXT, {"best_of": 3}, "not supported", "best_of"),
        (TEXT, {"logprobs": 2}, "not supported", "logprobs"),
        (CHAT, {"tools": [{}]}, "not supported", "tools"),
        (CHAT, {"prompt": "w5"}, "unrecognized", "prompt"),
        (TEXT, {"max_token": 5}, "unrecognized", "max_token"),
        (TEXT, {"max_tokens": 0}, "from 1", "max_tokens"),
        (TEXT, {"max_tokens": 2.5}, "an integer", "max_tokens"),
        (TEXT, {"max_tokens": 999}, "gives 64", "max_tokens"),
        (TEXT, {"temperature": 3}, "from 0 to 2", "temperature"),
        (TEXT, {"temperature": "hot"}, "a number", "temperature"),
        (TEXT, {"top_p": 0}, "above 0", "top_p"),
        (TEXT, {"seed": 0.5}, "an integer", "seed"),
        (TEXT, {"stop": [""]}, "none empty", "stop"),
        (TEXT, {"stop": ["a"] * 5}, "at most 4", "stop"),
        (TEXT, {"stream": "yes"}, "true or false", "stream"),
        (TEXT, {"stream_options": 5}, "an object", "stream_options"),
        (TEXT, {"model": 5}, "must name", "model"),
        (TEXT, {"prompt": ["a", "b"]}, "one string", "prompt"),
        (TEXT, {"prompt": ""}, "no tokens", "prompt"),
        (TEXT, {"prompt": [5, 151]}, "from 0 to 150", "prompt"),
        (TEXT, {"prompt": "w5 " * 100, "max_tokens": 40}, "128 positions", "prompt"),
        (CHAT, {"messages": []}, "a list of 1", "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "role", "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "text", "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type text",
         "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": "w1"}, {"role": "system", "content": ""}]},
         "system comes first", "messages"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_by_name(shared_call, path, change, word, param):
    made = said() if path == CHAT else body()
    answer = shared_call("POST", path, json={**made, **change})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert word in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def shared_call(talker):
    """One server for all requests that are refused before they reach the engine."""
    pytest.importorskip("fastapi")
    httpx = pytest.importorskip("httpx")
    import asyncio

    from sketchconv.serving.app import make_app
    from sketchconv.serving.run import open_service
    from sketchconv.serving.service import Limits

    service = open_service(talker["base"], {}, Limits(tokens=64, body=5000))
    app = make_app(service)

    def call(method, path, **options):
        async def run():
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
                return await http.request(method, path, **options)

        return asyncio.run(run())

    yield call
    service.engine.close()


def test_what_changes_nothing_may_be_there(shared_call):
    more = {"n": 1, "logprobs": None, "frequency_penalty": 0.0, "user": "me", "logit_bias": {}}
    assert shared_call("POST", TEXT, json=body(**more)).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "word"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 4000, 400, "not JSON"),
        (b"[]", 400, "a JSON object"),
        (b'{"prompt": "\\ud800"}', 400, "not JSON"),
        (b" " * 5001, 413, "larger than 5000"),
    ],
)
def test_bodies_that_are_no_requests(shared_call, content, status, word):
    kind = {"content-type": "application/json"}
    answer = shared_call("POST", TEXT, content=content, headers=kind)
    assert answer.status_code == status
    assert word in answer.json()["error"]["message"]


def test_other_content_types_paths_and_methods(shared_call):
    assert shared_call("POST", TEXT, data={"a": "b"}).status_code == 415
    for method, path, status in (("GET", "/v1/none", 404), ("GET", TEXT, 405)):
        answer = shared_call(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    missing = shared_call("POST", TEXT, json=body(model="three"))
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_a_key_is_asked_for(talk):
    with talk("secret") as call:
        assert call("GET", "/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = call("GET", "/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert call("POST", TEXT, json=body(), headers=headers).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert call("POST", TEXT, json=body(), headers=right).status_code == 200


def test_a_full_queue_refuses(talk, monkeypatch):
    forward, check = Engine._forward, Engine.check_room
    refused, gate = [], threading.Event()

    def held(self, *args):
        assert gate.wait(60)  # no answer is complete before all that are too many were refused
        return forward(self, *args)

    def checked(self):
        try:
            check(self)
        except Problem:
            refused.append(1)
            if len(refused) == 4:
                gate.set()
            raise

    monkeypatch.setattr(Engine, "_forward", held)
    monkeypatch.setattr(Engine, "check_room", checked)
    with talk(concurrent=1, queue=1) as call:
        answers = call.many([(TEXT, body(max_tokens=40))] * 6)
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(service, monkeypatch, stream):
    pytest.importorskip("fastapi")
    from sketchconv.serving.app import make_app

    made = service()
    forward, calls = made.engine._forward, []

    def slow(*args):
        calls.append(1)
        time.sleep(0.1)
        return forward(*args)

    monkeypatch.setattr(made.engine, "_forward", slow)
    data = json.dumps(body(max_tokens=100, stream=stream)).encode()
    scope = {
        "type": "http", "method": "POST", "path": TEXT, "query_string": b"", "http_version": "1.1",
        "headers": [(b"content-type", b"application/json")], "scheme": "http",
        "server": ("t", 80), "client": ("c", 1), "root_path": "", "raw_path": TEXT.encode(),
    }  # fmt: skip

    async def visit():
        messages = [{"type": "http.request", "body": data, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            while len(calls) < 3:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(_message):
            pass

        await make_app(made)(scope, receive, send)
        while made.engine.running:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(visit(), 60))
    assert len(calls) < 60
