"""The page at `/`: a chat in the browser, over `/v1/chat/completions` of the same server.

Plain HTML, CSS and JavaScript modules, sent as they lie here. Nothing is fetched from another address, and what a model
writes is never HTML: the page makes text nodes of it, and the headers forbid the rest.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The files that are sent, by their ending."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Content-Security-Policy: no script or style but ours, no other address, no HTML made of text."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # asked for each time, and answered by 304 while it is the same
}


def routes() -> list[Route]:
    """`/` and the files that it names, `/page/NAME`. None needs a key; what they ask of the server does."""
    return [Route("/", _send), Route("/page/{name}", _send)]


@cache
def files() -> dict[str, bytes]:
    """Name -> content; what is not here is not sent."""
    return {path.name: path.read_bytes() for path in Path(__file__).parent.iterdir() if path.suffix in TYPES}


async def _send(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    content = files().get(name)
    if content is None:
        raise HTTPException(404)
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[Path(name).suffix])
