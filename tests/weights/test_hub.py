"""The real Hub client against a server on this machine that speaks the part of the Hub's API that we use."""

from __future__ import annotations

import base64
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

from llama4.weights import hub
from tests import small_model
from tests.weights.test_meta import make_reference, params, write_meta

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


class LocalHub(ThreadingHTTPServer):
    """Repositories from directories. `org/gated` wants the token "secret", as does every upload."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts = 0
        """How many more times the weights break off half-way."""
        self.ranges: list[str] = []
        self.created: dict[str, object] = {}
        self.uploads: dict[str, bytes] = {}
        """Large files by their sha256."""
        self.committed: dict[str, bytes] = {}
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

    def do_POST(self) -> None:
        """Creating a repository, and uploading: safetensors go to a store for large files, the rest into the commit."""
        path, token = unquote(urlsplit(self.path).path), self.headers.get("Authorization")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if token != "Bearer secret":
            return self.fail(401, "")
        answer: dict[str, object]
        if path == "/api/repos/create":
            self.server.created = json.loads(body)
            answer = {"url": f"{self.server.url}/org/new"}
        elif path == "/api/models/org/new/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [(name, "lfs" if name.endswith(".safetensors") else "regular") for name in names]
            answer = {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
        elif path == "/org/new.git/info/lfs/objects/batch":
            objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(body)["objects"]]
            places = [{"upload": {"href": f"{self.server.url}/store/{o['oid']}"}} for o in objects]
            answer = {"objects": [o | {"actions": place} for o, place in zip(objects, places, strict=True)]}
        elif path == "/api/models/org/new/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.committed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.committed[value["path"]] = self.server.uploads[value["oid"]]
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/org/new/commit/{COMMIT}"}
        else:
            return self.fail(404, "")
        return self.reply(json.dumps(answer).encode(), {"Content-Type": "application/json"}, with_body=True)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.uploads[self.path.removeprefix("/store/")] = body
        self.reply(b"", {}, with_body=False)

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
                listing = [
                    {"type": "file", "path": f, "size": (directory / f).stat().st_size, "oid": "0"} for f in files
                ]
                return self.reply(json.dumps(listing).encode(), {"Content-Type": "application/json"}, with_body)
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
        if with_body and "Range" in self.headers:
            self.server.ranges.append(self.headers["Range"])
            start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            return self.reply(body[int(start) : int(end or len(body)) + 1], headers, with_body, status=206)
        if with_body and self.server.cuts and file.name == "model.safetensors":
            self.server.cuts -= 1
            return self.reply(body, headers, with_body, sent=len(body) // 2)
        return self.reply(body, headers, with_body)

    def reply(
        self, body: bytes, headers: dict[str, str], with_body: bool, status: int = 200, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[:sent])

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
        timeout=300,
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


def test_a_model_in_metas_layout(server: LocalHub, tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", make_reference(False), params(False), 2)
    (tmp_path / "meta" / "modeling_evil.py").write_text("not for us")
    server.repositories["org/meta"] = tmp_path / "meta"
    result = python(ASK.format(name="org/meta", arguments=""), server, tmp_path / "cache")
    assert int(result.stdout) > 0, result.stderr
    assert server.files_asked() == {"params.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model"}


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


RESOLVE = """
from llama4.weights import hub
print(hub.resolve("org/model"))
"""


def test_an_interrupted_download_goes_on_where_it_stopped(server: LocalHub, tmp_path: Path) -> None:
    """The client keeps what arrived in chunks of 10 MiB."""
    weights = server.repositories["org/model"] / "model.safetensors"
    weights.write_bytes(os.urandom(24 << 20))
    server.cuts = 1
    result = python(RESOLVE, server, tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    assert server.ranges == [f"bytes={10 << 20}-"]
    assert (Path(result.stdout.strip()) / "model.safetensors").read_bytes() == weights.read_bytes()


def test_a_download_that_fails_can_be_tried_again(server: LocalHub, tmp_path: Path) -> None:
    server.cuts = 1000
    failed = python("import time; time.sleep = lambda _: None" + RESOLVE, server, tmp_path / "cache")
    assert "ValueError: org/model could not be fetched from the Hub: " in failed.stderr
    assert failed.stderr.splitlines()[-1].endswith("what has arrived is kept, try again")
    server.cuts = 0
    again = python(RESOLVE, server, tmp_path / "cache")
    weights = server.repositories["org/model"] / "model.safetensors"
    assert (Path(again.stdout.strip()) / "model.safetensors").read_bytes() == weights.read_bytes(), again.stderr


PUSH = """
from llama4.weights import hub
print(hub.push({directory!r}, "org/new", token={token!r}, private=True))
"""


def test_an_upload_is_one_commit_of_every_file(server: LocalHub, tmp_path: Path) -> None:
    directory = small_model.write(tmp_path / "mine")
    result = python(PUSH.format(directory=str(directory), token="secret"), server, tmp_path / "cache")
    assert result.stdout.strip() == f"{server.url}/org/new/commit/{COMMIT}", result.stderr
    assert result.stderr == "", "a pipe is no place for progress"
    assert server.committed == {path.name: path.read_bytes() for path in directory.iterdir()}
    assert (server.created["organization"], server.created["name"]) == ("org", "new")
    assert server.created.get("private") is True or server.created.get("visibility") == "private"


@pytest.mark.parametrize(("token", "reachable"), [("wrong", True), ("secret", False)])
def test_an_upload_that_fails_says_so(server: LocalHub, tmp_path: Path, token: str, reachable: bool) -> None:
    directory = small_model.write(tmp_path / "mine")
    if not reachable:
        server.shutdown()
        server.server_close()
    result = python(PUSH.format(directory=str(directory), token=token), server, tmp_path / "cache")
    assert "ValueError: could not upload to org/new: " in result.stderr
    assert ("401" if reachable else "refused") in result.stderr.splitlines()[-1]


def test_local_names(tmp_path: Path) -> None:
    assert hub.resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="'no-such-model' is no model: give an embedded name"):
        hub.resolve("no-such-model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name the directory"):
        hub.resolve(tmp_path / "file")
