"""`sketchconv eval` from its options to its table, its JSON and its plots."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sketchconv.cli.main import cli

PLOTS = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="plots need matplotlib"
)


def sketch_maker():
    """`write` of the runtime tests; conftest files cannot be imported by name."""
    path = Path(__file__).parent.parent / "runtime" / "conftest.py"
    spec = importlib.util.spec_from_file_location("runtime_makers_for_eval", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.write


@pytest.fixture(scope="module")
def place(makers, tmp_path_factory):
    """A dense folder, another model, a sketch of the first, a text and questions."""
    folder = tmp_path_factory.mktemp("models")
    makers.folder(folder / "dense")
    makers.folder(folder / "other", makers.model(seed=1))
    tokenizer = {p.name: p.read_bytes() for p in (folder / "dense").glob("tokenizer*")}
    sketch_maker()(makers.model(), folder / "sketch.sktch", files=tokenizer)
    (folder / "text.txt").write_text(makers.text(70))
    (folder / "more.txt").write_text(makers.text(50, seed=1))
    records = [
        {"question": makers.text(4, seed=n), "choices": ["w1 w2", "w3"], "answer": n % 2}
        for n in range(5)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def run(place, *arguments):
    """The command inside the folder of models, with small windows."""
    paths = {p.name: str(p) for p in place.iterdir()}
    given = [paths.get(a, a) for a in arguments]
    return CliRunner().invoke(cli, ["eval", *given, "--seq-len", "16", "--windows", "3"])


def test_a_table_of_several_models(place):
    done = run(
        place, "dense", "other", "sketch.sktch", "--reference", "dense",
        "--text", "text.txt", "--text", "more.txt", "--choices", "questions.jsonl",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "windows of 16 tokens, stride 16; text: 3 of them, 45 predictions" in done.output
    assert done.output.count("5 questions") == 4
    assert done.output.count("relative error of the last hidden state") == 3
    assert "sketch.sktch" in done.output


def test_json_holds_every_figure(place, makers):
    done = run(
        place, "sketch.sktch", "dense", "--reference", "dense", "--text", "text.txt", "--json"
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    sketch, dense = result["models"]
    assert sketch["texts"][0]["divergence"]["kl"]["mean"] > 0.01
    assert dense["texts"][0]["divergence"]["kl"]["mean"] == 0
    assert dense["texts"][0]["divergence"]["agreement"]["mean"] == 1
    assert dense["texts"][0]["perplexity"] == result["reference"]["texts"][0]["perplexity"]
    assert sketch["bits_per_weight"] < dense["bits_per_weight"]
    assert result["cut"] == {"seq_len": 16, "stride": None, "count": 3}
    # against transformers' own loss
    model, tokenizer = makers.model(), makers.tokenizer()
    ids = torch.tensor(tokenizer((place / "text.txt").read_text())["input_ids"][:48]).view(3, 16)
    with torch.inference_mode():
        expected = math.exp(model(ids, labels=ids).loss.item())
    assert dense["texts"][0]["perplexity"] == pytest.approx(expected, rel=1e-5)


@PLOTS
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plots_are_the_same_bytes_each_time(place, tmp_path, suffix):
    for n in range(2):
        done = run(
            place, "sketch.sktch", "other", "--reference", "dense", "--text", "text.txt",
            "--plot", str(tmp_path / f"{n}{suffix}"),
        )  # fmt: skip
        assert done.exit_code == 0, done.output
    first, second = ((tmp_path / f"{n}{suffix}").read_bytes() for n in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


@PLOTS
def test_a_plot_without_a_reference(place, tmp_path):
    done = run(place, "dense", "--text", "text.txt", "--plot", str(tmp_path / "p.svg"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "p.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense"], "give a --text, or --choices"),
        (["nowhere.gguf", "--text", "text.txt"], "nowhere.gguf: no such file or folder"),
        (["dense", "--text", "text.txt", "--device", "cuda:0"], "torch sees no GPU"),
        (["dense", "--text", "text.txt", "--stride", "17"], "stride is between"),
        (["dense", "--text", "text.txt", "--plot", "x.pdf"], "written as .png or .svg"),
        (["dense", "--choices", "questions.jsonl", "--plot", "x.svg"], "needs a --text"),
    ],
)
def test_errors_in_one_line(place, arguments, message):
    if "cuda:0" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(place, *arguments)
    assert done.exit_code != 0
    assert message in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_models_of_other_words_are_refused(place, makers, tmp_path):
    makers.folder(tmp_path / "foreign", None, makers.tokenizer(words=80))
    done = run(place, str(tmp_path / "foreign"), "--reference", "dense", "--text", "text.txt")
    assert done.exit_code == 1
    assert "different vocabularies: 10 tokens differ, for instance 'w80'" in done.output


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("BertModel", "weights of BertLMHeadModel are missing"),
        ("BertForMaskedLM", "lets later tokens change earlier predictions"),
    ],
)
def test_an_encoder_has_no_perplexity(place, makers, tmp_path, kind, message):
    makers.model(kind).save_pretrained(tmp_path / "bert")
    makers.tokenizer().save_pretrained(tmp_path / "bert")
    done = run(place, str(tmp_path / "bert"), "--text", "text.txt")
    assert done.exit_code == 1
    assert message in done.output


@pytest.mark.parametrize(("models", "length"), [(["dense", "short"], 16), (["sketch.sktch"], 64)])
def test_windows_are_no_longer_than_the_models_can_take(place, makers, tmp_path, models, length):
    makers.folder(tmp_path / "short", makers.model("GPT2LMHeadModel", max_position_embeddings=16))
    paths = [str((tmp_path if name == "short" else place) / name) for name in models]
    words = ["--text", str(place / "text.txt")]
    done = CliRunner().invoke(cli, ["eval", *paths, *words])
    assert done.exit_code == 0, done.output
    assert f"windows of {length} tokens" in done.output
    assert "longer than" not in done.output
    asked = CliRunner().invoke(cli, ["eval", *paths, *words, "--seq-len", str(length + 1)])
    if models == ["sketch.sktch"]:  # rotary: goes on, and says so
        assert asked.exit_code == 0, asked.output
        assert f"sketch.sktch: windows are longer than its context of {length}" in asked.output
    else:
        assert asked.exit_code == 1
        assert f"positions for {length}; take --seq-len {length} or less" in asked.output


@PLOTS
@pytest.mark.filterwarnings("error")
def test_a_plot_of_what_is_infinite(tmp_path):
    from sketchconv.evaluation.evaluate import Evaluation, ModelScore
    from sketchconv.evaluation.plot import save_plot
    from sketchconv.evaluation.scores import Spread, TextScore
    from sketchconv.evaluation.windows import Cut

    models = []
    for n, value in enumerate((math.inf, 3.0, 1e300)):
        text = TextScore("t", 2, 9, value, Spread(math.log(value), 0.1), None)
        models.append(ModelScore(f"m{n}", None, None, "float32", (text,), None, None, 1.0))
    evaluation = Evaluation(tuple(models), None, Cut(), 0, "cpu")
    save_plot(evaluation, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().count("not drawn") == 2
