"""Errors of a request, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from llama4.errors import BusyError, ContextLengthError, Llama4Error

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """What a request is answered with instead of a reply.

    Attributes:
        status: of HTTP.
        field: the name of the field at fault.
        code: a word for programs.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code

    @classmethod
    def of(cls, error: Exception) -> RequestError | None:
        """What an error of the library means to who asked; None for a bug of ours."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, BusyError):
            return cls(str(error), status=503 if "closed" in str(error) else 429, code="busy")
        if isinstance(error, ContextLengthError):
            return cls(str(error), field="messages", code="context_length_exceeded")
        return cls(str(error)) if isinstance(error, Llama4Error) else None

    def to_json(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}
