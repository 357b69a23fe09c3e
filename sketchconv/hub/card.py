"""The sections of a model card: what each model is, how to load it, how it scored, checksums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sketchconv.hub.facts import Facts
from sketchconv.hub.markdown import plain, table
from sketchconv.hub.scores import score_lines

_SINGLE: Final = {"folder": "model", "dense": "model", "mlx": "model"}
_INSTALL: Final = "pip install sketchconv"
EVALUATION: Final = "evaluation"
FILES: Final = "files"


def section_name(facts: Facts) -> str:
    """The name of a model's section: that of its file; a folder's does not depend on its path."""
    model = facts.model
    if model.kind == "delta" and model.path.is_dir():
        return "adapter"
    return _SINGLE.get(model.kind, model.name)


def card_sections(
    repo: str,
    models: Sequence[Facts],
    checksums: Mapping[str, tuple[int, str]],
    scores: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Every section that is written anew, by name.

    Args:
        repo: where it goes, for the snippets.
        models: everything that is sent.
        checksums: size and SHA-256 of each weight file that the repository will hold.
        scores: of `sketchconv eval --json`, if there are any.
    """
    sections = {section_name(facts): _model(repo, facts) for facts in models}
    if scores is not None:
        sections[EVALUATION] = "\n".join(["## Evaluation", "", *score_lines(scores)])
    sections[FILES] = "\n".join(["## Checksums", "", *_checksums(checksums)])
    return sections


def _model(repo: str, facts: Facts) -> str:
    name = section_name(facts)
    title = {"model": "The model", "adapter": "The delta"}.get(name, plain(name))
    text = [f"## {title}", "", *table(facts.rows), ""]
    for head, language, lines in _snippets(repo, facts):
        text += [head, "", f"```{language}", *lines, "```", ""]
    return "\n".join(text)


def _snippets(repo: str, facts: Facts) -> Iterable[tuple[str, str, list[str]]]:
    kind, name = facts.model.kind, facts.model.name
    place = repo if kind in ("folder", "dense") or facts.model.path.is_dir() else f"{repo}:{name}"
    if kind == "delta":
        return _delta_snippets(place)
    if kind == "gguf":
        return _gguf_snippets(repo, facts.model.weights[0].name)
    if kind == "mlx":
        return _mlx_snippets(repo)
    if kind == "dense":
        return [
            ("transformers:", "python", _transformers(repo, facts)),
            ("As a sketch, at 4 bits:", "sh", [f"sketchconv convert {repo} model.sktch"]),
            _llama_cpp(repo),
        ]
    opening = (
        [
            "import sketchconv  # registers the format; without it loading fails",
            *_transformers(repo, facts),
        ]
        if kind == "folder"
        else [
            "import sketchconv",
            "",
            "# An ordinary model of transformers.",
            f'model = sketchconv.load("{place}")',
            f'tokenizer = sketchconv.load_tokenizer("{place}")',
        ]
    )
    return [
        (f"transformers (after `{_INSTALL}`):", "python", opening),
        ("The command line:", "sh", [_try_out(place, facts)]),
        _llama_cpp(place),
    ]


def _transformers(repo: str, facts: Facts) -> list[str]:
    kind = "AutoModelForCausalLM" if facts.task == "text-generation" else "AutoModel"
    return [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained("{repo}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
    ]


def _try_out(place: str, facts: Facts) -> str:
    if facts.task == "text-generation":
        return f'sketchconv generate {place} "Once upon a time"'
    return f"sketchconv inspect {place}"


def _llama_cpp(place: str) -> tuple[str, str, list[str]]:
    lines = [
        f"sketchconv convert {place} model.gguf",
        'llama-cli -m model.gguf -p "Once upon a time"',
    ]
    return "llama.cpp, where the architecture is one that it knows:", "sh", lines


def _gguf_snippets(repo: str, file: str) -> list[tuple[str, str, list[str]]]:
    python = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", gguf_file="{file}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}", gguf_file="{file}")',
    ]
    lines = [f'llama-cli -hf {repo} --hf-file {file} -p "Once upon a time"']
    sketch = [
        f"hf download {repo} {file} --local-dir .",
        f"sketchconv convert {file} model.sktch",
    ]
    return [
        ("llama.cpp:", "sh", lines),
        ("transformers:", "python", python),
        (f"As a sketch (after `{_INSTALL}`):", "sh", sketch),
    ]


def _mlx_snippets(repo: str) -> list[tuple[str, str, list[str]]]:
    python = [
        "from mlx_lm import generate, load",
        "",
        f'model, tokenizer = load("{repo}")',
        'print(generate(model, tokenizer, prompt="Once upon a time"))',
    ]
    prompt = '"Once upon a time"'
    return [
        ("MLX (after `pip install mlx-lm`):", "python", python),
        ("The command line:", "sh", [f"mlx_lm.generate --model {repo} --prompt {prompt}"]),
        ("As a server:", "sh", [f"mlx_lm.server --model {repo}"]),
    ]


def _delta_snippets(place: str) -> list[tuple[str, str, list[str]]]:
    python = [
        "import sketchconv",
        "from sketchconv.deltas import apply",
        "from sketchconv.hub import fetch",
        "",
        'base = fetch("BASE")  # the sketch that the delta was made for, by path or hub id',
        f'apply(base, fetch("{place}"), "tuned")  # or "tuned.sktch" where the base is one file',
        'model = sketchconv.load("tuned")',
    ]
    look = [f"sketchconv inspect {place}"]
    gguf = ["sketchconv convert tuned model.gguf", 'llama-cli -m model.gguf -p "Once upon a time"']
    return [
        (f"On its base (after `{_INSTALL}`):", "python", python),
        ("What it holds:", "sh", look),
        ("llama.cpp, after the above:", "sh", gguf),
    ]


def _checksums(files: Mapping[str, tuple[int, str]]) -> list[str]:
    rows = [f"| {plain(n)} | {size:,} | `{digest}` |" for n, (size, digest) in files.items()]
    return ["| File | Bytes | SHA-256 |", "|---|---:|---|", *rows]
