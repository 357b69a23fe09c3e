"""Products of few tokens with 16-bit tables of 1 to 4 bits, thread by thread. NVIDIA only.

One token and 4096 x 4096 weights at 4 bits take 7.5 us on an H100, where the tiles of
`sketchconv.kernels.gpu.permute` took 12.8.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sketchconv.kernels.gpu import support
from sketchconv.kernels.gpu.catalog import Variant
from sketchconv.kernels.gpu.fragment_kernel import fragments
from sketchconv.kernels.gpu.launch import on


def fits(x: Tensor, index: Tensor, lut: Tensor, layout: str) -> bool:
    """Whether this kernel can take the sketch at all; the device is not asked for.

    Args:
        x: ``[tokens, columns]``.
        index: uint8 ``[rows, groups, bytes]``.
        lut: ``[..., rows, groups, 2**bits]``.
        layout: order of `index`.
    """
    bits = lut.shape[-1].bit_length() - 1
    group = x.shape[-1] // lut.shape[-2]
    if bits > 4 or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    whole = group % 32 == 0 and layout == "device" if bits == 3 else group * bits % 32 == 0
    # Sixteen bytes of `x` and of the index are loaded at once.
    straight = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return whole and straight and index.data_ptr() % 16 == 0 and index.is_contiguous()


def run(x: Tensor, index: Tensor, lut: Tensor, y: Tensor, tasks: Tensor | None = None) -> None:
    """`y = x @ W.T` into `y` ``[tokens, rows]``, for `x` ``[tokens, columns]`` that `fits`.

    Tables of another type are first rounded to that of `x`. With `tasks`, int64 ``[tokens]``, there
    is one more dimension of tables before the rows, and tokens of no task keep what is in `y`.
    """
    (tokens, columns), (rows, groups, entries) = x.shape, lut.shape[-3:]
    bits, group = entries.bit_length() - 1, columns // groups
    pairs = lut.to(x.dtype).contiguous()
    if pairs.data_ptr() % 16:
        pairs = pairs.clone()
    tiles, eights, warps = _shape(tokens, rows, bits, group)
    every = triton.cdiv(tokens, 8 * eights) if tasks is None else tokens
    with on(x.device):
        fragments[(triton.cdiv(rows, 16 * tiles), every)](
            x.view(torch.int32), index.view(torch.int32), pairs.view(torch.int32), y,
            y if tasks is None else tasks, tokens, lut.shape[0], rows, x.stride(0) // 2,
            bits, groups, group, _vector(bits, group), tiles, eights, warps,
            tokens % (8 * eights) != 0, tasks is not None, not support.interpreting(),
            num_warps=warps,
        )  # fmt: skip


def _vector(bits: int, group: int) -> int:
    """Words that a thread loads at once: few enough that four threads stay within a group."""
    words, most = (group // 32, 2) if bits == 3 else (group * bits // 32, 4 if bits > 2 else 2)
    while most > 1 and (words % most or words < 4 * most):
        most //= 2
    return most


def _shape(tokens: int, rows: int, bits: int, group: int) -> tuple[int, int, int]:
    """Tiles of 16 rows, tiles of 8 tokens, and warps of a program: what was best on an H100.

    Nothing is tuned at run time: another number of warps would add in another order.
    """
    eights = int(min(triton.next_power_of_2(triton.cdiv(tokens, 8)), 8))
    if support.interpreting():
        return 1, eights, 2
    if rows >= 8192:  # programs enough without many warps
        return 1 if bits == 3 and tokens == 1 else 2, eights, 4
    if bits == 3:
        return (1, eights, 16) if tokens == 1 else (2, eights, 8)
    # At 4096 x 11008 weights 8 warps are 3 % faster, but spill on sm_89.
    return 1, eights, 16 if bits == 4 and eights == 1 and group > 8192 else 8


def variants() -> tuple[Variant, ...]:
    """What a 7B model meets: one token and sixteen, one group and several, tasks."""
    gates = ({"80": 3.5}, {"80": 2.2})
    return (
        _variant("fragments-4bit", 4, 1, 4096, (1, 1, 8), most=gates[0]),
        _variant("fragments-4bit-down", 4, 1, 11008, (1, 1, 16), most=gates[0]),
        _variant("fragments-4bit-16tok", 4, 1, 4096, (1, 2, 8), dtype="bf16"),
        _variant("fragments-4bit-16tok-up", 4, 1, 4096, (2, 2, 4)),
        _variant("fragments-4bit-8groups", 4, 8, 1376, (1, 1, 8), dtype="bf16"),
        _variant("fragments-3bit", 3, 1, 11008, (1, 1, 16), most=gates[1]),
        _variant("fragments-3bit-8tok", 3, 1, 4096, (2, 1, 8), dtype="bf16"),
        _variant("fragments-3bit-4groups", 3, 4, 1376, (2, 1, 4)),
        _variant("fragments-2bit", 2, 1, 4096, (1, 1, 8)),
        _variant("fragments-1bit", 1, 1, 4096, (2, 1, 8)),
        _variant("fragments-4bit-tasks", 4, 1, 4096, (1, 1, 8), tasks=True),
    )


def _variant(
    name: str, bits: int, groups: int, group: int, shape: tuple[int, int, int], dtype: str = "fp16",
    most: dict[str, float] | None = None, tasks: bool = False,
) -> Variant:  # fmt: skip
    tiles, eights, warps = shape
    vector = _vector(bits, group)
    pointers = {"x": "*i32", "words": "*i32", "lut": "*i32", "y": f"*{dtype}", "tasks": "*i64"}
    return Variant(
        name=name,
        kernel=fragments,
        signature={**pointers, **dict.fromkeys(("tokens", "count", "rows", "stride"), "i32")},
        constants={
            "BITS": bits, "GROUPS": groups, "GROUP": group, "VECTOR": vector, "TILES": tiles,
            "EIGHTS": eights, "WARPS": warps, "SKIP": True, "TASKS": tasks, "ASM": True,
        },
        warps=warps,
        weights=warps * tiles * 16 * 4 * vector * (32 if bits == 3 else 32 // bits),
        most=most or {},
        aligned=("stride",),
        backends=("cuda",),
    )  # fmt: skip
