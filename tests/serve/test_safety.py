"""`llama4 serve` among strangers: who may ask, what is told, what is logged, and who leaves or reads slowly."""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from llama4 import Engine, Llama4  # noqa: E402
from llama4.cli import serve as command  # noqa: E402
from llama4.errors import ArgumentError  # noqa: E402
from llama4.serve import http, starting  # noqa: E402
from llama4.serve import run as running_module  # noqa: E402
from llama4.serve.app import Server, Settings  # noqa: E402
from llama4.serve.run import MAX_HEADERS, Address, http_config, listening_at, run  # noqa: E402
from tests.serve.running import FOREVER, QUESTION, Running, until  # noqa: E402

CHAT = "/v1/chat/completions"
OPEN_ROUTES = {"/", "/health", "/ready", "/version", "/metrics"}
PICTURE = Path(__file__).parents[2] / "examples" / "shapes.png"


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [("127.0.0.1", None, False), ("localhost", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "secret", False)],
)
def test_an_open_address_without_a_key_is_warned_of(
    llm: Llama4, host: str, key: str | None, warns: bool, monkeypatch: Any, caplog: Any, capsys: Any
) -> None:
    """What is printed to try has the model's name as it is."""
    name = """the "model's" \\ name"""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    listened: list[str] = []

    def run_nothing(self: Any, sockets: list[socket.socket]) -> None:
        for each in sockets:
            listened.append(each.getsockname()[0])
            each.close()

    monkeypatch.setattr(running_module._Runner, "run", run_nothing)
    try:
        address = Address(host, 0)
        with listening_at(address) as listening:
            server = Server(Engine(llm), Settings(name, api_key=key))
        run(server, address, listening)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert listened == ["127.0.0.1" if host == "localhost" else host]
    (command,) = re.findall("(?m)^ *try: (.*)$", capsys.readouterr().out)
    assert json.loads(shlex.split(command)[-1])["model"] == name
    assert ("anybody who reaches" in caplog.text) == warns
    assert "secret" not in caplog.text


def test_who_asks_while_the_model_is_loaded_is_told_so(llm: Llama4) -> None:
    """By 503, though another says nothing; then the same socket serves. After an error it is closed."""
    address = Address(port=0)
    with listening_at(address) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        silent = socket.create_connection(listening.getsockname())
        asked = httpx.get(f"{url}/ready", timeout=60)
        for answer in (asked, httpx.post(f"{url}/v1/chat/completions", content=b"x" * 10**5, timeout=60)):
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert "being loaded" in answer.json()["error"]["message"]
        silent.close()
    engine = Engine(llm)
    config = http_config(Server(engine, Settings("tiny")), address)
    serving = uvicorn.Server(config)
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        assert httpx.get(f"{url}/ready", timeout=30).status_code == 200
    finally:
        serving.should_exit = True
        thread.join()
        engine.close()
    with pytest.raises(ZeroDivisionError), listening_at(address) as closed:
        raise ZeroDivisionError
    assert closed.fileno() == -1


def test_a_silent_client_keeps_no_other_from_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model is loaded, nor the start from going on."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, which makes the certificate")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(starting, "SECONDS", 60.0)
    monkeypatch.setattr(starting._Refusal, "timeout", 60.0)
    with contextlib.ExitStack() as silent:
        with listening_at(Address(port=0, certificate=certificate, key=key)) as listening:
            silent.enter_context(socket.create_connection(listening.getsockname()))
            url = f"https://127.0.0.1:{listening.getsockname()[1]}"
            begin = time.monotonic()
            assert httpx.get(f"{url}/ready", verify=trusted, timeout=60).status_code == 503
            silent.enter_context(socket.create_connection(listening.getsockname()))
        assert time.monotonic() - begin < 60
        listening.close()


def test_the_command_listens_at_loopback() -> None:
    assert Address().host == "127.0.0.1"
    import argparse

    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    options = parser.parse_args(["serve", "tiny"])
    assert options.host == "127.0.0.1" and options.cors_origin == options.url_hosts == []
    for hosts in (
        "--allow-host a --allow-host b tiny",
        "--allow-urls a --allow-urls b tiny",
        "tiny --allow-host a --allow-urls b",
    ):
        options = parser.parse_args(["serve", *hosts.split()])
        assert (options.model, options.url_hosts) == ("tiny", ["a", "b"])
    with pytest.raises(ArgumentError, match="--api-key is empty"):  # as of an unset variable
        command.run(parser.parse_args(["serve", "tiny", "--api-key", ""]))
    for key in ("secret\n", " secret", "sec\x00ret", "\udcff"):
        with pytest.raises(ArgumentError, match="the API key has blanks"):
            command.run(parser.parse_args(["serve", "tiny", "--api-key", key]))
    for origin in ("page.example", "http://page.example/", "http://Page.example", "http://a, http://b", ""):
        with pytest.raises(ArgumentError, match="is no origin"):
            command.run(parser.parse_args(["serve", "tiny", "--cors-origin", origin]))


def shown_as(key: str) -> list[dict[bytes, bytes]]:
    return [{b"authorization": f"Bearer {key}".encode()}, {b"x-api-key": key.encode()}]


def test_every_route_but_some_asks_for_the_key(llm: Llama4, monkeypatch: Any) -> None:
    """The key is compared in constant time, byte by byte, also one that is not ASCII."""
    key, compared = "sésame", []
    compare = hmac.compare_digest

    def note(shown: bytes, known: bytes) -> bool:
        compared.append((shown, known))
        return compare(shown, known)

    monkeypatch.setattr(hmac, "compare_digest", note)
    server = Running(llm, Settings("tiny", api_key=key))
    try:
        client, headers = server.client, {b"authorization": f"bearer {key}".encode()}
        paths = client.get("/openapi.json", headers=headers).json()["paths"]
        assert len(set(paths) - OPEN_ROUTES) > 8
        for path, methods in paths.items():
            for method in methods:
                answer = client.request(method, re.sub("{.*?}", "x", path))
                assert (answer.status_code == 401) == (path not in OPEN_ROUTES), (method, path)
        for shown in ("wrong", key.upper(), "séSame", key + "x"):
            assert [client.get("/v1/models", headers=given).status_code for given in shown_as(shown)] == [401, 401]
        assert [client.get("/v1/models", headers=given).status_code for given in shown_as(key)] == [200, 200]
    finally:
        server.close()
    assert (key.encode(), key.encode()) in compared and (b"wrong", key.encode()) in compared


def test_a_body_that_does_not_come_is_not_waited_for(running: Running, monkeypatch: Any) -> None:
    monkeypatch.setattr(http, "BODY_SECONDS", 0.3)
    with socket.create_connection(running.listening.getsockname(), timeout=60) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(2**16)


def test_no_other_page_may_ask_unless_named(llm: Llama4, running: Running) -> None:
    page = {"origin": "http://page.example", "access-control-request-method": "POST"}
    for answer in (running.client.options(CHAT, headers=page), running.client.get("/health", headers=page)):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    named = Running(llm, Settings("tiny", cors_origins=("http://page.example",)))
    try:
        assert named.client.options(CHAT, headers=page).headers["access-control-allow-origin"] == page["origin"]
        other = named.client.get("/health", headers={"origin": "http://other.example"})
        assert "access-control-allow-origin" not in other.headers
    finally:
        named.close()


@pytest.mark.parametrize(
    ("key", "named", "host", "origin", "may_ask"),
    [
        (None, (), "127.0.0.1:8000", "http://127.0.0.1:8000", True),  # the server's own page
        (None, (), "localhost", "http://localhost", True),
        (None, (), "[::1]:8000", "http://[::1]:8000", True),
        (None, (), "127.0.0.1:8000", "http://127.0.0.1:3000", False),
        (None, (), "127.0.0.1:8000", "http://page.example", False),
        (None, (), "127.0.0.1:8000", "null", False),
        (None, (), "page.example:8000", "http://page.example:8000", False),  # a name that was made to lead here
        (None, (), "127.0.0.1.page.example", "http://127.0.0.1.page.example", False),
        (None, (), "[::1", "http://[::1", False),
        (None, (), "", "http://", False),
        ("secret", (), "llama4.example", "https://llama4.example", True),
        ("secret", (), "llama4.example", "http://page.example", False),
        (None, ("http://page.example",), "127.0.0.1:8000", "http://page.example", True),
        (None, ("*",), "127.0.0.1:8000", "http://page.example", True),
    ],
)
def test_which_pages_may_ask(
    llm: Llama4, running: Running, monkeypatch: Any, key: Any, named: Any, host: str, origin: str, may_ask: bool
) -> None:
    """A browser sends a page's request to any address, if it is simple enough; what it says of the page decides."""
    monkeypatch.setattr(
        running.server.service, "settings", Settings("tiny", api_key=key, cors_origins=named, has_page=False)
    )
    before = running.engine.scheduler.counts.generated_tokens
    headers = {"host": host, "origin": origin, "content-type": "text/plain", "authorization": "Bearer secret"}
    answer = running.client.post(CHAT, content=json.dumps({"messages": QUESTION, "max_tokens": 1}), headers=headers)
    assert answer.status_code == (200 if may_ask else 403), answer.text
    assert (running.engine.scheduler.counts.generated_tokens > before) == may_ask
    assert may_ask or f"--cors-origin {origin}" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("settings", "host", "may_ask"),
    [
        (Settings("tiny"), "127.0.0.1:8000", True),
        (Settings("tiny"), "page.example:8000", False),  # a name that was made to lead here
        (Settings("tiny", cors_origins=("http://page.example:8000",)), "page.example:8000", True),
        (Settings("tiny", cors_origins=("https://page.example",)), "page.example", True),  # a proxy does TLS
        (Settings("tiny", cors_origins=("https://page.example",)), "other.example", False),
        (Settings("tiny", api_key="secret"), "page.example:8000", True),
    ],
)
def test_which_pages_may_read(running: Running, monkeypatch: Any, settings: Settings, host: str, may_ask: bool) -> None:
    """A browser does not say which page reads from its own address."""
    paths = running.client.get("/openapi.json").json()["paths"]
    monkeypatch.setattr(running.server.service, "settings", settings)
    headers = {"host": host, "authorization": "Bearer secret"}
    for path in (path for path, methods in paths.items() if "get" in methods):
        answer = running.client.get(re.sub("{.*?}", "x", path), headers=headers)
        refused = answer.status_code == 403
        assert refused == (not may_ask and path not in OPEN_ROUTES), path
        ways = (f"--cors-origin http://{host}", "--api-key", "by address")  # who asks may be no page
        assert not refused or all(way in answer.text for way in ways)


def test_who_does_not_say_what_it_wants_is_let_go(running: Running, monkeypatch: Any) -> None:
    """Nothing, half a head, or a head a byte at a time; also after an answer."""
    monkeypatch.setattr(running_module, "HEAD_SECONDS", 0.4)
    head = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    for before, says in (
        (b"", b""),
        (b"", b"GET /hea"),
        (b"", b"g" * 10**4),
        (head, b"GET /hea"),
        (head, b"g" * 10**4),
    ):
        with socket.create_connection(running.listening.getsockname(), timeout=60) as connection:
            connection.sendall(before)
            answer = connection.recv(2**16) if before else b""
            assert (b" 200 " in answer) == bool(before)
            with contextlib.suppress(ConnectionError):
                for byte in says:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.01)
                while connection.recv(2**16):
                    pass
    assert running.client.get("/health").status_code == 200


def test_what_is_no_http_fills_no_log(running: Running, caplog: Any) -> None:
    """Nor what asks for another protocol, which is answered in this one."""
    for says, status in (
        (b"\x16\x03\x01\x02\x00", b" 400 "),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b" 400 "),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n\r\n", b" 200 "),
        (b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade, close\r\nupgrade: h2c\r\n\r\n", b" 200 "),
    ):
        with socket.create_connection(running.listening.getsockname(), timeout=60) as connection:
            connection.sendall(says)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while piece := connection.recv(2**16):
                    answer += piece
            assert status in answer, (says, answer)
    assert caplog.text == ""


def test_a_request_of_two_lengths_ends_the_connection(running: Running) -> None:
    """As RFC 9112, 6.1, demands: a proxy may take what follows for its body."""
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    with socket.create_connection(running.listening.getsockname(), timeout=60) as connection:
        connection.sendall(head + b"2\r\n{}\r\n0\r\n\r\nGET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(2**16):
                answer += piece
    assert answer.count(b"HTTP/1.1 ") == 1 and answer.startswith(b"HTTP/1.1 400 ")


def test_headers_are_limited(running: Running) -> None:
    """By the parser that `http_config` names, before anything is read of what they say."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: ")
        try:
            for _ in range(2 * MAX_HEADERS // 1024):
                connection.sendall(b"a" * 1024)
            answer = connection.recv(1024)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""
    assert b" 200 " not in answer
    assert running.client.get("/health", headers={"x-long": "a" * (MAX_HEADERS // 2)}).status_code == 200


def test_this_network_is_not_reached_unless_named(llm: Llama4) -> None:
    """A picture's address that leads to this machine: no connection is made, whatever public hosts are allowed."""
    asked: list[str] = []

    class Private(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PICTURE.read_bytes())

        def log_message(self, format: str, *values: object) -> None:
            pass

    private = HTTPServer(("127.0.0.1", 0), Private)
    threading.Thread(target=private.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{private.server_port}/a.png"
    message = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    statuses = {}
    for hosts in ((), ("*",), ("example.com",), ("127.0.0.1",)):
        server = Running(llm, Settings("tiny", url_hosts=hosts))
        statuses[hosts] = server.client.post(CHAT, json={"messages": message, "max_tokens": 1}).status_code
        assert len(asked) == (hosts == ("127.0.0.1",)), hosts
        server.close()
    private.shutdown()
    private.server_close()
    assert statuses == {(): 400, ("*",): 400, ("example.com",): 400, ("127.0.0.1",): 200}


def test_prompts_are_not_logged(running: Running, monkeypatch: Any, caplog: Any) -> None:
    """Neither of answers nor of errors; each line of a request has its id, which its answer has, too."""
    caplog.set_level(logging.DEBUG, logger="llama4")
    caplog.set_level(logging.INFO)
    secret = "xyzzy-4711"
    message = [{"role": "user", "content": secret}]
    bodies: list[Any] = [
        {"messages": message, "max_tokens": 2},
        {"messages": message, "max_tokens": 2, "stream": True},
        {"messages": message, "n": secret},
        {"messages": message, "max_tokens": 1, "unheard_of": secret},
        {"messages": [{"role": secret, "content": secret}]},
    ]
    for number, body in enumerate(bodies):
        answer = running.client.post(CHAT, json=body, headers={"x-request-id": f"mine-{number}"})
        assert answer.headers["x-request-id"] == f"mine-{number}"
        until(lambda line=f"mine-{number} POST {CHAT}": line in caplog.text)  # written when the answer has gone
    running.client.post(CHAT, content=json.dumps(bodies[0])[:-1])
    monkeypatch.setattr(Engine, "stream", lambda *given, **options: 1 // 0)
    answer = running.client.post(CHAT, json=bodies[0], headers={"x-request-id": "failed-1"})
    assert answer.status_code == 500 and "ZeroDivision" not in answer.text
    assert "ZeroDivisionError" in caplog.text and "unheard_of" in caplog.text
    assert secret not in caplog.text
    assert "failed-1 failed" in caplog.text
    running.client.get("/a%0Amine-0 POST forged")
    assert "/a%0Amine-0%20POST" in caplog.text
    new = {running.client.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(new) == 3
    odd = running.client.get("/health", headers={"x-request-id": "a b\tc" * 100}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", odd)


def test_work_stops_within_a_step(running: Running, monkeypatch: Any) -> None:
    """Of a client that leaves: after the engine is told, at most one more token of it is computed; memory is free."""
    until(running.is_idle)
    counts, cancel, told = running.engine.scheduler.counts, Engine.cancel, []

    def note(engine: Engine, request: Any) -> None:
        told.append(counts.generated_tokens)
        cancel(engine, request)

    monkeypatch.setattr(Engine, "cancel", note)
    with running.client.stream("POST", CHAT, json={**FOREVER, "stream": True}) as answer:
        next(answer.iter_lines())
    until(lambda: told and running.is_idle())  # it seems idle while its request is between two lists
    assert counts.generated_tokens - told[0] <= 1
    while running.engine.scheduler.index.evict():
        pass
    assert running.engine.scheduler.pool.used == 0


def test_who_reads_slowly_holds_nobody_up(running: Running) -> None:
    """A client that does not read: its reply is computed to the end, what waits to be sent is bounded, others are
    answered; when it reads, everything is there."""
    running.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = {**FOREVER, "max_tokens": 200, "stream": True, "logprobs": True, "top_logprobs": 20, "seed": 1}
    content = json.dumps(body).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(running.listening.getsockname())
        slow.settimeout(60)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
        before = running.engine.scheduler.counts.generated_tokens
        slow.sendall(head.encode() + content)
        until(lambda: running.engine.scheduler.counts.generated_tokens - before == 200)
        until(running.is_idle)
        assert running.ask(messages=QUESTION)["choices"][0]["message"]["content"]
        waiting = [each.transport.get_write_buffer_size() for each in running.connections if each.transport]
        assert 0 < max(waiting) < 2**17
        answer = b""
        while piece := slow.recv(2**16):
            answer += piece
    assert len(answer) > 2**18 and b"[DONE]" in answer
    assert len(re.findall(rb'"logprob"', answer)) == 200 * 21
    running.listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)


def is_closed(url: str) -> bool:
    with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError):  # it closes meanwhile
        try:
            httpx.get(url, timeout=60)
        except httpx.ConnectError:
            return True
    return False


def test_the_command_does_not_wait_for_ever() -> None:
    """SIGTERM during a reply without end: nobody else is let in, it is cut when time is over, the exit code is 0."""
    code = "import llama4.serve.run as r; r.DRAIN_SECONDS = 4; from llama4.__main__ import run; run()"
    arguments = [sys.executable, "-c", code, "serve", "tiny", "--port", "0"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        url = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert url is not None
        with httpx.stream("POST", f"{url[0]}{CHAT}", json={**FOREVER, "stream": True}, timeout=60) as answer:
            lines = answer.iter_lines()  # kept: a generator that goes closes the connection
            next(lines)
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            until(lambda: is_closed(f"{url[0]}/health"))
            assert process.wait(60) == 0
            assert time.monotonic() - begun > 3.9


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "?"}]}, "messages"),
        ("/v1/completions", {"prompt": ["a", "?"]}, "prompt[1]"),
        ("/v1/completions", {"prompt": [1] * 6000}, "prompt"),
        ("/v1/embeddings", {"input": "?"}, "input"),
        ("/v1/responses", {"input": "?"}, "input"),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "?"}]}, "messages"),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "?"}]}, "messages"),
        ("/tokenize", {"prompt": "?"}, "prompt"),
        ("/tokenize", {"content": "?"}, "content"),
        ("/tokenize", {"messages": [{"role": "user", "content": "?"}]}, "messages"),
    ],
)
def test_a_text_that_cannot_fit_is_not_read(
    running: Running, path: str, fields: Any, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama4.serve.http.MAX_COUNTED", 100)
    model, read = running.engine.llm.tokenizer.model, []
    usual, parsed_in = model.encode, list[int]()

    def noted(text: str, **options: Any) -> list[int]:
        read.append(len(text))
        return usual(text, **options)

    parse = http.parse

    def noting_thread(data: bytearray) -> Any:
        parsed_in.append(threading.get_ident())
        return parse(data)

    monkeypatch.setattr(model, "encode", noted)
    monkeypatch.setattr(http, "parse", noting_thread)
    monkeypatch.setattr(http, "LONG_BODY", 10_000)
    body = json.dumps(fields).replace("?", "a" * 10**6)
    answer = running.client.post(path, content=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and re.search("the prompt has (at least )?[0-9]+ tokens, but", error["message"])
    assert error.get("param") == field
    assert max(read, default=0) < 1000
    assert parsed_in[0] != running._thread.ident  # the event loop goes on meanwhile
