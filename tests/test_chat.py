"""`llama4 chat`: its commands, its files, its keys in a terminal, and a server that answers."""

from __future__ import annotations

import base64
import codecs
import fcntl
import importlib.util
import io
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llama4 import Llama4, Llama4Error
from llama4.arguments import printable
from llama4.cli import chat
from llama4.cli.chat import answers
from llama4.cli.chat.answers import Remote
from llama4.cli.chat.commands import completions, file_names
from llama4.cli.chat.conversation import Conversation
from llama4.cli.chat.printing import MarkdownPrinter, TerminalPrinter, speed, split_blocks
from llama4.cli.chat.reading import LineReader
from llama4.cli.main import main

PICTURE = Path(__file__).parents[1] / "examples" / "shapes.png"
HAS_PROMPT = importlib.util.find_spec("prompt_toolkit") is not None
HAS_RICH = importlib.util.find_spec("rich") is not None


class Fake(ThreadingHTTPServer):
    """A server in OpenAI's form, whose replies are written here.

    Attributes:
        replies: the next answers: the pieces of a text, a status with a body, or all bytes.
        bodies: what was asked.
        gone: set when a client left an answer that has no end.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[list[str] | tuple[int, bytes] | bytes | None] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.gone = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *arguments: Any) -> None: ...

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["authorization"])
        self.send(200, b'{"data": [{"id": "fake\\u001b[31m"}]}')

    def event(self, content: Any) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

    def piece(self, text: str) -> None:
        self.event({"choices": [{"delta": {"content": text}, "finish_reason": None}]})

    def do_POST(self) -> None:
        self.server.keys.append(self.headers["authorization"])
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        reply = self.server.replies.pop(0)
        if isinstance(reply, tuple):
            self.send(*reply, location=f"{self.server.url}/elsewhere")
            return
        if isinstance(reply, bytes):
            self.wfile.write(reply)
            return
        self.send(200)
        if reply is None:
            try:
                while True:
                    self.piece("on and ")
                    time.sleep(0.01)
            except OSError:
                self.server.gone.set()
                return
        for text in reply:
            self.piece(text)
        self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self.event({"choices": [], "usage": {"completion_tokens": 7}})
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Lines in, and what a pipe sees."""

    def run(lines: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = main(["chat", *arguments])
        return code, *capsys.readouterr()

    return run


def said(fake: Fake) -> list[list[str]]:
    return [[message["content"] for message in body["messages"]] for body in fake.bodies]


# -- through pipes -------------------------------------------------------------------------------------------------


def test_commands(fake: Fake, talk: Talk, tmp_path: Path) -> None:
    fake.replies = [["one"], ["two"], ["three"], ["four"], ["five"], ["six"]]
    file = tmp_path / "my talk.json"
    lines = f"""\
/system Be brief.
a
b
/retry
/undo
c
/save "{file}"
/clear
d
/load '{file}'
/set temperature 0.5
/set max_new_tokens 9
/system ""
\"\"\"
/several
  lines
\"\"\"
/set
/nonsense
/quit
never
"""
    code, out, err = talk(lines, "--server", fake.url, "--seed", "3")
    assert (code, err) == (1, "error: /nonsense is no command; /help shows those there are\n")
    assert said(fake) == [
        ["Be brief.", "a"],
        ["Be brief.", "a", "one", "b"],
        ["Be brief.", "a", "one", "b"],
        ["Be brief.", "a", "one", "c"],
        ["Be brief.", "d"],
        ["a", "one", "c", "four", "/several\n  lines"],
    ]
    assert [body["seed"] for body in fake.bodies] == [3, 3, 4, 3, 3, 3], "a reply that is asked again is another one"
    assert [(body.get("temperature"), body["max_tokens"]) for body in fake.bodies[-2:]] == [(None, 256), (0.5, 9)]
    assert f"Saved 5 messages in {file}." in out and f"Loaded 4 messages of {file}." in out
    assert "temperature 0.5\n" in out and "top_p (not set)\n" in out
    assert out.endswith("chat_template_kwargs (not set)\n")
    assert json.loads(file.read_text())["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_picture_with_blanks_in_its_name_is_seen_saved_and_loaded(talk: Talk, tmp_path: Path) -> None:
    picture = shutil.copy(PICTURE, tmp_path / "my 'own' picture.png")
    written = str(picture).replace(" ", "\\ ").replace("'", "\\'")
    file = tmp_path / "talk.json"
    names = (str(picture), f'"{picture}"', written)
    asked = "".join(f"/clear\n/image {name}\nWhat colour is the circle?\n" for name in names)
    code, out, err = talk(f"{asked}/save {file}\n", "--model", "tiny")
    each = "A new conversation.\nAdded picture 1 to your next message.\nRed.\n"
    assert (code, err, out) == (0, "", f"{each * 3}Saved 2 messages in {file}.\n")
    code, out, err = talk(f"/load {file}\nWhat colour is the star?\n/undo\n/retry\n", "--model", "tiny")
    assert (err, out.splitlines()[1:]) == ("", ["Blue.", "Took back your last message and its reply.", "Red."])


def test_the_model_is_named_with_or_without_the_option(fake: Fake, talk: Talk) -> None:
    assert talk("", "nowhere.gguf") == talk("", "--model", "nowhere.gguf")
    assert talk("", "nowhere.gguf")[2].startswith("llama4: error: 'nowhere.gguf' is no model")
    assert "is named twice, 'a' and --model 'b'" in talk("", "a", "--model", "b")[2]
    fake.replies = [["Yes."]]
    assert talk("Well?\n", "mine", "--server", fake.url)[0] == 0 and fake.bodies[0]["model"] == "mine"


def test_a_server_of_ours_answers_as_the_model_does(talk: Talk) -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("httpx")
    from llama4.serve.app import Settings
    from tests.serve.running import Running

    running = Running(Llama4.from_pretrained("tiny", progress=False), Settings("tiny", api_key="secret"))
    lines = f"/image {PICTURE}\nWhat colour is the circle?\nAnd the star?\n/set temperature 1\n/set seed 7\nHello\n"
    try:
        remote = talk(lines, "--server", f"{running.url}/v1/", "--api-key", "secret")
        wrong = talk("", "--server", running.url, "--api-key", "wrong")
    finally:
        running.close()
    assert remote == talk(lines, "--model", "tiny")
    assert wrong[0] == 1 and wrong[2].startswith("llama4: error: the server says: the API key is missing or wrong")


def test_a_question_stopped_before_its_answer_leaves_its_pictures(
    fake: Fake, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, stops = Remote.stream, iter([True, False, False])

    def stopped_once(self: Remote, *arguments: Any) -> Iterator[str]:
        if next(stops):
            raise KeyboardInterrupt
        return stream(self, *arguments)

    monkeypatch.setattr(Remote, "stream", stopped_once)
    fake.replies = [["one"], ["two"]]
    code, out, _ = talk(f"/image {PICTURE}\na\nb\nc\n", "--server", fake.url)
    assert code == 0 and "(stopped)" in out
    first, second = (body["messages"] for body in fake.bodies)
    assert [part["type"] for part in first[0]["content"]] == ["image_url", "text"]
    assert first[0]["content"][1]["text"] == "b" and second[-1]["content"] == "c"


def test_files_of_others_are_left_alone(fake: Fake, talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text('{"a": 1}')
    part = {"type": "image_url", "image_url": {"url": "/etc/hostname"}}
    (tmp_path / "bad.json").write_text(json.dumps({"messages": [{"role": "user", "content": [part]}]}))
    (tmp_path / "not.json").write_text("no")
    lines = "\n".join(f"{line}" for line in (
        f"/save {tmp_path}/notes.json", f"/load {tmp_path}/notes.json", f"/load {tmp_path}/bad.json",
        f"/load {tmp_path}/not.json", "/load", '/image "a', "/retry", "/undo", "/set nothing 1", "/set seed x",
    ))  # fmt: skip
    code, out, err = talk(lines, "--server", fake.url)
    assert (code, out) == (1, "")
    reasons = [
        "is no conversation; choose another name", 'has no list of "messages"', "without its data", "is not valid JSON",
        "/load needs one file", "a quote is open", "there is no question yet", "nothing to take back",
        "there is no option 'nothing'", "is no value for seed",
    ]  # fmt: skip
    errors = err.splitlines()
    assert len(errors) == len(reasons)
    for line, reason in zip(errors, reasons, strict=True):
        assert line.startswith("error: ") and reason in line
    assert (tmp_path / "notes.json").read_text() == '{"a": 1}'


def test_each_retry_is_another_reply(fake: Fake, talk: Talk) -> None:
    """And what comes after them is drawn with the seed that was given."""
    fake.replies = [["one"], ["two"], ["three"], ["four"], ["five"]]
    assert talk("a\n/retry\n/retry\nb\n/retry\n", "--server", fake.url, "--seed", "3")[0] == 0
    assert [body["seed"] for body in fake.bodies] == [3, 4, 5, 3, 4]


def test_a_question_that_was_loaded_is_not_lost_by_a_retry_that_fails(fake: Fake, talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    fake.replies = [(500, b""), ["one"]]
    code, out, _ = talk(f"/load {tmp_path}/talk.json\n/retry\n/retry\n", "--server", fake.url)
    assert code == 1 and out.endswith("one\n") and said(fake) == [["a"], ["a"]]


def test_what_a_server_may_do(fake: Fake, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA4_API_KEY", "of-the-environment")
    error = json.dumps({"error": {"message": "too\u001b[2Jlong"}}).encode()
    fake.replies = [(400, error), (307, b""), (500, b"<html>"), ["fine"], ["again"]]
    code, out, err = talk("a\nb\nc\nd\n/retry\n", "--server", fake.url)
    assert (code, out) == (1, "fine\nagain\n")
    assert err.splitlines() == [
        "error: the server says: too\ufffd[2Jlong",
        "error: the server says: 307 Temporary Redirect",
        "error: the server says: 500 Internal Server Error",
    ]
    assert said(fake) == [["a"], ["b"], ["c"], ["d"], ["d"]], "what failed was not said"
    assert set(fake.keys) == {"Bearer of-the-environment"}
    for arguments, reason in (
        (["--server", "localhost:8000"], "is no address"),
        (["--server", f"{fake.url}/none/v1"], None),
        (["--server", "http://127.0.0.1:9"], "does not answer"),
        (["--api-key", "x"], "--api-key is for --server"),
        (
            ["--server", fake.url, "--quantization", "int4", "--adapter", "a", "--no-memory-map"],
            "leave out --quantization, --no-memory-map, --adapter",
        ),
    ):
        code, _, err = talk("", *arguments)
        assert (code == 0) == (reason is None)
        assert (reason or "") in err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_ctrl_c_in_a_command_leaves_the_conversation(
    is_terminal: bool, fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal; a pipe ends."""

    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    reader = LineReader(is_interactive=is_terminal)
    monkeypatch.setattr(chat, "make_reader", lambda **_: reader)
    monkeypatch.setattr("sys.stdin", Typed("a\n/image http://slow.example/\nb\n"))
    monkeypatch.setattr(Conversation, "add_picture", interrupted)
    fake.replies = [["fine"], ["again"]]
    code = main(["chat", "--plain", "--server", fake.url])
    out, err = capsys.readouterr()
    if is_terminal:
        assert (code, err) == (0, "") and "(stopped)" in out and said(fake) == [["a"], ["a", "fine", "b"]]
    else:
        assert (code, err, said(fake)) == (130, "llama4: interrupted\n", [["a"]])


@pytest.mark.parametrize("endless", ["event", "line", "header", "piece"])
def test_a_server_without_end(endless: str, fake: Fake, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left after so many bytes."""
    monkeypatch.setattr(answers, "MAX_STREAM", 1 << 16)
    monkeypatch.setattr(answers, "MAX_EVENT", 1 << 14)
    left = threading.Event()

    def on_and_on(handler: _Handler) -> None:
        handler.rfile.read(int(handler.headers["content-length"]))
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n" + b"\r\n" * (endless != "header"))
        pieces = {"event": b": nothing\n\n", "line": b"x", "header": b"x: y\r\n"}
        piece = pieces.get(endless) or f"data: {json.dumps(delta(content='y'))}\n\n".encode()
        try:
            while True:
                handler.wfile.write(piece * 1000)
        except OSError:
            left.set()

    monkeypatch.setattr(_Handler, "do_POST", on_and_on)
    code, _, err = talk("a\n", "--server", fake.url)
    assert code == 1 and left.wait(60)
    wanted = "does not answer (got more than 100 headers)" if endless == "header" else "sent more than 64.0 KiB"
    assert wanted in err and len(err.splitlines()) == 1


def test_what_is_saved_and_loaded_can_be_used(fake: Fake, talk: Talk, tmp_path: Path) -> None:
    def user(content: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "a"}, {"role": "user", "content": content}]

    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    (tmp_path / "picture.json").write_text(json.dumps({"messages": user([part])}))
    (tmp_path / "half.json").write_text(json.dumps({"messages": user("\ud800")}))
    picture = {"type": "image_url", "image_url": {"url": _data_url()}, "text": None}
    system = [picture, {"type": "text", "text": "be"}]
    (tmp_path / "system.json").write_text(json.dumps({"messages": [{"role": "system", "content": system}]}))
    fake.replies = [stream_of(delta(content="x\udc00y"))]
    loads = "".join(f"/load {tmp_path}/{name}.json\n" for name in ("picture", "half", "system"))
    lines = f"{loads}/system\n/clear\n/system -\nb\n/save {tmp_path}/new.json\n"
    code, out, err = talk(lines, "--server", fake.url)
    assert code == 1 and f"Saved 2 messages in {tmp_path}/new.json" in out and "\nbe\n" in out
    first, second = err.splitlines()
    assert f"the picture of message 1 of {tmp_path}/picture.json cannot be used" in first
    assert f"message 1 of {tmp_path}/half.json has half of a surrogate pair" in second
    saved = json.loads((tmp_path / "new.json").read_text(encoding="utf-8"))
    assert saved["messages"][1]["content"] == "x\udc00y"


def _data_url() -> str:
    return "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()


def stream_of(*events: Any, end: bytes = b"data: [DONE]\n\n") -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
    return b"HTTP/1.0 200 OK\r\n\r\n" + b"".join(lines) + end


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields}]}


def test_a_hostile_server_costs_a_line(fake: Fake, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_STREAM", 4000)
    one = len(f"data: {json.dumps(delta(content='y'))}\n\n")
    deep = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "[" * 100_000}}
    cases: list[tuple[bytes, str, str]] = [
        (stream_of(delta(tool_calls=[{"index": -200}])), "", "tool call -200"),
        (stream_of(delta(tool_calls=[{"index": 0, "function": {"name": ["f"]}}])), "", "OpenAI's form"),
        (stream_of(delta(content="x"), {"usage": {"completion_tokens": 10**400}}), "x\n", ""),
        (stream_of(*[delta(content="y")] * 200), "y" * (4001 // one) + "\n", "more than 3.9 KiB"),
        (stream_of(delta(content="cut"), end=b""), "cut\n", "the server broke off"),
        (stream_of(delta(content="cut"), {"error": "boom\x1b[2J"}), "cut\n", "the server says: boom\ufffd[2J"),
        (b"HTTP/1.0 500 no\x1b[31m\x9b31m\r\n\r\n", "", "500 no\ufffd[31m\ufffd31m"),
    ]
    for reply, shown, reason in cases:
        fake.replies = [reply, ["fine"]]
        code, out, err = talk("a\nb\n", "--server", fake.url)
        assert (code, out) == (int(bool(reason)), f"{shown}fine\n"), reason
        assert reason in err and len(err.splitlines()) == bool(reason)
        assert not set(err) & {"\x1b", "\x9b"}
    monkeypatch.undo()
    fake.replies = [stream_of(delta(tool_calls=[deep])), ["fine"]]
    monkeypatch.setattr("sys.stdin", io.StringIO())
    code, out, err = talk("a\nb\n", "--server", fake.url)
    assert (code, out, err) == (0, json.dumps({"name": "f", "arguments": "[" * 100_000}) + "\nfine\n", "")


@pytest.mark.parametrize(
    ("server", "key", "named"),
    [
        ("http://user:secret@127.0.0.1:1", "x", "--server"),
        ("user:secret@127.0.0.1:1", "x", "--server"),
        ("http://h\u00e9/", "x", "--server"),
        ("http://127.0.0.1:99999999", "x", "--server"),
        ("http://127.0.0.1:1", "secret\n", "--api-key"),
        ("http://127.0.0.1:1", "secr\u00e9t", "--api-key"),
    ],
)
def test_errors_name_the_option_and_show_no_secret(talk: Talk, server: str, key: str, named: str) -> None:
    code, _, err = talk("", "--server", server, "--api-key", key)
    assert code == 2 and named in err and "secr" not in err


def test_models_that_break_off() -> None:
    broken = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as client:
                client.recv(65536)
                client.sendall(broken)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(Llama4Error, match="the server broke off"):
            Remote(f"http://127.0.0.1:{server.getsockname()[1]}", None)
        thread.join()


# -- by themselves -------------------------------------------------------------------------------------------------


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a b.PNG", "a.txt", ".hidden.png", "talk.json", "it's.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "my dir").mkdir()
    (tmp_path / "my dir" / "in.gif").touch()
    assert completions("/im") == ["/image "]
    assert completions("/s") == ["/system ", "/set ", "/save "]
    assert completions("hello") == completions("/image")[1:] == completions("") == completions("/clear x") == []
    assert completions("/set te") == ["/set temperature "]
    assert completions("/image a") == ["/image 'a b.PNG'", "/image a.png"]
    assert completions("/image a.png 'a ") == ["/image a.png 'a b.PNG'"]
    assert completions("/image a\\ ") == ["/image 'a b.PNG'"]
    assert completions("/image my") == ["/image 'my dir/"]
    assert completions("/image 'my dir/") == ["/image 'my dir/in.gif'"]
    assert completions("/load ") == ["/load 'my dir/", "/load talk.json"]
    (line,) = completions("/image it")
    assert file_names(line.removeprefix("/image ")) == ["it's.jpg"]
    assert file_names("a b.PNG") == ["a b.PNG"]
    assert file_names("a.png b.png") == ["a.png", "b.png"]
    assert completions("/image " + "x/" * 5000) == []


def test_blocks_and_control_characters() -> None:
    assert split_blocks("a\n\nb") == ("a\n\n", "b")
    assert split_blocks("```\na\n\nb") == ("", "```\na\n\nb")
    assert split_blocks("````\n```\n\n````\n\nc") == ("````\n```\n\n````\n\n", "c")
    assert split_blocks("\n\n") == ("", "\n\n")
    assert printable("a\x1b]0;x\x07\tb\r\nc\r\u202ed\x9b") == "a\ufffd]0;x\ufffd\tb\nc\ufffd\ufffdd\ufffd"
    assert [speed(1, 0.0), speed(2, 0.5), speed(1001, 2)] == [
        "1 token",
        "2 tokens, 2.0 a second",
        "1,001 tokens, 500 a second",
    ]


def test_a_line_break_may_be_cut_in_two(capsys: pytest.CaptureFixture[str]) -> None:
    printer = TerminalPrinter()
    for reply in (["a\r", "\nb\x07", "\r", "c\r"], ["\nd\r\n"]):
        for piece in reply:
            printer.write(piece)
        printer.end("")
    assert capsys.readouterr().out == "a\nb\ufffd\nc\n" + "\nd\n\n"


@pytest.mark.skipif(not HAS_RICH, reason="rich is not installed")
def test_one_empty_line_between_blocks() -> None:
    from rich.console import Console

    out = io.StringIO()
    printer = MarkdownPrinter(Console(file=out, width=40))
    for piece in "a\n\n- b\n- c\n\n\n```py\nd = 1\n\ne = 2\n```\n\n| f |\n|---|\n| g |\n\nh":
        printer.write(piece)
    printer.end("")
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines == ["a", "", " • b", " • c", "", " d = 1", "", " e = 2", "", " f", " ─", " g", "", "h"]


# -- in a terminal -------------------------------------------------------------------------------------------------


class Terminal:
    """A program with a terminal of its own."""

    def __init__(self, *arguments: str, state: Path, term: str) -> None:
        import pty

        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (30, 300))  # no line is wrapped
        environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": term, "PROMPT_TOOLKIT_NO_CPR": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llama4", "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.seen, self._decoder = "", codecs.getincrementaldecoder("utf-8")("replace")  # a read may end in a character

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, wanted: str) -> str:
        """What is written up to this expression."""
        end = time.monotonic() + 60
        while not (found := re.search(wanted, self.seen)):
            assert time.monotonic() < end, f"{wanted!r} did not come, but {self.seen[-2000:]!r}"
            self._read(1)
        before, self.seen = self.seen[: found.start()], self.seen[found.end() :]
        return before

    def _read(self, seconds: float) -> None:
        """What comes within this time, or nothing."""
        if select.select([self._ours], [], [], seconds)[0]:
            self.seen += self._decoder.decode(os.read(self._ours, 4096))

    def interrupt(self, wanted: str) -> None:
        """Ctrl-C until this is written: Python's readline sleeps through a signal that comes just before it waits."""
        for _ in range(12):
            self.type("\x03")
            end = time.monotonic() + 5
            while time.monotonic() < end:
                self._read(0.2)
                if re.search(wanted, self.seen):
                    self.until(wanted)
                    return
        self.until(wanted)

    def ends(self) -> int:
        return self._process.wait(60)


PROMPT = r">( |\x08|\x1b\[\d+[CD])"
"""`> `, as it is and as prompt_toolkit writes it."""
HOSTILE = ["x\x1b[2J\x1b]0;title\x07", "**bold**\n\n", "```\n\x9b31m\n```"]


def test_a_plain_terminal(fake: Fake, tmp_path: Path) -> None:
    pytest.importorskip("readline")
    fake.replies = [HOSTILE, None, ["after"]]
    shutil.copy(PICTURE, tmp_path / "only one.png")
    with Terminal("--server", fake.url, state=tmp_path, term="dumb") as terminal:
        assert "fake\ufffd[31m. /help" in terminal.until(PROMPT)
        terminal.type("hi\n")
        shown = terminal.until("7 tokens")
        assert "x\ufffd[2J\ufffd]0;title\ufffd**bold**" in shown and "\ufffd31m" in shown
        assert "\x1b[2J" not in shown and "\x1b]0" not in shown
        terminal.until(PROMPT)
        terminal.type("half a line")
        terminal.until("half a line")
        terminal.interrupt(r"\(Ctrl-D leaves\)")
        terminal.until(PROMPT)
        terminal.type(f"/im\t{tmp_path}/on\t\n")
        terminal.until("Added picture 1")
        terminal.until("1 picture")
        terminal.until(PROMPT)
        terminal.type("go on\n")
        terminal.until("on and on and ")
        terminal.type("\x03")
        terminal.until(r"\(stopped\)")
        assert fake.gone.wait(20), "the server is left"
        terminal.until(PROMPT)
        terminal.type('"""\n')
        terminal.until(r"\. ")
        terminal.type("two\n")
        terminal.until(r"\. ")
        terminal.type('lines"""\n')
        terminal.until("after")
        terminal.until(PROMPT)
        terminal.type("\x04")
        assert terminal.ends() == 0
    assert [part["type"] for part in fake.bodies[1]["messages"][-1]["content"]] == ["image_url", "text"]
    stopped, asked = (message["content"] for message in fake.bodies[2]["messages"][-2:])
    assert re.fullmatch("(on and )+", stopped) and asked == "two\nlines"
    (history,) = (path for path in (tmp_path / "llama4").iterdir() if path.stat().st_size)
    assert history.stat().st_mode & 0o777 == 0o600
    fake.replies = [["again"]]
    with Terminal("--server", fake.url, state=tmp_path, term="dumb") as terminal:
        terminal.until(PROMPT)
        terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\n")
        terminal.until("again")
    assert fake.bodies[3]["messages"] == [{"role": "user", "content": "go on"}]


@pytest.mark.skipif(not HAS_RICH, reason="rich is not installed")
def test_markdown_in_a_terminal(fake: Fake, tmp_path: Path) -> None:
    fake.replies = [[*HOSTILE, "\n\n[a link](http://example.org/)"], None]
    with Terminal("--server", fake.url, "--no-history", state=tmp_path, term="xterm") as terminal:
        terminal.until(PROMPT)
        terminal.type("hi\r")
        shown = terminal.until("7 tokens")
        assert "\x1b[1mbold\x1b[0m" in shown and "**bold**" not in shown
        assert "\x1b[2J" not in shown and "\x1b]" not in shown and "\x9b" not in shown
        assert "http://example.org/" in shown
        terminal.until(PROMPT)
        terminal.type("go on\r")
        terminal.until("on and on and ")
        terminal.type("\x03")
        terminal.until(r"\(stopped\)")
        terminal.until(PROMPT)
        terminal.type("\x04")
        assert terminal.ends() == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not HAS_PROMPT, reason="prompt_toolkit is not installed")
def test_several_lines_history_and_tab_of_prompt_toolkit(fake: Fake, tmp_path: Path) -> None:
    fake.replies = [["done"], ["done"]]
    shutil.copy(PICTURE, tmp_path / "only one.png")
    for keys in ("one\x1b\rtwo\r", "\x1b[A\x1b[A\r"):
        with Terminal("--server", fake.url, state=tmp_path, term="xterm") as terminal:
            terminal.until(PROMPT)
            if keys.startswith("one"):
                terminal.type("half\x03")
                terminal.until(r"\(Ctrl-D leaves\)")
                terminal.until(PROMPT)
                terminal.type("/ima\t")
                terminal.until("ge\x1b")  # what changed of /image
                terminal.type(f"{tmp_path}/on\t")
                terminal.until("png'")
                terminal.type("\r")
                terminal.until("Added picture 1")
                terminal.until("1 picture")
                terminal.until(PROMPT)
            terminal.type(keys)
            terminal.until("7 tokens")
            terminal.until(PROMPT)
            terminal.type("\x04")
            assert terminal.ends() == 0
    parts = fake.bodies[0]["messages"][0]["content"]
    assert parts[1] == {"type": "text", "text": "one\ntwo"} and parts[0]["type"] == "image_url"
    assert fake.bodies[1]["messages"][0]["content"] == "one\ntwo"
    assert (tmp_path / "llama4" / "chat_history").stat().st_mode & 0o777 == 0o600
