"""Sketch modules that share the sketch of another module: tied embeddings and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from sketchconv.adapters.tables import Tables
from sketchconv.runtime.modules import SketchEmbedding, SketchLinear, SketchModule


class Tied(SketchModule):
    """Uses the sketch of another module, and has no index and no LUT in its own state."""

    owner: SketchModule

    def _make_state(self, lut_dtype: torch.dtype, device: torch.device | str | None) -> None:
        pass

    def _tensors(self) -> tuple[Tensor, Tensor]:
        return self.owner._tensors()

    def tables(self) -> Tables:
        """The LUTs of the owner by adapter."""
        return self.owner.tables()

    @property
    def layout(self) -> str:
        """The order of the owner's index."""
        return self.owner.layout

    def arrange(self) -> str:
        """Put the owner's index into the order of its device."""
        return self.owner.arrange()

    def disk_index(self) -> Tensor:
        """The owner's index in the order of the disk."""
        return self.owner.disk_index()

    @property
    def sketch_index(self) -> Tensor:  # type: ignore[override]
        """The index of the owner."""
        return self._tensors()[0]

    @property
    def sketch_lut(self) -> Tensor:  # type: ignore[override]
        """The LUT of the owner."""
        return self._tensors()[1]


class TiedSketchLinear(Tied, SketchLinear):
    """A `SketchLinear` that shares the sketch of `owner`: an output head tied to an embedding."""

    def __init__(
        self,
        owner: SketchModule,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.__dict__["owner"] = owner  # not a submodule: the owner is elsewhere in the model
        super().__init__(
            owner.columns,
            owner.rows,
            owner.bits,
            owner.groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )


class TiedSketchEmbedding(Tied, SketchEmbedding):
    """A `SketchEmbedding` that shares the sketch of `owner`: an embedding tied to a head."""

    def __init__(
        self,
        owner: SketchModule,
        *,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.__dict__["owner"] = owner  # not a submodule: the owner is elsewhere in the model
        super().__init__(
            owner.rows,
            owner.columns,
            owner.bits,
            owner.groups,
            padding_idx=padding_idx,
            device=device,
            dtype=dtype,
        )
