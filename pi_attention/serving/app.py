"""The routes, and what a client gets of an error."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pi_attention.serving.engine import Engine
from pi_attention.serving.handlers import Chats, Completions
from pi_attention.serving.requests import RequestError

GONE = 499
"""nginx's status of a request whose client has gone; nobody reads it."""

SILENCE = 10
"""Seconds without a byte, after which a body that is not whole is given up."""


BROKEN = 'data: {"error": '
"""With which transformers begins the event of an error; its message follows, and OpenAI's clients want an object."""


def with_error(part: str) -> str:
    """A part of a stream, whose error is an object as elsewhere."""
    before, broken, message = part.rpartition(BROKEN)
    if not broken:
        return part
    error = RequestError(json.loads(message.removesuffix("}\n\n")), status=503)
    return f"{before}data: {json.dumps(error.body())}\n\n"


class Streamed:
    """A stream of transformers' with OpenAI's errors and last line; its request is freed however it ends."""

    def __init__(self, response: StreamingResponse, engine: Engine, request_id: str) -> None:
        self._response, self._engine, self._request_id = response, engine, request_id
        response.body_iterator = self._with_end(response.body_iterator)

    @staticmethod
    async def _with_end(parts: Any) -> AsyncIterator[Any]:
        async for part in parts:
            yield with_error(part)
        yield "data: [DONE]\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._response(scope, receive, send)
        finally:
            self._engine.release(self._request_id)


async def body_of(request: Request, most: int) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        RequestError: it is none, longer than `most` bytes, or stays unfinished.
        ClientDisconnect: the client has gone.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("the body must be JSON: send the header Content-Type: application/json.", status=415)
    read, clock = bytearray(), asyncio.get_running_loop()
    try:
        async with asyncio.timeout(SILENCE) as silence:
            async for part in request.stream():
                read += part
                if len(read) > most:
                    raise RequestError(f"the body is longer than {most:,} bytes: shorten the prompt.", status=413)
                silence.reschedule(clock.time() + SILENCE)
    except TimeoutError:
        raise RequestError(f"nothing of the body came for {SILENCE} seconds: send it whole.", status=408) from None
    try:
        body = json.loads(read)
    except (ValueError, RecursionError):
        raise RequestError("the body is no valid JSON.") from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object.")
    return body


async def disconnected(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answer(handler: Completions | Chats, request: Request) -> Any:
    """What a handler answers; a request whose client goes away meanwhile is freed."""
    engine = handler.engine
    body = await body_of(request, engine.limits.body_bytes)
    request_id = f"{handler.kind}-{uuid4().hex}"
    work = asyncio.ensure_future(handler.handle_request(body, request_id))
    gone = asyncio.ensure_future(disconnected(request))
    streamed = False
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=GONE)
        response = work.result()
        streamed = isinstance(response, StreamingResponse)
        return Streamed(response, engine, request_id) if streamed else response
    finally:
        gone.cancel()
        work.cancel()
        if not streamed:
            engine.release(request_id)


def refused(request: Request, error: Exception) -> JSONResponse:
    """An error as OpenAI's clients read it; a connection whose body is not read to its end is closed."""
    if isinstance(error, HTTPException):
        error = RequestError(f"{request.method} {request.url.path}: {error.detail}.", status=error.status_code)
    elif not isinstance(error, RequestError):  # uvicorn logs it, with the traceback
        error = RequestError(f"the server failed by {type(error).__name__}: its log says more.", status=500)
    return JSONResponse(
        error.body(), status_code=error.status, headers={"Connection": "close"} if error.status in (408, 413) else None
    )


def left(request: Request, error: Exception) -> Response:
    """To a client that has gone before its body was whole."""
    return Response(status_code=GONE)


def build_app(engine: Engine, hosts: list[str]) -> Starlette:
    """The server's application.

    Args:
        engine: the running model.
        hosts: names by which clients may call the server, so that no page of the web reaches it under a name of its
            own; `["*"]` for all.
    """
    completions, chats, created = Completions(engine), Chats(engine), int(time.time())
    model = {"id": engine.name, "object": "model", "created": created, "owned_by": "pi-attention"}

    async def one_model(request: Request) -> JSONResponse:
        if request.path_params["name"] != engine.name:
            raise RequestError("no such model is served here.", "model", status=404, code="model_not_found")
        return JSONResponse(model)

    async def health(request: Request) -> JSONResponse:
        if not engine.alive():
            return JSONResponse({"status": "the model has failed"}, 503)
        return JSONResponse({"status": "ok", "open": len(engine.open), "running": engine.running()})

    async def all_models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(request: Request) -> Any:
        return await answer(completions, request)

    async def chat(request: Request) -> Any:
        return await answer(chats, request)

    return Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", all_models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={
            RequestError: refused,
            HTTPException: refused,
            ClientDisconnect: left,
            Exception: refused,
        },
    )
