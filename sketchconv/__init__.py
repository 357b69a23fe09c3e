"""Sketchconv: compress checkpoints into lookup-table sketches and take them anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

_ROOT = Path(__file__).resolve().parent.parent
if not (_ROOT / "sketchconv" / "kernels").exists() and (_ROOT / "pyproject.toml").exists():
    # An editable install or a bare checkout: `formats/` and `kernels/` lie beside this folder.
    __path__.append(str(_ROOT))

if TYPE_CHECKING:
    from sketchconv.export.dense import export_dense
    from sketchconv.export.mlx import export_mlx
    from sketchconv.export.run import export_gguf
    from sketchconv.pipeline import convert
    from sketchconv.recipe import Recipe
    from sketchconv.runtime.load import load, load_tokenizer
    from sketchconv.tuning.prepare import prepare_for_lut_training
    from sketchconv.tuning.run import tune

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "__version__",
    "convert",
    "export_dense",
    "export_gguf",
    "export_mlx",
    "load",
    "load_tokenizer",
    "prepare_for_lut_training",
    "tune",
]

_LAZY = {
    "Recipe": "sketchconv.recipe",
    "convert": "sketchconv.pipeline",
    "export_dense": "sketchconv.export.dense",
    "export_gguf": "sketchconv.export.run",
    "export_mlx": "sketchconv.export.mlx",
    "load": "sketchconv.runtime.load",
    "load_tokenizer": "sketchconv.runtime.load",
    "prepare_for_lut_training": "sketchconv.tuning.prepare",
    "tune": "sketchconv.tuning.run",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import sketchconv` stays light."""
    if name not in _LAZY:
        raise AttributeError(f"module 'sketchconv' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def _register_when_transformers_loads() -> None:
    """Register the quantizer as soon as `transformers.quantizers` is imported, now or later."""
    import wrapt

    def register(_module: object) -> None:
        from sketchconv.runtime.quantizer import register_quantizer

        register_quantizer()

    wrapt.register_post_import_hook(register, "transformers.quantizers")


_register_when_transformers_loads()
