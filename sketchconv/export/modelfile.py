"""A `Modelfile` beside a GGUF file, from which `ollama create` makes a model.

Syntax as Ollama's own parser reads it (`parser/parser.go`): one instruction a line, values in
double quotes without escapes, or in three of them. There is never a TEMPLATE: Ollama's are programs
in Go's template language, a chat template is one in Jinja, and a guessed translation would change
prompts in silence. Ollama looks for a template of its own that belongs to the GGUF's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from sketchconv.errors import OutputError
from sketchconv.export.job import GgufJob, check_outputs
from sketchconv.export.rows import RowReader, SourceRows
from sketchconv.sources.gguf_header import (
    GgufArray,
    GgufHeader,
    read_header,
    read_numbers,
    read_strings,
)

NAME: Final = "Modelfile"
# Ollama reserves memory for the whole context: the 131,072 of many a model would be gigabytes.
LARGEST_CONTEXT: Final = 8192
NO_TEMPLATE: Final = (
    "the Modelfile has no TEMPLATE: Ollama recognises some chat templates in a GGUF and otherwise "
    "sends the bare prompt; `ollama show --template NAME` says which"
)
_END_KEYS: Final = ("eos", "eot", "eom")
_SPECIAL: Final = (3, 4)  # token types: control, user-defined; others are not stored as plain text


def check_modelfile(job: GgufJob) -> None:
    """Say before the work what would prevent the Modelfile after it.

    Raises:
        OutputError: one is there already, the GGUF has several parts, or a name that no Modelfile
            can hold.
    """
    folder = job.output.absolute().parent
    check_outputs(folder, {NAME: None}, job.reader.paths, force=job.overwrite)
    if len(job.sizes) > 1:
        raise OutputError(
            f"{job.output}: would have {len(job.sizes)} parts, and Ollama takes one file; drop "
            "--max-shard-size"
        )
    quoted(f"./{job.output.name}")


def end_ids(reader: RowReader) -> tuple[int, ...]:
    """Ids that end a text by the source's configs; a GGUF file itself holds one of several."""
    if not isinstance(reader, SourceRows):
        return ()
    files = reader.source.files()
    generation = json.loads(files.get("generation_config.json", b"{}"))
    found: list[int] = []
    for config in (generation, reader.source.config()):
        value = config.get("eos_token_id") if isinstance(config, dict) else None
        found += [v for v in (value if isinstance(value, list) else [value]) if type(v) is int]
    return tuple(dict.fromkeys(found))


def write_modelfile(gguf: Path, ends: Iterable[int] = (), *, overwrite: bool = False) -> Path:
    """Write the Modelfile of a finished GGUF file, as a whole or not at all.

    Args:
        gguf: the file, one part.
        ends: more ids of tokens that end a text, see `end_ids`.
        overwrite: replace what is there.

    Returns:
        Its path, `Modelfile` in the folder of the GGUF.

    Raises:
        OutputError: it exists already, or a name or a token that no Modelfile can hold.
        SourceError: the GGUF file is not one.
    """
    path = gguf.absolute().parent / NAME
    text = modelfile_text(gguf, ends)
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; pass --force to replace it")
    unfinished = path.with_name(f".{NAME}.{gguf.name}.part")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def modelfile_text(gguf: Path, ends: Iterable[int] = ()) -> str:
    """The text for a GGUF file: FROM, the context, and the tokens that end a text.

    Raises:
        OutputError: as `quoted`.
        SourceError: the GGUF file is not one.
    """
    header = read_header(gguf)
    architecture = header.values.get("general.architecture")
    trained = header.values.get(f"{architecture}.context_length")
    lines = [
        f"# {_comment(gguf.name)} for Ollama: ollama create NAME -f {NAME}",
        f"# No TEMPLATE: {_template_note(header)}",
        f"FROM {quoted(f'./{gguf.name}')}",
    ]
    if isinstance(trained, int) and trained > 0:
        lines.append(f"# The model was made for {trained} tokens; more context takes more memory.")
        lines.append(f"PARAMETER num_ctx {min(trained, LARGEST_CONTEXT)}")
    lines += [f"PARAMETER stop {quoted(text)}" for text in _stops(gguf, header, ends)]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A value as the parser gives it back, which knows no escapes.

    Raises:
        OutputError: the text cannot be written.
    """
    if not text.isprintable():  # the parser drops such characters, and a line's end ends a value
        raise OutputError(f"{text!r} cannot be written in a Modelfile; choose another name")
    mark = '"""' if '"' in text else '"'
    return f"{mark}{text}{mark}"


def _template_note(header: GgufHeader) -> str:
    if "tokenizer.chat_template" not in header.values:
        return "the GGUF has no chat template, so prompts are sent as they are."
    return "Ollama looks for its own by the GGUF's (ollama show --template NAME)."


def _stops(gguf: Path, header: GgufHeader, ends: Iterable[int]) -> list[str]:
    """Texts of the tokens that end a text, each once, in the order of the keys."""
    values: Any = [header.values.get(f"tokenizer.ggml.{key}_token_id") for key in _END_KEYS]
    wanted = dict.fromkeys(v for v in (*values, *ends) if type(v) is int)
    tokens = header.values.get("tokenizer.ggml.tokens")
    types = header.values.get("tokenizer.ggml.token_type")
    if not wanted or not isinstance(tokens, GgufArray) or not isinstance(types, GgufArray):
        return []
    texts, kinds = read_strings(gguf, tokens), read_numbers(gguf, types)
    known = [i for i in wanted if 0 <= i < min(len(texts), len(kinds)) and kinds[i] in _SPECIAL]
    return [texts[i] for i in known if texts[i]]


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
