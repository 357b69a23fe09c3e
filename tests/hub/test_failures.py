"""What a Hub and a network do wrong: one clear line each, or tried again until it works."""

from __future__ import annotations

import pytest
from hub_client import Refused
from loopback import TOKEN, Fault

INFO, CREATE, TREE = "/api/models/user/tiny", "/api/repos/create", "/tree/"
PREUPLOAD, BATCH, COMMIT = "/preupload/", "/objects/batch", "/commit/"

# What never stops failing, and the line that it becomes.
LASTING = {
    "403 create": (Fault("POST", CREATE, 403), r"creating the repository: .*\(403: refused"),
    "403 commit": (Fault("POST", COMMIT, 403), r"committing: the token may not do this \(403"),
    "403 batch": (Fault("POST", BATCH, 403), r"sending model\.sktch: the token may not"),
    "404 commit": (Fault("POST", COMMIT, 404), r"committing: not on the Hub \(404\)"),
    "409 create": (Fault("POST", CREATE, 409), r"the Hub says that it is there \(409\)"),
    "409 commit": (Fault("POST", COMMIT, 409), r"someone else changed .* \(409\)"),
    "412 commit": (Fault("POST", COMMIT, 412), r"someone else changed .* \(412\)"),
    "413 put": (Fault("PUT", "/lfs/", 413), r"sending model\.sktch: too large for the Hub"),
    "400 preupload": (Fault("POST", PREUPLOAD, 400), r"the Hub refused \(400"),
    "429 info": (Fault("GET", INFO, 429), r"too many requests \(429\)"),
    "429 commit": (Fault("POST", COMMIT, 429), r"committing: too many requests \(429\)"),
    "500 info": (Fault("GET", INFO, 500), r"reading its files: the Hub has failed \(500\)"),
    "502 put": (Fault("PUT", "/lfs/", 502), r"sending model\.sktch: the Hub has failed \(502\)"),
    "503 commit": (Fault("POST", COMMIT, 503), r"committing: the Hub has failed \(503\)"),
    "504 batch": (Fault("POST", BATCH, 504), r"sending model\.sktch: the Hub has failed \(504\)"),
    "reset info": (Fault("GET", INFO, "reset"), r"the connection failed"),
    "reset preupload": (Fault("POST", PREUPLOAD, "reset"), r"sending .*: the connection failed"),
    "reset put": (Fault("PUT", "/lfs/", "early"), r"sending model\.sktch: the connection failed"),
    "reset commit": (Fault("POST", COMMIT, "reset"), r"committing: the connection failed"),
    "truncated info": (Fault("GET", INFO, "truncate"), r"the connection failed"),
    "truncated batch": (Fault("POST", BATCH, "truncate"), r"sending .*: the connection failed"),
    "web page": (Fault("GET", INFO, "html"), r"cut off or is no answer of a Hub"),
    "web page for a batch": (Fault("POST", BATCH, "html"), r"cut off or is no answer of a Hub"),
    "damaged": (Fault("PUT", "/lfs/", "corrupt"), r"model\.sktch is not what was sent"),
}
# What passes: the push succeeds without the user's help.
PASSING = {
    "429 info": Fault("GET", INFO, 429, 2, {"Retry-After": "1"}),
    "500 create": Fault("POST", CREATE, 500, 1),
    "503 put": Fault("PUT", "/lfs/", 503, 2),
    "502 batch": Fault("POST", BATCH, 502, 1),
    "503 commit": Fault("POST", COMMIT, 503, 1),
    "reset tree": Fault("GET", TREE, "reset", 1),
    "reset put": Fault("PUT", "/lfs/", "early", 1),
    "reset commit": Fault("POST", COMMIT, "reset", 1),
    "lost commit": Fault("POST", COMMIT, "lost", 1),
    "truncated tree": Fault("GET", TREE, "truncate", 1),
    "truncated commit": Fault("POST", COMMIT, "truncate", 1),
}


def copied(fault: Fault) -> Fault:
    return Fault(fault.method, fault.part, fault.kind, fault.times, fault.headers)


@pytest.mark.parametrize("name", LASTING)
def test_one_line_then_it_goes_on(hub, client, made, name):
    fault, line = LASTING[name]
    hub.faults.append(copied(fault))
    with pytest.raises(Refused, match=line) as error:
        client("push", [str(made / "model.sktch")], "user/tiny")
    text = str(error.value)
    assert error.value.kind == "HubError"
    assert text.startswith("user/tiny: ")
    assert "\n" not in text
    assert len(text) < 400
    assert "presigned" not in text
    hub.faults.clear()
    if name == "damaged":
        hub.lfs.clear()  # a real store would not have kept it
        hub.repos.clear()
    sent = hub.put_bytes
    client("push", [str(made / "model.sktch")], "user/tiny")
    data = (made / "model.sktch").read_bytes()
    assert hub.repos["user/tiny"].files()["model.sktch"] == data
    before_commit = fault.part == COMMIT and fault.method == "POST"
    assert hub.put_bytes - sent == (0 if before_commit else len(data))


@pytest.mark.parametrize("name", PASSING)
def test_tried_again(hub, client, made, name):
    hub.faults.append(copied(PASSING[name]))
    client("push", [str(made / "model.sktch")], "user/tiny")
    repo = hub.repos["user/tiny"]
    assert repo.files()["model.sktch"] == (made / "model.sktch").read_bytes()
    assert len(repo.commits) == 2
    assert hub.faults[0].times == 0  # it did happen


def test_tokens(hub, client, made):
    client("setting", token="hf_" + "NotTheRightOne" * 3)
    with pytest.raises(Refused, match=r"the token is not valid \(401\)"):
        client("push", [str(made / "model.sktch")], "user/tiny")
    client("setting")
    with pytest.raises(Refused, match="no access token; run `hf auth login`"):
        client("push", [str(made / "model.sktch")], "user/tiny")
    assert hub.repos == {}
    report = client("push", [str(made / "model.sktch")], "user/tiny", dry_run=True)
    assert report["created"]


def test_nobody_else_is_overwritten(hub, client, made):
    """The branch moves between the look at it and the commit."""
    client("push", [str(made / "model.sktch")], "user/tiny")
    repo = hub.repos["user/tiny"]
    answer, theirs = hub.RequestHandlerClass._mode, {"README.md": b"theirs"}

    def moved(self, *args):
        repo.commit("main", {**repo.files(), **theirs}, "theirs")
        return answer(self, *args)

    hub.RequestHandlerClass._mode = moved
    try:
        with pytest.raises(Refused, match=r"someone else changed the repository .* \(412\)"):
            client("push", [str(made / "delta.sktch")], "user/tiny")
    finally:
        hub.RequestHandlerClass._mode = answer
    assert repo.files()["README.md"] == b"theirs"
    client("push", [str(made / "delta.sktch")], "user/tiny")
    assert repo.files()["README.md"].startswith(b"---\n")
    assert b"\ntheirs" in b"\n" + repo.files()["README.md"].split(b"---\n", 2)[2]


DOWNLOADS = {
    "429": (Fault("GET", INFO, 429), r"too many requests \(429\)"),
    "500": (Fault("GET", INFO, 500), r"the Hub answered 500"),
    "403": (Fault("GET", INFO, 403), r"access denied \(403\)"),
    "truncated": (Fault("GET", "/resolve/", "truncate"), r"user/tiny: "),
    "reset": (Fault("GET", "/resolve/", "reset"), r"user/tiny: "),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_downloads(hub, client, made, tmp_path, name):
    fault, line = DOWNLOADS[name]
    data = (made / "model.sktch").read_bytes() + name.encode()  # never in the cache
    hub.add("user/tiny", {"model.sktch": data})
    hub.faults.append(copied(fault))
    with pytest.raises(Refused, match=line) as error:
        client("fetch", "user/tiny")
    assert error.value.kind == "HubError"
    assert "\n" not in str(error.value)
    hub.faults[:] = [Fault("GET", "/resolve/", "truncate", 1)]
    with open(client("fetch", "user/tiny"), "rb") as file:  # noqa: PTH123
        assert file.read() == data


def test_a_hub_that_names_files_outside(hub, client):
    hub.add("user/evil", {"../../evil.sktch": b"x", "/evil.gguf": b"x", ".hidden.sktch": b"x"})
    with pytest.raises(Refused, match="holds no sketch, no delta and no GGUF file"):
        client("fetch", "user/evil")
    assert not any("/resolve/" in line for line in hub.requests)


def test_the_token_is_never_shown(hub, client, made):
    for name in ("401 info", "502 put", "reset put", "429 commit"):
        status = int(name[:3]) if name[0].isdigit() else "early"
        part, method = (INFO, "GET") if "info" in name else ("/lfs/", "PUT")
        hub.faults[:] = [Fault(method, part, status)]
        done = client("command", "push", str(made / "model.sktch"), "user/tiny")
        assert (done["code"] == 0) == ("commit" in name and "429" not in name), done
        assert done["err"].startswith("Error: user/tiny: ")
        assert done["err"].count("\n") == 1
    assert TOKEN not in client.said
    assert "presigned" not in client.said
    assert TOKEN.encode() not in hub.received
