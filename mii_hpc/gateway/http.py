"""HTTP below the routes: the token at the door, clients that hang up, streams of events, OpenAI's kind of errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mii_hpc.errors import MIIError
from mii_hpc.gateway.schema import body_of, error_body, status_of
from mii_hpc.rpc import wire

MAX_BODY_BYTES = wire.MAX_MESSAGE_BYTES
OPEN_PATHS = frozenset({"/health"})
"""Paths that need no token."""

Admits = Callable[[str], bool]
"""Tells whether a token opens the deployment."""
T = TypeVar("T")


async def unless_it_hangs_up(receive: Receive, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """Return the result of some work; cancel it, and raise ClientDisconnect, when the client goes before it is done."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: the first, and those that follow."""

    def __init__(self, first: dict[str, Any], following: AsyncGenerator[dict[str, Any]]) -> None:
        self._first, self._following = first, following
        self.status_code = 200
        self.background = None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them. When the client goes, what follows is closed."""
        async with aclosing(self._following):
            with contextlib.suppress(ClientDisconnect):
                await unless_it_hangs_up(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._lines():
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[str]:
        yield json.dumps(self._first)
        try:
            async for event in self._following:
                yield json.dumps(event)
        except MIIError as error:
            yield json.dumps(error_body(error, status_of(error)))
        yield "[DONE]"


class Door:
    """Asks for the token before anything of a request is read, and bounds what is read."""

    def __init__(self, app: ASGIApp, admits: Admits) -> None:
        self._app, self._admits = app, admits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope = {**scope, "path": "/" + "/".join(part for part in scope["path"].split("/") if part)}
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        kind, _, token = headers.get(b"authorization", "").partition(" ")
        if scope["path"] not in OPEN_PATHS and not (kind.lower() == "bearer" and self._admits(token.strip())):
            refused = error_response(
                "the API key is missing or wrong: it is the deployment's token", 401, "invalid_api_key"
            )
            refused.headers["www-authenticate"] = "Bearer"
            return await refused(scope, receive, send)
        await self._app(scope, _bounded(receive), send)


def _bounded(receive: Receive) -> Receive:
    read = 0

    async def receive_no_more() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > MAX_BODY_BYTES:
            raise HTTPException(413, f"a request has at most {MAX_BODY_BYTES} bytes")
        return message

    return receive_no_more


def error_response(message: str, status: int, code: str | None) -> JSONResponse:
    return JSONResponse(body_of(message, status, code, None), status)
