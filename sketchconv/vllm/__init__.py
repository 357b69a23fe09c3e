"""The plugin that lets vLLM serve sketches: quantization method `sktch`.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in each of its
processes. Written against the source of vLLM 0.33.0 (the wheel on PyPI) and tested against
stand-ins of its interfaces (`tests/vllm/stubs.py`). Once, by hand on a CPU, the layers and the
weight loader of 0.33.0 itself gave the same results, with the rest of vLLM faked. It has **never
run inside vLLM, nor on a GPU**.

What it takes: the folder form of a sketch (vLLM reads no `.sktch` file), or the hub id of one, with
free LUTs of 1 to 8 bits; linear layers, fused ones (q/k/v, gate/up) where their parts have the same
bits and groups; embeddings and output heads, tied or not; tensor parallelism. Sketched experts and
sketches of GGUF's blocks (`--grid`) are refused by name.

Nothing but this module is imported until `register` is called.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make the quantization method `sktch` known to vLLM; once is enough, more do no harm.

    Raises:
        LoadError: vLLM is not installed, or has none of the interfaces that the plugin needs.
    """
    from sketchconv.errors import LoadError

    try:
        from vllm.model_executor.layers import quantization
    except ImportError as error:
        raise LoadError(
            f"vLLM cannot be imported ({error}); its plugin `sketchconv` is of use inside vLLM only"
        ) from error
    from sketchconv.vllm.records import METHOD

    if METHOD in quantization.QUANTIZATION_METHODS:
        return
    try:
        from sketchconv.vllm.config import SketchQuantConfig
    except ImportError as error:
        raise LoadError(
            f"this vLLM lacks what the plugin `sketchconv` needs ({error}); it is written for 0.33"
        ) from error
    quantization.register_quantization_config(METHOD)(SketchQuantConfig)
