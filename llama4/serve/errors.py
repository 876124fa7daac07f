"""Errors of a request, in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llama4.errors import BusyError, ChatTemplateError, ClosedError, ContextLengthError, ImageError, Llama4Error

_OPTIONS = {
    **{name: name for name in ("logit_bias", "min_tokens", "ignore_eos", "response_format", "tool_choice")},
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty")},
    **{name: name for name in ("presence_penalty", "frequency_penalty")},
    **{name: f"structured_outputs.{name}" for name in ("regex", "grammar")},
    "choices": "structured_outputs.choice",
    "chat_template_kwargs": "chat_template_kwargs",
    "the schema of a tool": "tools",
}
"""What begins the message of an error, mostly an argument of `Llama4.chat` -> the field of requests."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True)
class Place:
    """Where a request says a message.

    Attributes:
        field: of it.
        parts: of each part of its content; none where that is a text.
    """

    field: str
    parts: Sequence[str] = ()


@dataclass(frozen=True)
class Names:
    """How the fields of a request are called that the library's errors are about.

    Attributes:
        prompt: all that the model reads.
        messages: each message, where a request says them in another form than OpenAI's.
        form: what response_format is made of.
    """

    prompt: str = "messages"
    messages: Sequence[Place] | None = None
    form: str = "response_format"

    @contextmanager
    def told(self) -> Iterator[None]:
        """An error of the library becomes one of the request."""
        try:
            yield
        except Llama4Error as error:
            told = RequestError.of(error, self)
            assert told is not None
            raise told from error

    def of_message(self, message: int, part: int | None) -> str:
        if self.messages is None:
            return f"{self.prompt}[{message}]" + (f".content[{part}]" if part is not None else "")
        place = self.messages[message]
        return place.parts[part] if part is not None and place.parts else place.field

    def of_option(self, name: str) -> str:
        return self.form if name == "response_format" else _OPTIONS[name]


CHAT = Names()


class RequestError(Exception):
    """What a request is answered with instead of a reply.

    Attributes:
        status: of HTTP.
        field: the name of the field at fault.
        code: a word for programs.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(_whole(message))
        self.status, self.field, self.code = status, _whole(field) if field is not None else None, code

    @classmethod
    def of(cls, error: Exception, names: Names = CHAT) -> RequestError | None:
        """What an error of the library means to who asked; None for a bug of ours."""
        if isinstance(error, RequestError):
            return error
        if not isinstance(error, Llama4Error):
            return None
        if isinstance(error, BusyError):
            return cls(str(error), status=503 if isinstance(error, ClosedError) else 429, code="busy")
        if isinstance(error, ContextLengthError):
            return cls(str(error), field=names.prompt, code="context_length_exceeded")
        if isinstance(error, ChatTemplateError):
            return cls(str(error), field=names.prompt, status=422)
        if isinstance(error, ImageError) and error.place is not None:
            return cls(str(error), field=names.of_message(*error.place))
        return cls(*_in_words_of_the_request(str(error), names))

    def to_json(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


def _whole(text: str) -> str:
    """Of what JSON may hold, halves of surrogate pairs cannot be sent."""
    return text.encode("utf-8", "replace").decode()


def _in_words_of_the_request(message: str, names: Names) -> tuple[str, str | None]:
    """An error's message, and the field that its first words are about, by the name that the request has for it."""
    if found := re.match(r"(?:part (\d+) of )?message (\d+)\b", message):
        field = names.of_message(int(found[2]), int(found[1]) if found[1] else None)
        return field + message[found.end() :], field
    if re.match("(the|a) prompt |token id ", message):
        return message, names.prompt
    for begin in _OPTIONS:
        if message.startswith(f"{begin} "):
            field = names.of_option(begin)
            return (message if " " in begin else field + message[len(begin) :]), field
    return message, None


@dataclass(frozen=True)
class ErrorForm:
    """How errors are told.

    Attributes:
        name, schema: for /openapi.json.
        to_json: an error in this form.
    """

    name: str
    schema: Mapping[str, Any]
    to_json: Callable[[RequestError], dict[str, Any]]


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT = {"type": "string"}
_PERHAPS = {"type": ["string", "null"]}
OPENAI = ErrorForm(
    "Error", _object(error=_object(message=_TEXT, type=_TEXT, param=_PERHAPS, code=_PERHAPS)), RequestError.to_json
)
