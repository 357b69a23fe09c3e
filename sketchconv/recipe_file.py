"""The recipe file: a TOML document on top of a recipe's values."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sketchconv.errors import RecipeError
from sketchconv.recipe import Override, Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_RECIPE_BYTES = 1 << 20


def load_recipe(path: str | Path, base: Recipe | None = None) -> Recipe:
    """Read a TOML recipe on top of `base`; keys that the file does not name keep its values.

    Raises:
        RecipeError: the file is missing, is not TOML, or has an unknown key or a bad value.
    """
    path = Path(path)
    table = _read_toml(path)
    recipe = base or Recipe()
    try:
        return _merge(recipe, table)
    except (RecipeError, TypeError) as error:
        raise RecipeError(f"{path}: {error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: a recipe is at most {MAX_RECIPE_BYTES} bytes, got {len(data)}")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except RecursionError:
        raise RecipeError(f"{path}: not a TOML file: nested too deeply") from None
    except ValueError as error:  # also of bytes that are not UTF-8, and of numbers of 5,000 digits
        raise RecipeError(f"{path}: not a TOML file: {error}") from None


def _merge(recipe: Recipe, table: Mapping[str, Any]) -> Recipe:
    known = {"default", "embed_bits", "weighting", "exact", "include", "exclude", "override"}
    _check_keys("recipe", table, known)
    changes: dict[str, Any] = {
        key: table[key] for key in ("embed_bits", "weighting", "exact") if key in table
    }
    for key in ("include", "exclude"):
        if key in table:
            changes[key] = _patterns(key, table[key])
    if "default" in table:
        spec_keys = {"bits", "groups", "group_size", "lut_dtype", "grid"}
        _check_keys("[default]", _table("[default]", table["default"]), spec_keys)
        if {"groups", "group_size"} <= set(table["default"]):
            raise RecipeError("[default]: give groups or group_size, not both")
        changes["default"] = dataclasses.replace(recipe.default, **table["default"])
    if "override" in table:
        changes["overrides"] = recipe.overrides + tuple(_overrides(table["override"]))
    return dataclasses.replace(recipe, **changes)


def _overrides(items: object) -> list[Override]:
    if not isinstance(items, list):
        raise RecipeError("override must be written as [[override]] tables")
    known = {f.name for f in dataclasses.fields(Override)}
    for item in items:
        _check_keys("[[override]]", _table("[[override]]", item), known)
    return [Override(**item) for item in items]


def _patterns(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RecipeError(f"{key} must be a list of patterns, got {value!r}")
    if not all(isinstance(item, str) for item in value):
        raise RecipeError(f"{key} must hold strings only, got {list(value)!r}")
    return tuple(value)


def _table(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{where} must be a table, got {value!r}")
    return value


def _check_keys(where: str, table: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise RecipeError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
