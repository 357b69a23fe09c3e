"""Nothing leaves but the model: neither other files, nor secrets in those that may go."""

from __future__ import annotations

import json
import shutil

import pytest
from hub_client import Refused
from loopback import TOKEN

from sketchconv.hub.secrets import find_secret, redact

MARK = "PlantedSecret"
AWS = "AKIA" + "Q7EXAMPLE3PLANTED"[:16]
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA0Z3VS5JJcds3xfn\n"
OTHER = "hf_" + "abcdefghijKLMNOPQRSTuvwxyz01234567"


def everything(hub) -> bytes:
    """Every byte that the server was sent, or stores."""
    stored = [
        data for repo in hub.repos.values() for f in repo.commits.values() for data in f.values()
    ]
    return bytes(hub.received) + b"".join(hub.lfs.values()) + b"".join(stored)


@pytest.fixture
def planted(made, tmp_path):
    """A sketch folder among everything that a careless folder may hold."""
    folder = tmp_path / "planted"
    shutil.copytree(made / "folder", folder)
    outside = tmp_path / "outside.json"
    outside.write_text(MARK)
    names = [".env", ".netrc", "token", "id_rsa", "modeling_tiny.py", "pytorch_model.bin"]
    names += ["README.md", "notes.md", "optimizer.pt", "training_args.bin", "x.pkl", ".git/config"]
    names += ["wandb/run.log", "model-00009-of-00009.safetensors", "secrets.json", ".gitattributes"]
    names += ["chat_templates/evil.py", "calibration.txt", "other.sktch", "runs.gguf", "tokenizer"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{MARK} {TOKEN} {AWS} {KEY}")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": f"modeling_{MARK}.TinyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, names, outside


def test_other_files_stay(hub, client, planted):
    folder, names, _ = planted
    report = client("push", [str(folder)], "user/tiny")
    sent = everything(hub)
    for text in (MARK, TOKEN, AWS, "PRIVATE KEY", "auto_map"):
        assert text.encode() not in sent
    files = hub.repos["user/tiny"].files()
    assert not set(names).difference({"README.md", ".gitattributes"}).intersection(files)
    assert {".env", "modeling_tiny.py", "pytorch_model.bin"} <= set(report["left_behind"])
    assert client("logits", "user/tiny", "from_pretrained")


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("tokenizer_config.json", json.dumps({"x": OTHER}), "a Hugging Face token"),
        ("generation_config.json", json.dumps({"key": AWS}), "an AWS access key"),
        ("chat_template.jinja", f"{{# {KEY} #}}", "a private key"),
        ("LICENSE", f"line\n{TOKEN}", "the access token in use in line 2"),
        ("special_tokens_map.json", json.dumps({"k": "ghp_" + "a1B2" * 9}), "a GitHub token"),
    ],
)
def test_secrets_in_files_that_would_go(hub, client, made, tmp_path, name, text, kind):
    folder = tmp_path / "folder"
    shutil.copytree(made / "folder", folder)
    (folder / name).write_text(text)
    with pytest.raises(Refused, match=f"{name}: holds {kind}.*nothing was sent") as error:
        client("push", [str(folder)], "user/tiny")
    assert hub.requests == []
    for secret in (TOKEN, AWS, OTHER, "MIIEpAIBA"):
        assert secret not in str(error.value)


def test_links_do_not_lead_outside(hub, client, planted):
    folder, _, outside = planted
    (folder / "vocab.json").symlink_to(outside)
    with pytest.raises(Refused, match="leaves the model folder"):
        client("push", [str(folder)], "user/tiny")
    assert MARK.encode() not in everything(hub)


def test_a_bundle_is_looked_into(hub, client, tmp_path, made, writer):
    writer(tmp_path / "secret.sktch", {"tokenizer_config.json": json.dumps({"t": TOKEN}).encode()})
    with pytest.raises(Refused, match=r"tokenizer_config\.json: holds the access token in use"):
        client("push", [str(tmp_path / "secret.sktch")], "user/tiny")
    writer(tmp_path / "code.sktch", {"modeling_evil.py": b"import os"})
    with pytest.raises(Refused, match=r"modeling_evil\.py: not a file that may be published"):
        client("push", [str(tmp_path / "code.sktch")], "user/tiny")
    writer(tmp_path / "map.sktch", {}, {"auto_map": {"AutoModel": "evil.Model"}})
    with pytest.raises(Refused, match="names code to run"):
        client("push", [str(tmp_path / "map.sktch")], "user/tiny")
    for path in (made / "folder" / "config.json", tmp_path):
        with pytest.raises(Refused, match=r"can push|neither model nor delta"):
            client("push", [str(path)], "user/tiny")
    assert hub.requests == []


def test_no_pickle_under_a_good_name(hub, client, made, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(made / "dense", folder)
    (folder / "model.safetensors").write_bytes(b"\x80\x04\x95" + b"x" * 100)
    with pytest.raises(Refused, match="pickle"):
        client("push", [str(folder)], "user/tiny")
    assert hub.requests == []


def test_patterns():
    assert (
        find_secret(b"the hf_tokenizer and AKIA, sk-learn, ghp_ and " + KEY[:31].encode()) is None
    )
    assert find_secret(b"x" * 10 + b"\n" + OTHER.encode()) == "a Hugging Face token in line 2"
    assert find_secret(b"sk-ant-" + b"a1" * 20) is not None
    shown = redact(f"at https://x.org/a?X-Amz-Signature=abc with {OTHER} and word", "word-token")
    assert shown == "at https://x.org/a with *** and word"
    assert redact("tok word-token", "word-token") == "tok ***"
