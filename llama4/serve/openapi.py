"""/openapi.json: the routes, of the schemas that check their requests."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from llama4.serve.http import Route
from llama4.serve.settings import Settings
from llama4.version import __version__

STATUSES = {
    400: "a field has a value that it cannot have",
    401: "the API key is missing or wrong",
    403: "a browser asks, for a page of another address",
    404: "there is no such model, or no such thing",
    408: "the body does not come",
    413: "the body is too large",
    422: "the model's chat template refuses the messages",
    429: "too many requests wait",
    500: "an error of the server",
    503: "the server is about to stop",
    507: "the server has no room to store a response",
}


def describe(routes: Iterable[Route], settings: Settings) -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {}
    for route in routes:
        if route.fields is not None:
            schemas[route.fields.name] = route.fields.to_json()
        schemas[route.errors.name] = route.errors.schema
        path = re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    security = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"llama4: {settings.name}", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, **({"securitySchemes": security} if settings.api_key else {})},
        **({"security": [{"key": []}]} if settings.api_key else {}),
    }


def _operation(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if route.answer is not None:
        content = {"application/json": {"schema": route.answer}}
    if route.can_stream:
        content["text/event-stream"] = {}  # OpenAPI 3.1 has no words for events
    answers: dict[str, Any] = {"200": {"description": "what was asked for", "content": content}}
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{route.errors.name}"}}}
    for status, text in STATUSES.items():
        if route.is_open and status not in (500, 503):
            continue
        answers[str(status)] = {"description": text, "content": error}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.handle.__module__.rpartition('.')[2]}_{route.handle.__name__}",
        "responses": answers,
        **({"security": []} if route.is_open else {}),
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)", route.path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": field.schema}
        for name, field in (route.query.fields.items() if route.query is not None else ())
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.fields is not None:
        schema = {"$ref": f"#/components/schemas/{route.fields.name}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
