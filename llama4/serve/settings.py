"""How a server behaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
        has_page: whether there is a page to chat at `/`.
        store: the file of responses that clients may ask for again; None for memory.
    """

    name: str
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    url_hosts: tuple[str, ...] = ()
    media_directory: Path | None = None
    max_body: int = 64 * 2**20
    has_page: bool = True
    store: Path | None = None
