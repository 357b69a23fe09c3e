"""The model and the texts that quality is measured on.

SmolLM2's GGUF weights lie on a grid of 16 levels, which would flatter every 4-bit method, so each
decoder weight is first moved off its grid by seeded uniform noise of one grid step; that model, in
bf16, is the dense one.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from models import CACHE, SMOLLM2, fetch

# Modules of the standard library, prose and code, that change little from version to version.
MODULES = ("heapq", "textwrap", "bisect", "shlex", "fractions", "sched", "string", "graphlib")


def dense_model() -> Path:
    """The dithered SmolLM2 as a bf16 folder in the cache of models; made once."""
    return dithered(fetch(SMOLLM2), CACHE.parent / "smollm2-dithered")


def dithered(gguf: Path, folder: Path) -> Path:
    """Make the dense model of a GGUF file as a bf16 Hugging Face folder, unless it is there."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
                blocks = weight.view(weight.shape[0], -1, 32)
                step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
                blocks.add_((torch.rand(blocks.shape, generator=generator) - 0.5) * step)
    partial = folder.with_name(f"{folder.name}.partial")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    model.to(torch.bfloat16).save_pretrained(partial)
    partial.rename(folder)
    return folder


def other_domain() -> str:
    """Text unlike WikiText: the licence of the running Python, then sources of its library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    places = [library / "LICENSE.txt", *(library / f"{name}.py" for name in MODULES)]
    return "\n".join(path.read_text(encoding="utf-8") for path in places if path.exists())
