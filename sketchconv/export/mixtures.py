"""Mixtures of types that llama.cpp has names for: a base type, and more bits where they pay.

The rules are those of its `quantize` tool for models without experts. Embeddings and output take
the base type's own choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

Where = Callable[[int, int], bool]
"""Of a block's number and how many there are."""


def everywhere(block: int, blocks: int) -> bool:
    """All blocks."""
    return True


def outer(block: int, blocks: int) -> bool:
    """The first and the last eighth, and one block in three between."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def first(count: int) -> Where:
    """The first blocks."""
    return lambda block, blocks: block < count


def first_part(parts: int) -> Where:
    """The first of so many parts."""
    return lambda block, blocks: block < blocks // parts


@dataclass(frozen=True, slots=True)
class Rule:
    """Blocks' tensors called `part` are of another type."""

    part: str
    type: str
    where: Where = everywhere


@dataclass(frozen=True, slots=True)
class Mixture:
    """A base type and its exceptions; the first rule that holds decides."""

    base: str
    rules: tuple[Rule, ...] = ()


MIXTURES: Final[Mapping[str, Mixture]] = MappingProxyType(
    {
        "Q3_K_S": Mixture("Q3_K"),
        "Q3_K_M": Mixture(
            "Q3_K",
            (
                Rule("attn_v", "Q5_K", first(2)),
                Rule("attn_v", "Q4_K"),
                Rule("attn_qkv", "Q4_K"),
                Rule("attn_output", "Q4_K"),
                Rule("ffn_down", "Q5_K", first_part(16)),
                Rule("ffn_down", "Q4_K"),
            ),
        ),
        "Q3_K_L": Mixture(
            "Q3_K",
            (
                Rule("attn_v", "Q5_K"),
                Rule("attn_qkv", "Q4_K"),
                Rule("attn_output", "Q5_K"),
                Rule("ffn_down", "Q5_K"),
            ),
        ),
        "Q4_K_S": Mixture(
            "Q4_K",
            (Rule("attn_v", "Q5_K", first(4)), Rule("ffn_down", "Q5_K", first_part(8))),
        ),
        "Q4_K_M": Mixture(
            "Q4_K",
            (
                Rule("attn_v", "Q6_K", outer),
                Rule("attn_qkv", "Q5_K"),
                Rule("ffn_down", "Q6_K", outer),
            ),
        ),
        "Q5_K_S": Mixture("Q5_K"),
        "Q5_K_M": Mixture(
            "Q5_K",
            (
                Rule("attn_v", "Q6_K", outer),
                Rule("attn_qkv", "Q6_K"),
                Rule("ffn_down", "Q6_K", outer),
            ),
        ),
    }
)
"""Every mixture by its name."""


def exceptions(mixture: Mixture, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """``(name, type)`` of the tensors that are not of the base type.

    Args:
        mixture: see there.
        names: of all tensors in the file, as ``blk.3.attn_v.weight``.
    """
    inside = [(name, *name.split(".")) for name in names if name.startswith("blk.")]
    blocks = 1 + max((int(number) for _, _, number, *_ in inside), default=-1)
    for name, _, number, part, *rest in inside:
        for rule in mixture.rules if rest == ["weight"] else ():
            if rule.part == part and rule.where(int(number), blocks):
                yield name, rule.type
                break
