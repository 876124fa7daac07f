"""What all routes share: the service that they belong to, how a request is checked, and how an answer is sent."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from llama4.reading import MAX_JSON_MEMORY, json_memory
from llama4.serve.answer import Answer
from llama4.serve.engine import Engine
from llama4.serve.errors import OPENAI, ErrorForm, RequestError
from llama4.serve.metrics import Metrics
from llama4.serve.schema import OBJECT, Fields, Schema
from llama4.serve.settings import Settings
from llama4.serve.store import Store
from llama4.text.prompt_limit import PromptLimit

logger = logging.getLogger(__name__)

BODY_SECONDS = 60.0
"""In which the next piece of a body must come."""

LONG_BODY = 1 << 16
"""Bytes of a body from which it is read in a thread."""

MAX_COUNTED = 1 << 20
"""Tokens that are counted, for who asks how many a text has, where the window does not hold more."""

request_id: ContextVar[str] = ContextVar("request_id", default="a request")
"""Of the request that is being answered: in its answer's headers and in the log."""

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """A model as clients know it.

    Attributes:
        adapter: what it is computed with, beside the base; None for that which the engine goes on with, or none.
    """

    name: str
    adapter: str | None


@dataclass
class Service:
    """What the routes of one server work with.

    Attributes:
        store: responses that clients may ask for again.
        background: what is being answered although nobody waits, by the ids of responses.
        running: that, and other work that nobody waits for.
        created: when it began, in seconds since 1970.
        is_draining: whether it takes nothing new.
    """

    engine: Engine
    settings: Settings
    metrics: Metrics
    store: Store
    background: dict[str, tuple[asyncio.Task[None], Any]] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    running: set[asyncio.Task[None]] = field(default_factory=set)

    def keep_running(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something that nobody waits for."""
        task = asyncio.create_task(work)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    @property
    def models(self) -> list[Served]:
        """The model, and with each of its adapters."""
        base = self.settings.name
        return [Served(base, None), *(Served(name, name) for name in self.engine.llm.adapters)]

    @property
    def counted(self) -> PromptLimit:
        """How many tokens are counted where nothing is computed: texts beyond the window, too."""
        most = max(self.engine.scheduler.limit.most, MAX_COUNTED)
        return PromptLimit(most, f"no more than {most} are counted here; send it in parts")

    def model(self, name: str | None) -> Served:
        """What a request asks for; the model without an adapter where it names none.

        Raises:
            RequestError: another model than those that are here.
        """
        models = self.models
        found = next((each for each in models if name in (None, each.name)), None)
        if found is None:
            known = ", ".join(repr(each.name) for each in models)
            message = f"there is no model {name!r:.80} here; {'names are' if models[1:] else 'the name is'} {known}"
            raise RequestError(message, field="model", status=404, code="model_not_found")
        if found.adapter is not None:
            logger.info("%s asks for adapter %.80s", request_id.get(), found.adapter)
        return found


@dataclass(frozen=True)
class Call:
    """One request: what HTTP says, and its fields and what stands behind the question mark, checked."""

    request: Request
    fields: Mapping[str, Any]
    query: Mapping[str, Any]


@dataclass(frozen=True)
class Route:
    """What is answered at a path.

    Attributes:
        handle: does it.
        summary: a line for /openapi.json.
        fields: of the body; None where there is none.
        query: parameters behind the path's question mark.
        answer: the JSON Schema of what is answered; None where that is text.
        can_stream: whether `"stream": true` is answered by events.
        is_open: whether no key is asked for.
        errors: the form of errors.
        is_served: whether the route is there.
    """

    method: str
    path: str
    handle: Callable[[Service, Call], Awaitable[Response]]
    summary: str
    fields: Fields | None = None
    answer: Schema | None = field(default_factory=lambda: OBJECT)
    can_stream: bool = False
    is_open: bool = False
    query: Fields | None = None
    errors: ErrorForm = OPENAI
    is_served: Callable[[Service], bool] = lambda service: True

    async def serve(self, service: Service, request: Request) -> Response:
        """Check a request and answer it; its errors are answers, too."""
        try:
            if not self.is_open:
                check_page(request, service.settings)
                check_key(request, service.settings.api_key)
            fields = await read_fields(request, service.settings.max_body, self.fields) if self.fields else {}
            query = read_query(request, self.query) if self.query is not None else {}
            return await self.handle(service, Call(request, fields, query))
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            return refusal(error, self.errors)


def check_page(request: Request, settings: Settings) -> None:
    """A browser keeps from a page the answers of another address, but sends its requests; and it takes for the page's
    own what the page's name was made to lead to, perhaps here. It does not say which page reads from its own address:
    whatever reads may be such a one.

    Raises:
        RequestError: a browser asks for a page that may not.
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if origin is None and request.method not in ("GET", "HEAD"):
        return
    pages = {origin} if origin is not None else {f"{scheme}://{host}" for scheme in ("http", "https")}
    if {"*", *pages} & set(settings.cors_origins):
        return
    origin = origin or f"{request.url.scheme}://{host}"
    remedy = f"start the server with --cors-origin {origin:.200}"
    if origin.partition("://")[2] != host:
        problem = f"pages of {origin!r:.200} may not ask"
    elif settings.api_key is None and not _is_address(host):
        problem = f"without an API key {host!r:.200} may be a name that a web page has made to lead here"
        remedy += " or with --api-key, or ask by address, as http://127.0.0.1:8000"
    else:
        return
    raise RequestError(f"{problem}; {remedy}", status=403, code="origin_not_allowed")


def _is_address(host: str) -> bool:
    """Whether a host is named by number, or is this machine: nobody can make that lead elsewhere."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def check_key(request: Request, key: str | None) -> None:
    """Raises:
    RequestError: the client does not show the key, as OpenAI's or as Anthropic's do.
    """
    if key is None:
        return
    shown = request.headers.get("x-api-key") or re.sub(
        "^bearer +", "", request.headers.get("authorization", ""), flags=re.I
    )
    if not hmac.compare_digest(shown.encode("latin-1"), key.encode()):  # headers are bytes, read as Latin-1
        raise RequestError("the API key is missing or wrong; send Authorization: Bearer KEY", status=401)


async def read_fields(request: Request, limit: int, fields: Fields) -> dict[str, Any]:
    """The fields of a request's body. What is long is read in a thread: the event loop goes on.

    Raises:
        RequestError: the body is too long, does not come, is no JSON, or has a field that cannot be.
    """
    data = await read_body(request, limit)
    if len(data) < LONG_BODY:
        return fields.read(parse(data))
    return await asyncio.to_thread(lambda: fields.read(parse(data)))


async def read_body(request: Request, limit: int) -> bytearray:
    """Raises:
    RequestError: it is too long, or does not come.
    """
    data, pieces = bytearray(), request.stream()
    while True:
        try:
            data += await asyncio.wait_for(anext(pieces), BODY_SECONDS)
        except StopAsyncIteration:
            break
        except TimeoutError:
            raise RequestError(f"nothing more of the body came for {BODY_SECONDS:g} seconds", status=408) from None
        if len(data) > limit:
            raise RequestError(f"the body has more than {limit >> 20} MiB; send smaller pictures", status=413)
    return data


def parse(data: bytearray) -> Any:
    """Raises:
    RequestError: it is no JSON.
    """
    if json_memory(data) > MAX_JSON_MEMORY:
        raise RequestError("the body has too many values; send fewer", status=413)
    try:
        return json.loads(data, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON ({error})") from None


def read_query(request: Request, known: Fields) -> dict[str, Any]:
    """Raises:
    RequestError: a parameter with a value that it cannot have.
    """
    given: dict[str, Any] = {}
    for name, value in request.query_params.items():
        is_number = name in known.fields and known.fields[name].schema.get("type") == "integer"
        given[name] = int(value) if is_number and re.fullmatch(r"-?[0-9]{1,18}", value) else value
    return known.read(given)


def _no_constant(name: str) -> Any:
    raise RequestError(f"the body is not JSON: it holds {name}")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise RequestError(f"the body holds the number {text:.80}, which is too large")
    return number


def refusal(error: Exception, form: ErrorForm = OPENAI) -> Response:
    """The answer to a request that failed."""
    told = RequestError.of(error) or _internal(error)
    headers = {"retry-after": "1"} if told.status in (429, 503) else {}
    return JSONResponse(form.to_json(told), told.status, headers)


def _internal(error: Exception) -> RequestError:
    logger.error("%s failed", request_id.get(), exc_info=error)
    return RequestError("an error of the server; its log says more", status=500)


def check_taking(service: Service, count: int = 1) -> None:
    """Raises:
    RequestError: the server stops, or never takes so many replies at once.
    """
    if service.is_draining:
        raise RequestError("the server is about to stop; ask another one", status=503)
    most = service.engine.max_waiting
    if most is not None and count > most:
        message = f"the request is for {count} replies, and {most} may wait here at most; ask for fewer at once"
        raise RequestError(message)


async def respond(service: Service, call: Call, answer: Answer) -> Response:
    """Have the engine answer, and send that whole or as events, as the client asked.

    Raises:
        RequestError: it cannot be answered.
        ClientDisconnect: the client has hung up; the engine's work has stopped.
    """
    check_taking(service, len(answer.streams))
    try:
        await unless_gone(call.request, answer.open())
        if not call.fields["stream"]:
            await unless_gone(call.request, answer.finish())
            whole = answer.whole()
            note(service, answer)
            return JSONResponse(whole)
    except BaseException:
        answer.cancel()
        note(service, answer)
        raise
    return StreamingResponse(_sent(service, answer), media_type="text/event-stream", headers=_NO_BUFFER)


_NO_BUFFER = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def _sent(service: Service, answer: Answer) -> AsyncIterator[str]:
    """The events of an answer. Who reads slowly is waited for here; the engine goes on, up to the reply's limit."""
    try:
        async for event in answer.events():
            yield event
    except Exception as error:
        yield answer.failure(RequestError.of(error) or _internal(error))
    finally:
        answer.cancel()
        note(service, answer)
    if answer.last_event:
        yield answer.last_event


def note(service: Service, answer: Answer) -> None:
    """Count what was answered, to the end or not; not what the engine did not take."""
    for stream in answer.streams:
        if not stream.was_taken:
            continue
        service.metrics.note(stream.request, stream.reply.finish_reason or "abort")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
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
