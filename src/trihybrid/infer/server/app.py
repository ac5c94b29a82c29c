"""The application: endpoints, the key, and one form for all errors."""

import hmac
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trihybrid.infer.server.answers import ChatAnswer, TextAnswer, usage
from trihybrid.infer.server.event_stream import EventStream
from trihybrid.infer.server.intake import read_body, while_connected
from trihybrid.infer.server.limits import Refusal
from trihybrid.infer.server.metrics import Metrics
from trihybrid.infer.server.protocol import ChatRequest, CompletionRequest, read
from trihybrid.infer.server.scheduler import Scheduler, Ticket
from trihybrid.infer.server.served import Served

GONE = 499


def make_app(served: Served, scheduler: Scheduler, metrics: Metrics, key: str | None = None) -> Starlette:
    """The ASGI application.

    Args:
        served: the model.
        scheduler: which works.
        metrics: which count.
        key: what clients must send as `Authorization: Bearer KEY` to use /v1; None lets everybody.
    """
    endpoints = _Endpoints(served, scheduler, metrics)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.complete, methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/health", endpoints.health),
            Route("/metrics", endpoints.metrics),
        ],
        middleware=[Middleware(_Counted, metrics=metrics), Middleware(_Guarded, key=key)],
        exception_handlers={
            Refusal: _refused,
            HTTPException: _not_here,
            ClientDisconnect: _left,
            Exception: _broken,
        },
    )


class _Endpoints:
    def __init__(self, served: Served, scheduler: Scheduler, metrics: Metrics) -> None:
        self._served, self._scheduler, self._metrics = served, scheduler, metrics
        self._limits = served.limits
        self._started = int(time.time())

    async def chat(self, request: Request) -> Response:
        asked = read(ChatRequest, await read_body(request, self._limits))
        return await self._generate(request, asked, ChatAnswer(asked.model))

    async def complete(self, request: Request) -> Response:
        asked = read(CompletionRequest, await read_body(request, self._limits))
        return await self._generate(request, asked, TextAnswer(asked.model))

    async def _generate(
        self, request: Request, asked: CompletionRequest | ChatRequest, answer: TextAnswer
    ) -> Response:
        options = asked.stream_options
        if options is not None and not asked.stream:
            raise Refusal(400, "invalid_value", "stream_options: they need stream: true", "stream_options")
        ticket = self._scheduler.submit(await self._served.work(asked))
        try:
            if asked.stream:
                first = await while_connected(request, ticket.next())
                with_usage = options is not None and bool(options.include_usage)
                return EventStream(ticket, first, answer, with_usage, self._limits.seconds)
            return JSONResponse(await while_connected(request, _whole(ticket, answer)))
        except BaseException:
            ticket.cancel()
            raise

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._served.name:
            raise Refusal(
                404, "model_not_found", f'model is "{name}"; this server has "{self._served.name}"', "model"
            )
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self._served.name, "object": "model", "created": self._started, "owned_by": "trihybrid"}
        return card | {"context": self._limits.context}

    async def health(self, request: Request) -> Response:
        closed = self._scheduler.closed
        if closed is None:
            return JSONResponse({"status": "ok", "model": self._served.name})
        return JSONResponse({"status": closed.code}, 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _whole(ticket: Ticket, answer: TextAnswer) -> dict[str, Any]:
    parts = [piece := await ticket.next()]
    while piece.finish is None:
        parts.append(piece := await ticket.next())
    text = "".join(part.text for part in parts)
    return answer.whole(text, piece.finish, usage(len(ticket.work.tokens), piece.chosen, ticket.cached))


def _answer(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), refusal.status, headers=refusal.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _answer(error)


async def _not_here(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; docs/serving.md lists what is here"
    return JSONResponse(
        Refusal(error.status_code, "not_found", message).body(), error.status_code, headers=error.headers
    )


async def _left(request: Request, error: Exception) -> Response:
    """Nobody reads this."""
    return Response(status_code=GONE)


async def _broken(request: Request, error: Exception) -> Response:
    """A defect of ours; the log has the trace."""
    return _answer(
        Refusal(500, "internal_error", f"the server failed ({type(error).__name__}); its log has more")
    )


class _Counted:
    """Counts the answers of /v1 when they begin."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in ("/v1/chat/completions", "/v1/completions"):
            await self._app(scope, receive, send)
            return

        statuses: list[int] = []

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                self._metrics.requests.labels(scope["path"], str(message["status"])).inc()
            await send(message)

        try:
            await self._app(scope, receive, count)
        except Exception:
            # A defect of ours; Starlette answers it behind this.
            if not statuses:
                self._metrics.requests.labels(scope["path"], "500").inc()
            raise


class _Guarded:
    """Lets only those who have the key to /v1."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._wanted = None if key is None else f"bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._wanted is not None and scope["type"] == "http" and scope["path"].startswith("/v1"):
            kind, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(kind.lower() + b" " + key, self._wanted):
                refusal = Refusal(
                    401, "invalid_api_key", 'no valid API key; send "Authorization: Bearer KEY"'
                )
                await _answer(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)
