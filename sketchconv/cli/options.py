"""Option types and value checks that several commands share."""

from __future__ import annotations

from typing import Any

import click

from sketchconv.memory import parse_size


class Size(click.ParamType[int]):
    """A size in bytes, written like 5GB, 512MiB or 2G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the text of an option; integers pass through."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()
