"""One touched weight as a delta's document records it, and the tensors that it is stored in."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Final

from sketchconv.formats import rules
from sketchconv.formats.delta_coding import Coding
from sketchconv.formats.document import is_digest
from sketchconv.formats.errors import refuse, shown
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import LUT_DTYPES, TensorInfo

_NAME: Final = re.compile(rules.NAME_PATTERN)
RECORD_MEMBERS: Final = frozenset({"base", "changed", "index", "lut", "shape", "table", "tuned"})
LUT_TABLE: Final = rules.LUT_SUFFIX.removeprefix(".")
SCALE_TABLE: Final = rules.SCALE_SUFFIX.removeprefix(".")
_GROUP_BITS: Final = 8


@dataclass(frozen=True, slots=True)
class Bound:
    """A table of a sketch, as a delta is bound to it.

    Args:
        table: `"sketch_lut"`, or `"sketch_scale"` of a shaped sketch.
        lut: dtype of the table.
        shape: `(out, G, K)` of the table.
        index: SHA-256 of the sketch's index tensor.
        base: SHA-256 of the table.
    """

    table: str
    lut: str
    shape: tuple[int, int, int]
    index: str
    base: str

    @classmethod
    def of(cls, record: SketchRecord, index: str, base: str) -> Bound:
        """The table of a sketch whose two digests are given."""
        rows, groups, width = record.lut_info.shape
        table = SCALE_TABLE if record.shaped else LUT_TABLE
        return cls(table, record.lut_dtype, (rows, groups, width), index, base)


@dataclass(frozen=True, slots=True)
class DeltaRecord:
    """A weight that a delta changes.

    Args:
        name: the logical weight, for instance `model.layers.0.mlp.up_proj.weight`.
        bound: the table that it changes.
        changed: how many groups of it.
        tuned: SHA-256 of the table with the changes.
    """

    name: str
    bound: Bound
    changed: int
    tuned: str

    @property
    def stem(self) -> str:
        """The module's name: the weight's without `.weight`."""
        return self.name.removesuffix(rules.WEIGHT_SUFFIX)

    @property
    def lut_name(self) -> str:
        """The stored name of the changed tables."""
        return self.stem + rules.DELTA_LUT_SUFFIX

    @property
    def scale_name(self) -> str:
        """The stored name of the scales."""
        return self.stem + rules.DELTA_SCALE_SUFFIX

    @property
    def groups_name(self) -> str:
        """The stored name of the map of changed groups."""
        return self.stem + rules.DELTA_GROUPS_SUFFIX

    @property
    def base_name(self) -> str:
        """The stored name of the table in the base."""
        return f"{self.stem}.{self.bound.table}"

    @property
    def groups(self) -> int:
        """Groups of the whole table, `out * G`."""
        return self.bound.shape[0] * self.bound.shape[1]

    @property
    def base_info(self) -> TensorInfo:
        """The table in the base."""
        return TensorInfo(self.base_name, self.bound.lut, self.bound.shape)

    @property
    def groups_info(self) -> TensorInfo | None:
        """U8 `[ceil(out * G / 8)]`, a bit per group; None where all changed."""
        if self.changed == self.groups:
            return None
        return TensorInfo(self.groups_name, "U8", (-(-self.groups // _GROUP_BITS),))

    def infos(self, coding: Coding) -> tuple[TensorInfo, ...]:
        """Every tensor that the weight is stored in."""
        dtype = coding.stored_dtype(self.bound.lut)
        found = [TensorInfo(self.lut_name, dtype, (self.changed, self.bound.shape[2]))]
        if coding.scaled:
            count = -(-self.changed // coding.span)
            found.append(TensorInfo(self.scale_name, "F16", (count,)))
        if self.groups_info is not None:
            found.append(self.groups_info)
        return tuple(found)

    def check(self, where: str) -> None:
        """Check the record by itself.

        Raises:
            FormatError: DLT-010, DLT-012 to DLT-016.
        """
        at, bound = f"{where}: weight {shown(self.name)}", self.bound
        stem_ok = self.name.endswith(rules.WEIGHT_SUFFIX) and self.stem
        longest = len(self.stem) + len(rules.INDEX_SUFFIX)
        if not stem_ok or not _NAME.fullmatch(self.name) or longest > rules.MAX_NAME:
            refuse("DLT-010", at, "the name must be a tensor name that ends in .weight")
        if len(bound.shape) != 3 or not all(type(d) is int and d >= 1 for d in bound.shape):
            got = shown(bound.shape)
            refuse("DLT-012", at, f"shape must be three positive integers, got {got}")
        if bound.table not in (LUT_TABLE, SCALE_TABLE):
            refuse("DLT-013", at, f"table must be {LUT_TABLE} or {SCALE_TABLE}")
        self._check_width(at)
        if bound.lut not in LUT_DTYPES:
            refuse("DLT-014", at, f"lut must be F16, BF16 or F32, got {shown(bound.lut)}")
        if type(self.changed) is not int or not 1 <= self.changed <= self.groups:
            got = shown(self.changed)
            refuse("DLT-015", at, f"changed must be 1 to {self.groups} groups, got {got}")
        for key, digest in (("index", bound.index), ("base", bound.base), ("tuned", self.tuned)):
            if not is_digest(digest):
                refuse("DLT-016", at, f"{key} must be 64 hexadecimal digits, got {shown(digest)}")
        if bound.base == self.tuned:
            refuse("DLT-016", at, "base and tuned are the same: nothing changes")

    def _check_width(self, at: str) -> None:
        bound, width = self.bound, self.bound.shape[2]
        if bound.table == SCALE_TABLE and (width > 2 or bound.lut != "F16"):
            got = f"{shown(bound.lut)} of {width}"
            refuse("DLT-013", at, f"scales are F16, one or two per group, got {got}")
        if bound.table == LUT_TABLE and width not in {1 << b for b in range(1, rules.MAX_BITS + 1)}:
            refuse("DLT-013", at, f"a LUT has 2, 4, ... or 256 entries, got {width}")

    def to_value(self) -> dict[str, Any]:
        """Return the record as a JSON value, without its name."""
        return {
            "base": self.bound.base,
            "changed": self.changed,
            "index": self.bound.index,
            "lut": self.bound.lut,
            "shape": list(self.bound.shape),
            "table": self.bound.table,
            "tuned": self.tuned,
        }

    @classmethod
    def from_value(cls, name: str, value: Any, where: str) -> DeltaRecord:
        """Read a record; its values remain to be checked, see `check`.

        Raises:
            FormatError: DLT-011, and DLT-012 to DLT-014 for a value of a wrong type.
        """
        at = f"{where}: weight {shown(name)}"
        if not isinstance(value, dict) or value.keys() != RECORD_MEMBERS:
            got = shown(sorted(value) if isinstance(value, dict) else value)
            refuse("DLT-011", at, f"a record has exactly {sorted(RECORD_MEMBERS)}, got {got}")
        if not isinstance(value["shape"], list):
            refuse("DLT-012", at, f"shape must be three integers, got {shown(value['shape'])}")
        for key, requirement in (("table", "DLT-013"), ("lut", "DLT-014")):
            if not isinstance(value[key], str):
                refuse(requirement, at, f"{key} must be a string, got {shown(value[key])}")
        shape = tuple(value["shape"])
        bound = Bound(value["table"], value["lut"], shape, value["index"], value["base"])
        return cls(name, bound, value["changed"], value["tuned"])


def parameters(record: DeltaRecord) -> int:
    """How many numbers a record changes."""
    return math.prod((record.changed, record.bound.shape[2]))
