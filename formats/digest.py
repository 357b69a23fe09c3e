"""SHA-256 digests that bind a tensor: its dtype, its shape and its bytes, but not its file."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from sketchconv.formats.tensors import TensorInfo

if TYPE_CHECKING:
    from hashlib import _Hash

ZERO_DIGEST: Final = "0" * 64


def tensor_hash(info: TensorInfo) -> _Hash:
    """Return a running SHA-256 that already holds the tensor's dtype and shape (SKT-081).

    The prefix is ASCII: dtype, a space, the dimensions joined by commas, a line feed.
    Feed it the tensor's bytes in order.
    """
    dims = ",".join(map(str, info.shape))
    return hashlib.sha256(f"{info.dtype} {dims}\n".encode("ascii"))


def tensor_digest(info: TensorInfo, data: bytes | memoryview) -> str:
    """Return the digest of a whole tensor as 64 lower-case hexadecimal digits."""
    running = tensor_hash(info)
    running.update(data)
    return running.hexdigest()


def text_digest(text: str) -> str:
    """Return the SHA-256 of an ASCII text as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(text.encode("ascii")).hexdigest()
