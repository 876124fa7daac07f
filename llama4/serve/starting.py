"""What is answered at a server's address while its model is loaded: 503, and when to ask again."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llama4.serve.errors import RequestError

SECONDS = 5.0
"""That a client may take."""
MAX_READ = 2**20
"""Bytes of a body that are read: who is answered before may lose the answer."""
_BODY = json.dumps(RequestError("the model is being loaded; ask again later", status=503).to_json()).encode()


@contextmanager
def starting(listening: socket.socket, tls: ssl.SSLContext | None) -> Iterator[None]:
    """Within this, requests to the socket are answered with 503; behind it, who serves takes the socket, and who came
    meanwhile waits there. After an error it is closed."""
    server = _Server(listening, tls)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="llama4 starting", daemon=True)
    thread.start()
    try:
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
    except BaseException:
        listening.close()
        raise


class _Refusal(BaseHTTPRequestHandler):
    timeout = SECONDS

    def answer(self) -> None:
        length = self.headers.get("content-length", "0")
        self.rfile.read(min(int(length) if length.isdecimal() else 0, MAX_READ))
        self.send_response_only(503)
        for name, value in (("content-type", "application/json"), ("content-length", len(_BODY)), ("retry-after", 1)):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(_BODY)

    do_GET = do_HEAD = do_POST = do_DELETE = do_OPTIONS = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def __init__(self, listening: socket.socket, tls: ssl.SSLContext | None) -> None:
        super().__init__(listening.getsockname()[:2], _Refusal, bind_and_activate=False)
        self.socket.close()
        self.socket, self._tls = listening, tls

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.settimeout(SECONDS)
        if self._tls is not None:  # whose handshake comes with the first read, in the client's own thread
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves, or says no HTTP."""
