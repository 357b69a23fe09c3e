"""A transformers model as the network of the compiled step; nothing large is copied."""

from __future__ import annotations

import zlib
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sketchconv.kernels.decoder.network import Layer, Matrix, Network, floats
from sketchconv.runtime.modules import SketchModule
from sketchconv.runtime.shaped import ShapedLinear

Fingerprint: TypeAlias = tuple[tuple[int, int, int], ...]


def network_of(model: Any) -> Network:
    """The network of a model for which `decoder_support.why_not` is None.

    Weights stay where they are. Norms and biases, which are small, are copied as float32.

    Raises:
        ValueError: shapes do not fit together.
    """
    base = model.model
    network = Network(
        embedding=_matrix(base.embed_tokens),
        layers=tuple(_layer(layer) for layer in base.layers),
        norm=floats(base.norm.weight),
        head=_matrix(model.lm_head),
        eps=float(base.norm.variance_epsilon),
        head_dim=int(base.layers[0].self_attn.head_dim),
        rotations=lambda length: _rotations(base.rotary_emb, length),
    )
    network.check()
    return network


def fingerprint(model: nn.Module) -> Fingerprint:
    """Addresses and versions of all tensors, and what is in those that the network has copies of.

    Another one means that the network is out of date.
    """
    tensors = (*model.parameters(), *model.buffers())
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version, _digest(t)) for t in tensors)


def _digest(tensor: Tensor) -> int:
    """Checksum of a norm or a bias; neither address nor version tells of `tensor.data.mul_(2)`."""
    if tensor.dim() != 1 or not tensor.is_cpu:
        return 0
    return zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())


def _layer(layer: Any) -> Layer:
    attention, feed = layer.self_attn, layer.mlp
    return Layer(
        attention_norm=floats(layer.input_layernorm.weight),
        query=_matrix(attention.q_proj),
        key=_matrix(attention.k_proj),
        value=_matrix(attention.v_proj),
        query_norm=_norm(attention, "q_norm"),
        key_norm=_norm(attention, "k_norm"),
        output=_matrix(attention.o_proj),
        feed_norm=floats(layer.post_attention_layernorm.weight),
        gate=_matrix(feed.gate_proj),
        up=_matrix(feed.up_proj),
        down=_matrix(feed.down_proj),
        scale=float(attention.scaling),
    )


def _norm(attention: Any, name: str) -> Tensor | None:
    norm = getattr(attention, name, None)
    return None if norm is None else floats(norm.weight)


def _matrix(module: Any) -> Matrix:
    bias = getattr(module, "bias", None)
    more = None if bias is None else floats(bias)
    if not isinstance(module, SketchModule):
        return Matrix(module.weight.detach(), more)
    packed = module.shaped() if isinstance(module, ShapedLinear) else module.packed()
    if packed is None:
        raise ValueError("a sketch is not in CPU memory")
    return Matrix(packed, more)


@torch.no_grad()
def _rotations(rotary: Any, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines as the model's own module gives them for float32 activations."""
    cos, sin = rotary(torch.zeros(1, device="cpu"), torch.arange(length, device="cpu")[None])
    return cos[0].contiguous(), sin[0].contiguous()
