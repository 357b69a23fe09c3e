"""A reader of pickles that runs nothing: plain containers, numbers, texts and torch's tensors.

Its opcodes are a closed list, and the names that a pickle may mention are another
(`machine.KNOWN`), each mapped to a value of our own. Nothing is imported, called or built that is
not there; what is not on the lists is refused by name. Long byte strings are not read but noted as
spans of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from sketchconv.importers.machine import MARK, Builders, Machine
from sketchconv.importers.windows import Window

# A tensor takes about 40 opcodes.
MAX_STEPS: Final = 4_000_000
_STOP: Final = b"."


def load(window: Window, builders: Builders, where: str) -> Any:
    """The value of the pickle that begins at the window's place; the window then stands behind it.

    Args:
        window: where its bytes are.
        builders: what names and references become.
        where: the file, for errors.

    Raises:
        SourceError: an opcode or a name that is not on the lists, a stack that does not fit, or
            an end before STOP.
    """
    machine = Machine(window, builders, where)
    for _ in range(MAX_STEPS):
        code = window.take(1)
        if code == _STOP:
            return machine.pop()
        action = ACTIONS.get(code)
        if action is None:
            raise machine.refusal(f"opcode {code!r} is not one that is read")
        action(machine)
    raise machine.refusal(f"more than {MAX_STEPS} opcodes")


_Action = Callable[[Machine], None]


def _pushes(value: Any) -> _Action:
    return lambda m: m.push(value)


ACTIONS: Final[Mapping[bytes, _Action]] = MappingProxyType(
    {
        b"\x80": lambda m: m.skip("<B"),
        b"\x95": lambda m: m.skip("<Q"),
        b"(": _pushes(MARK),
        b"N": _pushes(None),
        b"\x88": _pushes(True),
        b"\x89": _pushes(False),
        b")": _pushes(()),
        b"}": lambda m: m.push({}),
        b"]": lambda m: m.push([]),
        b"J": lambda m: m.push(m.number("<i")),
        b"K": lambda m: m.push(m.number("<B")),
        b"M": lambda m: m.push(m.number("<H")),
        b"\x8a": lambda m: m.integer(m.number("<B")),
        b"G": Machine.real,
        b"X": lambda m: m.text(m.number("<I")),
        b"\x8c": lambda m: m.text(m.number("<B")),
        b"\x8d": lambda m: m.text(m.number("<Q")),
        b"B": lambda m: m.span(m.number("<I")),
        b"C": lambda m: m.span(m.number("<B")),
        b"\x8e": lambda m: m.span(m.number("<Q")),
        b"q": lambda m: m.memoize(m.number("<B")),
        b"r": lambda m: m.memoize(m.number("<I")),
        b"\x94": lambda m: m.memoize(m.next_memo()),
        b"h": lambda m: m.recall(m.number("<B")),
        b"j": lambda m: m.recall(m.number("<I")),
        b"\x85": lambda m: m.tuple_of(1),
        b"\x86": lambda m: m.tuple_of(2),
        b"\x87": lambda m: m.tuple_of(3),
        b"t": lambda m: m.push(tuple(m.to_mark())),
        b"a": lambda m: m.extend([m.pop()]),
        b"e": lambda m: m.extend(m.to_mark()),
        b"s": lambda m: m.fill([m.pop(), m.pop()][::-1]),
        b"u": lambda m: m.fill(m.to_mark()),
        b"c": Machine.line_global,
        b"\x93": Machine.stack_global,
        b"R": Machine.reduce,
        b"b": Machine.build,
        b"Q": Machine.persistent,
    }
)
