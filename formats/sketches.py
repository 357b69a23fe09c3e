"""One sketched weight as the document records it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from sketchconv.formats import rules
from sketchconv.formats.errors import refuse, shown
from sketchconv.formats.grids import COLUMNS, FREE, GRIDS
from sketchconv.formats.packing import packed_size
from sketchconv.formats.tensors import DENSE_DTYPES, LUT_DTYPES, TensorInfo

_NAME: Final = re.compile(rules.NAME_PATTERN)
_MEMBERS: Final = frozenset({"bits", "dtype", "groups", "lut", "shape"})


@dataclass(frozen=True, slots=True)
class SketchRecord:
    """A weight `[out, in]` stored as packed indices and lookup tables.

    Args:
        name: the logical weight, for instance `model.layers.0.mlp.up_proj.weight`.
        shape: `(out, in)`.
        dtype: the dtype of the dense weight in its source.
        bits: bits per index, 1 to 8.
        groups: LUTs per row; divides `in`.
        lut_dtype: F16, BF16 or F32; F16 of a shaped sketch, whose scales it stores.
        grid: `"free"`, or the shape of the LUTs, a key of `formats.grids.GRIDS`.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    bits: int
    groups: int
    lut_dtype: str
    grid: str = FREE

    @property
    def shaped(self) -> bool:
        """Whether scales are stored in place of LUTs."""
        return self.grid != FREE

    @property
    def stem(self) -> str:
        """The module's name: the weight's without `.weight`."""
        return self.name.removesuffix(rules.WEIGHT_SUFFIX)

    @property
    def index_name(self) -> str:
        """The stored name of the packed indices."""
        return self.stem + rules.INDEX_SUFFIX

    @property
    def lut_name(self) -> str:
        """The stored name of the lookup tables, or of the scales of a shaped sketch."""
        return self.stem + (rules.SCALE_SUFFIX if self.shaped else rules.LUT_SUFFIX)

    @property
    def group_size(self) -> int:
        """Columns per group."""
        return self.shape[1] // self.groups

    @property
    def index_info(self) -> TensorInfo:
        """U8 `[out, G, packed_size(in / G, bits)]`."""
        size = packed_size(self.group_size, self.bits)
        return TensorInfo(self.index_name, "U8", (self.shape[0], self.groups, size))

    @property
    def lut_info(self) -> TensorInfo:
        """The LUT's dtype, `[out, G, 2^bits]`; of a shaped sketch F16 `[out, G, fields]`."""
        width = GRIDS[self.grid].fields if self.shaped else 1 << self.bits
        return TensorInfo(self.lut_name, self.lut_dtype, (self.shape[0], self.groups, width))

    @property
    def sentinel_info(self) -> TensorInfo:
        """U8 `[1]` under the dense name."""
        return TensorInfo(self.name, "U8", (1,))

    def check(self, where: str) -> None:
        """Check the record by itself.

        Raises:
            FormatError: SKT-060, SKT-062 to SKT-066, SKT-073.
        """
        at = f"{where}: sketch {shown(self.name)}"
        stem_ok = self.name.endswith(rules.WEIGHT_SUFFIX) and self.stem
        longest = len(self.stem) + len(rules.INDEX_SUFFIX)
        if not stem_ok or not _NAME.fullmatch(self.name) or longest > rules.MAX_NAME:
            refuse("SKT-060", at, "the name must be a tensor name that ends in .weight")
        if len(self.shape) != 2 or not all(_positive(d) for d in self.shape):
            refuse("SKT-062", at, f"shape must be two positive integers, got {shown(self.shape)}")
        if not _positive(self.bits) or self.bits > rules.MAX_BITS:
            refuse("SKT-063", at, f"bits must be 1 to {rules.MAX_BITS}, got {shown(self.bits)}")
        if not _positive(self.groups) or self.shape[1] % self.groups:
            refuse(
                "SKT-064", at, f"groups {shown(self.groups)} do not divide {self.shape[1]} columns"
            )
        if self.lut_dtype not in LUT_DTYPES:
            refuse(
                "SKT-065", at, f"LUT dtype must be F16, BF16 or F32, got {shown(self.lut_dtype)}"
            )
        if self.dtype not in DENSE_DTYPES:
            refuse("SKT-066", at, f"dense dtype must be floating-point, got {shown(self.dtype)}")
        if self.shaped:
            self._check_grid(at)

    def _check_grid(self, at: str) -> None:
        grid = GRIDS.get(self.grid)
        if grid is None:
            refuse("SKT-073", at, f"grid must be one of {list(GRIDS)}, got {shown(self.grid)}")
        if self.bits not in grid.bits:
            refuse("SKT-073", at, f"{self.grid} has {grid.bits} bits, got {self.bits}")
        if self.group_size % COLUMNS:
            size = self.group_size
            refuse("SKT-073", at, f"shaped groups have a multiple of {COLUMNS} columns, got {size}")
        if self.lut_dtype != "F16":
            refuse("SKT-073", at, f"the scales of a grid are F16, got {shown(self.lut_dtype)}")

    def to_value(self) -> dict[str, Any]:
        """Return the record as a JSON value, without its name."""
        shape = {"grid": self.grid} if self.shaped else {}
        return {
            **shape,
            "bits": self.bits,
            "dtype": self.dtype,
            "groups": self.groups,
            "lut": self.lut_dtype,
            "shape": list(self.shape),
        }

    @classmethod
    def from_value(cls, name: str, value: Any, where: str, *, shaped: bool) -> SketchRecord:
        """Read a record; its values remain to be checked, see `check`.

        Args:
            name: of the weight.
            value: the JSON value.
            where: the document, for the error.
            shaped: the document's version knows shaped sketches.

        Raises:
            FormatError: SKT-061, and SKT-062, SKT-065, SKT-066 and SKT-073 for a value of a wrong
                type.
        """
        at = f"{where}: sketch {shown(name)}"
        members = _MEMBERS | {"grid"} if shaped and "grid" in _keys(value) else _MEMBERS
        if _keys(value) != members:
            got = sorted(value) if isinstance(value, dict) else value
            refuse("SKT-061", at, f"a record has exactly {sorted(members)}, got {shown(got)}")
        shape = value["shape"]
        if not isinstance(shape, list):
            refuse("SKT-062", at, f"shape must be two positive integers, got {shown(shape)}")
        for key, requirement in (("lut", "SKT-065"), ("dtype", "SKT-066")):
            if not isinstance(value[key], str):
                refuse(requirement, at, f"{key} must be a string, got {shown(value[key])}")
        grid = value.get("grid", FREE)
        if "grid" in value and (not isinstance(grid, str) or grid not in GRIDS):
            refuse("SKT-073", at, f"grid must be one of {list(GRIDS)}, got {shown(grid)}")
        numbers = value["bits"], value["groups"], value["lut"]
        return cls(name, tuple(shape), value["dtype"], *numbers, grid)


def _keys(value: Any) -> set[str]:
    return set(value) if isinstance(value, dict) else set()


def _positive(value: Any) -> bool:
    return type(value) is int and value >= 1
