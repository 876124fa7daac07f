"""Who answers: a model in this process, or a server in OpenAI's form."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast
from urllib.parse import urlsplit

from llama4.arguments import printable
from llama4.errors import ArgumentError, Llama4Error
from llama4.units import bytes_text
from llama4.vision.limits import LIMITS, ImageLimits

if TYPE_CHECKING:
    from llama4.api import Llama4
    from llama4.options import Options

Messages: TypeAlias = Sequence[Mapping[str, Any]]

TIMEOUT = 600.0
"""Seconds of silence after which a server is given up: it may read a long prompt meanwhile."""
MAX_EVENT = 16 << 20
"""Bytes of one event of a stream."""
MAX_STREAM = 64 << 20
"""Bytes of a stream: 300,000 tokens, each with an event around it."""
MAX_CALLS = 100
"""Tool calls of a reply."""
MAX_TOKENS = 2**31 - 1
"""Of a reply, as a server counts them."""
NOT_OPENAI = "the server does not answer in OpenAI's form; is the address right?"
NAMES = {"max_new_tokens": "max_tokens"}
"""Options that a server knows by another name."""


@dataclass
class PartialReply:
    """A reply, as far as it has come.

    Attributes:
        tool_calls: in OpenAI's form.
        tokens: of the reply; where a server does not tell, its pieces are counted.
        has_begun: whether the model took the question.
    """

    text: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int = 0
    has_begun: bool = False


class Answerer(Protocol):
    """What a conversation asks.

    Attributes:
        name: of the model.
        image_limits: of the pictures that it is shown.
    """

    name: str
    image_limits: ImageLimits

    def stream(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], answer: PartialReply
    ) -> Iterator[str]:
        """The text of a reply, piece by piece; `answer` is filled meanwhile, also when the reader leaves."""
        ...


class Local:
    """A model in this process."""

    def __init__(self, llm: Llama4, name: str) -> None:
        self.llm, self.name = llm, name
        self.image_limits = llm.processor.image_limits

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises:
        ArgumentError: options that no reply can have.
        """
        from llama4.engine.request import reply_budget  # imports torch
        from llama4.text.prompt_limit import PromptLimit

        prepared = self.llm.prepare([{"role": "user", "content": "?"}], **cast("Options", options))
        reply_budget(1, prepared.max_new_tokens, PromptLimit.of_window(2))

    def stream(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], answer: PartialReply
    ) -> Iterator[str]:
        stream = self.llm.stream(messages, **cast("Options", options))
        try:
            for piece in stream:
                answer.has_begun = True
                yield piece
            answer.has_begun = True
        finally:
            reply = stream.reply
            answer.has_begun |= bool(reply.usage.completion_tokens)
            answer.text, answer.finish_reason = reply.text, reply.finish_reason
            answer.tokens = reply.usage.completion_tokens
            answer.tool_calls = [call.to_openai() for call in reply.tool_calls]


class Remote:
    """A server that speaks OpenAI's chat completions."""

    def __init__(self, url: str, key: str | None, name: str | None = None, private_hosts: Sequence[str] = ()) -> None:
        """
        Args:
            url: of the server, with or without `/v1`.
            key: sent as `Authorization: Bearer KEY`.
            name: of a model there; None for its first.

        Raises:
            Llama4Error: no such address, nobody who answers there, or nobody who takes the key.
        """
        _check_address(url)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ArgumentError(
                "--api-key (or LLAMA4_API_KEY) has a line end or another character that no key has; copy it again"
            )
        base = url.rstrip("/")
        self._base = base if base.endswith("/v1") else f"{base}/v1"
        self._key = key
        self._opener = urllib.request.build_opener(_NoRedirects)
        self.image_limits = replace(LIMITS, private_hosts=tuple(private_hosts))
        self.name = name or printable(self._first_model())

    def _first_model(self) -> str:
        with self._open("models") as response, _read_from_server():
            content = _json(response.read(MAX_EVENT))
        data = content.get("data")
        name = data[0].get("id") if isinstance(data, list) and data and isinstance(data[0], dict) else None
        if not isinstance(name, str):
            raise Llama4Error(f"{self._base}/models names no model; name one with --model")
        return name

    def stream(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], answer: PartialReply
    ) -> Iterator[str]:
        fields = {NAMES.get(name, name): value for name, value in options.items() if value is not None}
        body = {"model": self.name, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        with self._open("chat/completions", {**fields, **body}) as response:
            answer.has_begun = True
            with _read_from_server():
                for event in _events(response):
                    if event is None:
                        return
                    yield from self._read(event, answer)
                if answer.finish_reason is None:
                    raise http.client.HTTPException("its stream has no end")

    def _read(self, event: Mapping[str, Any], answer: PartialReply) -> Iterator[str]:
        if error := event.get("error"):
            message = error.get("message") if isinstance(error, dict) else error
            raise Llama4Error(printable(f"the server says: {message}"))
        tokens = (event.get("usage") or {}).get("completion_tokens")
        if isinstance(tokens, int) and 0 <= tokens <= MAX_TOKENS:
            answer.tokens = tokens
        for choice in (event.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            _add_calls(answer, delta.get("tool_calls") or [])
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            if text := delta.get("content"):
                answer.text += text
                answer.tokens += 1
                yield text

    def _open(self, path: str, body: Mapping[str, Any] | None = None) -> http.client.HTTPResponse:
        headers = {
            "content-type": "application/json",
            **({"authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._base}/{path}", data, headers)
        try:
            return cast(http.client.HTTPResponse, self._opener.open(request, timeout=TIMEOUT))
        except urllib.error.HTTPError as error:
            with error:
                raise Llama4Error(_told(error)) from None
        except (OSError, http.client.HTTPException) as error:
            reason = printable(str(getattr(error, "reason", error)))
            raise Llama4Error(f"{self._base} does not answer ({reason}); is the server running?") from None


def _check_address(url: str) -> None:
    """Raises:
    ArgumentError: one that cannot be asked; a password in it is not shown.
    """
    if "@" in url:
        raise ArgumentError("--server has a name or a password in its address; leave it out and give --api-key")
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not (is_address and url.isascii() and url.isprintable() and " " not in url):
        raise ArgumentError(f"--server {printable(url):.200} is no address; write it as http://127.0.0.1:8000")


@contextmanager
def _read_from_server() -> Iterator[None]:
    """Raises:
    Llama4Error: it broke off, or what it sends is not in OpenAI's form.
    """
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise Llama4Error(printable(f"the server broke off ({error}): its answer is incomplete; ask again")) from None
    except (AttributeError, KeyError, IndexError, TypeError):
        raise Llama4Error(NOT_OPENAI) from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A server that sends elsewhere would get the key and the conversation sent there."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def _told(error: urllib.error.HTTPError) -> str:
    try:
        content = _json(error.read(1 << 16))
        inner = content.get("error")
        message = inner.get("message") if isinstance(inner, dict) else content.get("message") or inner
    except (Llama4Error, OSError, http.client.HTTPException):
        message = None
    hint = "; give --api-key, or set LLAMA4_API_KEY" if error.code == 401 else ""
    return printable(f"the server says: {message or f'{error.code} {error.reason}'}{hint}")


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any] | None]:
    """The objects of a stream of events; None for `[DONE]`.

    Raises:
        Llama4Error: one that is no object, or more than a reply has.
    """
    size = 0
    while line := response.readline(MAX_EVENT):
        size += len(line)
        if size > MAX_STREAM:
            raise Llama4Error(f"the server sent more than {bytes_text(MAX_STREAM)}; no reply is so long")
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                yield None
                return
            yield _json(data)


def _json(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise Llama4Error(NOT_OPENAI)
    return content


def _add_calls(answer: PartialReply, deltas: Sequence[Mapping[str, Any]]) -> None:
    for delta in deltas:
        index = delta.get("index") or 0
        if not 0 <= index < MAX_CALLS:
            raise Llama4Error(f"the server sends tool call {index!s:.20}; a reply has at most {MAX_CALLS}")
        while len(answer.tool_calls) <= index:
            function = {"name": "", "arguments": ""}
            answer.tool_calls.append({"id": "", "type": "function", "function": function})
        call, told = answer.tool_calls[index], delta.get("function") or {}
        for record, given, name in ((call, delta, "id"), (call["function"], told, "name")):
            if value := given.get(name):
                record[name] = "" + value
        call["function"]["arguments"] += told.get("arguments") or ""
