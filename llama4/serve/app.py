"""`llama4 serve`: an engine behind HTTP. Each protocol's routes are a file of their own; here they are put together."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from starlette import routing
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama4.serve import (
    anthropic,
    completions,
    embeddings,
    moderations,
    native,
    openai_chat,
    page,
    responses,
    stored_responses,
)
from llama4.serve.engine import Engine
from llama4.serve.errors import RequestError
from llama4.serve.http import Call, Route, Service, refusal, request_id
from llama4.serve.metrics import Metrics
from llama4.serve.openapi import describe
from llama4.serve.settings import Settings, check_names
from llama4.serve.store import Store
from llama4.vision.limits import SERVER_LIMITS

__all__ = ["Server", "Settings"]

logger = logging.getLogger(__name__)

ROUTES = (
    *openai_chat.ROUTES,
    *completions.ROUTES,
    *moderations.ROUTES,
    *native.ROUTES,
    *responses.ROUTES,
    *stored_responses.ROUTES,
    *anthropic.ROUTES,
    *embeddings.ROUTES,
)


class Server:
    """An engine behind HTTP. `app` is what an ASGI server runs; the engine is closed by whoever made it.

    Clients know the model by `settings.name`, and with an adapter by that one's name.

    Raises:
        ArgumentError: an adapter has the model's name.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        check_names(settings.name, engine.llm.adapters)
        self.engine, self.settings = engine, settings
        self.service = Service(engine, settings, Metrics(engine, settings.name), Store(settings.store))
        hosts = None if "*" in settings.url_hosts else settings.url_hosts
        private = () if hosts is None else hosts  # what is named may be in this network
        engine.llm.processor.image_limits = replace(SERVER_LIMITS, hosts=hosts, private_hosts=private)
        served = [route for route in ROUTES if route.is_served(self.service)]
        description: dict[str, Any] = {}

        async def openapi(service: Service, call: Call) -> Response:
            return JSONResponse(description)

        served.append(Route("GET", "/openapi.json", openapi, "This description"))
        description.update(describe(served, settings))
        middleware = []
        if settings.cors_origins:
            anything = ["*"]
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=settings.cors_origins,
                    allow_methods=anything,
                    allow_headers=anything,
                )
            )
        handlers: dict[Any, Any] = {404: _refuse, 405: _refuse}
        routes = [routing.Route(route.path, self._endpoint(route), methods=[route.method]) for route in served]
        routes += page.routes() if settings.has_page else ()
        app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
        app.router.redirect_slashes = False
        self.app: ASGIApp = _Identified(app)

    def _endpoint(self, route: Route) -> Callable[[Request], Awaitable[Response]]:
        return partial(route.serve, self.service)


async def _refuse(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    known = "see /openapi.json for what there is"
    answer = refusal(RequestError(f"{request.method} {request.url.path:.200} is not served; {known}", status=status))
    answer.headers.update(getattr(error, "headers", None) or {})
    return answer


async def _two_lengths(scope: Scope, receive: Receive, send: Send) -> None:
    """Where such a request ends, a proxy before this server may see otherwise: nothing that follows is read."""
    answer = refusal(RequestError("content-length and transfer-encoding say two lengths; send one of them"))
    answer.headers["connection"] = "close"
    await answer(scope, receive, send)


class _Identified:
    """Gives each request an id: that which the client sent, or a new one; it is in the answer's headers and the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent = headers.get(b"x-request-id", b"").decode("latin-1")
        identity = sent if re.fullmatch(r"[\w.-]{1,100}", sent, re.ASCII) else uuid.uuid4().hex
        request_id.set(identity)
        names = [b"x-request-id"]
        if scope["path"].startswith("/v1/messages"):
            names.append(b"request-id")  # as Anthropic's clients read it
        begun, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *((name, identity.encode()) for name in names)]
            await send(message)

        try:
            await (_two_lengths if {b"content-length", b"transfer-encoding"} <= headers.keys() else self._app)(
                scope, receive, noted
            )
        finally:
            took = 1000 * (time.monotonic() - begun)
            path = scope["raw_path"].decode("latin-1")  # as it was sent: without line breaks
            logger.info("%s %s %.200s %d in %.0f ms", identity, scope["method"], path, status, took)
