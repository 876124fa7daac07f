"""Pictures from URLs: from where they may come, how long it may take, how much it may be."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import io
import select
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from llama4 import Llama4
from llama4.cli.main import main
from llama4.errors import ImageError
from llama4.vision.download import is_private
from llama4.vision.images import load_image
from llama4.vision.limits import LIMITS, SERVER_LIMITS, ImageLimits

HERE = dataclasses.replace(LIMITS, private_hosts=("127.0.0.1",))


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (7, 5), (1, 2, 3)).save(file, "PNG")
    return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        moved = {
            "/moved.png": "/a.png",
            "/ftp": "ftp://127.0.0.1/a.png",
            "/file": "file:///etc/passwd",
            "/round": "/round",
        }
        if self.path in moved:
            self.send_response(302)
            self.send_header("Location", moved[self.path])
            self.end_headers()
        elif self.path == "/to-localhost":
            self.send_response(307)
            self.send_header("Location", f"http://localhost:{self.headers['Host'].rpartition(':')[2]}/a.png")
            self.end_headers()
        elif self.path in ("/a.png", "/a%20b.png?x=%20"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture())
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b"\0" * 65536)
        else:
            self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_urls(server: str) -> None:
    for path in ("a.png", "moved.png", "a b.png?x= "):
        assert load_image(f"{server}/{path}", HERE).size == (7, 5)
    with pytest.raises(ImageError, match=r"missing\.png: HTTP 404"):
        load_image(f"{server}/missing.png", HERE)
    with pytest.raises(ImageError, match=r"cannot download http://127\.0\.0\.1:1/"):
        load_image("http://127.0.0.1:1/a.png", HERE)
    with pytest.raises(ImageError, match="names no host"):
        load_image("http:///a.png", HERE)
    with pytest.raises(ImageError, match="larger than 1 MiB"):
        load_image(f"{server}/endless", dataclasses.replace(HERE, max_bytes=2**20))
    with pytest.raises(ImageError, match="more than 5 redirects"):
        load_image(f"{server}/round", HERE)
    for path in ("ftp", "file"):
        with pytest.raises(ImageError, match="no URL this library reads"):
            load_image(f"{server}/{path}", HERE)


def test_this_machine_and_its_network_are_refused(server: str) -> None:
    port = server.rsplit(":", 1)[1]
    other_ways = ("127.1", "2130706433", "0177.0.0.1", "0x7f000001", "ⓛocalhost", "allowed.example@127.0.0.1")
    for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", *other_ways):
        with pytest.raises(ImageError, match="in this machine or its network"):
            load_image(f"http://{host}:{port}/a.png")
    with pytest.raises(ImageError, match=r"169\.254\.169\.254 is in this machine"):
        load_image("http://169.254.169.254/latest/meta-data/")
    with pytest.raises(ImageError, match="in this machine or its network"):  # allowed is the first host alone
        load_image(f"{server}/to-localhost", HERE)
    assert load_image(f"{server}/to-localhost", dataclasses.replace(HERE, private_hosts="*")).size == (7, 5)


@pytest.mark.parametrize(
    ("address", "private"),
    [
        *(("8.8.8.8", False), ("1.1.1.1", False), ("2606:4700:4700::1111", False)),
        *(("10.0.0.1", True), ("172.16.3.4", True), ("192.168.1.1", True), ("127.0.0.53", True), ("0.0.0.0", True)),
        *(("169.254.169.254", True), ("100.100.100.200", True), ("168.63.129.16", True), ("192.0.0.192", True)),
        *(("224.0.0.1", True), ("255.255.255.255", True), ("::1", True), ("::", True), ("fe80::1%eth0", True)),
        *(("fd00:ec2::254", True), ("ff02::1", True), ("::ffff:10.0.0.1", True), ("::ffff:8.8.8.8", False)),
        *(("64:ff9b::a9fe:a9fe", True), ("64:ff9b::808:808", False), ("2002:7f00:1::", True)),
    ],
)
def test_addresses(address: str, private: bool) -> None:
    assert is_private(address) is private


def test_the_checked_address_is_the_one_connected_to(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose second look-up gives another address than its first (DNS rebinding)."""
    port, asked = int(server.rsplit(":", 1)[1]), []
    real = socket.getaddrinfo

    def rebinding(host: str, *args: object, **options: object) -> object:
        asked.append(host)
        return real("127.0.0.1" if len(asked) == 1 else "8.8.8.8", port, type=socket.SOCK_STREAM)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert load_image(f"http://pictures.example:{port}/a.png", ImageLimits(private_hosts=("pictures.example",))).size
    assert asked == ["pictures.example"]
    asked.clear()
    with pytest.raises(ImageError, match=r"127\.0\.0\.1 is in this machine"):
        load_image(f"http://pictures.example:{port}/a.png")


def test_a_server_fetches_from_named_hosts_and_reads_no_files(server: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="none of the hosts that pictures may come from"):
        load_image(f"{server}/a.png", dataclasses.replace(SERVER_LIMITS, private_hosts="*"))
    named = dataclasses.replace(SERVER_LIMITS, hosts=("127.0.0.1",))
    with pytest.raises(ImageError, match="in this machine or its network"):
        load_image(f"{server}/a.png", named)
    assert load_image(f"{server}/a.png", dataclasses.replace(named, private_hosts=("127.0.0.1",))).size == (7, 5)
    path = tmp_path / "a.png"
    path.write_bytes(picture())
    for source in (path, str(path)):
        with pytest.raises(ImageError, match="may not come from files"):
            load_image(source, SERVER_LIMITS)


def trickle(peer: socket.socket) -> None:
    for byte in b"HTTP/1.0 200 OK\r\nX: " + b"x" * 10_000:
        peer.sendall(bytes([byte]))
        time.sleep(0.05)


def trickle_content(peer: socket.socket) -> None:
    peer.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(10_000):
        peer.sendall(b"x")
        time.sleep(0.05)


def say_nothing(peer: socket.socket) -> None:
    time.sleep(60)


@pytest.mark.parametrize("behaviour", [trickle, trickle_content, say_nothing])
def test_one_deadline_for_all_of_it(behaviour: Callable[[socket.socket], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                behaviour(peer)

        threading.Thread(target=serve, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(ImageError, match=r"not done after 0\.5 seconds"):
            load_image(f"http://127.0.0.1:{listener.getsockname()[1]}/", dataclasses.replace(HERE, max_seconds=0.5))
        assert time.monotonic() - started < 30


def test_a_look_up_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(60))
    started = time.monotonic()
    with pytest.raises(ImageError, match="not done after"):
        load_image("http://pictures.example/a.png", ImageLimits(max_seconds=0.3))
    assert time.monotonic() - started < 30
    done.set()


class Proxy(Handler):
    asked: list[str]

    def do_GET(self) -> None:
        Proxy.asked.append(self.path)
        self.path = "/a.png"
        super().do_GET()

    def do_CONNECT(self) -> None:
        """Every host is this machine."""
        Proxy.asked.append(self.path)
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2]))) as there:
            self.send_response(200)
            self.end_headers()
            ends = {self.connection: there, there: self.connection}
            while True:
                for end in select.select(list(ends), [], [], 5)[0] or [there]:
                    if not (data := end.recv(65536)):
                        return
                    ends[end].sendall(data)


def test_through_the_environments_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks hosts up, so what can be refused is an address, or a name of this machine or network."""
    Proxy.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{httpd.server_address[1]}")
        monkeypatch.setenv("no_proxy", "")
        assert load_image("http://pictures.example/x.png").size == (7, 5)
        assert load_image("http://pictures.example/\u00e9 %20.png?a=b&c=/\u20ac").size == (7, 5)
        numbers = ("127.1", "0x7f.0.0.1", "2130706433", "\uff11\uff10.0.0.1")  # as programs read them, and browsers
        for host in ("10.0.0.1", *numbers, "[::1]", "localhost", "localhost.", "metadata.google.internal."):
            with pytest.raises(ImageError, match="in this machine or its network"):
                load_image(f"http://{host}/x.png")
        httpd.shutdown()
    encoded = "http://pictures.example/%C3%A9%20%20.png?a=b&c=/%E2%82%AC"
    assert Proxy.asked == ["http://pictures.example/x.png", encoded]


def test_the_processors_limits(server: str) -> None:
    llm = Llama4.from_pretrained("tiny")
    message = {"role": "user", "content": [{"type": "image", "url": f"{server}/a.png"}, {"type": "text", "text": "?"}]}
    with pytest.raises(ImageError, match="in this machine or its network"):
        llm.chat([message])
    llm.processor.image_limits = HERE
    assert llm.chat([message], max_new_tokens=1).usage.completion_tokens == 1


def test_the_command_lines_limits(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--image", f"{server}/a.png", "--max-new-tokens", "2", "Which colour?"]
    assert main(arguments) != 0
    assert "in this machine or its network" in capsys.readouterr().err
    assert main([*arguments, "--private-host", "127.0.0.1"]) == 0


@pytest.fixture
def https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server whose certificate, for pictures.example, is trusted."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, which makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=pictures.example"
    names = ["-addext", "subjectAltName=DNS:pictures.example", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield httpd.server_address[1]
        httpd.shutdown()


def test_https(https: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is of the host that was named, though an address is connected to; through a proxy as well."""
    monkeypatch.setenv("no_proxy", "*")
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **o: real("127.0.0.1", *a, **o))
    named = dataclasses.replace(LIMITS, private_hosts=("pictures.example", "other.example"))
    assert load_image(f"https://pictures.example:{https}/a.png", named).size == (7, 5)
    with pytest.raises(ImageError, match="certificate verify failed"):
        load_image(f"https://other.example:{https}/a.png", named)
    Proxy.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{httpd.server_address[1]}")
        monkeypatch.setenv("no_proxy", "")
        assert load_image(f"https://pictures.example:{https}/a.png").size == (7, 5)
        httpd.shutdown()
    assert Proxy.asked == [f"pictures.example:{https}"]
