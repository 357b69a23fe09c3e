"""GGUF models made to mislead or to break: each is refused by name, before any weight is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from sketchconv.errors import ArchitectureError, SketchconvError, SourceError
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.run import export_gguf
from sketchconv.formats import gguf_values as v
from sketchconv.formats.gguf_layout import GgufInfo, gguf_layout
from sketchconv.formats.gguf_types import GGML_TYPES
from sketchconv.sources.gguf import GgufSource
from sketchconv.sources.gguf_blocks import GgufBlocks
from sketchconv.summary import summarise

Tensors = dict[str, tuple[GgufInfo, bytes]]
F32 = GGML_TYPES["F32"]


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """A good F32 file of a kind, made once."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("gguf") / "good.gguf"
            export_gguf(models(kind), made[kind], ExportRecipe("F32"))
        return made[kind]

    return get


def rewritten(
    source: Path,
    out: Path,
    values: Mapping[str, bytes | None],
    change: Callable[[Tensors], object] | None = None,
) -> Path:
    """A file with some metadata set, or None for left out, and its tensors changed."""
    blocks = GgufBlocks(source)
    kept = {key: blocks.value_bytes(key) for key in blocks.header.values}
    for key, value in values.items():
        kept.pop(key, None)
        if value is not None:
            kept[key] = value
    tensors = {}
    for name, info in blocks.tensors.items():
        rows = int(np.prod(info.shape[:-1], dtype=int))
        tensors[name] = info, blocks.rows(name, 0, rows)
    blocks.close()
    if change is not None:
        change(tensors)
    layout = gguf_layout(kept, [info for info, _ in tensors.values()])
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for info, raw in tensors.values():
        begin = layout.begin[info.name]
        data[begin : begin + len(raw)] = raw
    out.write_bytes(data)
    return out


def test_a_file_that_is_only_written_again_is_fine(exported, tmp_path):
    for kind in ("llama3", "gemma3", "phi3-long", "gpt2"):
        path = rewritten(exported(kind), tmp_path / "x.gguf", {})
        with GgufSource(path) as source, GgufSource(exported(kind)) as good:
            assert source.config() == good.config()
            assert {**source.files()} == good.files()


def u(value: int) -> bytes:
    return v.uint32(value)


LONG = "phi3.rope.scaling.original_context_length"


@pytest.mark.parametrize(
    ("kind", "values", "text"),
    [
        ("gemma2", {"gemma2.attention.sliding_window": None}, "sliding_window is None"),
        ("gemma2", {"gemma2.attention.sliding_window": u(0)}, "sliding_window is 0"),
        ("gemma2", {"gemma2.attn_logit_softcapping": v.float32(-1.0)}, "softcapping is -1.0"),
        ("gemma2", {"gemma2.final_logit_softcapping": v.float32(np.nan)}, "softcapping is nan"),
        ("gemma2", {"gemma2.attention.value_length": u(8)}, "value length 8 differ"),
        ("gemma2", {"gemma2.block_count": u(1 << 30)}, "block_count is .* more than there are"),
        ("gemma2", {"gemma2.attention.sliding_window_pattern": u(0)}, "pattern is 0"),
        ("gemma2", {"gemma2.rope.dimension_count": u(8)}, "rotary dimensions 8 differ"),
        ("gemma3", {"gemma3.attn_logit_softcapping": v.float32(50.0)}, "not understood"),
        ("gemma3", {"gemma3.rope.freq_base_swa": v.string("x")}, "freq_base_swa is 'x'"),
        ("gemma3", {"gemma3.rope.freq_base": v.float32(np.inf)}, "freq_base is inf"),
        ("gemma3", {"gemma3.attention.head_count": v.boolean(True)}, "head_count is True"),
        ("phi3", {"phi3.rope.dimension_count": u(64)}, "64 rotary dimensions, but a head has 16"),
        ("phi3", {"phi3.attention.key_length": u(8)}, "value length"),
        ("phi3", {"phi3.rope.scaling.type": v.string("yarn")}, "'yarn' is not supported for phi3"),
        ("phi3", {"phi3.attention.sliding_window": v.string("wide")}, "sliding_window is 'wide'"),
        ("phi3-long", {LONG: None}, "original_context_length is None"),
        ("phi3-long", {"phi3.rope.scaling.attn_factor": v.float32(0.0)}, "attn_factor is 0.0"),
        ("phi3-long", {"phi3.rope.dimension_count": u(8)}, "must have 4 positive factors"),
        ("gpt2", {"gpt2.attention.head_count_kv": u(2)}, "fewer heads of keys"),
        ("gpt2", {"gpt2.attention.layer_norm_epsilon": None}, "layer_norm_epsilon is None"),
        ("gpt2", {"gpt2.rope.freq_base": v.float32(1e4)}, "rope.freq_base = .* not understood"),
        ("gpt2", {"gpt2.context_length": v.string("1024")}, "context_length is '1024'"),
        ("llama", {"general.architecture": v.string("gpt2")}, "unknown in architecture 'gpt2'"),
        ("gpt2", {"general.architecture": None}, "architecture None is not supported"),
        ("llama", {"general.alignment": u(1 << 20)}, "misaligned"),
    ],
)
def test_settings_that_make_no_model(exported, kind, values, text, tmp_path):
    path = rewritten(exported(kind), tmp_path / "x.gguf", values)
    with pytest.raises(SourceError, match=rf"x\.gguf: .*{text}"):
        GgufSource(path)


def put(name, shape, kind=F32):
    """Add a tensor of zeros, or replace one."""

    def change(tensors):
        info = GgufInfo(name, shape, kind)
        tensors[name] = info, bytes(info.nbytes)

    return change


def rename(old, new):
    def change(tensors):
        info, raw = tensors.pop(old)
        tensors[new] = replace(info, name=new), raw

    return change


Q8 = GGML_TYPES["Q8_0"]


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("gemma2", put("output.weight", (384, 64)), "'output.weight' is unknown"),
        ("qwen2", put("rope_freqs.weight", (8,)), "'rope_freqs.weight' is unknown"),
        ("llama", put("rope_freqs.weight", (8,)), "not Llama 3's frequency scaling"),
        ("llama3", put("rope_freqs.weight", (4,)), "not Llama 3's frequency scaling"),
        ("llama", put("rope_freqs.weight", (2, 4)), r"has the shape \[2, 4\]"),
        ("llama", put("rope_freqs.weight", (1 << 17,)), r"has the shape \[131072\]"),
        ("phi3", put("rope_factors_long.weight", (8,)), "rope_factors_short.weight must have 8"),
        ("phi3-long", put("rope_factors_long.weight", (8,)), "long.weight must have 8 positive"),
        ("phi3-long", put("rope_factors_short.weight", (9,)), "short.weight must have 8 positive"),
        ("gpt2", put("blk.0.attn_qkv.weight", (1, 192, 64)), "has 3 axes; expected 1 or 2"),
        ("gpt2", rename("blk.1.attn_qkv.bias", "blk.00.attn_qkv.bias"), "are one"),
        ("gpt2", rename("blk.1.ffn_up.bias", "blk.1.ffn_gate.bias"), "'blk.1.ffn_gate.bias' is"),
        ("gpt2", rename("blk.1.ffn_up.bias", "blk.٣.ffn_up.bias"), "is unknown"),
        ("gpt2", put("blk.0.attn_norm.bias", (64,), Q8), "is a vector of type Q8_0"),
        ("llama", put("blk.0.ffn_up.weight", (160, 64), GGML_TYPES["I32"]), "is I32, which cannot"),
        ("llama", put("token_embd.weight", (384,)), "no two-dimensional token_embd.weight"),
    ],
)
def test_tensors_that_make_no_model(exported, kind, change, text, tmp_path):
    path = rewritten(exported(kind), tmp_path / "x.gguf", {}, change)
    with pytest.raises(SourceError, match=rf"x\.gguf: .*{text}"):
        GgufSource(path)


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("gpt2", put("blk.0.attn_qkv.weight", (96, 64)), r"c_attn.weight: .* \[64, 96\]"),
        ("gpt2", rename("blk.1.ffn_up.bias", "blk.9.ffn_up.bias"), "lacks"),
        ("phi3", put("blk.0.attn_qkv.weight", (64, 64)), r"qkv_proj.weight: .* \[64, 64\]"),
        ("gemma3", put("blk.9.attn_q.weight", (64, 64)), "no such layer"),
    ],
)
def test_tensors_that_do_not_fit_the_config(exported, kind, change, text, tmp_path):
    from sketchconv.architecture import map_model

    path = rewritten(exported(kind), tmp_path / "x.gguf", {}, change)
    with GgufSource(path) as source, pytest.raises(ArchitectureError, match=text):
        map_model(source.config(), source.infos)


def test_rows_of_query_heads_that_do_not_fit(exported, tmp_path):
    change = put("blk.0.attn_q.weight", (60, 64))
    path = rewritten(exported("llama"), tmp_path / "x.gguf", {}, change)
    with GgufSource(path) as source, pytest.raises(SourceError, match="60 rows; expected 4 heads"):
        source.rows("model.layers.0.self_attn.q_proj.weight", 0, 1)


TOKENS = [f"t{i}" for i in range(384)]
PRE = "tokenizer.ggml."
NAMES = "tokenizer.chat_templates"


@pytest.mark.parametrize(
    ("kind", "values", "text"),
    [
        ("gpt2", {f"{PRE}merges": v.strings(["a"])}, "merge 0 .* is 'a'; expected two tokens"),
        ("gpt2", {f"{PRE}merges": v.strings(["a zzz"])}, "merge 0 .* is 'a zzz'"),
        ("gpt2", {f"{PRE}tokens": v.strings(["t1", *TOKENS[1:]])}, "token 't1' is there twice"),
        ("gpt2", {f"{PRE}tokens": v.strings([*TOKENS, "x"])}, "do not match 385 tokens"),
        ("gpt2", {f"{PRE}tokens": v.string("all")}, "tokens is 'all'; expected an array"),
        ("gpt2", {f"{PRE}tokens": v.int32s([1, 2])}, "an array of strings was expected"),
        ("gpt2", {f"{PRE}token_type": v.strings(TOKENS)}, "an array of numbers was expected"),
        ("gpt2", {f"{PRE}token_type": v.int32s([9] * 384)}, "unknown type 9"),
        ("gpt2", {f"{PRE}tokens": None}, "no tokenizer in the metadata"),
        ("gpt2", {f"{PRE}pre": v.string("new")}, "splitter tokenizer.ggml.pre = 'new'"),
        ("gpt2", {f"{PRE}model": v.string("t5")}, "tokenizer.ggml.model is 't5'"),
        ("gemma2", {f"{PRE}scores": v.float32s([np.nan] * 384)}, "no numbers"),
        ("gemma2", {f"{PRE}scores": v.float32s([1.0])}, "do not match 384 tokens"),
        ("gemma2", {f"{PRE}tokens": v.strings(["x" * 2000, *TOKENS[1:]])}, "2000 characters"),
        ("gpt2", {NAMES: v.strings(["../../evil"])}, "names '../../evil', which has no text"),
        (
            "gpt2",
            {NAMES: v.strings(["a/b"]), "tokenizer.chat_template.a/b": v.string("x")},
            "names 'a/b'",
        ),
    ],
)
def test_tokenizers_that_are_broken(exported, kind, values, text, tmp_path):
    path = rewritten(exported(kind), tmp_path / "x.gguf", values)
    with GgufSource(path) as source, pytest.raises(SourceError, match=rf"x\.gguf: .*{text}"):
        source.files()


def test_more_tokens_than_rows(exported, tmp_path):
    change = put("token_embd.weight", (300, 64))
    path = rewritten(exported("gpt2"), tmp_path / "x.gguf", {}, change)
    with GgufSource(path) as source, pytest.raises(SourceError, match=r"384 tokens, .* only 300"):
        source.files()


def test_special_tokens_beyond_the_vocabulary_are_left_out(exported, tmp_path):
    key = f"{PRE}bos_token_id"
    path = rewritten(exported("gpt2"), tmp_path / "x.gguf", {key: u(0xFFFFFFFF)})
    with GgufSource(path) as source:
        assert "bos_token_id" not in source.config()
        assert source.config()["pad_token_id"] == 3
        assert b"bos_token" not in source.files()["tokenizer_config.json"]


def test_a_file_without_a_tokenizer_can_still_be_measured(exported, tmp_path):
    from sketchconv.evaluation import gguf

    keys = [f"{PRE}tokens", f"{PRE}token_type", f"{PRE}merges", f"{PRE}model"]
    path = rewritten(exported("gpt2"), tmp_path / "x.gguf", dict.fromkeys(keys))
    assert gguf.open_tokenizer(path) is None
    assert gguf.open_model(path, "float32").config.vocab_size == 384
    assert gguf.open_tokenizer(exported("gpt2")).bos_token_id == 1


@pytest.fixture(scope="module")
def split_good(models, tmp_path_factory):
    """Four good parts."""
    root = tmp_path_factory.mktemp("split")
    export_gguf(models("llama"), root / "m.gguf", ExportRecipe("F32"), max_shard_size=120_000)
    parts = sorted(root.iterdir())
    assert len(parts) >= 3
    return parts


@pytest.fixture
def parts(split_good, tmp_path):
    """A copy of the parts, to break."""
    return [Path(shutil.copy(part, tmp_path)) for part in split_good]


def patched(path: Path, key: str, value: bytes) -> None:
    rewritten_part(path, {key: value})


def rewritten_part(path, values, change=None):
    """Change one part, read as if it were a whole file."""
    alone = path.with_name("alone.gguf")
    data = path.read_bytes()
    # Without its key for the number of parts it is a file of its own.
    alone.write_bytes(data.replace(b"split.count", b"split.c0unt"))
    kept = {key: value for key, value in values.items()}
    with GgufBlocksClosing(alone) as blocks:
        count = blocks.value_bytes("split.c0unt")
    rewritten(alone, path, {"split.c0unt": None, "split.count": count, **kept}, change)
    alone.unlink()


class GgufBlocksClosing(GgufBlocks):
    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def refused(path, text):
    """Every way in says the same: as a model, as blocks, and for `inspect`."""
    for opened in (GgufSource, GgufBlocks, summarise):
        with pytest.raises(SourceError, match=text):
            opened(path)


def test_good_parts_are_taken_from_each_of_them(parts, split_good):
    rewritten_part(parts[1], {})
    for part in parts:
        with GgufSource(part) as source:
            assert source.id == "m.gguf"
            assert source.paths == tuple(parts)
            assert source.nbytes == sum(p.stat().st_size for p in parts)


@pytest.mark.parametrize("gone", [0, 1, -1])
def test_a_missing_part_is_named(parts, gone):
    name = parts[gone].name
    parts[gone].unlink()
    refused(parts[2 if gone != -1 else 0], f"1 of {len(parts)} parts are missing: {name}")


def test_many_missing_parts_are_not_all_named(parts):
    for part in parts[1:]:
        part.unlink()
    many = parts[0].with_name("n-00001-of-60000.gguf")
    parts[0].rename(many)
    patched(many, "split.count", v.uint16(60000))
    refused(many, r"59999 of 60000 parts are missing: (\S+, ){4}\S+ \.\.\.;")


def test_a_part_by_another_name(parts):
    renamed = parts[1].rename(parts[1].with_name("model.gguf"))
    refused(renamed, r"model.gguf: one of \d parts .* name it as it was, like model-00001-of-0000")


def test_parts_in_each_others_place(parts):
    first, second = (part.read_bytes() for part in parts[1:3])
    parts[1].write_bytes(second)
    parts[2].write_bytes(first)
    refused(parts[0], "split.no is 2, but by its name it is number 1; was it renamed")


def test_the_same_part_twice(parts):
    shutil.copy(parts[1], parts[2])
    refused(parts[0], "split.no is 1, but by its name it is number 2")


def test_a_part_of_another_split(parts):
    patched(parts[1], "split.tensors.count", v.int32(7))
    refused(parts[0], "split.tensors.count is 7, in the first part .* different splits")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("split.count", v.uint16(9), "the name says . parts, but split.count is 9"),
        ("split.count", v.string("3"), "split.count is '3'; expected an integer, 1 to 65535"),
        ("split.count", v.uint32(1 << 31), "split.count is 2147483648; expected"),
        ("split.count", v.float32(3.0), "split.count is 3.0; expected"),
        ("split.no", v.string("0"), "split.no is '0'; expected"),
        ("split.no", v.boolean(False), "split.no is False; expected"),
        ("split.tensors.count", v.int32(-1), "in the first part -1; the parts"),
    ],
)
def test_numbers_of_parts_that_are_none(parts, key, value, text):
    patched(parts[0], key, value)
    refused(parts[0], text)


def test_a_count_of_tensors_that_is_not_theirs(parts):
    for part in parts:
        patched(part, "split.tensors.count", v.int32(500))
    refused(parts[0], "split.tensors.count is 500, but all parts together have")


def test_a_tensor_in_two_parts(parts):
    double = put("token_embd.weight", (384, 64))
    rewritten_part(parts[-1], {}, double)
    refused(parts[0], r"tensor 'token_embd.weight' is in m-0000\d-of-.* too")


def test_a_part_of_another_model(parts):
    patched(parts[1], "general.architecture", v.string("qwen2"))
    refused(parts[0], "general.architecture is 'qwen2', in the first part 'llama'")


def test_a_part_that_is_no_part(parts, exported):
    shutil.copy(exported("llama"), parts[1])
    refused(parts[0], "not a part of a split GGUF")


def test_a_part_that_is_cut_off(parts):
    data = parts[-1].read_bytes()
    parts[-1].write_bytes(data[:-5000])
    refused(parts[0], "cut off")
    parts[-1].write_bytes(data[:100])
    refused(parts[0], f"{parts[-1].name}: the GGUF header is cut off")


def test_a_part_that_is_a_folder(parts):
    parts[1].unlink()
    parts[1].mkdir()
    refused(parts[0], f"1 of {len(parts)} parts are missing: {parts[1].name}")


def test_parts_behind_links_are_found_by_the_links_names(parts, tmp_path):
    """As the cache of the Hub has them."""
    blobs, links = tmp_path / "blobs", tmp_path / "links"
    blobs.mkdir()
    links.mkdir()
    for number, part in enumerate(parts):
        blob = part.rename(blobs / f"{number:064x}")
        (links / part.name).symlink_to(blob)
    with GgufSource(links / parts[1].name) as source:
        assert len(source.paths) == len(parts)
        assert source.id == "m.gguf"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["llama3", "gemma2", "gemma3", "phi3-long", "gpt2"])
def test_flipped_bits_give_our_errors_and_nothing_else(exported, kind, tmp_path):
    """A seeded walk over the header; a run of 20,000 found nothing more."""
    good, path = exported(kind).read_bytes(), tmp_path / "x.gguf"
    with GgufSource(exported(kind)) as source:
        header = min(tensor.offset for tensor in source.header.tensors.values())
    rng, refusals = np.random.default_rng(5), 0
    for _ in range(60):
        data = bytearray(good)
        for at in rng.integers(8, header, 1):
            data[at] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            with GgufSource(path) as source:
                source.files()
                for name in source.infos:
                    source.stored(name, source.rows(name, 0, 1))
        except SketchconvError:
            refusals += 1
    assert refusals
