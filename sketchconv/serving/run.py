"""Load a sketch and its deltas and serve them until a signal ends it."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sketchconv.errors import ServingError
from sketchconv.serving.hosts import LOCAL, bracketed, plain_host
from sketchconv.serving.service import Limits, Service

GRACE_SECONDS = 10  # that answers under way have after a signal
NEEDED = ("fastapi", "uvicorn")


def check_installed() -> None:
    """Refuse to go on without the packages of the extra `serve`.

    Raises:
        ServingError: one of them is not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ServingError(
            f"serving needs {' and '.join(missing)}; install them with: "
            "pip install 'sketchconv[serve]'"
        )


def check_key(key: str) -> None:
    """Refuse a key that clients cannot send in a header, or not in one way alone.

    Raises:
        ServingError: it has other characters than those of ASCII that can be seen, or its end is a
            space.
    """
    if not (key and key.isascii() and key.isprintable() and key == key.strip()):
        raise ServingError(
            "the API key must be of printable ASCII characters (letters, digits, signs), without a "
            "space or a line end around it"
        )


def open_service(
    base: str | os.PathLike[str], deltas: Mapping[str, str], limits: Limits, name: str | None = None
) -> Service:
    """Load a sketch with all its deltas and start the engine.

    Args:
        base: the sketch, by path or hub id.
        deltas: path or hub id of each delta by the name of its task.
        limits: see there.
        name: what the base is called in the API; None takes that of its file.

    Raises:
        LoadError: the base cannot be loaded, or generates no text.
        DeltaError: a delta does not belong to it.
        AdapterError: a name is taken twice.
    """
    from sketchconv.adapters import manage as adapters
    from sketchconv.errors import LoadError
    from sketchconv.runtime.load import load, load_tokenizer

    tokenizer = load_tokenizer(base)
    model: Any = load(base)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise LoadError(f"{base}: {type(model).__name__} does not continue text")
    for task, path in deltas.items():
        adapters.load(model, path, task)
    if deltas:
        model.disable_adapters()
    chosen = name or Path(base).resolve().name.removesuffix(".sktch")
    return Service(model.eval(), tokenizer, chosen, list(deltas), limits)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 takes a free one.

    Raises:
        ServingError: the address is not of this machine, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        raise ServingError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    made.listen(128)
    return made


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    service: Service,
    place: socket.socket,
    key: str | None,
    ready: Callable[[str], None],
    hosts: frozenset[str] | None,
) -> None:
    """Answer requests until SIGINT or SIGTERM; answers under way have `GRACE_SECONDS` then.

    Args:
        service: what is served; its engine is closed at the end.
        place: a listening socket.
        key: what clients must send; None for nothing.
        ready: called with the URL once requests are taken.
        hosts: whose requests are answered, see `hosts_of`; None for all.

    Raises:
        ServingError: the key cannot be sent in a header.
    """
    import uvicorn

    from sketchconv.serving.app import make_app

    if key is not None:
        check_key(key)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready(url(place))

    config = uvicorn.Config(
        make_app(service, key, hosts),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )
    try:
        Server(config).run(sockets=[place])
    except KeyboardInterrupt:  # the signal again, after all was closed
        pass
    finally:
        service.engine.close()


def hosts_of(place: socket.socket, host: str, allowed: Sequence[str] = ()) -> frozenset[str] | None:
    """The hosts that requests to a socket may name; None for any.

    Args:
        place: where it listens. Any host will do where other machines reach it and none is allowed.
        host: the name or the address that it was bound to.
        allowed: more names and addresses, such as that of a proxy; ports are not looked at.
    """
    address = place.getsockname()[0]
    if not allowed and not is_loopback(address):
        return None
    own = (bracketed(address), bracketed(host.lower()))
    return frozenset({*LOCAL, *own, *map(plain_host, allowed)})


def url(place: socket.socket) -> str:
    """Where a socket listens."""
    host, port = place.getsockname()[:2]
    return f"http://{bracketed(host)}:{port}"
