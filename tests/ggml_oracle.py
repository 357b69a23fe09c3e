"""ggml itself, through the functions that the library in the `xllamacpp` wheel exports."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sketchconv.kernels.ggml.kinds import KINDS


@cache
def library() -> Any:
    """The library, or None where the wheel is not installed or exports no encoder."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    files = sorted(Path(spec.origin).parent.glob("xllamacpp*.so"))
    if not files:
        return None
    loaded = ctypes.CDLL(str(files[0]))
    return loaded if hasattr(loaded, "ggml_quantize_chunk") else None


def encode(kind: str, rows: Any, weights: Any = None) -> Any:
    """Blocks of llama.cpp's own encoder, `weights` as its importance matrix."""
    known = KINDS[kind]
    rows = np.ascontiguousarray(rows, np.float32)
    count, columns = rows.shape
    out = np.zeros((count, columns // known.columns * known.nbytes), np.uint8)
    run = library().ggml_quantize_chunk
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    run.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    run.restype = ctypes.c_size_t
    given = None if weights is None else np.ascontiguousarray(weights, np.float32)
    masses = None if given is None else given.ctypes.data
    run(known.number, rows.ctypes.data, out.ctypes.data, 0, count, columns, masses)
    return out


def decode(kind: str, blocks: Any, columns: int) -> Any:
    """Weights by ggml's own decoder."""
    head, _, tail = kind.partition("_")
    name = f"iq4_{tail.lower()}" if head == "IQ4" else f"{head.lower()}_{tail}"
    run = getattr(library(), f"dequantize_row_{name}")
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    run.restype = None
    out = np.empty((len(blocks), columns), np.float32)
    run(np.ascontiguousarray(blocks).ctypes.data, out.ctypes.data, out.size)
    return out
