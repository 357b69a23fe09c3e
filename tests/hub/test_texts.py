"""Cards, attributes and specs: merged with what is there, safe against what files say."""

from __future__ import annotations

import json

import pytest
import yaml

from sketchconv.errors import HubError
from sketchconv.hub.attributes import with_lfs
from sketchconv.hub.card_file import BEGIN, END, merge_card, section_names
from sketchconv.hub.contents import find_model
from sketchconv.hub.facts import facts_of
from sketchconv.hub.markdown import plain
from sketchconv.hub.scores import read_scores, score_lines
from sketchconv.hub.spec import HubSpec, parse_spec

OURS = {"license": "mit", "tags": ["sketchconv", "4-bit"]}


def merged(old: str | None, sections=None, kept=()) -> str:
    data = None if old is None else old.encode()
    return merge_card(data, "Title", OURS, sections or {"a": "text"}, frozenset(kept)).decode()


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_a_new_card():
    text = merged(None)
    assert front(text) == OURS
    assert "\n# Title\n" in text
    assert merged(text) == text


@pytest.mark.parametrize(
    ("old", "wanted"),
    [
        ("Just text.", OURS),
        ("---\n---\nText", OURS),
        ("---\n# only a comment\n---\nText", OURS),
        ("---\nlicense: x # why\n---\nText\n", {**OURS, "license": "x"}),
        (
            "---\r\nlicense: x\r\ntags:\r\n- a\r\n---\r\nText\r\n",
            {"license": "x", "tags": ["a", *OURS["tags"]]},
        ),
        (
            "---\ntags: [4-bit]\nlanguage: en\n---\n",
            {"license": "mit", "language": "en", "tags": ["4-bit", "sketchconv"]},
        ),
        ("---\n{license: x, tags: [sketchconv, 4-bit]}\n---\n", {**OURS, "license": "x"}),
        ("---\n{language: en}\n---\nText", {**OURS, "language": "en"}),
        ("---\ntags: words\n---\nText", {"license": "mit", "tags": "words"}),
    ],
)
def test_what_the_user_wrote_stays(old, wanted):
    text = merged(old)
    assert front(text) == wanted
    for line in ("Just text.", "Text", "# why", "# only a comment"):
        assert (line in old) == (line in text)
    assert text.count(BEGIN) == text.count(END) == 1
    assert merged(text) == text


def test_sections_are_kept_by_name():
    first = merged(None, {"a.gguf": "of a", "b.gguf": "of b", "files": "old"})
    second = merged(first, {"b.gguf": "new b", "files": "new"}, kept=("a.gguf", "b.gguf"))
    assert section_names(second.encode()) == {"a.gguf", "b.gguf", "files"}
    assert "of a" in second
    assert "of b" not in second
    assert "old" not in second
    assert "of a" not in merged(second, {"files": "x"}, kept=("b.gguf",))


@pytest.mark.parametrize("body", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"])
def test_broken_markers(body):
    with pytest.raises(HubError, match="expected one pair in order"):
        merged(f"text\n{body}\ntext")


def test_cards_that_cannot_be_merged():
    for old in (b"---\n- a\n---\n", b"---\n{a: [\n---\n", b"---\na: b: c\n---\n"):
        with pytest.raises(HubError, match="no YAML mapping"):
            merge_card(old, "T", OURS, {})
    with pytest.raises(HubError, match="not UTF-8"):
        merge_card(b"\xff", "T", OURS, {})


def test_texts_of_files_end_nothing():
    for text in (END, "a|b", "`code`", "<script>", "line\nline\r\u2028", "](x)"):
        shown = plain(text)
        assert END not in merged(None, {"a": shown}).replace(END, "", 1)
        assert not {"|", "`", "<", ">", "\n", "\r", "\u2028"}.intersection(shown)


def test_attributes():
    rule = b"*.sktch filter=lfs diff=lfs merge=lfs -text\n"
    assert with_lfs(b"", []) == rule
    assert with_lfs(rule, ["a.sktch"]) == rule
    assert with_lfs(b"*.gguf filter=lfs", ["a.gguf"]) == b"*.gguf filter=lfs\n" + rule
    assert with_lfs(b"# *.sktch filter=lfs\n*.sktch text\n", []).endswith(rule)
    assert with_lfs(rule, ["a.gguf"]) == rule + rule.replace(b"sktch", b"gguf")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("user/repo", HubSpec("user/repo")),
        ("user/repo:model.sktch", HubSpec("user/repo", "model.sktch")),
        ("user/repo:sub/q4.gguf", HubSpec("user/repo", "sub/q4.gguf")),
        ("user/repo:../model.sktch", None),
        ("user/repo:/etc/model.sktch", None),
        ("user/repo:.hidden.sktch", None),
        ("user/repo:model.bin", None),
        ("user/repo:modeling.py", None),
        ("user/repo:", None),
        ("out/model.sktch", None),
        ("./user/repo", None),
        ("/user/repo", None),
        ("a/b/c", None),
        ("repo", None),
        ("C:\\model.sktch", None),
    ],
)
def test_specs(text, wanted):
    assert parse_spec(text) == wanted


def test_scores(tmp_path):
    spread = {"mean": 0.5, "error": None}
    divergence = {"kl": spread, "median": 0.1, "p99": 1.0, "agreement": spread}
    text = {"text": "a|b", "windows": 2, "tokens": 10, "perplexity": None, "loss": 1.0}
    choices = {"questions": 8, "accuracy": 0.5, "error": 0.1}
    model = {"model": "org/name", "bits_per_weight": None, "choices": choices}
    value = {
        "models": [{**model, "texts": [{**text, "divergence": divergence}]}],
        "reference": {**model, "choices": None, "texts": [{**text, "divergence": None}]},
        "cut": {"seq_len": 64, "stride": 32, "windows": 2},
    }
    lines = score_lines(value)
    assert "| org/name |  | a&#124;b | infinite | 0.5000 | 50.0 % |" in lines
    assert "org/name: 8 questions, 50.0 +- 10.0 % right." in lines
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(value))
    assert read_scores(path) == value
    for bad in (
        "{}",
        "[]",
        "x",
        json.dumps({**value, "models": []}),
        json.dumps({**value, "cut": 1}),
    ):
        path.write_text(bad)
        with pytest.raises(HubError, match="not what `sketchconv eval --json` prints"):
            read_scores(path)
    with pytest.raises(HubError, match="cannot be read"):
        read_scores(tmp_path / "none.json")


def test_facts(made):
    bundle = facts_of(find_model(made / "model.sktch"))
    assert (bundle.base, bundle.license) == (None, "apache-2.0")
    rows = dict(bundle.rows)
    assert rows["Bits"] == "4"
    assert rows["Groups per row"] == "1"
    assert rows["Calibration data"] == "none"
    assert int(rows["Size"].split()[0].replace(",", "")) == (made / "model.sktch").stat().st_size
    gguf = facts_of(find_model(made / "tiny-Q4_K.gguf"))
    assert (gguf.base, gguf.license) == ("org/base", "mit")
    delta = facts_of(find_model(made / "delta"))
    assert delta.relation == "adapter"
    assert dict(delta.rows)["Task"] == "french"


def test_a_split_model_goes_whole(made, tmp_path):
    for number in (1, 2):
        part = tmp_path / f"x-{number:05d}-of-00002.gguf"
        part.write_bytes((made / "tiny-Q4_K.gguf").read_bytes())
    model = find_model(tmp_path / "x-00002-of-00002.gguf")
    assert [file.name for file in model.files] == ["x-00001-of-00002.gguf", part.name]
    part.unlink()
    with pytest.raises(
        HubError, match=r"x-00002-of-00002\.gguf of the same split model is missing"
    ):
        find_model(tmp_path / "x-00001-of-00002.gguf")
