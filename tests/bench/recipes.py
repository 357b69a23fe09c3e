"""What the benchmarks of whole models run: a dense folder and sketches of it, made once."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from models import CACHE, SMOLLM2, fetch

WORK = CACHE.parent / "bench"


def source(given: Path | None) -> Path:
    """The model to measure: a dense folder or a .gguf file [default: SmolLM2-135M, Q4_1]."""
    return given or fetch(SMOLLM2)


def dense_folder(model: Path, work: Path) -> Path:
    """The model as a folder of bfloat16 weights; a .gguf file is decoded by transformers."""
    if model.is_dir():
        return model
    folder = work / f"{model.stem}-dense"
    if not (folder / "config.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        scratch = work / f"{model.stem}-unfinished"
        AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(scratch)
        AutoModelForCausalLM.from_pretrained(
            model.parent,
            dtype=torch.bfloat16,
            gguf_file=model.name,
            quantization_config=GgufConfig(gguf_file=model.name, dequantize=True),
        ).save_pretrained(scratch)
        scratch.rename(folder)
    return folder


def sketch(model: Path, work: Path, embed_bits: int | None) -> Path:
    """The model at 4 bits, with embeddings of `embed_bits` or as they are."""
    import sketchconv
    from sketchconv.recipe import Recipe

    out = work / f"{model.stem}-embed{embed_bits or 'dense'}.sktch"
    if not out.exists():
        work.mkdir(parents=True, exist_ok=True)
        sketchconv.convert(model, out, Recipe(embed_bits=embed_bits))
    return out
