"""Open a sketch as a transformers model: `load`, `load_tokenizer`."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.errors import HubError, LoadError, SketchconvError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sketchconv.formats.reader import SktchModel

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
)


def load(
    path: str | os.PathLike[str],
    auto_class: type[Any] | str | None = None,
    *,
    revision: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Open a sketch as a model of transformers, ready to run, with every parameter frozen.

    Args:
        path: a bundle (`model.sktch`), a folder, or on the Hub `user/repo` or
            `user/repo:file.sktch`.
        auto_class: a class of transformers, or its name, for instance ``"AutoModel"``; None takes
            the class that was compressed.
        revision: branch, tag or commit on the Hub.
        kwargs: for `from_pretrained`: `dtype`, `device_map`, `attn_implementation` and so on.

    Returns:
        The model; its weights are the bytes of the file, still packed.

    Raises:
        LoadError: the sketch is damaged, incomplete, or does not fit the model.
        HubError: the Hub refused, or the repository holds no sketch.
    """
    path = _local(path, revision)
    with _opened(path) as sketch, _folder(sketch) as folder:
        config = sketch.config()
        _check_method(config, path)
        kwargs.setdefault("dtype", _dtype(config, sketch))
        model: PreTrainedModel = _from_pretrained(
            _model_class(auto_class, config), folder, path, kwargs
        )
    model.config._name_or_path = model.name_or_path = str(path)
    return model


def load_tokenizer(
    path: str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a sketch (bundle, folder or hub id; `revision` as for `load`).

    Raises:
        LoadError: there is none, or transformers cannot read it.
        HubError: the Hub refused, or the repository holds no sketch.
    """
    path = _local(path, revision)
    from transformers import AutoTokenizer

    with _opened(path) as sketch, _folder(sketch) as folder:
        if not any((folder / name).exists() for name in _TOKENIZERS):
            raise LoadError(f"{path}: this sketch holds no tokenizer; its source had none")
        tokenizer = _from_pretrained(AutoTokenizer, folder, path, kwargs)
    tokenizer.name_or_path = str(path)
    return tokenizer  # type: ignore[no-any-return]


def set_threads(threads: int) -> None:
    """Let this process compute with `threads` CPU threads."""
    import torch

    torch.set_num_threads(threads)


def _local(path: str | os.PathLike[str], revision: str | None) -> Path:
    """The path itself, or that of what a hub id names."""
    from sketchconv.hub.fetching import fetch

    try:
        return fetch(path, revision)
    except HubError:
        raise
    except SourceError as error:
        raise LoadError(str(error)) from None


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[SktchModel]:
    from sketchconv.formats.reader import SktchModel

    try:
        sketch = SktchModel.open(path)
    except (SketchconvError, OSError) as error:
        raise LoadError(f"not a sketch: {error}") from error
    with sketch:
        yield sketch


@contextmanager
def _folder(sketch: SktchModel) -> Iterator[Path]:
    """A folder that transformers can open; for a bundle a passing one with a link to it.

    A bundle is a safetensors file, so a link of that name is all that the weights need.
    """
    if not sketch.is_bundle:
        yield sketch.path
        return
    from sketchconv.sources.files import is_side_file

    with tempfile.TemporaryDirectory(prefix="sketchconv-") as name:
        folder = Path(name)
        for inner in filter(is_side_file, sketch.files):  # never code, weights or adapters
            target = folder / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(sketch.file(inner))
        weights, source = folder / "model.safetensors", sketch.path.resolve()
        try:
            weights.symlink_to(source)
        except OSError:  # systems or users without symbolic links
            os.link(source, weights)
        yield folder


def _check_method(config: dict[str, Any], path: str | os.PathLike[str]) -> None:
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "sktch":
        raise LoadError(f"{path}: config.json has quant_method {method!r}, expected 'sktch'")


def _dtype(config: dict[str, Any], sketch: SktchModel) -> str:
    """The model's own dtype; where the config has none, that of most weights in the source."""
    if config.get("dtype") or config.get("torch_dtype"):
        return "auto"
    counts = Counter(record.dtype for record in sketch.manifest.sketches.values())
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    return names.get(max(counts, key=lambda name: counts[name], default="F32"), "float32")


def _model_class(wanted: type[Any] | str | None, config: dict[str, Any]) -> Any:
    import transformers

    if wanted is not None and not isinstance(wanted, str):
        return wanted
    names = [wanted] if wanted else config.get("architectures") or []
    for name in names:
        found = getattr(transformers, str(name), None)
        if hasattr(found, "from_pretrained"):
            return found
    raise LoadError(
        f"transformers has no model class {', '.join(map(str, names)) or '(none named)'}"
    )


def _from_pretrained(
    kind: Any, folder: Path, path: str | os.PathLike[str], kwargs: dict[str, Any]
) -> Any:
    from sketchconv.runtime.quantizer import register_quantizer

    register_quantizer()
    try:
        return kind.from_pretrained(str(folder), **{"local_files_only": True, **kwargs})
    except (SketchconvError, MemoryError):
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        text = " ".join(str(error).split())[:300]
        raise LoadError(f"{path}: transformers cannot open it: {text}") from error
