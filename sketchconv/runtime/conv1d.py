"""`SketchConv1D`: a sketch in place of transformers' `Conv1D`, whose weight is ``[in, out]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sketchconv.runtime.modules import SketchLinear


class SketchConv1D(SketchLinear):
    """`y = x @ weight + bias` with `weight` ``[nx, nf]``, sketched as its transpose ``[nf, nx]``.

    The state is that of a `SketchLinear`: rows of the sketch are output features, and groups run
    along the inputs.
    """

    @property
    def nf(self) -> int:
        """Output features, as `Conv1D` calls them."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Input features."""
        return self.in_features

    @property
    def weight(self) -> Tensor:
        """The dense weight ``[nx, nf]`` in `dtype`, as `Conv1D` has it; decoded at each access."""
        return self.dequantize(self.dtype).T

    def dense(self, weight: Tensor) -> Conv1D:
        """A `Conv1D` with this bias, and `weight` ``[nf, nx]`` transposed."""
        with torch.device("meta"):
            module = Conv1D(self.nf, self.nx)  # type: ignore[no-untyped-call]
        module.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
        module.register_parameter("bias", self.bias)
        return module
