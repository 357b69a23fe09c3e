"""The names under which a server answers: what keeps foreign web sites out of a local one.

A web site may let its own name point to 127.0.0.1 (DNS rebinding). A browser then takes the API for
a part of that site and lets the site read it. Such requests bear the site's name as their host.
starlette's TrustedHostMiddleware answers in plain text, and its older versions know no IPv6.
"""

from __future__ import annotations

import re
from typing import Any

from sketchconv.serving.problems import Problem

LOCAL = ("localhost", "127.0.0.1", "[::1]")


class OnlyHosts:
    """ASGI middleware that refuses requests to any other host, at any port.

    Args:
        app: what answers the others.
        hosts: names in lower case, and addresses; those of IPv6 in brackets.
    """

    def __init__(self, app: Any, hosts: frozenset[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or let the application do it."""
        from starlette.responses import JSONResponse

        if scope["type"] != "http" or (given := _host(scope)) in self._hosts:
            await self._app(scope, receive, send)
            return
        problem = Problem(
            403,
            f"this server does not answer for the host {given[:100]!r}; send the request (or let "
            f"the proxy send it) to one of: {', '.join(sorted(self._hosts))}",
            code="unknown_host",
        )
        await JSONResponse(problem.body(), status_code=problem.status)(scope, receive, send)


def _host(scope: Any) -> str:
    """The host of a request, without its port."""
    given: bytes = dict(scope["headers"]).get(b"host", b"")
    return plain_host(given.decode("latin-1"))


def plain_host(given: str) -> str:
    """A host as it is compared: in lower case, without a port; IPv6 must be in brackets."""
    return re.sub(r":[0-9]*$", "", given.lower())


def bracketed(address: str) -> str:
    """A host or an address as URLs have it."""
    return f"[{address}]" if ":" in address else address
