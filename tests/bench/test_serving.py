"""`llama4 bench serve`: what it says of servers that are right, wrong, and gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from llama4 import Llama4
from llama4.bench.serving import command
from llama4.bench.serving.client import Target, TimedReply
from llama4.bench.serving.crowd import Visitor, crowd, judge
from llama4.bench.serving.load import Prompts, StreamTimer, Workload, figure, percentile
from llama4.errors import ArgumentError, Llama4Error
from llama4.serve.app import Settings
from tests.serve.running import Running, until


@pytest.fixture(scope="module")
def llm() -> Llama4:
    return Llama4.from_pretrained("tiny", progress=False)


@pytest.fixture(scope="module")
def running(llm: Llama4) -> Iterator[Running]:
    server = Running(llm, Settings("model"))
    yield server
    server.close()


def test_a_crowd(llm: Llama4, running: Running) -> None:
    """All manners at once: who stays has the reply of the library; no task, connection or block is left."""
    target = Target(running.url, "model")
    asyncio.run(target.chat(Visitor(0, "plain").body()))
    tasks = running.num_tasks
    report, replies = asyncio.run(crowd(target, 2**22 + 1, 60, lambda: None))
    until(running.is_idle)
    expected = {number: Visitor.of(number).expected(llm) for number in replies}
    seen = judge(report, replies, expected)
    assert (seen["stayed"], seen["right"], seen["left"], seen["mixed"], seen["wrong"]) == (45, 45, 15, 0, 0)
    assert seen["failures"] == [] and seen["distinct_replies"] > 40 and seen["slow"] == 15
    until(lambda: running.num_tasks <= tasks and not running.connections)
    assert running.engine.scheduler.pool.used == 0


def test_another_s_reply_is_seen() -> None:
    seen = judge({}, {1: "a", 2: "a", 3: "x", 4: "d"}, {1: "a", 2: "b", 3: "c", 4: "d"})
    assert (seen["right"], seen["mixed"], seen["wrong"]) == (2, 1, 1)


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    """Connections and requests at a server in a process of its own."""
    saved = tmp_path / "report.json"
    options = ["--parts", "connections", "endurance", "--connections", "12", "--requests", "40"]
    assert command.main([*options, "--save", str(saved)]) == 0
    said, report = capsys.readouterr().out, json.loads(saved.read_text())
    assert "of 9 that stay 9 have the reply of llm.chat" in said and "40 requests by 16 clients" in said
    assert report["endurance"]["right"] + report["endurance"]["left"] == 40
    assert not command.is_right({**report["endurance"], "wrong": 1})
    assert not command.is_right({**report["connections"], "failures": ["x"]})


def test_throughput(running: Running, monkeypatch: Any, capsys: Any) -> None:
    """Of servers that run already and of our own, beside `llm.stream`."""

    class Here:
        target, pid = Target(running.url, "model"), 0

        def __init__(self, *given: object) -> None:
            self.timer = StreamTimer("tiny", None) if given[0] is StreamTimer else None

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *given: object) -> None:
            pass

        def call(self, method: str, body: Any) -> Any:
            assert method == "stream" and self.timer is not None
            return self.timer.stream(body)

    monkeypatch.setattr(command, "Served", Here)
    monkeypatch.setattr(command, "Worker", Here)
    options = [
        "tiny",
        "--parts",
        "throughput",
        "--vs",
        running.url,
        "--clients",
        "1",
        "2",
        "--least",
        "2",
        "--pairs",
        "2",
    ]
    options += ["--lengths", "8", "40", "--shared", "16", "--reply", "3"]
    assert command.main([*options, "--json"]) == 0
    part = json.loads(capsys.readouterr().out)["throughput"]
    assert [(each["server"], each["clients"]) for each in part["figures"]] == [
        ("llama4", 1),
        (running.url, 1),
        ("llama4", 2),
        (running.url, 2),
    ]
    for each in part["figures"]:
        (seen,) = each["rounds"]
        assert seen["answered"] == seen["asked"] == max(2, 2 * each["clients"])
        assert seen["tokens"] == 3 * seen["asked"] and seen["tokens_per_second"] > 0
        assert 0 < seen["first_token_p50"] <= seen["first_token_p95"] < seen["seconds"]
    assert part["one_client_against_stream"][0]["pairs"] >= 1
    assert command.main([*options, "--seconds", "0.0001"]) == 0
    assert "0/2" in capsys.readouterr().out


def test_prompts() -> None:
    """Of the lengths that were asked for; every other one begins like all others of its kind, and nothing else does."""
    prompts = Prompts("tiny", Workload(8, 40, 16, 5), seed=1)
    texts = [body["messages"][0]["content"] for body in prompts.bodies(20)]
    assert len({text.split()[0] for text in texts[1::2]}) == 1 and len({text[:20] for text in texts[::2]}) == 10
    counts = [len(prompts._tokenizer.encode(text)) for text in texts]
    assert all(7 <= count <= 60 for count in counts) and all(count >= 30 for count in counts[1::2])
    assert Prompts("tiny", Workload(8, 40, 16, 5), seed=1).bodies(20) == Prompts(
        "tiny", Workload(8, 40, 16, 5), seed=1
    ).bodies(20)


def test_figures_are_of_what_came() -> None:
    answers = [TimedReply(tokens=11, begun=10.0, first=10.0 + wait, last=20.0) for wait in (1.0, 2.0, 3.0)]
    seen = figure(answers, clients=3, asked=4, begun=10.0)
    assert seen["tokens_per_second"] == 3.3 and seen["answered"] == 3
    assert (seen["first_token_p50"], seen["first_token_p95"], seen["between_tokens"]) == (2.0, 3.0, 0.8)
    one = figure([TimedReply(tokens=1, begun=0.0, first=1.0, last=1.0)], clients=1, asked=1, begun=0.0)
    work = {"shortest": 1, "longest": 1, "shared": 0, "new": 1}
    part = {
        "workload": work,
        "figures": [{"server": "s", "clients": 1, "rounds": [one]}],
        "one_client_against_stream": [],
    }
    assert command._throughput_tables(part, markdown=False)[1].split()[-1] == "1/1"
    assert [percentile(range(1, 101), percent) for percent in (50, 95, 1)] == [50, 95, 1]


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (429, b"busy", "busy"),
        (200, b'data: {"error": {"message": "no memory"}}\n\n', "no memory"),
        (200, b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "broke off"),
        (0, b"", "broke off, or is no HTTP server"),
    ],
)
def test_a_server_that_fails_is_quoted(status: int, content: bytes, said: str) -> None:
    class Failing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if status:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *values: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        Thread(target=server.handle_request).start()
        with pytest.raises(Llama4Error, match=said):
            asyncio.run(Target(f"http://127.0.0.1:{server.server_port}/v1", "x").chat({"messages": []}))


def test_a_server_that_refuses_a_field_is_asked_without() -> None:
    class Strict(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(422 if "ignore_eos" in body else 200)
            self.end_headers()
            said = b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n'
            self.wfile.write(b"Unexpected fields: {'ignore_eos'}" if "ignore_eos" in body else said)

        def log_message(self, format: str, *values: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Strict) as server:
        Thread(target=server.serve_forever).start()
        target = Target(f"http://127.0.0.1:{server.server_port}", "x")
        assert command._warmed(target, {"messages": [], "ignore_eos": True}).leaves_out == ("ignore_eos",)
        server.shutdown()


def test_mistakes() -> None:
    for options in (["--parts", "throughput"], ["tiny", "--lengths", "9", "8"], ["tiny", "--shared", "512"]):
        with pytest.raises(ArgumentError):
            command.main(options)
    with pytest.raises(ArgumentError, match="no address"):
        Target("localhost:8000", "x")
