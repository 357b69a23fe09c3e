"""Each layout, module by module: decoded values equal the peer's formula bit for bit."""

from __future__ import annotations

import pickle

import numpy as np
import peer_layouts as peers
import pytest
import torch
from imported import assert_same, checkpoint, decode

from sketchconv.errors import SourceError
from sketchconv.importers.base import Checkpoint
from sketchconv.importers.torch_files import TorchStore

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def named(tensors, stem="m"):
    return {f"{stem}.{leaf}": tensor for leaf, tensor in tensors.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("width", "group"), [(64, 32), (96, 64), (64, 64)])
def test_gptq(tmp_path, bits, version, width, group):
    """Rows of 96 columns in groups of 64: the last group is shorter."""
    less = 1 if version == "gptq" else 0
    tensors, weight = peers.gptq(32, width, bits, group, stored_less=less)
    settings = {**GPTQ, "bits": bits, "group_size": group, "checkpoint_format": version}
    found = decode(checkpoint(tmp_path / "m.safetensors", named(tensors), settings))
    assert_same(found["m.weight"], weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gptq_with_scales_of_another_dtype(tmp_path, dtype):
    tensors, weight = peers.gptq(32, 64, 4, 16, dtype=dtype)
    found = decode(checkpoint(tmp_path / "m.safetensors", named(tensors), GPTQ))
    assert_same(found["m.weight"], weight)


def test_gptq_with_groups_in_another_order(tmp_path):
    """Static groups may use the rows of scales in any order, as long as columns stand together."""
    g_idx = torch.tensor([2, 0, 3, 1]).repeat_interleave(32)
    tensors, weight = peers.gptq(32, 128, 4, 32, g_idx=g_idx)
    found = decode(checkpoint(tmp_path / "m.safetensors", named(tensors), GPTQ))
    assert_same(found["m.weight"], weight)


def test_gptq_without_g_idx(tmp_path):
    tensors, weight = peers.gptq(32, 64, 4, 32)
    del tensors["g_idx"]
    found = decode(checkpoint(tmp_path / "m.safetensors", named(tensors), GPTQ))
    assert_same(found["m.weight"], weight)
    settings = {**GPTQ, "group_size": 16}
    with pytest.raises(SourceError, match="64 columns in groups of 16 are not the 2 of its scales"):
        decode(checkpoint(tmp_path / "n.safetensors", named(tensors), settings))


def test_gptq_in_act_order_is_refused(tmp_path):
    g_idx = torch.randperm(128, generator=torch.Generator().manual_seed(0)) // 32
    tensors, _ = peers.gptq(32, 128, 4, 32, g_idx=g_idx)
    with pytest.raises(SourceError, match=r"m\.g_idx: .*act order.*dequantize it with its own"):
        decode(checkpoint(tmp_path / "m.safetensors", named(tensors), GPTQ))


def test_a_zero_that_kernels_disagree_on_is_refused(tmp_path):
    tensors, _ = peers.gptq(32, 64, 4, 32, stored_less=0)
    tensors["qzeros"][1, 2] |= 0xF
    found = checkpoint(tmp_path / "m.safetensors", named(tensors), GPTQ)
    with pytest.raises(SourceError, match=r"m\.qzeros: a stored zero of 15"):
        decode(found)


@pytest.mark.parametrize(("width", "group"), [(64, 32), (128, 128), (96, 16)])
def test_awq(tmp_path, width, group):
    tensors, weight = peers.awq(40, width, group)
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    found = decode(checkpoint(tmp_path / "m.safetensors", named(tensors), settings))
    assert_same(found["m.weight"], weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lean_quant(tmp_path, bits, dtype):
    tensors, weight = peers.lean_quant(13, 34, bits, dtype=dtype)
    assert_same(decode(checkpoint(tmp_path / "m.safetensors", named(tensors)))["m.weight"], weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_squeeze_llm(tmp_path, bits):
    tensors, weight = peers.squeeze_llm(21, 96, bits)
    assert_same(decode(checkpoint(tmp_path / "m.safetensors", named(tensors)))["m.weight"], weight)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_any_precision_at_every_precision(tmp_path, bits):
    """1120 columns: one whole warp, and one of three lanes."""
    tensors, weight = peers.any_precision(5, 1120, bits)
    config = {"anyprec": {"seed_precision": 3, "parent_precision": 8, "group_count": 1}}
    found = checkpoint(tmp_path / "m.safetensors", named(tensors), None, config)
    assert_same(decode(found, bits)["m.weight"], weight)


def test_any_precision_takes_the_highest_and_knows_its_limits(tmp_path):
    tensors, weight = peers.any_precision(5, 64, 5, seed_bits=4, parent=5)
    config = {"anyprec": {"seed_precision": 4, "parent_precision": 5, "group_count": 1}}
    found = checkpoint(tmp_path / "m.safetensors", named(tensors), None, config)
    assert_same(decode(found)["m.weight"], weight)
    with pytest.raises(SourceError, match="has 4 to 5 bits, not 3; pass --bits"):
        decode(found, 3)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("width", "block", "nested"),
    [(64, 64, 0), (96, 64, 0), (192, 64, 16), (32, 128, 0), (50, 64, 4)],
)
def test_bits_and_bytes(tmp_path, kind, dtype, width, block, nested):
    """Blocks run over the flattened matrix: they may be longer than a row, or cross rows."""
    options = {"block": block, "dtype": dtype, "nested": nested}
    tensors, weight = peers.bits_and_bytes(18, width, kind, **options)
    found = decode(checkpoint(tmp_path / "m.safetensors", named(tensors)))
    assert_same(found["m.weight"], weight)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sketch_tune(tmp_path, groups, dtype):
    pair, weight = peers.sketch_tune(9, 64, groups, dtype=dtype)
    with (tmp_path / "m.pkl").open("wb") as file:
        pickle.dump({"m": pair}, file)
    store = TorchStore(tmp_path / "m.pkl")
    assert_same(decode(Checkpoint("m.pkl", store))["m.weight"], weight)


def test_an_index_beyond_its_table_is_refused(tmp_path):
    tensors, _ = peers.lean_quant(4, 8, 3)
    tensors["weight_codes"][2, 1] = 0x09
    with pytest.raises(SourceError, match=r"m\.weight_codes: index 9 in a table of 8 entries"):
        decode(checkpoint(tmp_path / "m.safetensors", named(tensors)))


def test_hard_scales_give_the_values_that_torch_gives(tmp_path):
    """Zero, negative, the smallest and the largest scales; 8 bits reach beyond float16 last."""
    tensors, _ = peers.gptq(32, 64, 8, 64, stored_less=0)
    tiny = torch.finfo(torch.float16).smallest_normal
    hard = torch.tensor([0.0, -0.01, tiny / 1024, 250.0, -250.0, tiny, 1.0, -0.0])
    tensors["scales"] = hard.repeat(4).half()[None].contiguous()
    codes = torch.from_numpy(
        tensors["qweight"].numpy().view(np.uint8).reshape(16, 32, 4).transpose(0, 2, 1).copy()
    ).view(64, 32)
    zeros = torch.from_numpy(tensors["qzeros"].numpy().view(np.uint8).reshape(1, 32).copy())
    weight = tensors["scales"] * (codes.to(torch.int16) - zeros.to(torch.int16))
    settings = {**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}
    found = decode(checkpoint(tmp_path / "m.safetensors", named(tensors), settings))
    assert_same(found["m.weight"], weight.T.contiguous())
