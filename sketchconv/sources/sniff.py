"""First bytes of a weight file: tell a pickle, a pointer or a web page from safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sketchconv.errors import SourceError
from sketchconv.formats.sniff import PICKLE_SUFFIXES, kind_of_head

_HEAD = 256
_TO_SAFETENSORS = (
    "pickles run code when loaded and are never opened; save it again with"
    " `model.save_pretrained(folder)`, or take the repository's safetensors revision (of SqueezeLLM"
    " and SketchTune: pass --base FOLDER, which reads their tables and runs nothing)"
)
_ADVICE: Mapping[str, str] = {
    "git-lfs": "a Git LFS pointer, not the weights; run `git lfs pull`, or `hf download` the model",
    "zip": f"a ZIP archive, as PyTorch's pickles are; {_TO_SAFETENSORS}",
    "pickle": f"a pickle; {_TO_SAFETENSORS}",
    "gguf": "a GGUF file; give that file itself, ending in .gguf, as the source",
    "elf": "a program, not weights; download the file again",
    "pdf": "a PDF, not weights; download the file again",
    "web": "a web page, not weights; download the file again",
}


def refuse_impostor(path: Path, label: str) -> None:
    """Raise if the file's first bytes are those of something else than safetensors.

    Bytes 8 and 9 decide: a safetensors header begins with "{" there, so that a length that
    happens to look like a pickle's first bytes is no false alarm.

    Raises:
        SourceError: says what the file is, and what to do.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise SourceError(f"{label}: cannot be read ({error.strerror})") from None
    if not head:
        raise SourceError(f"{label}: the file is empty; download it again")
    if head[8:9] == b"{":
        return
    kind = kind_of_head(head)
    if kind is not None and kind != "json":
        advice = _ADVICE.get(kind, f"a file of kind {kind}, not weights; download the file again")
        raise SourceError(f"{label}: {advice}")


def refuse_pickles(names: list[str], label: str) -> None:
    """Raise if a folder without safetensors holds pickled weights.

    Raises:
        SourceError: names the pickle and says how to convert it.
    """
    for name in names:
        if name.endswith(PICKLE_SUFFIXES) and not name.startswith(("training_args", "optimizer")):
            raise SourceError(f"{label}: holds only pickled weights ({name}); {_TO_SAFETENSORS}")
