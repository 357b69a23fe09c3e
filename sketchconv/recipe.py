"""What to compress and how: defaults and per-pattern overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from sketchconv.errors import RecipeError

Action = Literal["sketch", "copy"]
Weighting = Literal["covariances", "moments", "equal"]
LutDtype = Literal["F16", "BF16", "F32"]
GridName = Literal["free", "iq4_nl", "affine", "symmetric"]


# Bits up to which columns alone do not do: 3-bit SmolLM2-135M without data has a perplexity of 92
# with covariances and 357 with moments, where the dense model has 26.
COARSE = 3


def _check_int(field: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise RecipeError(f"{field} must be an integer of at least {low}, got {value!r}")
    if high is not None and value > high:
        raise RecipeError(f"{field} must be between {low} and {high}, got {value}")


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"{field} must be one of {', '.join(choices)}, got {value!r}")


def matches(pattern: str, name: str) -> bool:
    """Whether a shell-style pattern names a tensor, with or without its ``.weight`` suffix.

    >>> matches("*.down_proj", "model.layers.0.mlp.down_proj.weight")
    True
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


@dataclass(frozen=True, slots=True)
class SketchSpec:
    """How one weight matrix is sketched.

    Args:
        bits: index width, 1 to 8; every LUT has ``2**bits`` entries.
        groups: groups per row (GPR in the paper); ignored when `group_size` is given.
        group_size: columns per group; must divide the row.
        lut_dtype: dtype of the stored LUT entries.
        grid: ``"free"``: LUTs of any entries. Else fixed levels times a scale (and plus a minimum,
            ``"affine"``) per 32 columns, or a multiple of that as `group_size`: the blocks of a
            GGUF type.
    """

    bits: int = 4
    groups: int = 1
    group_size: int | None = None
    lut_dtype: LutDtype = "F16"
    grid: GridName = "free"

    def __post_init__(self) -> None:
        _check_int("bits", self.bits, 1, 8)
        _check_int("groups", self.groups, 1, None)
        if self.group_size is not None:
            _check_int("group_size", self.group_size, 1, None)
        _check_choice("lut_dtype", self.lut_dtype, get_args(LutDtype))
        _check_choice("grid", self.grid, get_args(GridName))
        if self.grid != "free":
            self._check_grid()

    def _check_grid(self) -> None:
        from sketchconv.formats.grids import COLUMNS, GRIDS

        known, size = GRIDS[self.grid].bits, self.group_size
        if self.bits not in known:
            widths = " or ".join(map(str, known))
            raise RecipeError(f"grid {self.grid} has {widths} bits, got {self.bits}")
        if self.groups != 1 or (size is not None and size % COLUMNS):
            asked = f"{self.groups} groups" if size is None else f"groups of {size} columns"
            raise RecipeError(
                f"grid {self.grid} has groups of {COLUMNS} columns, or of a multiple given as "
                f"group_size; got {asked}"
            )
        if self.lut_dtype != "F16":
            raise RecipeError(f"grid {self.grid} has F16 scales, got lut_dtype {self.lut_dtype}")

    def groups_for(self, columns: int) -> int | None:
        """Groups per row for rows of `columns` weights, or None if they do not divide evenly."""
        if self.grid != "free" and self.group_size is None:
            return dataclasses.replace(self, group_size=32).groups_for(columns)
        if self.group_size is not None:
            return columns // self.group_size if columns % self.group_size == 0 else None
        return self.groups if columns % self.groups == 0 else None


@dataclass(frozen=True, slots=True)
class Override:
    """Settings for the weights that `match` names; None inherits. The last match wins."""

    match: str
    action: Action | None = None
    bits: int | None = None
    groups: int | None = None
    group_size: int | None = None
    lut_dtype: LutDtype | None = None
    grid: GridName | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise RecipeError(
                f"override: match must be a pattern of tensor names, got {self.match!r}"
            )
        if self.action is not None:
            _check_choice("action", self.action, get_args(Action))
        if self.groups is not None and self.group_size is not None:
            raise RecipeError(f"override {self.match!r}: give groups or group_size, not both")
        self.applied(SketchSpec(bits=4 if self.bits is None else self.bits))

    def applied(self, spec: SketchSpec) -> SketchSpec:
        """The spec with this override's settings in place of its own."""
        fields = ("bits", "groups", "group_size", "lut_dtype", "grid")
        changes = {f: getattr(self, f) for f in fields if getattr(self, f) is not None}
        if self.groups is not None:
            changes["group_size"] = None
        elif self.group_size is not None:
            changes["groups"] = 1
        if self.grid is not None and self.grid != spec.grid:
            # Groups of one kind of LUT mean nothing to the other.
            changes = {"groups": 1, "group_size": None, **changes}
        return dataclasses.replace(spec, **changes)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the bytes of a sketch, besides the source itself.

    Args:
        default: spec of every linear weight.
        embed_bits: index width for embeddings and the output head; None copies them.
        weighting: without data, where the architecture is known: ``"covariances"`` propagates
            second moments of whole inputs through the network and compensates errors with them;
            ``"moments"`` propagates those of columns, and weighs columns by them (several times
            faster); ``"equal"`` weighs all columns alike. None: covariances where `default` has 3
            bits or fewer, moments elsewhere and beside a calibration.
        exact: solve every group to the global optimum (slower) instead of within about 0.2 %.
        include: if given, only weights that one of these patterns names are sketched.
        exclude: weights that one of these patterns names are copied.
        overrides: per-pattern settings, the last match wins.
    """

    default: SketchSpec = SketchSpec()
    embed_bits: int | None = None
    weighting: Weighting | None = None
    exact: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        if self.embed_bits is not None:
            _check_int("embed_bits", self.embed_bits, 1, 8)
        if self.weighting is not None:
            _check_choice("weighting", self.weighting, get_args(Weighting))
        if not isinstance(self.exact, bool):
            raise RecipeError(f"exact must be true or false, got {self.exact!r}")
        if self.exact and self.weighting == "covariances":
            raise RecipeError("exact is about k-means alone; covariances compensate: drop one")

    def patterns(self) -> tuple[str, ...]:
        """Every pattern of the recipe, so that one that names nothing can be reported."""
        return (*self.include, *self.exclude, *(o.match for o in self.overrides))

    def override_for(self, name: str) -> Override | None:
        """The override that decides for `name`: the last whose pattern matches."""
        return next((o for o in reversed(self.overrides) if matches(o.match, name)), None)

    def spec_for(self, name: str, *, embedding: bool) -> SketchSpec:
        """The spec of one weight; embeddings and heads start from `embed_bits`, with free LUTs."""
        spec = self.default
        if embedding and spec.grid != "free":
            spec = SketchSpec(bits=spec.bits)
        if embedding and self.embed_bits is not None:
            spec = dataclasses.replace(spec, bits=self.embed_bits)
        override = self.override_for(name)
        return spec if override is None else override.applied(spec)

    def weighting_for(self, *, calibrated: bool) -> Weighting:
        """The weighting that was asked for, or else the one that suits the bits."""
        if self.weighting is not None:
            return self.weighting
        coarse = self.default.bits <= COARSE and not self.exact and not calibrated
        return "covariances" if coarse else "moments"

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values, for a sketch's metadata."""
        values: dict[str, Any] = _plain(dataclasses.asdict(self))
        if self.default.grid == "free":
            del values["default"]["grid"]
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
