"""Stand-ins of the parts of vLLM that the plugin meets.

Written after the source of vLLM 0.33.0: the same names, signatures and semantics of
`model_executor/layers/quantization/{__init__,base_config}.py`, of `layers/linear.py` (the loaders
of methods that are not on its list for "v2"), of `layers/vocab_parallel_embedding.py`, and of the
way of a checkpoint through `models/utils.py` into parameters. Nothing else of vLLM is here; a rank
is a number, and what ranks exchange is left to the tests.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LLAMA = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


@dataclass
class Ranks:
    """The rank that layers are made for, of how many."""

    rank: int = 0
    size: int = 1


ranks = Ranks()


class QuantizeMethodBase:
    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        layer.weight = embed_tokens.weight
        return layer

    def embedding(self, layer: nn.Module, *args: Any) -> Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedMethod(LinearMethodBase):
    def create_weights(self, layer, inputs, sizes, _in, _out, params_dtype, *, weight_loader):
        weight = nn.Parameter(torch.empty(sum(sizes), inputs, dtype=params_dtype), False)
        weight.output_dim, weight.input_dim, weight.weight_loader = 0, 1, weight_loader
        layer.register_parameter("weight", weight)

    def apply(self, layer, x, bias=None):
        return functional.linear(x, layer.weight, bias)

    def embedding(self, layer, input_):
        return functional.embedding(input_, layer.weight)


class UnquantizedLinearMethod(UnquantizedMethod):
    pass


class QuantizationConfig:
    online_quantization_config = None

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


def narrow(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    return tensor.narrow(dim, rank * size, size)


def copy(target: Tensor, loaded: Tensor) -> None:
    assert target.shape == loaded.shape
    target.copy_(loaded)


class LinearBase(nn.Module):
    def __init__(self, inputs, output, sizes, local, quant_config, prefix, bias=False):
        super().__init__()
        self.prefix, self.rank, self.size = prefix, ranks.rank, ranks.size
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        assert self.quant_method is not None
        self.quant_method.create_weights(
            self,
            local,
            sizes,
            inputs,
            output,
            torch.float32,
            weight_loader=self.weight_loader,
        )
        self.bias = nn.Parameter(torch.zeros(sum(sizes)), False) if bias else None
        if bias:
            self.bias.output_dim, self.bias.weight_loader = 0, self.weight_loader

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, self.bias)


class ReplicatedLinear(LinearBase):
    def __init__(self, inputs, output, quant_config, prefix):
        super().__init__(inputs, output, [output], inputs, quant_config, prefix)

    def weight_loader(self, param, loaded):
        copy(param.data, loaded)


class ColumnParallelLinear(LinearBase):
    def __init__(self, inputs, sizes, quant_config, prefix, bias=False):
        self.output_sizes = sizes
        local = [size // ranks.size for size in sizes]
        super().__init__(inputs, sum(sizes), local, inputs, quant_config, prefix, bias)

    def weight_loader(self, param, loaded):
        size = param.data.shape[param.output_dim]
        copy(param.data, narrow(loaded, param.output_dim, self.rank, size))


class MergedColumnParallelLinear(ColumnParallelLinear):
    def weight_loader(self, param, loaded, loaded_shard_id=None):
        if loaded_shard_id is None:  # fused on disk
            for shard, part in enumerate(loaded.split(self.output_sizes, param.output_dim)):
                self.weight_loader(param, part, shard)
            return
        begin = sum(self.output_sizes[:loaded_shard_id]) // self.size
        size = self.output_sizes[loaded_shard_id] // self.size
        target = param.data.narrow(param.output_dim, begin, size)
        copy(target, narrow(loaded, param.output_dim, self.rank, size))


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(self, inputs, head, heads, kv_heads, quant_config, prefix, bias=False):
        local_kv = max(1, kv_heads // ranks.size)
        self.replicas = max(1, ranks.size // kv_heads)
        self.local = {"q": heads // ranks.size * head, "k": local_kv * head, "v": local_kv * head}
        self.total = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
        sizes = [size * ranks.size for size in self.local.values()]
        super().__init__(inputs, sizes, quant_config, prefix, bias)

    def weight_loader(self, param, loaded, loaded_shard_id=None):
        if loaded_shard_id is None:  # fused on disk
            parts = loaded.split(list(self.total.values()), param.output_dim)
            for shard, part in zip("qkv", parts, strict=True):
                self.weight_loader(param, part, shard)
            return
        begin = {"q": 0, "k": self.local["q"], "v": self.local["q"] + self.local["k"]}
        size = self.local[loaded_shard_id]
        rank = self.rank if loaded_shard_id == "q" else self.rank // self.replicas
        target = param.data.narrow(param.output_dim, begin[loaded_shard_id], size)
        copy(target, narrow(loaded, param.output_dim, rank, size))


class RowParallelLinear(LinearBase):
    def __init__(self, inputs, output, quant_config, prefix):
        local = inputs // ranks.size
        super().__init__(inputs, output, [output], local, quant_config, prefix)

    def weight_loader(self, param, loaded):
        dim = getattr(param, "input_dim", None)
        if dim is not None:
            loaded = narrow(loaded, dim, self.rank, param.data.shape[dim])
        copy(param.data, loaded)


class VocabParallelEmbedding(nn.Module):
    def __init__(self, words, width, quant_config, prefix=""):
        super().__init__()
        padded = -(-words // 64) * 64
        self.local = padded // ranks.size
        self.begin = min(ranks.rank * self.local, words)
        self.end = min(self.begin + self.local, words)
        self.org_vocab_size, self.embedding_dim = words, width
        method = quant_config.get_quant_method(self, prefix=prefix)
        base = inspect.getattr_static(QuantizeMethodBase, "embedding")
        if method is not None and not isinstance(self, ParallelLMHead):
            assert inspect.getattr_static(type(method), "embedding") is not base
        self.quant_method = method or UnquantizedMethod()
        self.quant_method.create_weights(
            self,
            width,
            [self.local],
            width,
            padded,
            params_dtype=torch.float32,
            weight_loader=self.weight_loader,
        )

    def weight_loader(self, param, loaded):
        assert loaded.shape[param.output_dim] == self.org_vocab_size
        part = loaded[self.begin : self.end]
        param[: len(part)].data.copy_(part)
        param[len(part) :].data.fill_(0)

    def forward(self, ids: Tensor) -> Tensor:
        """The part of this rank; the tests add those of all ranks."""
        outside = (ids < self.begin) | (ids >= self.end)
        local = torch.where(outside, 0, ids - self.begin)
        return self.quant_method.embedding(self, local).masked_fill_(outside.unsqueeze(-1), 0)


class ParallelLMHead(VocabParallelEmbedding):
    def tie_weights(self, embed_tokens: nn.Module) -> nn.Module:
        return self.quant_method.tie_weights(self, embed_tokens)


class RoutedExperts(nn.Module):
    """Experts ask for a method, too."""


class WeightsMapper:
    """Renames prefixes; the real one has more kinds of rules."""

    def __init__(self, prefixes: dict[str, str]) -> None:
        self.prefixes = prefixes

    def apply_list(self, values: list[str]) -> list[str]:
        for old, new in self.prefixes.items():
            values = [new + v[len(old) :] if v.startswith(old) else v for v in values]
        return values


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Send a checkpoint through the loaders, as `AutoWeightsLoader` and its callers do."""
    params = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    aliases = {n for n, p in params.items() if first.setdefault(id(p), n) != n}
    loaded = set()
    for stored, tensor in weights:
        name, shard = stored, None
        for part, (fused, which) in SHARDS.items():
            if part in name:
                name, shard = name.replace(part, fused, 1), which
        if name in aliases:
            continue
        if name not in params:
            raise ValueError(f"There is no module or parameter named {name!r}")
        param = params[name]
        if shard is None:
            param.weight_loader(param, tensor)
        else:
            param.weight_loader(param, tensor, shard)
        loaded.add(name)
    absent = set(params) - loaded - aliases
    if absent:
        raise ValueError(f"Following weights were not initialized from checkpoint: {absent}")
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), QuantizeMethodBase):
            module.quant_method.process_weights_after_loading(module)


def modules() -> dict[str, ModuleType]:
    """The stand-ins by the names under which vLLM has them."""
    here = sys.modules[__name__]
    layers = "vllm.model_executor.layers"
    names = ["vllm", "vllm.model_executor", layers, f"{layers}.linear"]
    names += [f"{layers}.quantization", f"{layers}.quantization.base_config"]
    names += [f"{layers}.vocab_parallel_embedding"]
    made = {name: ModuleType(name) for name in names}
    for name, module in made.items():
        module.__dict__.update({k: v for k, v in vars(here).items() if not k.startswith("_")})
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, module)
    quantization = made[f"{layers}.quantization"]
    methods: list[str] = ["awq", "gptq"]
    configs: dict[str, Any] = {}

    def register_quantization_config(name: str) -> Any:
        def wrapper(cls: Any) -> Any:
            if name in methods:
                raise ValueError(f"{name} exists already")  # as older versions did
            assert issubclass(cls, QuantizationConfig)
            methods.append(name)
            configs[name] = cls
            return cls

        return wrapper

    quantization.QUANTIZATION_METHODS = methods
    quantization.register_quantization_config = register_quantization_config
    quantization.get_quantization_config = configs.__getitem__
    return made
