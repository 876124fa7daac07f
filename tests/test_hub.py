"""The real Hub client against a server on this machine that speaks the part of the Hub's API that downloads use."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from llama4 import hub
from tests import small_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


class LocalHub(ThreadingHTTPServer):
    """Repositories from directories. `org/gated` wants the token "secret"."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.requests: list[tuple[str, str, str | None]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files_asked(self) -> set[str]:
        return {path.split("/resolve/")[1].split("/", 1)[1] for _, path, _ in self.requests if "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    server: LocalHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path, token = unquote(urlsplit(self.path).path), self.headers.get("Authorization")
        self.server.requests.append((self.command, path, token))
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").lstrip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        directory = self.server.repositories.get(name)
        if directory is None:
            return self.fail(404, "RepoNotFound")
        if name == "org/gated" and token != "Bearer secret":
            return self.fail(403, "GatedRepo")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER}.get(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound")
        if is_api:
            files = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
            if rest[:1] == ["tree"]:
                body = [{"type": "file", "path": f, "size": (directory / f).stat().st_size, "oid": "0"} for f in files]
                return self.reply(json.dumps(body).encode(), {"Content-Type": "application/json"}, with_body)
            content = {
                "_id": "1",
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": False,
                "tags": [],
                "downloads": 0,
            }
            content["siblings"] = [{"rfilename": file} for file in files]
            return self.reply(json.dumps(content).encode(), {"Content-Type": "application/json"}, with_body)
        file = directory / "/".join(rest[2:])
        if not file.is_file():
            return self.fail(404, "EntryNotFound")
        body = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return self.reply(body, headers, with_body)

    def reply(self, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalHub]:
    model = small_model.write(tmp_path / "model")
    for junk in ("consolidated.00.pth", "pytorch_model.bin", "modeling_evil.py", "original/params.json", "README.md"):
        (model / junk).parent.mkdir(exist_ok=True)
        (model / junk).write_text("not for us")
    local = LocalHub({"org/model": model, "org/gated": model})
    yield local
    local.shutdown()
    local.server_close()


def python(script: str, server: LocalHub, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own: the client reads its endpoint and its cache at import."""
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


ASK = """
from llama4 import Llama4
llm = Llama4.from_pretrained({name!r}, {arguments})
print(llm.complete("hello", max_new_tokens=4).usage.completion_tokens)
"""


def test_a_model_by_its_hub_id(server: LocalHub, tmp_path: Path) -> None:
    """Loads, fetches only what it needs, and works again without the server."""
    script = ASK.format(name="org/model", arguments="revision='v1', token='abc'")
    first = python(script, server, tmp_path / "cache")
    assert first.stdout.strip() == "4", first.stderr
    assert first.stderr == "", "a pipe is no place for progress"
    needed = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.model"}
    assert server.files_asked() == needed
    assert all("v1" in path or OLDER in path for _, path, _ in server.requests)
    assert {token for _, _, token in server.requests} == {"Bearer abc"}

    server.requests.clear()
    offline = python(script, server, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout, offline.stderr
    assert not server.requests
    server.shutdown()
    server.server_close()
    unreachable = python(script, server, tmp_path / "cache")
    assert unreachable.stdout == first.stdout, unreachable.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("org/nothing", "", "'org/nothing' is neither a directory here nor a repository on the Hub"),
        ("org/gated", "", "org/gated is gated: accept its licence"),
        ("org/model", "revision='v9'", "org/model has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses(server: LocalHub, tmp_path: Path, name: str, arguments: str, message: str) -> None:
    result = python(ASK.format(name=name, arguments=arguments), server, tmp_path / "cache")
    assert result.returncode
    assert f"ValueError: {message}" in result.stderr


def test_a_token_opens_a_gated_model(server: LocalHub, tmp_path: Path) -> None:
    result = python(ASK.format(name="org/gated", arguments="token='secret'"), server, tmp_path / "cache")
    assert result.stdout.strip() == "4", result.stderr


def test_offline_and_not_in_the_cache(server: LocalHub, tmp_path: Path) -> None:
    result = python(ASK.format(name="org/model", arguments=""), server, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert "org/model is not in the local cache and the Hub cannot be reached" in result.stderr


def test_local_names(tmp_path: Path) -> None:
    assert hub.resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="'no-such-model' is no model: give an embedded name"):
        hub.resolve("no-such-model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name the directory"):
        hub.resolve(tmp_path / "file")
