"""The routes of `llama4 serve`: HTTP <-> the engine."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama4.inputs import Inputs
from llama4.reading import MAX_JSON_MEMORY, json_memory
from llama4.serve.completions import Answer, as_event, choices_of, inputs_of
from llama4.serve.engine import Engine
from llama4.serve.errors import RequestError
from llama4.serve.metrics import Metrics
from llama4.serve.schema import Body, read_chat, read_common
from llama4.version import __version__
from llama4.vision.limits import SERVER_LIMITS

logger = logging.getLogger(__name__)

OPEN = {"/health", "/ready", "/version", "/metrics"}
"""Routes that need no key."""
MAX_PROMPTS = 128
"""Prompts of one request for completions."""

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        name: of the model, as clients know it.
        api_key: what clients must show; None for none.
        cors_origins: pages of which origins may ask; none by default.
        url_hosts: hosts from which pictures are fetched; "*" for any public one.
        media_directory: pictures of which `file://` addresses are read.
        max_body: bytes of a request.
    """

    name: str
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    url_hosts: tuple[str, ...] = ()
    media_directory: Path | None = None
    max_body: int = 64 * 2**20


class Server:
    """An engine behind HTTP. `app` is what an ASGI server runs; the engine is closed by whoever made it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine, settings.name)
        self.created = int(time.time())
        self.is_draining = False
        hosts = None if "*" in settings.url_hosts else settings.url_hosts
        private = () if hosts is None else hosts  # what is named may be in this network
        engine.llm.processor.image_limits = replace(SERVER_LIMITS, hosts=hosts, private_hosts=private)
        routes = [
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self.complete), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.models)),
            Route("/tokenize", self._guarded(self.tokenize), methods=["POST"]),
            Route("/detokenize", self._guarded(self.detokenize), methods=["POST"]),
            Route("/apply-template", self._guarded(self.apply_template), methods=["POST"]),
            Route("/health", self._guarded(self.health)),
            Route("/ready", self._guarded(self.ready)),
            Route("/version", self._guarded(self.version)),
            Route("/props", self._guarded(self.props)),
            Route("/metrics", self._guarded(self.show_metrics)),
        ]
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
        self.app: ASGIApp = _Identified(Starlette(routes=routes, middleware=middleware, exception_handlers=handlers))

    def _guarded(
        self, route: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """A route whose errors are answers, and which asks for the key."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await route(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                return _answer_to(error)

        return guarded

    def _check_key(self, request: Request) -> None:
        key = self.settings.api_key
        if key is None or request.url.path in OPEN:
            return
        shown = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(shown.encode(), key.encode()):
            raise RequestError("the API key is missing or wrong; send Authorization: Bearer KEY", status=401)

    async def _body(self, request: Request) -> Body:
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > self.settings.max_body:
                limit = f"{self.settings.max_body >> 20} MiB"
                raise RequestError(f"the body has more than {limit}; send smaller pictures", status=413)
        if json_memory(data) > MAX_JSON_MEMORY:
            raise RequestError("the body has too many values; send fewer", status=413)
        try:
            return Body(json.loads(data, parse_constant=_no_constant))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON ({error})") from None

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.settings.name):
            message = f"there is no model {name!r:.80} here; the name is {self.settings.name!r}"
            raise RequestError(message, field="model", status=404, code="model_not_found")

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        asked = read_common(body, self.engine.scheduler.window, is_chat=True)
        messages, options = read_chat(body, self.settings.media_directory)
        body.end()
        self._check_model(asked.model)
        streams = choices_of(self.engine, [messages], asked, options)
        return await self._answer(request, Answer(streams, asked, self.settings.name, is_chat=True))

    async def complete(self, request: Request) -> Response:
        body = await self._body(request)
        asked = read_common(body, self.engine.scheduler.window, is_chat=False)
        prompts = self._prompts(body)
        echo = body.flag("echo")
        if echo and asked.alternatives is not None:
            raise RequestError("echo with logprobs is not supported; ask for one of them", field="echo")
        body.end()
        self._check_model(asked.model)
        inputs = await asyncio.to_thread(lambda: [self._inputs_of(prompt) for prompt in prompts])
        decode = self.engine.llm.tokenizer.decode
        texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in prompts] if echo else []
        streams = choices_of(self.engine, inputs, asked, {})
        repeated = [text for text in texts for _ in range(asked.choices)]
        return await self._answer(request, Answer(streams, asked, self.settings.name, is_chat=False), repeated)

    def _prompts(self, body: Body) -> list[str | list[int]]:
        def is_row(value: Any) -> bool:
            return bool(value) and (isinstance(value, str) or (isinstance(value, list) and all(map(_is_id, value))))

        def is_valid(value: Any) -> bool:
            rows = isinstance(value, list) and 0 < len(value) <= MAX_PROMPTS and all(map(is_row, value))
            return is_row(value) or rows

        wanted = f"a text, a list of token ids, or a list of up to {MAX_PROMPTS} of these; none may be empty"
        prompt = body.take("prompt", is_valid, wanted)
        if prompt is None:
            raise RequestError("prompt is missing", field="prompt")
        return [prompt] if is_row(prompt) else prompt

    def _inputs_of(self, prompt: str | list[int]) -> Inputs:
        return self.engine.llm.processor.complete(prompt) if isinstance(prompt, str) else inputs_of(prompt)

    async def _answer(self, request: Request, answer: Answer, echo: list[str] | None = None) -> Response:
        if self.is_draining:
            raise RequestError("the server is about to stop; ask another one", status=503)
        try:
            await _unless_gone(request, answer.open())
            if not answer.asked.stream:
                whole = await _unless_gone(request, answer.whole(echo or ()))
                self._note(answer)
                return JSONResponse(whole)
        except BaseException:
            answer.cancel()
            raise
        return StreamingResponse(self._sent(answer, echo or []), media_type="text/event-stream", headers=_NO_BUFFER)

    async def _sent(self, answer: Answer, echo: list[str]) -> AsyncIterator[str]:
        """The events of an answer. Who reads slowly is waited for here; the engine goes on, up to the reply's limit."""
        try:
            async for event in answer.events(echo):
                yield as_event(event)
            self._note(answer)
        except Exception as error:
            yield as_event((RequestError.of(error) or _internal(error)).to_json())
        finally:
            answer.cancel()
        yield as_event("[DONE]")

    def _note(self, answer: Answer) -> None:
        for stream in answer.streams:
            self.metrics.note(stream.request, stream.reply.finish_reason or "abort")

    async def models(self, request: Request) -> Response:
        if (name := request.path_params.get("name")) is not None:
            self._check_model(name)
        card = {"id": self.settings.name, "object": "model", "created": self.created, "owned_by": "llama4"}
        card |= {"root": self.settings.name, "parent": None, "max_model_len": self.engine.scheduler.window}
        return JSONResponse(card if name is not None else {"object": "list", "data": [card]})

    async def tokenize(self, request: Request) -> Response:
        """vLLM's `prompt` or `messages`, or llama.cpp's `content`."""
        body = await self._body(request)
        llm, messages = self.engine.llm, body.take("messages", lambda value: isinstance(value, list), "a list")
        content, prompt = body.text("content"), body.text("prompt")
        adds_bos = body.flag("add_special_tokens", default=content is None)
        self._check_model(body.text("model"))
        if messages is not None:
            inputs = await asyncio.to_thread(llm.processor, messages)
            ids: list[int] = inputs.input_ids[0].tolist()
        else:
            text = content if content is not None else prompt
            if text is None:
                raise RequestError("give prompt, content or messages", field="prompt")
            ids = await asyncio.to_thread(llm.tokenizer.encode, text)
            ids = [llm.tokenizer.bos_id, *ids] if adds_bos else ids
        return JSONResponse({"count": len(ids), "max_model_len": self.engine.scheduler.window, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        size = self.engine.llm.config.text.vocab_size

        def are_ids(value: Any) -> bool:
            return isinstance(value, list) and all(_is_id(id_) and id_ < size for id_ in value)

        ids = body.take("tokens", are_ids, f"a list of token ids from 0 to {size - 1}")
        if ids is None:
            raise RequestError("tokens is missing", field="tokens")
        text = self.engine.llm.tokenizer.decode(ids)
        return JSONResponse({"prompt": text, "content": text})

    async def apply_template(self, request: Request) -> Response:
        messages, options = read_chat(await self._body(request), self.settings.media_directory)
        processor = self.engine.llm.processor
        variables = options["chat_template_kwargs"] or {}
        text = await asyncio.to_thread(
            lambda: processor.apply_chat_template(
                messages, tools=options["tools"], add_generation_prompt=True, **variables
            )
        )
        return JSONResponse({"prompt": text})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"status": "draining" if self.is_draining else "ok"}, 503 if self.is_draining else 200)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def props(self, request: Request) -> Response:
        """What llama.cpp's clients ask."""
        llm, scheduler = self.engine.llm, self.engine.scheduler
        return JSONResponse(
            {
                "default_generation_settings": {"n_ctx": scheduler.window},
                "total_slots": scheduler.max_batch,
                "model_path": self.settings.name,
                "modalities": {"vision": llm.config.vision is not None, "audio": False},
                "build_info": f"llama4 {__version__}",
            }
        )

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


_NO_BUFFER = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client hangs up.

    Raises:
        ClientDisconnect: it has.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    known = "see docs/serving.md for what there is"
    return _answer_to(RequestError(f"{request.method} {request.url.path:.200} is not served; {known}", status=status))


def _answer_to(error: Exception) -> Response:
    told = RequestError.of(error) or _internal(error)
    headers = {"retry-after": "1"} if told.status in (429, 503) else {}
    return JSONResponse(told.to_json(), told.status, headers)


def _internal(error: Exception) -> RequestError:
    logger.error("a request failed", exc_info=error)
    return RequestError("an error of the server; its log says more", status=500)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _no_constant(name: str) -> Any:
    raise RequestError(f"the body is not JSON: it holds {name}")


class _Identified:
    """Gives each request an id: that which the client sent, or a new one; it is in the answer's headers and the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        identity = sent if re.fullmatch(r"[\w.-]{1,100}", sent) else uuid.uuid4().hex
        begun, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            took = 1000 * (time.monotonic() - begun)
            logger.info("%s %s %s %d in %.0f ms", identity, scope["method"], scope["path"], status, took)
