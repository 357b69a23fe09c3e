"""The options of `convert` that say how a model is compressed, and what they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import click

from sketchconv.calibration.options import Calibration
from sketchconv.recipe import Recipe, SketchSpec
from sketchconv.recipe_file import load_recipe

_DTYPES: Final = click.Choice(["F16", "BF16", "F32"], case_sensitive=False)
_WEIGHTINGS: Final = click.Choice(["covariances", "moments", "equal"])
_BITS: Final = click.IntRange(1, 8)
_COUNT: Final = click.IntRange(1)
_GRIDS: Final = click.Choice(["free", "iq4_nl", "affine", "symmetric"])

_OPTIONS: Final = (
    click.option("--bits", type=_BITS, help="Bits per index. [default: 4]"),
    click.option("--groups", type=_COUNT, help="Groups per row. [default: 1]"),
    click.option("--group-size", type=_COUNT, help="Columns per group, instead of --groups."),
    click.option(
        "--grid",
        type=_GRIDS,
        help="Free LUTs, or fixed levels times a scale per 32 columns: the blocks of GGUF's "
        "IQ4_NL, Q4_1 and Q5_1 (affine), Q4_0, Q5_0 and Q8_0 (symmetric). [default: free]",
    ),
    click.option("--embed-bits", type=_BITS, help="Sketch embeddings and head too, at these bits."),
    click.option("--lut-dtype", type=_DTYPES, help="Dtype of the LUT entries. [default: F16]"),
    click.option("--include", multiple=True, metavar="PATTERN", help="Sketch only these weights."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Copy these weights."),
    click.option("--recipe", "recipe_file", type=click.Path(), help="TOML file with overrides."),
    click.option(
        "--weighting", type=_WEIGHTINGS, help="Without a text: see above. [default: by the bits]"
    ),
    click.option("--equal-weights", is_flag=True, help="The same as --weighting equal."),
    click.option("--exact", is_flag=True, help="Solve each group to the global optimum (slower)."),
    click.option(
        "--calibration",
        "texts",
        multiple=True,
        metavar="TEXT",
        help="Calibrate on a .txt or .jsonl file, 'self' (text that the model writes itself) or a "
        "data set of the Hub; several give equal shares.",
    ),
    click.option(
        "--tokens", type=_COUNT, help="Calibration tokens. [default: 65536, if there are]"
    ),
    click.option(
        "--seq-len",
        type=click.IntRange(2),
        help="Tokens per window. [default: 1024, or fewer if the model takes no more]",
    ),
    click.option("--seed", type=click.IntRange(0), help="Of the choice of windows. [default: 0]"),
    click.option(
        "--method", help="rtn, kmeans, gptq, leanquant or sketch. [default with a text: sketch]"
    ),
    click.option("--device", help="auto, cpu, cuda or cuda:n. [default: auto]"),
    click.option(
        "--recover",
        type=click.IntRange(0),
        metavar="TOKENS",
        help="Train the LUTs on so many tokens; 0 for none. [default: 32768 at 3 bits and below]",
    ),
    click.option(
        "--recover-by",
        type=click.Choice(["auto", "model", "blocks"]),
        help="Train the whole model, or one block at a time: weaker, in less memory. "
        "[default: auto, blocks where the model does not fit]",
    ),
    click.option(
        "--resume/--no-resume",
        default=None,
        help="Go on with what an interrupted run left, or drop that. [default: go on]",
    ),
)
# As they are called on the command line, by the names that click passes.
_NAMES: Final = {
    **{name: f"--{name.replace('_', '-')}" for name in ("bits", "groups", "group_size", "grid")},
    **{name: f"--{name.replace('_', '-')}" for name in ("embed_bits", "lut_dtype", "include")},
    **{name: f"--{name.replace('_', '-')}" for name in ("exclude", "weighting", "equal_weights")},
    **{name: f"--{name.replace('_', '-')}" for name in ("exact", "tokens", "seq_len", "seed")},
    **{name: f"--{name}" for name in ("method", "device", "recover")},
    "recover_by": "--recover-by",
    "resume": "--resume",
    "recipe_file": "--recipe",
    "texts": "--calibration",
}


def sketch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of compression."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given_sketch_options(options: Mapping[str, Any]) -> list[str]:
    """Which options of compression were given, as they are called on the command line."""
    given = [flag for name, flag in _NAMES.items() if options[name] not in (None, False, ())]
    return [*given, "--no-resume"] if options["resume"] is False else given


def calibration_of(options: Mapping[str, Any]) -> Calibration | None:
    """The calibration that the options describe; None where none of them is given."""
    fields = ("tokens", "seq_len", "seed", "device", "recover", "recover_by")
    given = {field: options[field] for field in fields if options[field] is not None}
    if options["texts"]:
        given["text"] = options["texts"]
    elif given:
        name = next(iter(given)).replace("_", "-")
        raise click.UsageError(f"--{name} goes with --calibration TEXT")
    if options["method"] is not None:
        given["method"] = options["method"]
    return Calibration(**given) if given else None


def recipe_of(options: Mapping[str, Any]) -> Recipe:
    """Defaults, then the recipe file, then the options of the command line."""
    if options["groups"] is not None and options["group_size"] is not None:
        raise click.UsageError("give --groups or --group-size, not both")
    file = options["recipe_file"]
    recipe = load_recipe(file) if file is not None else Recipe()
    changes: dict[str, Any] = {"default": _spec(recipe.default, options)}
    if options["embed_bits"] is not None:
        changes["embed_bits"] = options["embed_bits"]
    if options["weighting"] is not None:
        changes["weighting"] = options["weighting"]
    if options["equal_weights"]:
        changes["weighting"] = "equal"
    if options["exact"]:
        changes["exact"] = True
    changes["include"] = (*recipe.include, *options["include"])
    changes["exclude"] = (*recipe.exclude, *options["exclude"])
    return dataclasses.replace(recipe, **changes)


def _spec(spec: SketchSpec, options: Mapping[str, Any]) -> SketchSpec:
    fields = ("bits", "groups", "group_size", "lut_dtype", "grid")
    changes = {field: options[field] for field in fields if options[field] is not None}
    if options["groups"] is not None:
        changes["group_size"] = None
    elif options["group_size"] is not None:
        changes["groups"] = 1
    return dataclasses.replace(spec, **changes)
