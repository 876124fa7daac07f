"""Errors of a request, in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llama4.errors import BusyError, ChatTemplateError, ClosedError, ContextLengthError, Llama4Error

_FIELDS = {
    **{name: name for name in ("logit_bias", "min_tokens", "ignore_eos", "response_format", "tool_choice")},
    **{name: f"structured_outputs.{name}" for name in ("regex", "grammar")},
    "choices": "structured_outputs.choice",
}
"""An argument of `Llama4.chat`, which begins the message of its error -> the field of requests."""
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


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
    def of(cls, error: Exception) -> RequestError | None:
        """What an error of the library means to who asked; None for a bug of ours."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, BusyError):
            return cls(str(error), status=503 if isinstance(error, ClosedError) else 429, code="busy")
        if isinstance(error, ContextLengthError):
            return cls(str(error), field="messages", code="context_length_exceeded")
        if isinstance(error, ChatTemplateError):
            return cls(str(error), field="messages", status=422)
        return cls(str(error), field=_field_of(str(error))) if isinstance(error, Llama4Error) else None

    def to_json(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


def _whole(text: str) -> str:
    """Of what JSON may hold, halves of surrogate pairs cannot be sent."""
    return text.encode("utf-8", "replace").decode()


def _field_of(message: str) -> str | None:
    """The field that an error of the library is about, by its first words."""
    if found := re.match(r"(?:part (\d+) of )?message (\d+)\b", message):
        return f"messages[{found[2]}]" + (f".content[{found[1]}]" if found[1] else "")
    return _FIELDS.get(message.partition(" ")[0])


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
