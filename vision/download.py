"""A picture from a URL: with one deadline for all of it, and only from where it may come.

Python's own `urllib.request` bounds the time of each read, not of all; follows redirects to ftp; and looks a host up
again after anyone could have checked it. Here the address that was checked is the one that is connected to.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Collection
from typing import Any

from llama4.errors import ImageError
from llama4.vision.limits import ImageLimits

MAX_REDIRECTS = 5
_IN_TARGETS = "!#$%&'()*+,/:;=?@[]~"
"""What stands in a request as it is in a URL; other characters are written as bytes, as browsers do."""
_REDIRECTS = (301, 302, 303, 307, 308)
_CLOUDS = (ipaddress.ip_network("168.63.129.16/32"), ipaddress.ip_network("192.0.0.0/24"))
"""Addresses of clouds' own services that look public, to some versions of Python (Azure's, Oracle's)."""
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))


def download(url: str, limits: ImageLimits) -> bytes:
    """The content of an http(s) URL.

    Raises:
        ImageError: it cannot be fetched, is larger than the limits say or takes longer, or lies where these do not
            allow.
    """
    deadline = time.monotonic() + limits.max_seconds
    current = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            connection, peer, target = _connect(current, limits, deadline)
            try:
                connection.request("GET", target, headers={"User-Agent": "llama4", "Accept": "image/*, */*;q=0.5"})
                response = connection.getresponse()
                location = response.getheader("Location")
                if response.status in _REDIRECTS and location:
                    current = urllib.parse.urljoin(current, location)
                    continue
                if response.status != 200:
                    raise ImageError(
                        f"cannot download {url}: HTTP {response.status} {response.reason}; check the address"
                    )
                return _read(response, url, limits)
            finally:
                peer.close()
    except ImageError:
        raise
    except TimeoutError:
        raise ImageError(
            f"cannot download {url}: not done after {limits.max_seconds:g} seconds; fetch it yourself and give its path"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ImageError(f"cannot download {url}: {error}; check the address and the connection") from error
    raise ImageError(f"cannot download {url}: more than {MAX_REDIRECTS} redirects; give the address that they lead to")


def _read(response: http.client.HTTPResponse, url: str, limits: ImageLimits) -> bytes:
    data = bytearray()
    while chunk := response.read1(1 << 16):
        data += chunk
        if len(data) > limits.max_bytes:
            raise ImageError(
                f"{url} is larger than {limits.max_bytes >> 20} MiB; make it smaller, or raise max_bytes of ImageLimits"
            )
    return bytes(data)


def _connect(url: str, limits: ImageLimits, deadline: float) -> tuple[http.client.HTTPConnection, socket.socket, str]:
    """A connection for a URL, by the environment's proxy if that is meant for it; its socket; what to ask for there."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ImageError(f"{url} is no URL this library reads; use http, https, data or a path")
    if not parts.hostname:
        raise ImageError(f"cannot download {url}: it names no host; check the address")
    host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    if limits.hosts is not None and not _names(limits.hosts, host):
        raise ImageError(
            f"{url} is not fetched: {host} is none of the hosts that pictures may come from; send the data"
        )
    target = urllib.parse.quote(urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, "")), safe=_IN_TARGETS)
    may_be_private = _names(limits.private_hosts, host)
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
    if proxy is None:
        peer = _reach(host, port, url, may_be_private, deadline)
    else:
        if not may_be_private and _is_private_name(host):
            raise _private(url, host)
        hop = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        peer = _reach(hop.hostname or "", hop.port or 80, url, True, deadline)
    connection = http.client.HTTPConnection(host, port)
    tunnelled = proxy is not None and parts.scheme == "https"
    if tunnelled:
        connection.set_tunnel(host, port)
        connection.sock = _Socket(peer, deadline)
        connection._tunnel()  # type: ignore[attr-defined]  # what its own connect does
    if parts.scheme == "https":
        peer.settimeout(_left(deadline))
        peer = ssl.create_default_context().wrap_socket(peer, server_hostname=host)
    connection.sock = _Socket(peer, deadline)
    if proxy is not None and not tunnelled:
        target = f"{parts.scheme}://{parts.netloc}{target}"
    return connection, peer, target


class _Socket:
    """What http.client uses of a socket, with a deadline for all of it: a timeout alone begins anew at each byte."""

    def __init__(self, peer: socket.socket, deadline: float) -> None:
        self._peer, self._deadline = peer, deadline

    def sendall(self, data: bytes) -> None:
        self._peer.settimeout(_left(self._deadline))
        self._peer.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._peer, self._deadline))

    def close(self) -> None:
        """http.client does so before it has read the content."""


class _Reader(io.RawIOBase):
    def __init__(self, peer: socket.socket, deadline: float) -> None:
        self._peer, self._deadline = peer, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._peer.settimeout(_left(self._deadline))
        return self._peer.recv_into(buffer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _reach(host: str, port: int, url: str, may_be_private: bool, deadline: float) -> socket.socket:
    """Connect to the first address of a host that answers and may be reached."""
    failure: OSError | None = None
    for family, kind, protocol, _, address in _look_up(host, port, deadline):
        if not may_be_private and is_private(str(address[0])):
            raise _private(url, str(address[0]))
        peer = socket.socket(family, kind, protocol)
        try:
            peer.settimeout(_left(deadline))
            peer.connect(address)
            return peer
        except OSError as error:
            peer.close()
            failure = error
    raise failure or OSError(f"{host} has no address")


def _look_up(host: str, port: int, deadline: float) -> list[Any]:
    """getaddrinfo, which knows no timeout."""
    found: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except Exception as error:
            found.put(error)

    threading.Thread(target=look_up, daemon=True).start()
    try:
        result = found.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(result, Exception):
        raise result
    return result


def is_private(address: str) -> bool:
    """Whether an IP address is not one of the public internet, or belongs to a cloud's own services."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if any(ip in network for network in _NAT64):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_private(str(inner))
        if ip.teredo is not None or ip.is_site_local:
            return True
    return not ip.is_global or ip.is_multicast or any(ip in network for network in _CLOUDS)


def _is_private_name(host: str) -> bool:
    """What can be known of a host that a proxy looks up: also numbers that only some programs take for an address."""
    host = host.lower().rstrip(".")
    try:
        host = host.encode("idna").decode()
        return is_private(socket.inet_ntoa(socket.inet_aton(host)) if ":" not in host else host)
    except (OSError, ValueError):
        return host == "localhost" or host.endswith((".localhost", ".local", ".internal"))


def _private(url: str, address: str) -> ImageError:
    return ImageError(
        f"{url} is not fetched: {address} is in this machine or its network; if it may be read, name its host: "
        "llm.processor.image_limits = ImageLimits(private_hosts=[...]), or --private-host"
    )


def _names(hosts: Collection[str], host: str) -> bool:
    return "*" in hosts or host.lower() in {name.lower() for name in hosts}
