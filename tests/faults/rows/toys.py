"""Good inputs, small and seeded: sketches, deltas, checkpoints, GGUF files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sketchconv.formats import gguf_values as v
from sketchconv.formats.delta_coding import CODES, Coding
from sketchconv.formats.delta_record import Bound
from sketchconv.formats.delta_writer import DeltaWriter
from sketchconv.formats.digest import tensor_digest
from sketchconv.formats.gguf_layout import GgufInfo, gguf_layout
from sketchconv.formats.gguf_types import GGML_TYPES
from sketchconv.formats.tensors import TensorInfo

ROOT = Path(__file__).resolve().parents[3]
VECTORS = ROOT / "spec" / "vectors"
CODINGS = (Coding(), Coding("replace"), Coding("add", "BF16"), Coding("add", CODES, 2))


def load(path, name):
    """Import a file that lies in no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def decoder(kind="decode"):
    """The independent decoder of the specification, `decode_delta` that of deltas."""
    decode = load(ROOT / "spec" / "decode.py", "decode")
    return decode if kind == "decode" else load(ROOT / "spec" / f"{kind}.py", kind)


def toys():
    """The toy sketches of the tests of deltas, which build upon those of the format."""
    return load(ROOT / "tests" / "deltas" / "conftest.py", "fault_toys")


def written(folder):
    """A Llama of two layers with a tokenizer of bytes, and a text: of the tests of calibration."""
    from transformers import LlamaForCausalLM

    made = load(ROOT / "tests" / "calibration" / "conftest.py", "fault_models")
    config = made.llama_config(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    made.save_model(folder / "byte-llama", LlamaForCausalLM(config))
    return folder / "byte-llama", made.write_text(folder / "words.txt", 600, seed=1)


def content(path):
    """Every byte of a file or folder, by name."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def llama_shapes(config=CONFIG):
    """The shapes of a Llama's weights, by name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (keys, hidden),
            f"{at}self_attn.v_proj.weight": (keys, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}post_attention_layernorm.weight": (hidden,),
            f"{at}mlp.gate_proj.weight": (inner, hidden),
            f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def llama_arrays(config=CONFIG, seed=0):
    """Random weights of a Llama, F32, by name."""
    rng, shapes = np.random.default_rng(seed), llama_shapes(config)
    return {n: rng.standard_normal(s).astype(np.float32) * 0.1 + 0.01 for n, s in shapes.items()}


def llama(folder, shards=1, seed=0):
    """A Hugging Face folder of a tiny Llama, in one file or in shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    arrays = llama_arrays(seed=seed)
    if shards == 1:
        save_file(arrays, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(arrays.items())[i::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def delta_base(seed=0, shape=(3, 3, 4)):
    """The base's table of `delta`."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16)


def delta(path, coding=CODINGS[0], seed=0, shape=(3, 3, 4)):
    """A delta of one weight, on a base of which only the table is known."""
    base = delta_base(seed, shape)
    tuned = base.copy()
    rng = np.random.default_rng([seed, 1])
    tuned[rng.random(shape[:2]) < 0.5] += np.float16(0.25)
    digest = tensor_digest(TensorInfo("m.sketch_lut", "F16", shape), base.tobytes())
    with DeltaWriter(path, coding) as writer:
        writer.add("m.weight", Bound("sketch_lut", "F16", shape, "a" * 64, digest), base, tuned)
        writer.commit({"id": "a/b"}, {"name": "t"}, "faults 1")
    return path


def model_gguf(folder):
    """A whole Llama as GGUF, with the tokenizer and the tiny models of the tests of exports."""
    from sketchconv.export.recipe import ExportRecipe
    from sketchconv.export.run import export_gguf

    made = load(ROOT / "tests" / "export" / "tiny.py", "fault_tiny")
    model = made.make_model(folder / "gguf-llama", "llama")
    export_gguf(model, folder / "model.gguf", ExportRecipe("Q8_0"))
    return folder / "model.gguf"


def gguf(path, tensors=6, seed=0, values=None):
    """A GGUF file of F32 matrices and vectors, of a model that nobody knows."""
    rng = np.random.default_rng(seed)
    infos = [
        GgufInfo(f"t{i}.weight", (96,) if i % 3 == 2 else (16 + 8 * i, 64), GGML_TYPES["F32"])
        for i in range(tensors)
    ]
    metadata = {"general.architecture": v.string("toy"), "toy.block_count": v.uint32(1)}
    layout = gguf_layout(metadata | (values or {}), infos)
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for info in infos:
        raw = rng.standard_normal(info.shape).astype(np.float32).tobytes()
        begin = layout.begin[info.name]
        data[begin : begin + len(raw)] = raw
    path.write_bytes(data)
    return path
