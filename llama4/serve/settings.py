"""How a server behaves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llama4.errors import ArgumentError


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


def check_names(model: str, adapters: Iterable[str]) -> None:
    """Raises:
    ArgumentError: clients could not tell an adapter from the model, or name it.
    """
    for name in adapters:
        if not name:
            raise ArgumentError("an adapter has no name; write NAME=DIR")
        if name == model:
            raise ArgumentError(
                f"the adapter {name!r} has the model's name; give it another, or the model by --served-model-name"
            )
