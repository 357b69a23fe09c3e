"""KL divergence of two models' next-token distributions, from their hidden states, by chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sketchconv.kernels.likeness import kl_rows

CHUNK = 128  # tokens whose logits exist at any time


@dataclass(frozen=True, slots=True)
class Head:
    """From hidden states to logits: ``cap * tanh(scale * (h @ weight.T + bias) / cap)``.

    `weight` is ``[vocab, hidden]``; without `cap` the logits are not bounded.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def fast(self) -> bool:
        """Whether the compiled comparison of rows knows it: bfloat16 on the CPU, a product only."""
        plain = self.bias is None and self.scale == 1.0 and self.cap is None
        return plain and self.weight.is_cpu and self.weight.dtype is torch.bfloat16

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of hidden states ``[tokens, hidden]``."""
        raw = (hidden.to(self.weight.dtype) @ self.weight.T).float()
        if self.bias is not None:
            raw += self.bias.float()
        if self.scale != 1.0:
            raw *= self.scale
        return raw if self.cap is None else torch.tanh(raw / self.cap) * self.cap

    def grad_hidden(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient of the hidden states, from that of the `logits` (which is overwritten)."""
        if self.cap is not None:
            grad *= 1 - (logits / self.cap).square_()
        if self.scale != 1.0:
            grad *= self.scale
        return grad.to(self.weight.dtype) @ self.weight


def divergence(
    dense: Head, target: Tensor, student: Head, hidden: Tensor, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """KL(dense || student) of each token, in nats over the full vocabulary, and its gradient.

    Args:
        dense: head of the dense model.
        target: hidden states of the dense model ``[tokens, hidden]``.
        student: head of the student.
        hidden: hidden states of the student ``[tokens, hidden]``.
        gradient: whether to compute the gradient.

    Returns:
        float64 ``[tokens]``, and the gradient of the *mean* with respect to `hidden`, in its dtype.
    """
    count = hidden.shape[0]
    if dense.fast and student.fast:
        return _divergence_bf16(dense.weight, target, student.weight, hidden, gradient)
    parts, grads = [], []
    with torch.no_grad():
        for begin in range(0, count, CHUNK):
            part = slice(begin, begin + CHUNK)
            wanted = torch.log_softmax(dense.logits(target[part]), -1)
            logits = student.logits(hidden[part])
            found = torch.log_softmax(logits, -1)
            mass = wanted.exp()
            parts.append((mass * wanted.sub_(found)).sum(-1, dtype=torch.float64))
            if gradient:
                slope = found.exp_().sub_(mass).div_(count)
                grads.append(student.grad_hidden(slope, logits).to(hidden.dtype))
    return torch.cat(parts), torch.cat(grads) if gradient else None


def _divergence_bf16(
    dense: Tensor, target: Tensor, student: Tensor, hidden: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """`divergence` where the CPU multiplies in bfloat16, as the model itself does.

    The rounding of logits of size 20 (0.03 rms) adds about 1e-3 to a divergence, before and after.
    """
    parts, grads = [], []
    with torch.no_grad():
        for begin in range(0, hidden.shape[0], CHUNK):
            part = slice(begin, begin + CHUNK)
            wanted = target[part].to(torch.bfloat16) @ dense.T
            found = hidden[part].to(torch.bfloat16) @ student.T
            parts.append(kl_rows(wanted, found, 1 / hidden.shape[0]))
            if gradient:
                grads.append((found @ student).to(hidden.dtype))
    return torch.cat(parts), torch.cat(grads) if gradient else None


def hidden_error(
    target: Tensor, hidden: Tensor, gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Squared error of hidden states relative to the size of the dense model's.

    For models without a head. Arguments and results as for `divergence`.
    """
    with torch.no_grad():
        wide = target.float()
        size = wide.square().sum(-1).mean()
        off = hidden.float() - wide
        errors = off.square().sum(-1, dtype=torch.float64) / size.double()
        grad = (off * (2 / (size * hidden.shape[0]))).to(hidden.dtype) if gradient else None
    return errors, grad
