"""A small valid model, and ways to break it."""

import hashlib
import re

from vectorlib.material import model, sketch
from vectorlib.material import shaped as shaped_sketch
from vectorlib.plain import ZERO, build, container, digest, entries, header_of, seal


def base():
    """A small valid model to break: one sketch, one plain tensor."""
    return model({"m": sketch(1, 4, 2, 1, seed=50)}, {"p": ("F32", [2], b"12345678")})


def shaped_base():
    """The same with a shaped sketch of 32 columns."""
    made = shaped_sketch(1, 64, "affine", 4, 2, seed=52)
    return model({"m": made}, {"p": ("F32", [2], b"12345678")})


def with_header(change):
    """A file whose header's text is changed; its data stays."""
    document, tensors = base()
    parts, data = entries(tensors)
    text = change(header_of(seal(document), parts).rstrip(" "))
    text = text if isinstance(text, bytes) else text.encode()
    return container(text + b" " * (-(8 + len(text)) % 64), data)


def swap(old, new):
    """A header in which `old`, which must be there, is `new`."""

    def change(text):
        if old not in text:
            raise ValueError(old)
        return text.replace(old, new, 1)

    return with_header(change)


def with_document(change, drop=(), add=None, made=base):
    """A file with a changed document, sealed again, and tensors taken away or put in."""
    document, tensors = made()
    for name, tensor in (add or {}).items():
        tensors[name] = tensor
        document["digests"][name] = digest(*tensor)
    for name in drop:
        del tensors[name]
        document["digests"].pop(name)
    change(document)
    return build(document, tensors)


def same(document):
    """The change that changes nothing."""


def with_tensors(tensors):
    """A file with more tensors, or with other ones, digests recomputed."""
    return with_document(same, add=tensors)


def shaped(text):
    """A header in which the shape of the plain tensor is another text."""
    return swap('"shape":[2]', text)


def put(path, value):
    """A change of a document: the member at a path gets a value."""

    def change(document):
        *above, last = path
        for key in above:
            document = document[key]
        document[last] = value

    return change


def drop_member(*path):
    """A change of a document: the member at a path goes away."""

    def change(document):
        *above, last = path
        for key in above:
            document = document[key]
        del document[last]

    return change


def with_text(change):
    """A file whose document is changed as a text, neither sorted nor sealed again."""
    document, tensors = base()
    parts, data = entries(tensors)
    return container(header_of(change(seal(document)), parts), data)


def resealed(change):
    """A file whose document is changed as a text and then sealed again."""

    def both(text):
        text = re.sub(r'"seal":"[0-9a-f]{64}"', f'"seal":"{ZERO}"', change(text))
        seal_ = hashlib.sha256(text.encode()).hexdigest()
        return text.replace(f'"seal":"{ZERO}"', f'"seal":"{seal_}"')

    return with_text(both)
