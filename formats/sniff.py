"""Recognise what a file is that is not a safetensors file, to say so in the error."""

from __future__ import annotations

from typing import Final

_HEADS: Final = (
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`, the weights are missing"),
    (b"GGUF", "a GGUF file"),
    (b"PK\x03\x04", "a ZIP archive, such as a PyTorch pickle checkpoint: pickles are never loaded"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\x80\x02", "a Python pickle: pickles are never loaded"),
    (b"\x80\x03", "a Python pickle: pickles are never loaded"),
    (b"\x80\x04", "a Python pickle: pickles are never loaded"),
    (b"\x80\x05", "a Python pickle: pickles are never loaded"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x7fELF", "a program (ELF)"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"{", "a JSON text"),
)


def describe_head(head: bytes) -> str:
    """Return `"; this looks like ..."` for a known head of a file, else an empty string."""
    lowered = head[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if lowered.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "; this looks like a web page, perhaps an error page of a download"
    for magic, name in _HEADS:
        if head.startswith(magic):
            return f"; this looks like {name}"
    return ""
