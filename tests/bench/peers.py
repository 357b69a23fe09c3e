"""Compressors of others, applied to a dense model in place: the same ruler measures them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer's recipe: its stored bits per weight, and what becomes of a weight float32 [n, m]."""

    bits_per_weight: float
    rounded: Callable[[Any], Any]


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of the decoder, as `convert` sketches them by default."""
    import torch

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield name, module


def apply(model: Any, peer: Peer) -> Any:
    """Replace every decoder weight of a dense model by what the peer makes of it."""
    import torch

    with torch.no_grad():
        for _, module in linears(model):
            weight = module.weight
            weight.copy_(peer.rounded(weight.float()).to(weight.dtype))
    return model


def nf4(*, double: bool) -> Peer:
    """bitsandbytes NF4 in blocks of 64, with or without its compressed block maxima."""
    from bitsandbytes import functional

    def rounded(weight: Any) -> Any:
        options = {"blocksize": 64, "compress_statistics": double, "quant_type": "nf4"}
        packed, state = functional.quantize_4bit(weight.contiguous(), **options)
        return functional.dequantize_4bit(packed, state)

    # float32 maxima per 64; compressed: 8 bits each, and one float32 per 256 of them
    return Peer(4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64), rounded)


def hqq(bits: int) -> Peer:
    """HQQ in groups of 64 along the input, with 16-bit scales and zeros."""
    from hqq.core.quantize import Quantizer

    def rounded(weight: Any) -> Any:
        packed, meta = Quantizer.quantize(
            weight, nbits=bits, group_size=64, optimize=True, axis=1, device="cpu"
        )
        return Quantizer.dequantize(packed, meta)

    return Peer(bits + 2 * 16 / 64, rounded)


PEERS: Mapping[str, Callable[[], Peer]] = {
    "nf4": lambda: nf4(double=False),
    "nf4-double": lambda: nf4(double=True),
    "hqq-4": lambda: hqq(4),
    "hqq-3": lambda: hqq(3),
    "hqq-2": lambda: hqq(2),
}
