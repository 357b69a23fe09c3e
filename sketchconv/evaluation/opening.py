"""Open what is to be measured: a dense folder, a sketch, a GGUF file or a hub id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.errors import EvaluationError, SketchconvError
from sketchconv.evaluation.network import Network

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_SHOWN_TOKENS = 3


def resolve(name: str) -> Path:
    """The path that a name stands for; a hub id is downloaded.

    Raises:
        EvaluationError: it is neither a path that exists nor a hub id.
        HubError: the Hub refused.
    """
    from sketchconv.hub.fetching import fetch
    from sketchconv.hub.spec import parse_spec

    path = Path(name).expanduser()
    if path.exists():
        return path
    if parse_spec(name) is not None:
        return fetch(name, dense=True)
    raise EvaluationError(f"{name}: no such file or folder, and not a hub id (org/name)")


def open_network(path: Path, *, dtype: str | None = None, device: str = "cpu") -> Network:
    """Load a causal language model to measure it.

    Args:
        path: a dense or quantized Hugging Face folder, a sketch (file or folder) or a GGUF file
            (any part of one that is split), whose weights are decoded.
        dtype: of the computation: "float32", "bfloat16" or "float16"; None takes the model's own.
        device: "cpu", "cuda" or "cuda:n".

    Raises:
        EvaluationError: transformers cannot open it, or it is no causal language model.
        LoadError: the sketch is damaged.
        SourceError: the GGUF file is broken.
    """
    from sketchconv.evaluation import gguf
    from sketchconv.summary import is_sketch

    if is_sketch(path):
        import sketchconv

        model: Any = sketchconv.load(path, **({} if dtype is None else {"dtype": dtype}))
    elif gguf.is_read(path):
        model = gguf.open_model(path, dtype or "float32")
    else:
        model = _from_transformers(path, dtype)
    try:
        return Network(model.to(device), str(path))
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"{path}: cannot be put on {device!r}: {_line(error)}") from error


def open_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with a model; None where there is none.

    Raises:
        EvaluationError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    from sketchconv.errors import LoadError
    from sketchconv.evaluation import gguf
    from sketchconv.runtime.load import load_tokenizer
    from sketchconv.summary import is_sketch

    if is_sketch(path):
        try:
            return load_tokenizer(path)
        except LoadError:
            return None
    if gguf.is_read(path):
        return gguf.open_tokenizer(path)
    if path.is_dir() and not any((path / name).exists() for name in _TOKENIZER_FILES):
        return None
    place, options = _place(path)
    found: PreTrainedTokenizerBase = _guarded(AutoTokenizer, path, place, options)
    return found


def check_same_tokens(
    name: str, ours: PreTrainedTokenizerBase, other_name: str, theirs: PreTrainedTokenizerBase
) -> None:
    """Refuse two models whose tokenizers name tokens differently.

    Raises:
        EvaluationError: says how many tokens differ, and some of them.
    """
    mine, others = ours.get_vocab(), theirs.get_vocab()
    odd = sorted(t for t in mine.keys() | others.keys() if mine.get(t) != others.get(t))
    if odd:
        shown = ", ".join(f"{t!r} ({mine.get(t)}, {others.get(t)})" for t in odd[:_SHOWN_TOKENS])
        raise EvaluationError(
            f"{name} and {other_name} have different vocabularies: {len(odd)} tokens differ, "
            f"for instance {shown}; only models of one vocabulary can be compared"
        )


def common_tokenizer(named: Sequence[tuple[str, Path]]) -> PreTrainedTokenizerBase:
    """The first tokenizer there is; all others must name tokens as it does.

    Args:
        named: models' names and paths, at least one.

    Raises:
        EvaluationError: two differ, or there is none.
    """
    first: tuple[str, PreTrainedTokenizerBase] | None = None
    for name, path in named:
        tokenizer = open_tokenizer(path)
        if tokenizer is None:
            continue
        if first is None:
            first = (name, tokenizer)
        else:
            check_same_tokens(name, tokenizer, *first)
    if first is None:
        raise EvaluationError(f"{named[0][0]}: comes without a tokenizer, so no text can be read")
    return first[1]


def _from_transformers(path: Path, dtype: str | None) -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    place, options = _place(path)
    options = {**options, "dtype": dtype or "auto"}
    if path.suffix == ".gguf":
        options["quantization_config"] = GgufConfig(dequantize=True)
        options["dtype"] = dtype or "float32"
    model, info = _guarded(
        AutoModelForCausalLM, path, place, {**options, "output_loading_info": True}
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise EvaluationError(
            f"{path}: no causal language model in full: {len(missing)} weights of "
            f"{type(model).__name__} are missing, for instance {missing[0]}"
        )
    return model


def _place(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder that transformers opens, and what it has to be told."""
    if path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name}
    return path, {}


def _guarded(kind: Any, path: Path, place: Path, options: Mapping[str, Any]) -> Any:
    """`from_pretrained`, with its many kinds of errors turned into ours."""
    try:
        return kind.from_pretrained(
            str(place), local_files_only=True, trust_remote_code=False, **options
        )
    except (SketchconvError, MemoryError):
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise EvaluationError(f"{path}: transformers cannot open it: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
