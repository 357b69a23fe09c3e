"""A GGUF model of an architecture that we read, as a model and a tokenizer of transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_read(path: Path) -> bool:
    """Whether a path is a GGUF file of an architecture of ours; transformers reads some others.

    Raises:
        SourceError: a `.gguf` file that is broken, or a part whose siblings are missing.
    """
    if path.suffix.lower() != ".gguf":
        return False
    from sketchconv.sources.gguf_names import ARCHITECTURES
    from sketchconv.sources.gguf_parts import read_parts

    return read_parts(path).header.values.get("general.architecture") in ARCHITECTURES


def open_model(path: Path, dtype: str) -> PreTrainedModel:
    """The dense model, every weight decoded bit for bit as ggml does it, then cast to `dtype`.

    Args:
        path: the file, or any part of a split.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        SourceError, ArchitectureError: the file is broken, or has what is not understood.
    """
    import torch

    from sketchconv.architecture import open_skeleton
    from sketchconv.calibration.weights import Weights
    from sketchconv.sources.gguf import GgufSource

    with GgufSource(path) as source:
        model, mapping = open_skeleton(source.config(), source.infos)
        kind, place = getattr(torch, dtype), torch.device("cpu")
        Weights(model, mapping, source, kind, place).fill("")
    model.tie_weights()
    model.config.dtype = kind
    model.config._name_or_path = model.name_or_path = str(path)
    return model


def open_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the file describes; None where it has none.

    Raises:
        SourceError: one of a kind that is not known, or a broken one.
        EvaluationError: transformers does not take it.
    """
    from transformers import AutoTokenizer

    from sketchconv.sources.gguf import GgufSource

    with GgufSource(path) as source:
        if "tokenizer.ggml.tokens" not in source.header.values:
            return None
        files = source.files()
    with tempfile.TemporaryDirectory(prefix="sketchconv-") as folder:
        for name, data in files.items():
            target = Path(folder, name)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(data)
        try:
            found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the library of tokenizers raises plain Exception
            text = " ".join(str(error).split())[:300]
            raise EvaluationError(
                f"{path}: transformers cannot open its tokenizer: {text}"
            ) from error
    found.name_or_path = str(path)
    tokenizer: PreTrainedTokenizerBase = found
    return tokenizer
