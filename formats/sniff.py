"""Recognise what a file is that is not a safetensors file, to say so in the error."""

from __future__ import annotations

from typing import Final

PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HEADS: Final = (
    (b"version https://git-lfs", "git-lfs"),
    (b"GGUF", "gguf"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "empty-zip"),
    (b"\x80\x02", "pickle"),
    (b"\x80\x03", "pickle"),
    (b"\x80\x04", "pickle"),
    (b"\x80\x05", "pickle"),
    (b"\x89HDF", "hdf5"),
    (b"\x7fELF", "elf"),
    (b"%PDF", "pdf"),
    (b"\x1f\x8b", "gzip"),
    (b"{", "json"),
)
_WEB: Final = (b"<!doctype", b"<html", b"<?xml")
_TEXTS: Final = {
    "git-lfs": "a Git LFS pointer: run `git lfs pull`, the weights are missing",
    "gguf": "a GGUF file",
    "zip": "a ZIP archive, such as a PyTorch pickle checkpoint: pickles are never loaded",
    "empty-zip": "an empty ZIP archive",
    "pickle": "a Python pickle: pickles are never loaded",
    "hdf5": "an HDF5 file",
    "elf": "a program (ELF)",
    "pdf": "a PDF document",
    "gzip": "a gzip archive: unpack it first",
    "json": "a JSON text",
    "web": "a web page, perhaps an error page of a download",
}


def kind_of_head(head: bytes) -> str | None:
    """Return the kind of a file from its first bytes, None if they are not known.

    The kinds: `git-lfs`, `gguf`, `zip`, `empty-zip`, `pickle`, `hdf5`, `elf`, `pdf`, `gzip`,
    `json` and `web`. A safetensors file may begin with any bytes, the length of its header, so
    ask only about a file that is known not to be one. More than 256 bytes are not looked at.
    """
    if head[:256].lstrip(b"\xef\xbb\xbf \t\r\n\f\v").lower().startswith(_WEB):
        return "web"
    return next((kind for magic, kind in _HEADS if head.startswith(magic)), None)


def describe_head(head: bytes) -> str:
    """Return `"; this looks like ..."` for a known head of a file, else an empty string."""
    kind = kind_of_head(head)
    return f"; this looks like {_TEXTS[kind]}" if kind else ""
