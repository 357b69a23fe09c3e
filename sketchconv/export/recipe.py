"""Which type each tensor of a GGUF export gets: a default and patterns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sketchconv.errors import RecipeError
from sketchconv.export.encoders import encoder_named
from sketchconv.export.llama_cpp_names import check_splitter_name
from sketchconv.export.mixtures import MIXTURES, exceptions
from sketchconv.recipe import matches

AUTO = "AUTO"


@dataclass(frozen=True, slots=True)
class TypeChoice:
    """A type for the tensors that a pattern names."""

    pattern: str
    type: str

    def __post_init__(self) -> None:
        if not self.pattern:
            raise RecipeError("a type for a pattern is written PATTERN=TYPE, got no pattern")
        object.__setattr__(self, "type", encoder_named(self.type).type.name)

    def names(self, *names: str) -> bool:
        """Whether the pattern names a tensor by one of its names.

        A pattern is shell-style, or one part between dots, as in ``ffn_down``.
        """
        return any(matches(self.pattern, n) or self.pattern in n.split(".") for n in names if n)


@dataclass(frozen=True, slots=True)
class ExportRecipe:
    """The types of a GGUF export.

    Args:
        type: of every matrix; ``"AUTO"`` keeps what is exact: the stored dtype, and for a sketch
            that of its LUTs. Of a GGUF it keeps every block. A mixture has types of its own for
            some tensors, before those of `choices`.
        choices: types by pattern of GGUF or Hugging Face names; the last match wins.
        tokenizer_pre: `tokenizer.ggml.pre`, in place of the one that is recognised.
        name: `general.name`, in place of the source's.
    """

    type: str = AUTO
    choices: tuple[TypeChoice, ...] = ()
    tokenizer_pre: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.type.upper() in (AUTO, *MIXTURES):
            object.__setattr__(self, "type", self.type.upper())
        else:
            object.__setattr__(self, "type", encoder_named(self.type).type.name)
        if self.tokenizer_pre is not None:
            check_splitter_name(self.tokenizer_pre)

    def spelled_out(self, names: Iterable[str]) -> ExportRecipe:
        """The same without a mixture: its base type, and a choice for each of its exceptions.

        Args:
            names: of all tensors in the file.
        """
        mixture = MIXTURES.get(self.type)
        if mixture is None:
            return self
        own = tuple(TypeChoice(name, kind) for name, kind in exceptions(mixture, names))
        return replace(self, type=mixture.base, choices=(*own, *self.choices))

    def choice_for(self, *names: str) -> TypeChoice | None:
        """The choice that decides for a tensor of these names: the last that names it."""
        return next((c for c in reversed(self.choices) if c.names(*names)), None)


def parse_choice(text: str) -> TypeChoice:
    """A choice from ``PATTERN=TYPE``.

    >>> parse_choice("ffn_down=q8_0").type
    'Q8_0'

    Raises:
        RecipeError: no pattern, no type, or an unknown type.
    """
    pattern, equals, type_name = text.rpartition("=")
    if not equals:
        raise RecipeError(f"{text!r}: expected PATTERN=TYPE, for instance ffn_down=Q8_0")
    return TypeChoice(pattern, type_name)
