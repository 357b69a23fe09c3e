"""Make transformers know sketches. The classes are in `plugin`, which needs transformers."""

from __future__ import annotations

from importlib import import_module


def register_quantizer() -> None:
    """Register the quantization method `sktch`; may be called again.

    The plugin registers itself at the end of its import. By name and not by `from ... import`,
    since this also runs while the plugin's own import of transformers is under way.
    """
    import_module("sketchconv.runtime.plugin")
