"""The base of torch modules whose weight is a sketch: state, casts, moves, copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sketchconv.adapters.batch import BASE
from sketchconv.adapters.tables import Tables
from sketchconv.kernels import dequantize, plain
from sketchconv.kernels.packed import LUT_DTYPES, Packed
from sketchconv.kernels.planes import packed_size
from sketchconv.runtime import locks
from sketchconv.runtime.devices import DISK, arranged, best_order, gpu_kernels, restored
from sketchconv.runtime.switching import Ready, Switching, fits

ANCHOR = "dtype_anchor"


class SketchModule(Switching):
    """A module whose weight `[rows, columns]` is a sketch.

    State: the buffer `sketch_index`, uint8 ``[rows, groups, bytes]`` in the packing `planes-le`,
    and the parameter `sketch_lut` ``[rows, groups, 2**bits]`` in float16, bfloat16 or float32. Both
    stay as they lie on disk; there is no second copy. Only where GPU kernels run, and at 3 bits on
    CPUs with AVX-512, is the index put into another order of the same size, once; `state_dict`,
    moves and copies have the order of the disk.

    `.to(dtype)`, `.half()`, `.float()` and their like change `dtype`, the dtype of what the module
    gives out where the input does not decide it, but **not** the LUT: it holds the weight's values,
    and a cast would change them for good. To change it, assign a new parameter to `sketch_lut`.

    The dtype is that of `dtype_anchor`, an empty parameter which comes before the LUT, so that code
    which asks for the dtype of a model's first parameter gets an answer that fits. It is not part
    of `state_dict`.

    On the CPU the fast kernels run, on a GPU those of Triton where `kernels.gpu.support` knows no
    reason against it (never tried on a GPU so far), elsewhere plain torch operations by tiles.
    """

    sketch_index: Tensor
    sketch_lut: Tensor
    dtype_anchor: nn.Parameter
    _ready: Ready | None
    _arranged: tuple[Tensor, int] | None
    TABLE = "sketch_lut"  # the parameter that holds the values

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        groups: int = 1,
        *,
        lut_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups < 1 or columns % groups:
            raise ValueError(f"{groups} groups do not divide {columns} columns")
        if lut_dtype not in LUT_DTYPES:
            raise ValueError(f"a LUT is float16, bfloat16 or float32, not {lut_dtype}")
        self.rows, self.columns, self.bits, self.groups = rows, columns, bits, groups
        self._tables = Tables()
        self._forget()
        anchor = torch.empty(0, device=device, dtype=dtype)
        self.register_parameter(ANCHOR, nn.Parameter(anchor, requires_grad=False))
        self._make_state(lut_dtype, device)

    def _make_state(self, lut_dtype: torch.dtype, device: torch.device | str | None) -> None:
        size = packed_size(self.columns // self.groups, self.bits)
        shape = (self.rows, self.groups)
        index = torch.zeros((*shape, size), dtype=torch.uint8, device=device)
        lut = torch.zeros((*shape, 2**self.bits), dtype=lut_dtype, device=device)
        self.register_buffer("sketch_index", index)
        self.sketch_lut = nn.Parameter(lut)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the dense weight that the sketch stands for; follows `.to(dtype)`."""
        return self.dtype_anchor.dtype

    @property
    def layout(self) -> str:
        """The order of the index as `arrange` left it: "planes-le", "woven", "device" on a GPU."""
        return self._layout

    @property
    def weight(self) -> Tensor:
        """The dense weight in `dtype`, decoded at each access; for code that looks at weights."""
        return self.dequantize(self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[rows, columns]``; float32 holds it exactly."""
        packed = self.packed()
        if packed is not None:
            return dequantize.decode(packed, dtype)
        with torch.no_grad():
            layout = self.arrange()
            index, lut = self._tensors()
            gpu = gpu_kernels(index)
            if gpu is None:
                return plain.decode(index, lut, self.columns, dtype)
            dense: Tensor = gpu.decode(index, lut, self.columns, dtype, layout=layout)
            return dense

    def settle(self) -> None:
        """Move the anchor to the device of the sketch, and put the index into the device's order.

        Loaders know of neither.
        """
        device = self._tensors()[0].device
        if self.dtype_anchor.device != device:
            empty = torch.empty(0, device=device, dtype=self.dtype)
            self.dtype_anchor = nn.Parameter(empty, requires_grad=False)
        self.arrange()

    def packed(self) -> Packed | None:
        """The checked form that the CPU kernels take; None on other devices.

        The index is put into the order of the CPU's kernels before.
        """
        index, lut = self._tensors()
        ready = self._ready
        # Tensors are assigned, and their data swapped, by many a loader.
        if ready is not None and fits(ready, index, lut):
            return ready[3]
        self._ready = None
        packed = self._pack(lut)
        if packed is not None:
            self._ready = (self._tensors()[0], lut, lut.dtype, packed)
        return packed

    def _pack(self, lut: Tensor) -> Packed | None:
        if not (self._tensors()[0].is_cpu and lut.is_cpu):
            return None
        with locks.places:
            order = self.arrange()
            index = self._tensors()[0]
            return Packed.of(index.contiguous(), lut.contiguous(), self.columns, order)

    def operands(self) -> tuple[Packed | None, Tensor, Tensor, str]:
        """The checked form (None off the CPU), index, LUT and the order of the index, all at once.

        Another thread may put the index into another order between two questions.
        """
        packed = self.packed()
        layout = self.arrange() if packed is None else packed.order
        index, lut = self._tensors()
        return packed, index if packed is None else packed.index, lut, layout

    def arrange(self) -> str:
        """Put the index into the order that suits its device; the order it has now.

        Call it outside of traced code: a tracer reads `layout`.
        """
        # A buffer made in inference mode could not be trained.
        with locks.places, torch.inference_mode(False):
            index = self._tensors()[0]
            if self._order_of(index) == DISK:
                self._layout, self._arranged = DISK, None
                order = best_order(index, self.bits, self.columns // self.groups)
                if order != DISK:
                    index = arranged(index, self.bits, self.columns // self.groups, order)
                    # In this order: at no time does another thread take the new index for the old.
                    self._layout, self._arranged = order, (index, index.data_ptr())
                    self._buffers["sketch_index"] = index
            return self._layout

    def disk_index(self) -> Tensor:
        """The index in the order of the disk: the buffer itself, or a restored copy."""
        index = self._tensors()[0]
        return restored(index, self.bits, self.columns // self.groups, self._order_of(index))

    def _order_of(self, index: Tensor) -> str:
        """The order of the index: what came from elsewhere has that of the disk."""
        known = self._arranged
        if known is None or known[0] is not index or known[1] != index.data_ptr():
            return DISK
        return self._layout

    def _forget(self) -> None:
        """Drop what is known of the tensors: their checked form and order."""
        self._ready = None
        self._arranged = None
        self._layout = DISK
        self._tables.forget()

    def _tensors(self) -> tuple[Tensor, Tensor]:
        index, lut = self._buffers["sketch_index"], self._parameters[self.TABLE]
        if index is None or lut is None:
            raise RuntimeError("the sketch's tensors were removed from the module")
        return index, lut

    def _to_disk_order(self) -> None:
        if self._buffers.get("sketch_index") is not None:
            self._buffers["sketch_index"] = self.disk_index()
        self._forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SketchModule:
        """Move or cast the module: the LUT is moved, never cast."""
        self._to_disk_order()
        lut = self._parameters.get(self.TABLE)
        before = None if lut is None else lut.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self._parameters.get(self.TABLE)
        if before is not None and after is not None and after.dtype is not before.dtype:
            after.data = before.to(after.device)
        self._tables.apply(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + ANCHOR, None)
        self._save_tables(destination, prefix, keep_vars)
        if self._arranged is not None and prefix + "sketch_index" in destination:
            destination[prefix + "sketch_index"] = self.disk_index()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        lost: list[str] = []
        self._to_disk_order()
        active = self._tables.active
        self.switch(BASE)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, lost, *rest)
        assign = bool(metadata.get("assign_to_params_buffers", False))
        self._load_tables(state_dict, prefix, assign, *rest)
        self.switch(active)
        missing.extend(name for name in lost if name != prefix + ANCHOR)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_ready": None, "_arranged": None, "_layout": DISK}
        if self._arranged is not None:
            state["_buffers"] = {**self._buffers, "sketch_index": self.disk_index()}
        return state

    def extra_repr(self) -> str:
        """Shape, bits, groups and the LUT's dtype."""
        lut = str(self._tensors()[1].dtype).removeprefix("torch.")
        return f"{self._shape()}, bits={self.bits}, groups={self.groups}, lut={lut}"

    def _shape(self) -> str:
        return f"rows={self.rows}, columns={self.columns}"
