"""The types that a GGUF export can write: for each an encoder, and what stands in for it.

One line in `ENCODERS` adds a type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from sketchconv.errors import RecipeError, WeightError
from sketchconv.export.mixtures import MIXTURES
from sketchconv.formats.gguf_types import GGML_TYPES, GgmlType
from sketchconv.formats.tensors import f32_to_bf16

Rows = npt.NDArray[np.float32]
Blocks = npt.NDArray[np.uint8]
_F16_MAX: Final = 65504.0


class Encode(Protocol):
    """Rows of values, and the importance of their columns where it is known, to blocks."""

    def __call__(self, rows: Rows, weights: Rows | None = None, /) -> Blocks:
        """Encode."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """One type that can be written.

    Attributes:
        type: its block layout.
        encode: float32 ``[rows, columns]``, and the importance of each column (float32
            ``[columns]`` or None), to uint8 ``[rows, row_bytes]``; rows fit the block, and every
            value is finite. Each block depends on its own values and columns alone.
        fallback: the type for rows that are no multiple of the block, as llama.cpp chooses it.
        head: the type for token embeddings and output where this one is the default.
        weighted: whether the importance of columns changes anything.
    """

    type: GgmlType
    encode: Encode
    fallback: str = "F16"
    head: str | None = None
    weighted: bool = False


def _float32(rows: Rows, _weights: Rows | None = None) -> Blocks:
    return np.ascontiguousarray(rows, "<f4").view(np.uint8)


def _float16(rows: Rows, _weights: Rows | None = None) -> Blocks:
    with np.errstate(over="ignore"):
        values = rows.astype("<f2")
    if np.isinf(values).any():
        worst = float(np.abs(rows).max())
        raise WeightError(
            f"{worst:g} is beyond F16, which ends at {_F16_MAX:g}; choose BF16 or F32"
        )
    return values.view(np.uint8)


def _bfloat16(rows: Rows, _weights: Rows | None = None) -> Blocks:
    return f32_to_bf16(rows).view(np.uint8)


def _by_gguf(name: str, scales: tuple[int, ...]) -> Encode:
    """The reference encoder of the `gguf` package, in NumPy.

    `scales` are the bytes of a block where its F16 numbers begin.
    """
    size = GGML_TYPES[name].block_bytes

    def encode(rows: Rows, _weights: Rows | None = None) -> Blocks:
        from gguf import GGMLQuantizationType, quants

        with np.errstate(all="ignore"):
            blocks: Blocks = quants.quantize(rows, GGMLQuantizationType[name])
        for at in scales:
            halves = blocks.reshape(-1, size)[:, at : at + 2].copy().view("<f2")
            if not np.isfinite(halves).all():
                worst = float(np.abs(rows).max())
                raise WeightError(
                    f"blocks with values up to {worst:g} need scales beyond F16, which {name}"
                    " keeps them in; choose BF16 or F32"
                )
        return blocks

    return encode


def _by_blocks(name: str, plain: Encode | None = None) -> Encode:
    """Our own encoder: less error than llama.cpp's; an export has its own threads.

    `plain` stands in where nothing is known of the columns.
    """

    def encode(rows: Rows, weights: Rows | None = None) -> Blocks:
        if weights is None and plain is not None:
            return plain(rows, None)
        from sketchconv.kernels.ggml.blocks import encode as encode_blocks

        try:
            return encode_blocks(name, rows, weights, threads=1)
        except ValueError as error:
            raise WeightError(f"{error}; choose BF16 or F32") from None

    return encode


def _packed(name: str, fallback: str = "F16", head: str | None = "Q8_0") -> Encoder:
    return Encoder(GGML_TYPES[name], _by_blocks(name), fallback, head, weighted=True)


_ALL: Final = (
    Encoder(GGML_TYPES["F32"], _float32, "F32"),
    Encoder(GGML_TYPES["F16"], _float16),
    Encoder(GGML_TYPES["BF16"], _bfloat16),
    _packed("Q8_0", head=None),
    _packed("Q6_K", fallback="Q8_0", head=None),
    _packed("Q5_K", fallback="Q5_1", head="Q6_K"),
    _packed("Q5_1"),
    _packed("Q5_0"),
    _packed("Q4_K", fallback="Q5_0", head="Q6_K"),
    _packed("IQ4_NL"),
    _packed("IQ4_XS", fallback="IQ4_NL", head="Q6_K"),
    _packed("Q4_1"),
    # Without weights, least squares give SmolLM2 a KL of .59, llama.cpp's plain rounding .41.
    Encoder(
        GGML_TYPES["Q4_0"],
        _by_blocks("Q4_0", _by_gguf("Q4_0", (0,))),
        head="Q8_0",
        weighted=True,
    ),
    Encoder(GGML_TYPES["MXFP4"], _by_gguf("MXFP4", ()), head="Q8_0"),  # powers of two
    _packed("Q3_K", fallback="IQ4_NL", head="Q6_K"),
    _packed("Q2_K", fallback="IQ4_NL", head="Q6_K"),
    Encoder(GGML_TYPES["TQ1_0"], _by_gguf("TQ1_0", (52,)), "Q4_0", "Q8_0"),
    Encoder(GGML_TYPES["TQ2_0"], _by_gguf("TQ2_0", (64,)), "Q4_0", "Q8_0"),
)

ENCODERS: Final[Mapping[str, Encoder]] = MappingProxyType({e.type.name: e for e in _ALL})
"""Every type that can be written, by name."""


def encoder_named(name: str) -> Encoder:
    """The encoder of a type, named in any case.

    Raises:
        RecipeError: no such type, or none that can be written.
    """
    found = ENCODERS.get(name.upper())
    if found is None:
        known = ", ".join([*ENCODERS, *MIXTURES])
        what = "cannot be written yet" if name.upper() in GGML_TYPES else "is no GGUF type"
        raise RecipeError(f"type {name!r} {what}; choose one of {known}")
    return found


def fitting(encoder: Encoder, columns: int) -> Encoder:
    """The encoder itself, or the first of its fallbacks whose blocks fit rows of `columns`."""
    while not encoder.type.fits(columns):
        encoder = ENCODERS[encoder.fallback]
    return encoder
