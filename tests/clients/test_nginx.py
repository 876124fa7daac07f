"""The lines for nginx in docs/scale.md, run by nginx in front of two servers."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
if NGINX is None or shutil.which("openssl") is None:
    pytest.skip("nginx or openssl is not installed", allow_module_level=True)

from llama4 import Llama4  # noqa: E402
from llama4.serve.app import Settings  # noqa: E402
from tests.serve.running import Running  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Running]]:
    made = [Running(Llama4.from_pretrained("tiny", progress=False), Settings("tiny")) for _ in range(2)]
    yield made
    for server in made:
        server.close()


@pytest.fixture(scope="module")
def client(servers: list[Running], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of nginx, with the page's lines; only addresses and files are others."""
    directory = tmp_path_factory.mktemp("nginx")
    (block,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    changes = {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "/etc/ssl/llama4.pem": f"{directory}/cert.pem",
        "/etc/ssl/llama4.key": f"{directory}/key.pem",
        "127.0.0.1:8001": servers[0].url.removeprefix("http://"),
        "127.0.0.1:8002": servers[1].url.removeprefix("http://"),
    }
    for old, new in changes.items():
        assert old in block
        block = block.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {directory};" for kind in kinds)
    user = "user root; " if os.getuid() == 0 else ""
    head = f"{user}daemon off; pid {directory}/pid; error_log {directory}/log; events {{}}"
    (directory / "conf").write_text(f"{head} http {{ access_log off; {temporary}\n{block}}}\n")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=llama4.example"]
    make += ["-addext", "subjectAltName=DNS:llama4.example,IP:127.0.0.1"]
    make += ["-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem")]
    subprocess.run(make, check=True, capture_output=True)
    assert NGINX is not None
    with subprocess.Popen([NGINX, "-c", str(directory / "conf"), "-p", str(directory)]) as process:
        trusted = ssl.create_default_context(cafile=str(directory / "cert.pem"))
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, timeout=60) as made:
            deadline = time.monotonic() + 30
            while True:
                try:
                    made.get("/health")
                    break
                except httpx.TransportError:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.1)
            yield made
        process.terminate()


def conversation(question: str, turns: int) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    for turn in range(turns):
        messages += [{"role": "assistant", "content": f"{turn}"}, {"role": "user", "content": "And?"}]
    return {"model": "tiny", "messages": messages, "max_tokens": 2}


def test_a_conversation_stays_at_one_server(client: Any, servers: list[Running]) -> None:
    """Also one whose question is "Hi", and one that begins with parts; another may go elsewhere."""
    found = set()
    for question in ("Hi", 'He said "x\\"', "What is it? " * 40, *(f"Number {n}" for n in range(8))):
        answers = [client.post(CHAT, json=conversation(question, turns)) for turns in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3
        (where,) = {answer.headers["x-upstream"] for answer in answers}
        found.add(where)
    parts: Any = [{"type": "text", "text": "Number 1"}]
    assert (
        client.post(CHAT, json=conversation(parts, 1)).headers["x-upstream"]
        == client.post(CHAT, json=conversation("Number 1", 0)).headers["x-upstream"]
    )
    assert found == {server.url.removeprefix("http://") for server in servers}


def test_what_passes(client: Any, servers: list[Running], monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams as they come, large bodies, ids; not what is inside."""
    may_go_on = [server.hold(monkeypatch) for server in servers]
    body = {**conversation("Hi", 0), "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with client.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines), "comes before there is more"
        for event in may_go_on:
            event.set()
        assert len(list(lines)) > 2000
    answer = client.post("/tokenize", json={"prompt": "Hi" + 2_000_000 * " "})
    assert answer.status_code == 400 and "tokens" in answer.json()["error"]["message"]
    assert client.get("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert client.get("/metrics").status_code == 403


def test_one_stops(client: Any, servers: list[Running]) -> None:
    """Its conversations go to the other; one that says 503 is passed by, too."""
    first, second = (server.url.removeprefix("http://") for server in servers)
    questions = [f"Number {n}" for n in range(8)]
    servers[0].server.service.is_draining = True
    answers = [client.post(CHAT, json=conversation(question, 0)) for question in questions]
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.headers["x-upstream"].endswith(second) for answer in answers)
    time.sleep(0.1)
    servers[0].close()
    answers = [client.post(CHAT, json=conversation(question, 0)) for question in questions]
    assert {answer.status_code for answer in answers} == {200}
    assert first != second
