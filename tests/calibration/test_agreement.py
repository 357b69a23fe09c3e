"""A model that is run block by block is the model, or it is refused in one line."""

from __future__ import annotations

import pytest
import torch

import sketchconv
from sketchconv.calibration.agreement import check_blocks
from sketchconv.calibration.heads import final_hidden
from sketchconv.calibration.options import Calibration
from sketchconv.calibration.setting import make_setting
from sketchconv.calibration.streams import Streams
from sketchconv.errors import CalibrationError
from sketchconv.job import prepare
from sketchconv.recipe import Recipe, SketchSpec

ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def options(text, **changes):
    given = {"tokens": 512, "seq_len": 32, "device": "cpu", "recover": 0, **changes}
    return Calibration(str(text), **given)


def convert(source, out, text, **changes):
    recipe = Recipe(SketchSpec(bits=2))
    return sketchconv.convert(source, out, recipe, calibration=options(text, **changes), threads=1)


def test_a_block_that_runs_for_several_layers_is_refused(saved, text, tmp_path):
    folder = saved("AlbertModel", **ENCODER, embedding_size=16)
    with pytest.raises(CalibrationError, match="does not run its 1 blocks once each"):
        convert(folder, tmp_path / "m.sktch", text)


def test_what_the_first_block_hands_on_reaches_the_others(saved, text, tmp_path):
    """T5's position bias is in its first block; trained ones are of this size."""
    from transformers import T5EncoderModel

    folder = saved("T5EncoderModel", d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
    dense = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    bias = dense.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    with torch.no_grad():
        bias.weight.normal_(0, 4)
    dense.save_pretrained(folder)
    job = prepare(folder, tmp_path / "m.sktch", Recipe(), calibration=options(text))
    setting = make_setting(job, job.calibration, 0)
    with torch.no_grad():
        streams = Streams(setting, setting.windows.gathered, tmp_path, 1 << 30, paired=False)
        check_blocks(streams)
        for index, block in enumerate(streams.blocks):
            setting.weights.fill(f"encoder.block.{index}")
            streams.advance(index, "block", block, block)
        found = torch.cat([hidden for _, hidden in final_hidden(streams)])
        wanted = dense(setting.windows.gathered).last_hidden_state
    job.source.close()
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_t5_encoder_is_calibrated_and_recovered(saved, text, tmp_path):
    folder = saved("T5EncoderModel", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    for by in ("model", "blocks"):
        out = tmp_path / f"{by}.sktch"
        report = convert(folder, out, text, recover=512, recover_by=by).calibration
        assert len(report.weights) == 12
        assert report.recovery.after <= report.recovery.before


def test_blocks_that_leave_something_behind_are_refused(llama, text, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    plain = LlamaDecoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        if self.self_attn.layer_idx == 1:
            kwargs["position_embeddings"][0].mul_(1.5)
        return plain(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(CalibrationError, match=r"model\.layers\.2: run block by block it gives"):
        convert(llama, tmp_path / "m.sktch", text)


def test_the_comparison_is_made_once_and_reads_one_block_at_a_time(
    llama, text, tmp_path, monkeypatch
):
    from sketchconv.calibration import agreement

    held, calls = [], []
    compare = agreement._compare

    def counted(name, apart, whole):
        held.append(sum(not p.is_meta for n, p in parameters() if ".layers." in n))
        compare(name, apart, whole)

    def checked(streams):
        calls.append(streams)
        check_blocks(streams)

    def parameters():
        return calls[-1].model.named_parameters()

    monkeypatch.setattr(agreement, "_compare", counted)
    monkeypatch.setattr(agreement, "check_blocks", checked)
    convert(llama, tmp_path / "m.sktch", text, recover=256)
    assert len(calls) == 1
    assert held == [9, 9, 9, 0]


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (
            "SqueezeBertModel",
            {**ENCODER, "hidden_size": 40, "embedding_size": 40},
            r"take .*40, 32\], expected",
        ),
        (
            "XLNetLMHeadModel",
            {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
            r"XLNetLMHeadModel: its blocks take hidden states \[32, 14, 32\], expected \[14, 32, ",
        ),
        (
            "XmodModel",
            {**ENCODER, "pad_token_id": 1, "languages": ["en_XX", "de_DE"]},
            r"XmodModel cannot be run on token ids alone.*ValueError: Input language unknown",
        ),
    ],
)
def test_what_odd_encoders_find_wrong_is_said_in_one_line(
    saved, text, tmp_path, kind, config, message
):
    with pytest.raises(CalibrationError, match=message) as caught:
        convert(saved(kind, **config), tmp_path / "m.sktch", text)
    assert "convert it without --calibration" in str(caught.value)
    assert "\n" not in str(caught.value)
