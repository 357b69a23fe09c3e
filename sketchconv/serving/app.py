"""The HTTP side: routes, limits, keys, streams."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from sketchconv.serving import replies, wanted
from sketchconv.serving.hosts import OnlyHosts
from sketchconv.serving.jobs import Event, Job
from sketchconv.serving.problems import Problem, bad
from sketchconv.serving.replies import Reply
from sketchconv.serving.service import Service
from sketchconv.serving.wanted import Wanted

if TYPE_CHECKING:
    from fastapi import FastAPI

BODY_SECONDS = 60  # that a request's body may take to arrive
WATCH_SECONDS = 0.2  # how often a request without a stream is asked whether its client is there

GONE = 499  # status where nobody reads the answer any more, as nginx has it


def make_app(
    service: Service, key: str | None = None, hosts: frozenset[str] | None = None
) -> FastAPI:
    """The application: `/v1/models`, `/v1/completions`, `/v1/chat/completions`, `/health`.

    Args:
        service: what is served; its engine is closed when the application ends.
        key: what clients must send as a bearer token; None for nothing.
        hosts: the names that requests may be sent to, as in `OnlyHosts`; None for any.
    """
    from contextlib import asynccontextmanager

    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.routing import Route

    api = _Api(service, key)

    @asynccontextmanager
    async def life(_app: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close)

    routes: Any = [
        Route("/health", api.health, methods=["GET"]),
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{name:path}", api.model, methods=["GET"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
    ]
    handlers: Any = {Problem: _refuse, HTTPException: _refuse_route}
    no_docs: Any = dict.fromkeys(("openapi_url", "docs_url", "redoc_url"))
    guards = [] if hosts is None else [Middleware(OnlyHosts, hosts=hosts)]
    return FastAPI(
        routes=routes, lifespan=life, exception_handlers=handlers, middleware=guards, **no_docs
    )


def _answer(body: Any, status: int = 200) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(body, status_code=status)


async def _refuse(_request: Any, problem: Any) -> Any:
    return _answer(problem.body(), problem.status)


async def _refuse_route(_request: Any, error: Any) -> Any:
    return _answer(Problem(error.status_code, str(error.detail)).body(), error.status_code)


class _Api:
    """The handlers; each takes a request of Starlette and gives a response."""

    def __init__(self, service: Service, key: str | None) -> None:
        self._service, self._key = service, key

    async def health(self, _request: Any) -> Any:
        """Whether the engine runs, and how much there is to do."""
        engine = self._service.engine
        status = "ok" if engine.alive else "stopping"
        counts = {"running": engine.running, "waiting": engine.waiting}
        return _answer({"status": status, **counts}, 200 if engine.alive else 503)

    async def models(self, request: Any) -> Any:
        """The base and the tasks."""
        self._check_key(request)
        return _answer({"object": "list", "data": [self._card(n) for n in self._service.adapters]})

    async def model(self, request: Any) -> Any:
        """One of them."""
        self._check_key(request)
        name = request.path_params["name"]
        if name not in self._service.adapters:
            raise Problem(404, f"there is no model {name[:100]!r}", code="model_not_found")
        return _answer(self._card(name))

    async def completions(self, request: Any) -> Any:
        """Continue a text."""
        return await self._complete(request, wanted.completion, chat=False)

    async def chat(self, request: Any) -> Any:
        """Answer a chat."""
        return await self._complete(request, wanted.chat, chat=True)

    def _card(self, name: str) -> dict[str, Any]:
        started = self._service.started
        return {"id": name, "object": "model", "created": started, "owned_by": "sketchconv"}

    async def _complete(self, request: Any, parse: Callable[[Any], Wanted], *, chat: bool) -> Any:
        from starlette.responses import StreamingResponse

        self._check_key(request)
        asked = parse(await self._body(request))
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def send(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = await asyncio.to_thread(self._service.job, asked, send)
        self._service.engine.submit(job)
        reply = Reply(asked.model, chat, len(job.prompt))
        if asked.stream:
            stream = self._stream(job, events, reply, asked.usage)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        try:
            return _answer(await _collect(request, events, reply))
        finally:
            self._service.engine.cancel(job)

    async def _stream(
        self, job: Job, events: asyncio.Queue[Event], reply: Reply, usage: bool
    ) -> AsyncIterator[str]:
        """Events as text; whoever stops reading gives up the job."""
        try:
            if opening := reply.opening():
                yield opening
            while True:
                event = await events.get()
                if event.problem is not None:
                    yield replies.event(event.problem.body())
                    return
                yield reply.piece(event.text, None) if event.text else ""
                if event.finish is not None:
                    yield reply.piece("", event.finish)
                    break
            if usage:
                yield reply.count(event.tokens)
            yield replies.END
        finally:
            self._service.engine.cancel(job)

    async def _body(self, request: Any) -> Any:
        """The body as JSON, read no further and no longer than the limits."""
        from starlette.requests import ClientDisconnect

        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also keeps out forms that other web sites may send
            raise Problem(415, "the content type must be application/json")
        reading = _read(request, self._service.limits.body)
        try:
            data = await asyncio.wait_for(reading, BODY_SECONDS)
        except asyncio.TimeoutError as error:
            raise Problem(408, f"the body took longer than {BODY_SECONDS} seconds") from error
        except ClientDisconnect as error:
            raise Problem(GONE, "the client has gone") from error
        try:
            body = json.loads(data)
            json.dumps(body, ensure_ascii=False).encode()  # halves of characters have no text
        except (ValueError, RecursionError) as error:
            raise bad(f"the body is not JSON: {error}"[:200]) from error
        return body

    def _check_key(self, request: Any) -> None:
        if self._key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            raise Problem(401, "the API key is missing or wrong", code="invalid_api_key")


async def _read(request: Any, most: int) -> bytes:
    """A body of so many bytes at most.

    Raises:
        Problem: it is larger.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise Problem(413, f"the body is larger than {most} bytes")
    return bytes(data)


async def _collect(request: Any, events: asyncio.Queue[Event], reply: Reply) -> dict[str, Any]:
    """A whole answer.

    Raises:
        Problem: the engine failed; 499 where the client has gone, which nobody will read.
    """
    text, clock = "", asyncio.get_running_loop().time
    asked = clock()
    while True:
        if clock() - asked >= WATCH_SECONDS:
            if await request.is_disconnected():
                raise Problem(GONE, "the client has gone")
            asked = clock()
        try:
            event = await asyncio.wait_for(events.get(), WATCH_SECONDS)
        except asyncio.TimeoutError:
            continue
        if event.problem is not None:
            raise event.problem
        text += event.text
        if event.finish is not None:
            return reply.whole(text, event.finish, event.tokens)
