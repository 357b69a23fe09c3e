"""Small writers of each peer's layout, made from its formula alone, and the peer's own values.

Each gives the tensors of one module, by leaf name, and the weight that the peer computes from
them, in the peer's dtype. Nothing of sketchconv is used here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
Case = tuple[Tensors, torch.Tensor]


def words_down(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [n, columns] as int32 words [n * bits / 32, columns], by one big number per column."""
    columns = []
    for column in codes.T.tolist():
        number = sum(int(code) << (bits * place) for place, code in enumerate(column))
        columns.append(np.frombuffer(number.to_bytes(len(column) * bits // 8, "little"), "<i4"))
    return torch.from_numpy(np.stack(columns, axis=1).copy())


def codes_of(shape: Sequence[int], bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, tuple(shape), generator=generator)
    codes.view(-1)[:2] = torch.tensor([0, (1 << bits) - 1])
    return codes


def normal(shape: Sequence[int], seed: int, scale: float = 0.05) -> torch.Tensor:
    return scale * torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def gptq(
    out: int,
    width: int,
    bits: int = 4,
    group: int = 32,
    *,
    stored_less: int = 1,
    dtype: torch.dtype = torch.float16,
    g_idx: torch.Tensor | None = None,
    seed: int = 0,
) -> Case:
    """`stored_less`: 1 in the format gptq, 0 in gptq_v2."""
    groups = -(-width // group)
    g_idx = torch.arange(width) // group if g_idx is None else g_idx
    codes = codes_of((width, out), bits, seed)
    zeros = codes_of((groups, out), bits, seed + 1)
    if stored_less:
        zeros = zeros.clamp(min=1)
    scales = (normal((groups, out), seed + 2, 0.02).abs() + 1e-3).to(dtype)
    weight = scales[g_idx] * (codes - zeros[g_idx]).to(torch.int16)
    tensors = {
        "qweight": words_down(codes, bits),
        "qzeros": words_down((zeros - stored_less).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": g_idx.to(torch.int32),
    }
    return tensors, weight.T.contiguous()


def awq(out: int, width: int, group: int = 32, *, seed: int = 0) -> Case:
    codes, zeros = codes_of((width, out), 4, seed), codes_of((width // group, out), 4, seed + 1)
    scales = (normal(zeros.shape, seed + 2, 0.02).abs() + 1e-3).half()
    spread = torch.arange(width) // group
    weight = (codes - zeros[spread]).to(torch.int8) * scales[spread]

    def packed(values: torch.Tensor) -> torch.Tensor:
        eights = values.view(len(values), -1, 8)
        found = torch.zeros(eights.shape[:2], dtype=torch.int64)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            found |= eights[:, :, column] << (4 * place)
        return torch.where(found >= 1 << 31, found - (1 << 32), found).to(torch.int32)

    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}
    return tensors, weight.T.contiguous()


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two codes in a byte, the first in the high half."""
    return (codes[..., 0::2] * 16 + codes[..., 1::2]).to(torch.uint8)


def lean_quant(
    out: int, width: int, bits: int = 4, *, dtype: torch.dtype = torch.float16, seed: int = 0
) -> Case:
    codes, grid = codes_of((out, width), bits, seed), normal((out, 1 << bits), seed + 1).to(dtype)
    tensors = {"quant_grid": grid, "weight_codes": nibbles(codes)}
    return tensors, torch.gather(grid, 1, codes)


def sketch_tune(
    out: int, width: int, groups: int = 4, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    codes = codes_of((out, groups, width // groups), 4, seed)
    grid = normal((out, groups, 16), seed + 1).to(dtype)
    weight = torch.gather(grid.bfloat16(), 2, codes).view(out, width)
    pair = grid, nibbles(codes)
    return (pair if groups > 1 else (grid[:, 0], pair[1][:, 0])), weight


def squeeze_llm(out: int, width: int, bits: int = 4, *, seed: int = 0) -> Case:
    codes, table = codes_of((out, width), bits, seed), normal((out, 1 << bits), seed + 1)
    tensors = {"qweight": words_down(codes.T, bits), "lookup_table": table}
    return tensors, torch.gather(table, 1, codes)


def any_precision(
    out: int, width: int, bits: int, *, seed_bits: int = 3, parent: int = 8, seed: int = 0
) -> Case:
    codes = codes_of((out, width), parent, seed)
    tensors = {
        f"lut{b}": normal((out, 1 << b), seed + b).half() for b in range(seed_bits, parent + 1)
    }
    words = np.zeros((parent, out, width // 32), np.uint32)
    for column in range(width):
        warp, inside = divmod(column, 1024)
        lanes = min(32, (width - warp * 1024) // 32)
        byte, bit = divmod(inside, 8)
        place, lane = divmod(byte, lanes)
        for plane in range(parent):
            # The highest bit of a code is in plane 0; bytes of a word run from the highest down.
            found = (codes[:, column] >> (parent - 1 - plane) & 1).numpy().astype(np.uint32)
            words[plane, :, warp * 32 + lane] |= found << np.uint32(31 - 8 * place - bit)
    tensors["qweight"] = torch.from_numpy(words.view(np.int32).copy())
    return tensors, torch.gather(tensors[f"lut{bits}"], 1, codes >> (parent - bits))


NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
FP4 = [0, 0.0625, 8, 12, 4, 6, 2, 3]


def levels(kind: str) -> torch.Tensor:
    values = NF4 if kind == "nf4" else [v / 12 for v in FP4] + [0 - v / 12 for v in FP4]
    return torch.tensor(values, dtype=torch.float32)


def bits_and_bytes(
    out: int,
    width: int,
    kind: str = "nf4",
    *,
    block: int = 64,
    dtype: torch.dtype = torch.float16,
    nested: int = 0,
    seed: int = 0,
) -> Case:
    """Leaves begin with `weight`; `nested`: values per block of 8-bit scales, or 0."""
    count = out * width
    codes, blocks = codes_of((count,), 4, seed), -(-count // block)
    settings = {
        **{"quant_type": kind, "blocksize": block, "dtype": str(dtype).removeprefix("torch.")},
        "shape": [out, width],
    }
    tensors = {"weight": nibbles(codes)[:, None], "weight.quant_map": levels(kind)}
    absmax = normal((blocks,), seed + 1).abs()
    if nested:
        table = torch.linspace(-1, 1, 256)
        coarse = torch.randint(0, 256, (blocks,), generator=torch.Generator().manual_seed(seed))
        outer = normal((-(-blocks // nested),), seed + 2, 0.01).abs()
        settings |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.0437}
        absmax = table[coarse] * outer[torch.arange(blocks) // nested] + torch.tensor(0.0437)
        tensors["weight.absmax"] = coarse.to(torch.uint8)
        tensors |= {"weight.nested_absmax": outer, "weight.nested_quant_map": table}
    else:
        tensors["weight.absmax"] = absmax
    text = json.dumps(settings).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(text), dtype=torch.uint8
    )
    weight = levels(kind)[codes] * absmax[torch.arange(count) // block]
    return tensors, weight.to(dtype).view(out, width)
