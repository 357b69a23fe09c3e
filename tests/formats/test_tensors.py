"""dtypes, sizes and bfloat16."""

import numpy as np
import pytest
import safetensors

from sketchconv.formats.tensors import (
    DTYPES,
    LUT_DTYPES,
    SKTCH_DTYPES,
    TensorInfo,
    bf16_to_f32,
    carried_to_f32,
    f32_to_bf16,
)


def test_every_bf16_survives_the_round_trip():
    bits = np.arange(65536, dtype=np.uint16)
    values = bf16_to_f32(bits)
    nan = np.isnan(values)
    assert (f32_to_bf16(values)[~nan] == bits[~nan]).all()
    assert np.isnan(bf16_to_f32(f32_to_bf16(values[nan]))).all()


def test_bf16_rounds_to_nearest_even():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    got = bf16_to_f32(f32_to_bf16(values)).astype(np.float64)
    exact = values.astype(np.float64)
    low = bf16_to_f32((values.view(np.uint32) >> 16).astype(np.uint16)).astype(np.float64)
    high = bf16_to_f32(((values.view(np.uint32) >> 16) + 1).astype(np.uint16)).astype(np.float64)
    best = np.minimum(np.abs(exact - low), np.abs(exact - high))
    assert (np.abs(exact - got) == best).all()
    ties = np.array([0x3F808000, 0x3F818000, 0xBF818000], np.uint32).view(np.float32)
    assert f32_to_bf16(ties).tolist() == [0x3F80, 0x3F82, 0xBF82]


def test_bf16_keeps_infinities_and_nans_with_low_payload():
    bits = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF], np.uint32)
    got = bf16_to_f32(f32_to_bf16(bits.view(np.float32)))
    assert got[0] == np.inf
    assert got[1] == -np.inf
    assert np.isnan(got[2:]).all()


def test_the_closed_list_is_a_subset_of_safetensors(raw_file):
    for name, dtype in DTYPES.items():
        nbytes = dtype.bits
        header = f'{{"a":{{"dtype":"{name}","shape":[8],"data_offsets":[0,{nbytes}]}}}}'
        ((_, found),) = safetensors.deserialize(raw_file(header, bytes(nbytes)))
        assert found["shape"] == [8]
        assert TensorInfo("a", name, (8,)).nbytes == nbytes
    assert set(DTYPES) > SKTCH_DTYPES
    assert set(LUT_DTYPES) < SKTCH_DTYPES
    assert not SKTCH_DTYPES & {"BOOL", "F4", "F6_E2M3", "F6_E3M2"}


def test_sizes_do_not_wrap():
    assert TensorInfo("a", "F64", (2**40, 2**40)).nbytes == 2**83
    assert TensorInfo("a", "F32", ()).nbytes == 4


def test_carried_to_f32_refuses_integers():
    with pytest.raises(ValueError, match="I8"):
        carried_to_f32(np.zeros(1, np.int8), "I8")
