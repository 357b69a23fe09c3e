"""Tiny random Llamas as sketches, with a tokenizer of single characters and a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import TensorInfo
from sketchconv.formats.writer import BundleWriter, Draft, Results
from sketchconv.kernels.planes import pack_rows

NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,:!?0123456789\n"
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "the cat sat on the mat. the dog sat on the log. " * 40


def tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token per character; `</s>` ends texts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: n for n, token in enumerate((*SPECIAL, *CHARACTERS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL[3:]),
    )
    made.chat_template = template
    return made


def dense(kind: str = "LlamaForCausalLM", **changes: Any) -> Any:
    """A tiny model in float32, from a fixed seed."""
    import transformers

    cls = getattr(transformers, kind)
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(SPECIAL) + len(CHARACTERS),
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    torch.manual_seed(0)
    return cls(cls.config_class(**values)).eval()


def write(
    model: Any,
    out: Path,
    *,
    bits: int = 4,
    groups: int = 2,
    lut: torch.dtype = torch.float16,
    everything: bool = False,
    template: str | None = TEMPLATE,
) -> Path:
    """Each linear layer with its groups rounded to even steps, as a bundle with a tokenizer.

    With `everything`, embedding and head are sketched too.
    """
    records, blobs, seen = {}, {}, set()
    for path, module in model.named_modules():
        linear = isinstance(module, torch.nn.Linear) and (everything or "lm_head" not in path)
        if not (linear or (everything and isinstance(module, torch.nn.Embedding))):
            continue
        if module.weight.data_ptr() in seen:  # tied to one that is sketched
            continue
        seen.add(module.weight.data_ptr())
        record, parts = sketched(f"{path}.weight", module.weight.detach(), bits, groups, lut)
        records[record.name] = record
        blobs.update(parts)
    plain, aliases = rest(model, records)
    blobs |= {name: raw(tensor) for name, tensor in plain.items()}
    infos = tuple(TensorInfo(n, NAMES[t.dtype], tuple(t.shape)) for n, t in plain.items())
    draft = Draft(tuple(records.values()), infos, aliases, {"bits": bits}, {"id": "tiny"})
    with BundleWriter(out, draft, files(model, template)) as writer:
        for record in draft.sketches:
            for name in (record.index_name, record.lut_name):
                writer.append(name, blobs[name])
        for info in draft.plain:
            writer.append(info.name, blobs[info.name])
        writer.commit(Results(dict.fromkeys(records, 0.125), "0" * 64))
    return out


def sketched(
    name: str, weight: torch.Tensor, bits: int, groups: int, lut: torch.dtype
) -> tuple[SketchRecord, dict[str, bytes]]:
    rows, columns = weight.shape
    wide = weight.reshape(rows, groups, -1)
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    table = (low + (high - low) * torch.linspace(0, 1, 2**bits)).to(lut)
    codes = (wide.unsqueeze(-1) - table.float().unsqueeze(2)).abs().argmin(-1)
    flat = codes.view(rows, columns).numpy().astype(np.uint8)
    record = SketchRecord(name, (rows, columns), "F32", bits, groups, NAMES[lut])
    packed = pack_rows(flat, bits, groups).tobytes()
    return record, {record.index_name: packed, record.lut_name: raw(table)}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def rest(model: Any, records: Mapping[str, SketchRecord]) -> tuple[dict, dict]:
    stored, aliases, seen = {}, {}, {}
    for name, tensor in model.state_dict().items():
        first = seen.setdefault(tensor.data_ptr(), name)
        if first != name:
            aliases[name] = first
        elif name not in records:
            stored[name] = tensor.detach()
    return stored, aliases


def files(model: Any, template: str | None) -> dict[str, bytes]:
    import tempfile

    config = json.loads(model.config.to_json_string())
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    config["quantization_config"] = {"quant_method": "sktch", "format": "1.0", "bits": 4}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer(template).save_pretrained(folder)
        made = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return {"config.json": json.dumps(config).encode(), **made}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sketched Llama with float16 LUTs; read only."""
    return write(dense(), tmp_path_factory.mktemp("tiny") / "tiny.sktch")


@pytest.fixture(scope="session")
def makers() -> Any:
    """`makers.dense(...)`, `makers.write(model, out, ...)`, `makers.tokenizer()`."""

    class Makers:
        dense = staticmethod(dense)
        write = staticmethod(write)
        tokenizer = staticmethod(tokenizer)
        text = TEXT

    return Makers


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    return path
