"""Tiny sketched models, made without the solver: each weight rounded to even steps of its row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sketchconv.kernels.planes import pack_rows
from sketchconv.runtime.modules import SketchLinear

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 151,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}


def build(kind: str, **changes: Any) -> Any:
    """A tiny model by the name of its class, in float32, from a fixed seed."""
    import transformers

    cls = getattr(transformers, kind)
    values = {**(BERT if kind.startswith("Bert") else LLAMA), **changes}
    torch.manual_seed(0)
    return cls(cls.config_class(**values)).eval()


def sketched_linear(linear: Any, bits: int, groups: int, lut: torch.dtype) -> SketchLinear:
    """The layer with each group rounded to ``2**bits`` even steps."""
    weight = linear.weight.detach()
    rows, columns = weight.shape
    module = SketchLinear(columns, rows, bits, groups, bias=linear.bias is not None, lut_dtype=lut)
    wide = weight.view(rows, groups, -1)
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    steps = torch.linspace(0, 1, 2**bits)
    table = (low + (high - low) * steps).to(lut)
    codes = (wide.unsqueeze(-1) - table.float().unsqueeze(2)).abs().argmin(-1)
    packed = pack_rows(codes.view(rows, columns).to(torch.uint8).numpy(), bits, groups)
    module.sketch_index = torch.from_numpy(packed)
    module.sketch_lut.data = table
    if linear.bias is not None:
        module.bias.data = linear.bias.detach().clone()
    return module.requires_grad_(False)


def sketched(model: Any, bits: int = 2, groups: int = 1, lut: torch.dtype = torch.float16) -> Any:
    """A copy of the model with every linear layer but the head sketched."""
    found = copy.deepcopy(model)
    for path, module in list(found.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
            found.set_submodule(path, sketched_linear(module, bits, groups, lut))
    return found


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype is second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine two threads wait for each other in every one of the tiny products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny():
    """Makers: `tiny.build(kind)`, `tiny.sketched(model)`, `tiny.linear(linear, ...)`."""

    class Makers:
        build = staticmethod(build)
        sketched = staticmethod(sketched)
        linear = staticmethod(sketched_linear)
        state = staticmethod(state)
        same = staticmethod(same)

    return Makers


@pytest.fixture(scope="session")
def lesson():
    """A dense tiny Llama, windows of tokens, and its final hidden states for them.

    A random network has nothing in common between random windows: so four come again and again.
    """
    model = build("LlamaForCausalLM")
    windows = torch.randint(3, 150, (4, 24), generator=torch.Generator().manual_seed(4))
    windows = windows.repeat(5, 1)
    with torch.no_grad():
        hidden = model.model(windows).last_hidden_state
    return model, windows, hidden
