"""Operations on sketches on a GPU; each kernel's module is imported at its first use.

Arguments and results are those of `sketchconv.kernels.plain`, plus `layout`: the order of the
index, "planes-le" as on disk or "device" as `sketchconv.kernels.gpu.layout.repack` makes it. Ask
`sketchconv.kernels.gpu.support.why_not(device)` first: nothing here falls back in silence.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "multiply": "multiply",
    "decode": "decode",
    "gather": "embedding",
    "grad_gather": "embedding",
    "grad_input": "gradients",
    "grad_lut": "gradients",
    "multiply_tasks": "tasks",
}
__all__ = [  # noqa: F822
    "decode",
    "gather",
    "grad_gather",
    "grad_input",
    "grad_lut",
    "multiply",
    "multiply_tasks",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    value = getattr(import_module(f"sketchconv.kernels.gpu.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
