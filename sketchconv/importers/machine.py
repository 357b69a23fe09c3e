"""The stack of the reader of pickles: what each opcode does, and which names are known."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from sketchconv.errors import SourceError
from sketchconv.importers.windows import Span, Window

MAX_STACK: Final = 100_000
MAX_TEXT: Final = 1 << 16
_INT_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Known:
    """A name that a pickle may mention: what it stands for, and for storages their dtype."""

    kind: str
    dtype: str = ""


KNOWN: Final[Mapping[tuple[str, str], Known]] = MappingProxyType(
    {
        ("collections", "OrderedDict"): Known("dict"),
        ("torch._utils", "_rebuild_tensor_v2"): Known("tensor"),
        ("torch._utils", "_rebuild_parameter"): Known("parameter"),
        ("torch.storage", "_load_from_bytes"): Known("bytes"),
        ("torch", "FloatStorage"): Known("storage", "F32"),
        ("torch", "DoubleStorage"): Known("storage", "F64"),
        ("torch", "HalfStorage"): Known("storage", "F16"),
        ("torch", "BFloat16Storage"): Known("storage", "BF16"),
        ("torch", "LongStorage"): Known("storage", "I64"),
        ("torch", "IntStorage"): Known("storage", "I32"),
        ("torch", "ShortStorage"): Known("storage", "I16"),
        ("torch", "CharStorage"): Known("storage", "I8"),
        ("torch", "ByteStorage"): Known("storage", "U8"),
        ("torch", "BoolStorage"): Known("storage", "BOOL"),
    }
)
"""Every name that is understood."""


@dataclass(frozen=True, slots=True)
class Builders:
    """What the names and references of a pickle become.

    Attributes:
        tensor: of the arguments of `_rebuild_tensor_v2`.
        storage: of a persistent id.
        nested: of the bytes of a storage that was pickled by itself.
    """

    tensor: Callable[[tuple[Any, ...]], Any]
    storage: Callable[[Any], Any]
    nested: Callable[[Span], Any]


class _Mark:
    """Stands on the stack where a list of values begins."""


MARK: Final = _Mark()


class Machine:
    """The state of one pickle that is read.

    Args:
        window: where its bytes are.
        builders: what names become.
        where: the file, for errors.
    """

    def __init__(self, window: Window, builders: Builders, where: str) -> None:
        self.window, self._builders, self._where = window, builders, where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def refusal(self, reason: str) -> SourceError:
        """What to raise."""
        return SourceError(
            f"{self._where}: {reason}. Pickles are read by a list of what tensors need, and nothing"
            " in them is run; save the tensors as safetensors"
        )

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        if len(self._stack) >= MAX_STACK:
            raise self.refusal(f"more than {MAX_STACK} open values")
        self._stack.append(value)

    def pop(self) -> Any:
        """Take the top value."""
        if not self._stack or self._stack[-1] is MARK:
            raise self.refusal("a value is missing")
        return self._stack.pop()

    def to_mark(self) -> list[Any]:
        """Take all values above the last mark, and the mark."""
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is MARK:
                values = self._stack[at + 1 :]
                del self._stack[at:]
                return values
        raise self.refusal("a mark is missing")

    def skip(self, layout: str) -> None:
        """Pass over a number that says nothing of the value: a version, or the size of a frame."""
        self.number(layout)

    def number(self, layout: str) -> int:
        """The next number, in a layout of `struct`."""
        return int(struct.unpack(layout, self.window.take(struct.calcsize(layout)))[0])

    def _text(self, length: int) -> str:
        if length > MAX_TEXT:
            raise self.refusal(f"a text of {length} bytes")
        try:
            return self.window.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.refusal("a text that is not UTF-8") from None

    def _name(self, module: Any, name: Any) -> Known:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.refusal("a name that is no text")
        if (module, name) not in KNOWN:
            raise self.refusal(f"it names {module}.{name}, which no tensor needs")
        return KNOWN[module, name]

    def line_global(self) -> None:
        """Push the name on the next two lines."""
        module, name = self.window.line(MAX_TEXT), self.window.line(MAX_TEXT)
        self.push(self._name(module, name))

    def stack_global(self) -> None:
        """Push the name whose module and name are on the stack."""
        name, module = self.pop(), self.pop()
        self.push(self._name(module, name))

    def reduce(self) -> None:
        """Call a known name: what it becomes is ours."""
        arguments, called = self.pop(), self.pop()
        if not isinstance(called, Known) or not isinstance(arguments, tuple):
            raise self.refusal("a call of something that is not a name")
        if called.kind == "dict" and not arguments:
            self.push({})
        elif called.kind == "tensor":
            self.push(self._builders.tensor(arguments))
        elif called.kind == "parameter" and arguments:
            self.push(arguments[0])
        elif called.kind == "bytes" and len(arguments) == 1 and isinstance(arguments[0], Span):
            self.push(self._builders.nested(arguments[0]))
        else:
            raise self.refusal("a call with other arguments than torch writes")

    def build(self) -> None:
        """Attributes of a dict (torch's `_metadata`) say nothing of tensors and are left out."""
        state = self.pop()
        if not self._stack or not isinstance(self._stack[-1], dict) or not isinstance(state, dict):
            raise self.refusal("attributes of something that is no dict")

    def persistent(self) -> None:
        """Push the storage that a reference stands for."""
        self.push(self._builders.storage(self.pop()))

    def memoize(self, number: int) -> None:
        """Remember the value on top."""
        value = self.pop()
        self.push(value)
        self._memo[number] = value

    def recall(self, number: int) -> None:
        """Push a remembered value."""
        if number not in self._memo:
            raise self.refusal(f"a reference to {number}, which was not stored")
        self.push(self._memo[number])

    def extend(self, values: list[Any]) -> None:
        """Add items to the list on top."""
        if not self._stack or not isinstance(self._stack[-1], list):
            raise self.refusal("items of something that is no list")
        self._stack[-1].extend(values)

    def fill(self, values: list[Any]) -> None:
        """Add keys and values to the dict on top."""
        if not self._stack or not isinstance(self._stack[-1], dict) or len(values) % 2:
            raise self.refusal("items of something that is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise self.refusal(f"a key of type {type(key).__name__}")
            self._stack[-1][key] = value

    def integer(self, length: int) -> None:
        """Push a number of so many bytes, lowest first."""
        if length > _INT_BYTES:
            raise self.refusal(f"a number of {length} bytes")
        self.push(int.from_bytes(self.window.take(length), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        """Replace the top values by a tuple of them."""
        values = [self.pop() for _ in range(count)]
        self.push(tuple(values[::-1]))

    def next_memo(self) -> int:
        """The number of the next remembered value."""
        return len(self._memo)

    def text(self, length: int) -> None:
        """Push a text of so many bytes."""
        self.push(self._text(length))

    def span(self, length: int) -> None:
        """Push the place of so many bytes; they are not read."""
        self.push(self.window.span(length))

    def real(self) -> None:
        """Push a float."""
        self.push(float(struct.unpack(">d", self.window.take(8))[0]))
