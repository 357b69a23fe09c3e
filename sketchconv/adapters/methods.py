"""The methods of transformers' models that concern adapters, for sketches.

transformers gives every model methods for adapters of peft. `install` puts methods of the same
names in front of them, which look at their model: what concerns a sketch and its deltas is done
here, all else is left to transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sketchconv.adapters import batch, files, manage
from sketchconv.adapters.base import is_sketch
from sketchconv.errors import AdapterError

_MARK = "is_sketchconv"


def install() -> None:
    """Put our methods in front of those of transformers; may be called again."""
    from transformers import GenerationMixin, PreTrainedModel

    if hasattr(PreTrainedModel.load_adapter, _MARK):
        return
    table: dict[str, Callable[..., Any]] = {
        "load_adapter": _load,
        "set_adapter": _set,
        "delete_adapter": _delete,
        "active_adapters": _active,
        "disable_adapters": _disable,
        "enable_adapters": _enable,
        "get_adapter_state_dict": _state,
        "generate": _generate,
    }
    for name, make in table.items():
        owner: type = GenerationMixin if name == "generate" else PreTrainedModel
        setattr(owner, name, _ours(make, getattr(owner, name)))


def _ours(make: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A method that calls `make` with the original method of the model before its arguments."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return make(self, functools.partial(original, self), *args, **kwargs)

    setattr(method, _MARK, True)
    return method


def _load(
    self: Any,
    original: Callable[..., Any],
    peft_model_id: Any = None,
    adapter_name: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not (is_sketch(self) and files.is_delta(peft_model_id)):
        return original(peft_model_id, adapter_name, *args, **kwargs)
    trainable = kwargs.pop("is_trainable", False)
    name = "default" if adapter_name is None else adapter_name
    if args or kwargs:
        raise AdapterError(
            f"an adapter of a sketch is loaded with a name and is_trainable, not {sorted(kwargs)}"
        )
    return manage.load(self, peft_model_id, name, trainable)


def _has(self: Any) -> bool:
    """Whether a model has adapters of ours."""
    return bool(manage.adapters_of(self).loaded)


def _peft(self: Any) -> bool:
    """Whether a model has adapters of peft."""
    return bool(getattr(self, "_hf_peft_config_loaded", False))


def _names(given: Any) -> list[Any]:
    return [given] if isinstance(given, str) else list(given)


def _chosen(self: Any, names: Any) -> bool:
    """Whether names are for us to look up: of ours, or of nobody's on a sketch without peft."""
    known = manage.adapters_of(self).loaded
    return any(name in known for name in _names(names)) or (is_sketch(self) and not _peft(self))


def _set(self: Any, original: Callable[..., Any], adapter_name: Any) -> None:
    if _chosen(self, adapter_name):
        manage.activate(self, adapter_name)
    else:
        original(adapter_name)


def _delete(self: Any, original: Callable[..., Any], adapter_names: Any) -> None:
    if _chosen(self, adapter_names):
        manage.delete(self, adapter_names)
    else:
        original(adapter_names)


def _active(self: Any, original: Callable[..., Any]) -> list[str]:
    if not is_sketch(self):
        return original()  # type: ignore[no-any-return]
    return manage.active(self) + (original() if _peft(self) else [])


def _disable(self: Any, original: Callable[..., Any]) -> None:
    if _has(self):
        manage.enable(self, False)
    if _peft(self) or not _has(self):
        original()


def _enable(self: Any, original: Callable[..., Any]) -> None:
    if _has(self):
        manage.enable(self, True)
    if _peft(self) or not _has(self):
        original()


def _state(
    self: Any,
    original: Callable[..., Any],
    adapter_name: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if adapter_name in manage.adapters_of(self).loaded or (_has(self) and not _peft(self)):
        return manage.state(self, adapter_name)
    if adapter_name is None and _has(self):  # transformers would take the first of all, ours
        from transformers.integrations.peft import PeftAdapterMixin

        adapter_name = PeftAdapterMixin.active_adapters(self)[0]
    return original(adapter_name, *args, **kwargs)


def _generate(
    self: Any,
    original: Callable[..., Any],
    *args: Any,
    adapter_names: Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    if not is_sketch(self):
        if adapter_names is not None:
            kwargs["adapter_names"] = adapter_names  # transformers says that it knows none
        return original(*args, **kwargs)
    if adapter_names is None:
        with batch.use(None):
            return original(*args, **kwargs)
    names = manage.check_known(self, adapter_names)
    _check_count(names, *args[:1], **kwargs)
    _check_eager(self)
    with batch.use(names):
        return original(*args, **{"disable_compile": True, **kwargs})


def _check_count(names: batch.Names, *args: Any, **kwargs: Any) -> None:
    # What has a row per sample comes first: positions and masks may have one row for all samples.
    samples = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "inputs")]
    for value in (*samples, *args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim():
            if value.shape[0] != len(names):
                raise AdapterError(
                    f"adapter_names has {len(names)} names, the batch {value.shape[0]} samples"
                )
            return


def _check_eager(model: Any) -> None:
    """Refuse models of which torch compiles a part: its programs do not ask for the names."""
    compiled = torch.compiler.is_compiling() or _under_compile()
    for module in () if compiled else model.modules():
        forward = vars(module).get("forward")
        if module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable"):
            compiled = True
    if compiled:
        raise AdapterError("adapter_names works on models that are not compiled; use set_adapter")


def _under_compile() -> bool:
    """Whether plain Python runs between two parts of a compiled program."""
    frames: Any = getattr(torch._C._dynamo, "eval_frame", None)
    ask = getattr(frames, "get_eval_frame_callback", None)
    return ask is not None and ask() is not None


def hook(model: Any) -> None:
    """Let `forward` of a model take `adapter_names`."""
    model.register_forward_pre_hook(before_forward, with_kwargs=True)
    model.register_forward_hook(after_forward, always_call=True)


def before_forward(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Take `adapter_names` out of a call, for the sketch modules inside."""
    if "adapter_names" not in kwargs:
        return None
    kwargs = dict(kwargs)
    given = kwargs.pop("adapter_names")
    if given is None:
        return args, kwargs
    _check_eager(model)
    names = manage.check_known(model, given)
    _check_count(names, *args, **kwargs)
    if model.training and _recomputes(model):
        raise AdapterError("adapter_names and gradient checkpointing do not go together")
    batch.begin(names)
    return args, kwargs


def _recomputes(model: Any) -> bool:
    """Whether layers run again in the backward pass, when the names are not known any more."""
    name = "is_activation_checkpointing"  # older: is_gradient_checkpointing
    found = getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing", False)
    return bool(found)


def after_forward(_model: Any, _args: Any, _output: Any) -> None:
    """The names were those of one forward."""
    if not torch.compiler.is_compiling():
        batch.end()
