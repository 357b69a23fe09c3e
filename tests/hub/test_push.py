"""Push, and what comes back: files, card, digests, `from_pretrained`, nothing sent twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_client import Refused
from loopback import TOKEN, Fault, sha256

WEIGHTS = (".sktch", ".safetensors", ".gguf")


def card_of(repo) -> tuple[dict, str]:
    text = repo.files()["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_folder_goes_and_comes_back(hub, client, made):
    report = client("push", [str(made / "folder")], "user/tiny")
    repo = hub.repos["user/tiny"]
    sent = repo.files()
    assert repo.private
    assert report["created"]
    assert report["private"]
    names = {p.name for p in (made / "folder").iterdir()}
    assert sent.keys() == names | {"README.md", ".gitattributes"}
    for name in names:
        assert sent[name] == (made / "folder" / name).read_bytes()
    assert b"*.sktch filter=lfs diff=lfs merge=lfs -text\n" in sent[".gitattributes"]
    assert sent[".gitattributes"].startswith(b"*.bin filter=lfs -text\n")
    values, body = card_of(repo)
    assert values["license"] == "apache-2.0"
    assert values["library_name"] == "transformers"
    assert values["pipeline_tag"] == "text-generation"
    assert {"sketchconv", "4-bit"} <= set(values["tags"])
    assert "base_model" not in values  # `tiny` is no hub id
    assert sha256(sent["model.safetensors"]) in body
    assert 'from_pretrained("user/tiny")' in body
    assert "import sketchconv" in body
    assert "llama-cli" in body

    want = client("logits", str(made / "folder"), "load")
    assert client("logits", "user/tiny", "load") == want
    assert client("logits", "user/tiny", "from_pretrained") == want
    assert client("tokens", "user/tiny") == client("tokens", str(made / "folder"))

    before, commits = hub.put_bytes, len(repo.commits)
    again = client("push", [str(made / "folder")], "user/tiny")
    assert {f["state"] for f in again["files"]} == {"there already"}
    assert again["sent_bytes"] == 0
    assert hub.put_bytes == before
    assert len(repo.commits) == commits
    assert again["commit"] == repo.refs["main"]

    client("setting", token=TOKEN, offline=True)
    seen = len(hub.requests)
    assert client("logits", "user/tiny", "load") == want
    assert client("logits", "user/tiny", "from_pretrained") == want
    with pytest.raises(Refused, match="HF_HUB_OFFLINE is set"):
        client("fetch", "user/never")
    with pytest.raises(Refused, match="HF_HUB_OFFLINE is set; unset it to push"):
        client("push", [str(made / "folder")], "user/tiny")
    assert len(hub.requests) == seen


def test_several_files_in_one_repository(hub, client, made):
    base = hub.add("org/base")
    base.card_data = {"license": "cc-by-4.0", "language": ["en"]}
    models = [made / "model.sktch", made / "tiny-Q8_0.gguf", made / "delta.sktch"]
    client("push", list(map(str, models)), "user/mixed")
    repo = hub.repos["user/mixed"]
    assert repo.files().keys() == {m.name for m in models} | {"README.md", ".gitattributes"}
    for model in models:
        assert repo.files()[model.name] == model.read_bytes()
    values, body = card_of(repo)
    assert (values["license"], values["language"]) == ("cc-by-4.0", ["en"])
    assert (values["base_model"], values["base_model_relation"]) == ("org/base", "quantized")
    assert values["library_name"] == "sketchconv"
    for part in ("user/mixed:model.sktch", "--hf-file tiny-Q8_0.gguf", "user/mixed:delta.sktch"):
        assert part in body

    # Another variant later: the card keeps the sections of those that are there.
    client("push", [str(made / "tiny-Q4_K.gguf")], "user/mixed")
    body = card_of(repo)[1]
    for name in ("tiny-Q8_0.gguf", "tiny-Q4_K.gguf", "model.sktch", "delta.sktch"):
        assert body.count(f"<!-- sketchconv:section {name} -->") == 1
        assert body.count(sha256(repo.files()[name])) == 1

    want = client("logits", str(made / "model.sktch"), "load")
    assert client("logits", "user/mixed:model.sktch", "load") == want
    assert client("tokens", "user/mixed:model.sktch")
    with pytest.raises(Refused, match=r"2 such files; name one of user/mixed:delta\.sktch"):
        client("fetch", "user/mixed")
    with pytest.raises(Refused, match=r"holds no file 'none\.sktch'"):
        client("fetch", "user/mixed:none.sktch")
    shown = client("command", "inspect", "user/mixed:delta.sktch", "--json")
    assert json.loads(shown["out"])["format"] == "delta"
    assert client("command", "verify", "user/mixed:model.sktch")["code"] == 0


def test_a_delta_by_its_id(hub, client, made):
    options = {"card": {"base_model": "user/tiny", "license": "mit"}}
    client("push", [str(made / "delta")], "user/french", **options)
    values, body = card_of(hub.repos["user/french"])
    assert values["base_model"] == "user/tiny"
    assert values["base_model_relation"] == "adapter"
    assert values["library_name"] == "sketchconv"
    assert values["license"] == "mit"
    assert "french" in body
    path = client("fetch", "user/french")
    for file in (made / "delta").iterdir():
        assert (Path(path) / file.name).read_bytes() == file.read_bytes()


def test_deltas_and_their_bases_by_their_ids(hub, client, made, tmp_path):
    client("push", [str(made / "folder")], "user/tiny")
    client("push", [str(made / "delta")], "user/french")
    client("push", [str(made / "delta.sktch")], "user/files")
    one, other = "user/french", "user/files:delta.sktch"
    for command in (
        ("info", one, "--base", "user/tiny"),
        ("apply", "user/tiny", one, str(tmp_path / "tuned")),
        ("revert", str(tmp_path / "tuned"), other, str(tmp_path / "back")),
        ("merge", "user/tiny", str(tmp_path / "d.sktch"), one, f"{other}=0.5"),
        ("export", other, "user/tiny", str(tmp_path / "dense"), "--to", "safetensors", "--quiet"),
    ):
        done = client("command", "delta", *command)
        assert done["code"] == 0, done
    for file in (made / "folder").glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    done = client("command", "delta", "info", "user/nothing")
    assert done["code"] == 1
    assert "user/nothing" in done["err"]
    client("setting", token=TOKEN, offline=True)
    seen = len(hub.requests)
    assert client("command", "delta", "info", one, "--base", "user/tiny")["code"] == 0
    assert client("command", "delta", "info", other)["code"] == 0
    assert len(hub.requests) == seen


def test_shards_and_a_dense_model(hub, client, made):
    client("push", [str(made / "shards")], "user/shards")
    sent = hub.repos["user/shards"].files()
    assert sum(name.endswith(".safetensors") for name in sent) > 1
    want = client("logits", str(made / "folder"), "load")
    assert client("logits", "user/shards", "load") == want
    client("push", [str(made / "dense")], "user/dense")
    assert card_of(hub.repos["user/dense"])[0]["library_name"] == "transformers"
    with pytest.raises(Refused, match="holds no sketch, no delta and no GGUF file"):
        client("logits", "user/dense", "load")
    assert client("fetch", "user/dense", dense=True)


def test_a_folder_of_another_quantizer_or_of_mlx(hub, client, made, tmp_path):
    shutil.copytree(made / "dense", tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(Refused, match="quantized by 'awq', not a model that was made here"):
        client("push", [str(tmp_path / "dense")], "user/dense")
    settings = {"group_size": 32, "bits": 4, "mode": "affine"}
    path.write_text(json.dumps({**config, "quantization": settings}))
    client("push", [str(tmp_path / "dense")], "user/mlx")
    values, body = card_of(hub.repos["user/mlx"])
    assert values["library_name"] == "mlx"
    assert {"mlx", "4-bit"} <= set(values["tags"])
    assert 'load("user/mlx")' in body
    assert "MLX, affine mode" in body


def test_branches_and_pull_requests(hub, client, made):
    client("push", [str(made / "model.sktch")], "user/tiny", message="first")
    repo = hub.repos["user/tiny"]
    main = dict(repo.files())
    client("push", [str(made / "folder")], "user/tiny", revision="v2")
    assert repo.files() == main
    assert repo.files("v2").keys() > main.keys()
    assert repo.messages[-2] == "first"
    want = client("logits", str(made / "folder"), "load")
    assert client("logits", "user/tiny", "load", revision="v2") == want
    assert client("fetch", "user/tiny").endswith("/model.sktch")
    with pytest.raises(Refused, match="no revision 'v3' on the Hub"):
        client("fetch", "user/tiny", revision="v3")
    with pytest.raises(Refused, match="a revision can be chosen only on the Hub"):
        client("fetch", str(made / "folder"), revision="v2")

    report = client("push", [str(made / "delta.sktch")], "user/tiny", create_pr=True)
    assert report["pull_request"].endswith("/discussions/1")
    assert repo.files() == main
    assert "delta.sktch" in repo.files("refs/pr/1")
    client("push", [str(made / "tiny-Q8_0.gguf")], "user/tiny", revision="refs/pr/1")
    assert {"delta.sktch", "tiny-Q8_0.gguf"} <= repo.files("refs/pr/1").keys()
    with pytest.raises(Refused, match="a pull request needs a repository"):
        client("push", [str(made / "folder")], "user/nothing", create_pr=True)
    with pytest.raises(Refused, match="no pull request refs/pr/9"):
        client("push", [str(made / "folder")], "user/tiny", revision="refs/pr/9")
    assert "user/nothing" not in hub.repos


def test_a_card_is_merged(hub, client, made, tmp_path):
    old = "---\nlicense: llama3  # ours\ntags:\n- mine\n---\n# My title\n\nMy words.\n"
    repo = hub.add("user/tiny", {"README.md": old.encode()})
    scores = tmp_path / "eval.json"
    spread = {"mean": 0.01, "error": 0.002}
    divergence = {"kl": spread, "median": 0.005, "p99": 0.1, "agreement": spread}
    text = {"text": "wiki", "windows": 4, "tokens": 400, "perplexity": 12.5, "loss": 2.5}
    score = {"model": "/home/someone/private/tiny.sktch", "bits_per_weight": 4.5, "choices": None}
    value = {
        "models": [{**score, "texts": [{**text, "divergence": divergence}]}],
        "reference": None,
        "cut": {"seq_len": 128, "stride": None, "windows": 4},
    }
    scores.write_text(json.dumps(value))
    done = client("command", "push", str(made / "folder"), "user/tiny", "--eval", str(scores))
    assert done["code"] == 0, done
    assert "stays public" in done["out"]
    text = repo.files()["README.md"].decode()
    assert text.startswith("---\nlicense: llama3  # ours\n")
    values, body = card_of(repo)
    assert values["tags"][0] == "mine"
    assert "sketchconv" in values["tags"]
    assert body.startswith("# My title\n\nMy words.\n")
    assert "| tiny.sktch | 4.50 | wiki | 12.500 | 0.0100 +- 0.0020 | 1.0 +- 0.2 % |" in body
    assert "someone" not in body

    # The user edits around our part; the next push keeps that and the evaluation.
    edited = text.replace("My words.", "Other words.") + "\nA last word.\n"
    files = {**repo.files(), "README.md": edited.encode()}
    repo.commit("main", files, "by hand")
    client("push", [str(made / "folder")], "user/tiny")
    text = repo.files()["README.md"].decode()
    assert text == edited

    untouched = client("push", [str(made / "model.sktch")], "user/tiny", card={"write": False})
    assert untouched["card"] is None
    assert repo.files()["README.md"].decode() == edited
    repo.commit("main", {"README.md": b"---\n- no mapping\n---\n"}, "by hand")
    with pytest.raises(Refused, match="no YAML mapping"):
        client("push", [str(made / "folder")], "user/tiny")


def test_an_interrupted_push_goes_on(hub, client, made):
    shards = sorted(p for p in (made / "shards").glob("*.safetensors"))
    last = sha256(shards[-1].read_bytes())
    hub.faults.append(Fault("PUT", last, "early"))
    with pytest.raises(Refused, match=f"sending {shards[-1].name}: the connection failed") as error:
        client("push", [str(made / "shards")], "user/tiny")
    assert "what has arrived is not sent again" in str(error.value)
    repo = hub.repos["user/tiny"]
    assert len(repo.commits) == 1  # nothing was published by halves
    hub.faults.clear()
    before = hub.put_bytes
    client("push", [str(made / "shards")], "user/tiny")
    assert hub.put_bytes - before == shards[-1].stat().st_size
    for shard in shards:
        assert repo.files()[shard.name] == shard.read_bytes()


def test_what_arrived_damaged_is_named(hub, client, made):
    hub.faults.append(Fault("PUT", "/lfs/", "corrupt"))
    with pytest.raises(Refused, match=r"model\.sktch is not what was sent: its digest"):
        client("push", [str(made / "model.sktch")], "user/tiny")


def test_a_lost_answer_makes_no_second_commit(hub, client, made):
    hub.faults.append(Fault("POST", "/commit/", "lost", 1))
    report = client("push", [str(made / "model.sktch")], "user/tiny")
    repo = hub.repos["user/tiny"]
    assert len(repo.commits) == 2
    assert report["commit"] == repo.refs["main"]

    hub.faults[:] = [Fault("POST", "/commit/", "lost", 1)]
    with pytest.raises(Refused, match="committing: the connection failed"):
        client("push", [str(made / "delta.sktch")], "user/tiny", create_pr=True)
    assert sum(ref.startswith("refs/pr/") for ref in repo.refs) == 1


def test_a_dry_run_changes_nothing(hub, client, made):
    done = client("command", "push", str(made / "folder"), "user/tiny", "--dry-run", "--json")
    report = json.loads(done["out"])
    assert {f["state"] for f in report["files"]} == {"to send"}
    assert report["sent_bytes"] == report["bytes"] > 0
    assert hub.repos == {}
    client("push", [str(made / "folder")], "user/tiny")
    seen = len(hub.repos["user/tiny"].commits)
    models = [str(made / "folder"), str(made / "model.sktch")]
    report = client("push", models, "user/tiny", dry_run=True)
    states = {f["name"]: f["state"] for f in report["files"]}
    assert states["model.safetensors"] == "there already"
    assert states["model.sktch"] == "to send"
    assert len(hub.repos["user/tiny"].commits) == seen
    assert {line.split()[0] for line in hub.requests[-3:]} <= {"GET", "HEAD"}


def test_a_damaged_model_stays_here(hub, client, made, tmp_path):
    damaged = bytearray((made / "model.sktch").read_bytes())
    damaged[8 + int.from_bytes(damaged[:8], "little")] ^= 1  # the first byte of the data
    path = tmp_path / "model.sktch"
    path.write_bytes(damaged)
    with pytest.raises(Refused, match="failed verification, nothing was sent"):
        client("push", [str(path)], "user/tiny", verify=True)
    path.write_bytes(damaged[:-8])
    with pytest.raises(Refused, match="SKT-"):
        client("push", [str(path)], "user/tiny")
    shutil.copy(made / "tiny-Q8_0.gguf", tmp_path / "cut.gguf")
    with (tmp_path / "cut.gguf").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 64)
    with pytest.raises(Refused, match="cut off"):
        client("push", [str(tmp_path / "cut.gguf")], "user/tiny")
    with pytest.raises(Refused, match="record no digests"):
        client("push", [str(made / "tiny-Q8_0.gguf")], "user/tiny", verify=True)
    assert hub.repos == {}
    assert hub.requests == []


def test_convert_and_publish(hub, client, made, tmp_path):
    client("setting", token=None)
    out = str(tmp_path / "dense")
    done = client("command", "convert", str(made / "folder"), out, "--dense", "--push-to", "user/d")
    assert done["code"] == 1
    assert "no access token" in done["err"]
    assert not (tmp_path / "dense").exists()  # refused before the work
    client("setting", token=TOKEN)
    done = client("command", "convert", str(made / "folder"), out, "--dense", "--push-to", "user/d")
    assert done["code"] == 0, done
    assert "digests of all" in done["out"]
    sent = hub.repos["user/d"].files()
    assert sent["model.safetensors"] == (tmp_path / "dense/model.safetensors").read_bytes()

    # A sketch on the Hub is a source as one on disk is.
    client("push", [str(made / "folder")], "user/s")
    done = client("command", "convert", "user/s", str(tmp_path / "again"), "--dense")
    assert done["code"] == 0, done
    assert (tmp_path / "again/model.safetensors").read_bytes() == sent["model.safetensors"]

    # The card of a folder that does not say where it comes from names the source.
    assert "base_model" not in card_of(hub.repos["user/d"])[0]
    hub.repos["user/d"].card_data = {"license": "mit"}
    out = str(tmp_path / "copy")
    done = client("command", "convert", "user/d", out, "--dense", "--push-to", "user/e")
    assert done["code"] == 0, done
    values, _ = card_of(hub.repos["user/e"])
    assert (values["base_model"], values["license"]) == ("user/d", "mit")


def test_what_eval_measures_goes_into_the_card(hub, client, made, tmp_path):
    client("push", [str(made / "folder")], "user/s")
    (tmp_path / "words.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    cut = ["--text", str(tmp_path / "words.txt"), "--windows", "2", "--seq-len", "16"]
    done = client("command", "eval", "user/s", *cut, "--device", "cpu", "--json", "--quiet")
    assert done["code"] == 0, done
    (tmp_path / "eval.json").write_text(done["out"])
    measured = json.loads(done["out"])["models"][0]["texts"][0]["perplexity"]
    scores = ("--eval", str(tmp_path / "eval.json"))
    done = client("command", "push", str(made / "folder"), "user/s", *scores)
    assert done["code"] == 0, done
    body = card_of(hub.repos["user/s"])[1]
    assert f"| words | {measured:.3f} |" in body
    assert "Windows of 16 tokens, stride 16, 2 of them" in body


def test_a_push_that_was_killed_goes_on(hub, client, made, tmp_path):
    shards = sorted(p for p in (made / "shards").glob("*.safetensors"))
    last = sha256(shards[-1].read_bytes())
    hub.faults.append(Fault("PUT", last, "stall"))
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "sketchconv", "push", str(made / "shards"), "user/tiny"],
        env={**client.environment, "HF_TOKEN": TOKEN},
        cwd=tmp_path,
    ) as process:
        assert hub.stalled.wait(120)
        process.kill()
    assert len(hub.repos["user/tiny"].commits) == 1
    hub.faults.clear()
    before = hub.put_bytes
    client("push", [str(made / "shards")], "user/tiny")
    assert hub.put_bytes - before == shards[-1].stat().st_size
    sent = hub.repos["user/tiny"].files()
    assert all(sent[shard.name] == shard.read_bytes() for shard in shards)
