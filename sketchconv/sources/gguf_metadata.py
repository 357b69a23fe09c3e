"""Typed access to the metadata of one architecture in a GGUF file."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from sketchconv.errors import ArchitectureError
from sketchconv.sources.gguf_header import GgufArray, GgufHeader, GgufValue


class Metadata:
    """The keys below an architecture's prefix.

    Args:
        header: the file's metadata and tensor table.
        prefix: the architecture's name.
        where: the file's name, for errors.
        factors: the values of the file's tensors of rotary factors, by name.
    """

    def __init__(
        self,
        header: GgufHeader,
        prefix: str,
        where: str,
        factors: Mapping[str, tuple[float, ...]] | None = None,
    ) -> None:
        self.values, self.tensors = header.values, header.tensors
        self.prefix, self.where = prefix, where
        self.factors = dict(factors or {})

    def fail(self, message: str) -> ArchitectureError:
        """An error to raise, with the file's name."""
        return ArchitectureError(f"{self.where}: {message}")

    def get(self, key: str) -> GgufValue | None:
        """One value as it is; None where the file has none."""
        return self.values.get(f"{self.prefix}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer.

        Raises:
            ArchitectureError: it is none, or is absent and there is no default.
        """
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            shown = "one value per layer" if isinstance(value, GgufArray) else repr(value)
            raise self.fail(f"{self.prefix}.{key} is {shown}; expected one positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number.

        Raises:
            ArchitectureError: it is none, or is absent and there is no default.
        """
        value = self.get(key)
        if value is None and default is not None:
            return default
        usual = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not usual or not 0 < float(value) < float("inf"):  # type: ignore[arg-type]
            raise self.fail(f"{self.prefix}.{key} is {value!r}; expected a positive number")
        return shortest(float(value))  # type: ignore[arg-type]

    def refuse_unknown(self, understood: Collection[str]) -> None:
        """Refuse keys of the architecture that nobody would look at.

        Raises:
            ArchitectureError: names the first one.
        """
        for key, value in self.values.items():
            prefix, _, rest = key.partition(".")
            if prefix != self.prefix or rest in understood:
                continue
            # Zero and False switch a feature off (an expert count of 0, for instance).
            if isinstance(value, GgufArray) or value:
                raise self.fail(
                    f"{key} = {value!r} is not understood, and ignoring it could give a wrong"
                    " model; convert the model's Hugging Face folder instead"
                )


def shortest(value: float) -> float:
    """The shortest decimal of a stored float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))
