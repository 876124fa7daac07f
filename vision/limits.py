"""What reading a picture may cost, and where one may be fetched from."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from llama4.errors import ArgumentError


@dataclass(frozen=True)
class ImageLimits:
    """Bounds on pictures. The defaults are for a program that reads its user's pictures; `SERVER_LIMITS` are for one
    that reads strangers'.

    Attributes:
        max_pixels: width times height. PIL has a limit of its own, twice `PIL.Image.MAX_IMAGE_PIXELS`.
        max_side: the longer side. What resizing takes grows with it, however few pixels there are.
        max_bytes: of the file, however it comes.
        max_decoding: bytes that a format's decoder takes beside the picture, above 4 a pixel: it bounds WebP at 20
            million pixels, for instance.
        max_prepared: bytes that the tiles of all pictures of one conversation take, as the model reads them: for
            Llama 4 1.4 MB a tile. A picture of one pixel is a tile, too.
        max_scans: passes over a JPEG, each of which a decoder makes over all of its pixels; encoders write about ten.
        max_seconds: for fetching a URL, from looking up its host to the last byte.
        hosts: from which URLs are fetched, by name or address; None for any.
        private_hosts: those that may be this machine or in its network (loopback, private and link-local addresses, a
            cloud's metadata); "*" for any.
        files: whether paths and `file://` URLs are read.
    """

    max_pixels: int = 89_478_485
    max_side: int = 1_000_000
    max_bytes: int = 64 * 2**20
    max_decoding: int = 100_000_000
    max_scans: int = 100
    max_prepared: float = math.inf
    max_seconds: float = 30.0
    hosts: Collection[str] | None = None
    private_hosts: Collection[str] = ()
    files: bool = True

    def __post_init__(self) -> None:
        for host in (*(self.hosts or ()), *self.private_hosts):
            if "/" in host or host.count(":") == 1:  # an IPv6 address has more
                raise ArgumentError(f"{host!r} is no host; give its name or address alone, without scheme and port")


LIMITS = ImageLimits()
SERVER_LIMITS = ImageLimits(max_prepared=2**30, hosts=(), files=False)
