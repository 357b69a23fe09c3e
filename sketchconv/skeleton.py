"""Build a model without weights: transformers' class for a config, on PyTorch's meta device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from sketchconv.errors import ArchitectureError
from sketchconv.formats.tensors import TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Far above any real model, and low enough that building the modules stays quick.
_MAX_SIZE = 1 << 24
_MIN_LAYERS = 256
_SIZE = re.compile(
    r"size|dim|layers?$|heads|^n_|num_|positions?|length|width|channels|experts|rank|depth|d_model"
    r"|d_ff|d_kv|ctx|embd"
)
_LAYERS = re.compile(r"(?<!window_)layers?$|depth$|blocks$")


def check_sizes(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse sizes that no checkpoint can have, before any module is built from them.

    Args:
        config: the model's config, parts such as `text_config` included.
        tensors: how many tensors the checkpoint has; a layer has at least one of its own.

    Raises:
        ArchitectureError: names the key and its value.
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_sizes(value, tensors)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if _LAYERS.search(key) and value > max(tensors, _MIN_LAYERS):
                raise ArchitectureError(
                    f"config: {key} is {value}, but the checkpoint has only {tensors} tensors"
                )
            if _SIZE.search(key) and not value <= _MAX_SIZE:
                raise ArchitectureError(
                    f"config: {key} is {value}; sizes above {_MAX_SIZE} are refused"
                )


def candidate_classes(config: Mapping[str, Any]) -> list[Any]:
    """Model classes to try, best first: the one the config names, else by the model type.

    Raises:
        ArchitectureError: neither is known to the installed transformers.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    _config_class(config.get("model_type"))
    model_type = str(config["model_type"])
    found = []
    for name in _names(config.get("architectures")):
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return [named]
        found.append(name)
    for table in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    ):
        found.extend(_names(table.get(model_type)))
    classes = [getattr(transformers, name, None) for name in found]
    classes = [item for item in classes if item is not None]
    if not classes:
        raise ArchitectureError(
            f"transformers {transformers.__version__} has no model class for"
            f" {', '.join(found) or model_type!r}; a newer one may: pip install -U transformers"
        )
    return classes


def _names(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    named = value if isinstance(value, list | tuple) else ()
    return [item for item in named if isinstance(item, str)]


def _config_class(model_type: Any) -> Any:
    import transformers
    from transformers import CONFIG_MAPPING

    if not isinstance(model_type, str):
        raise ArchitectureError("config: no model_type, which says what the model is")
    try:
        return CONFIG_MAPPING[model_type]
    except KeyError:
        raise ArchitectureError(
            f"model type {model_type!r} is unknown to transformers {transformers.__version__};"
            " a newer one may know it: pip install -U transformers (models that bring their own"
            " code are never run)"
        ) from None


def build_skeleton(
    config: Mapping[str, Any], infos: Mapping[str, TensorInfo], cls: Any
) -> PreTrainedModel:
    """The model of class `cls` on the meta device: modules and shapes, no memory for weights.

    Raises:
        ArchitectureError: the config does not describe a model that can be built.
    """
    check_sizes(config, len(infos))
    config_class = _config_class(config["model_type"])
    try:
        with _no_weights():
            model: PreTrainedModel = cls(config_class.from_dict(dict(config)))
    except Exception as error:
        # Whatever a config breaks inside transformers is the config's fault, not a crash of ours.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArchitectureError(
            f"config: {cls.__name__} cannot be built from it ({reason})"
        ) from None
    return model


@contextmanager
def _no_weights() -> Iterator[None]:
    import torch
    from transformers import initialization

    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        for name in ("no_init_weights", "no_tie_weights", "meta_device_safe_creation_ops"):
            # The last one exists from some 5.x on; models build without it, but for a few.
            context: Callable[[], Any] | None = getattr(initialization, name, None)
            if context is not None:
                stack.enter_context(context())
        yield
