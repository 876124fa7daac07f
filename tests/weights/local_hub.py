"""A server on this machine that speaks the part of the Hub's API that `huggingface_hub`'s own client uses: listings,
files with ranges, and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


class LocalHub(ThreadingHTTPServer):
    """Repositories from directories. `org/gated` wants the token "secret", as does every upload, which goes to
    `org/new` or, if it is there already, `org/model`."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts = 0
        """How many more times the weights break off half-way."""
        self.has_ranges = True
        """Whether it knows ranges; else it sends all."""
        self.ranges: list[str] = []
        self.sent: dict[str, int] = {}
        """Bytes of each file that went out."""
        self.created: dict[str, object] = {}
        self.private = False
        """Whether what is created is."""
        self.branches: list[str] = []
        self.uploads: dict[str, bytes] = {}
        """Large files by their sha256."""
        self.committed: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []
        """Of each: its revision, whether it is a pull request, its message, and the files that it deletes."""
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
        address = urlsplit(self.path)
        path, token = unquote(address.path), self.headers.get("Authorization")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if token != "Bearer secret":
            return self.fail(401, "")
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2]).removesuffix(".git")
        answer: dict[str, object]
        if path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif path == "/api/repos/create":
            self.server.created = json.loads(body)
            name = f"{self.server.created['organization']}/{self.server.created['name']}"
            answer = {"url": f"{self.server.url}/{name}"}
            if name in self.server.repositories:
                return self.reply(json.dumps(answer).encode(), {}, with_body=True, status=409)
            self.server.private = "private" in (self.server.created.get("visibility"), *self.server.created)
            self.server.repositories[name] = Path("/nonexistent")
        elif path.startswith(f"/api/models/{name}/branch/"):
            self.server.branches.append(path.rpartition("/branch/")[2])
            answer = {}
        elif path.startswith(f"/api/models/{name}/preupload/"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [(name, "lfs" if name.endswith(".safetensors") else "regular") for name in names]
            answer = {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
        elif path == f"/{name}.git/info/lfs/objects/batch":
            objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(body)["objects"]]
            places = [{"upload": {"href": f"{self.server.url}/store/{o['oid']}"}} for o in objects]
            answer = {"objects": [o | {"actions": place} for o, place in zip(objects, places, strict=True)]}
        elif path.startswith(f"/api/models/{name}/commit/"):
            commit = {"revision": path.rpartition("/commit/")[2], "is_pr": "create_pr=1" in address.query}
            deleted = []
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    commit["message"] = value["summary"]
                elif line["key"] == "file":
                    self.server.committed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.committed[value["path"]] = self.server.uploads[value["oid"]]
                elif line["key"] == "deletedFile":
                    deleted.append(value["path"])
            self.server.commits.append(commit | {"deleted": sorted(deleted)})
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}"}
            if commit["is_pr"]:
                answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/1"
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
        raw = urlsplit(self.path).path
        parts = [unquote(part) for part in raw.removeprefix("/api/models/").lstrip("/").split("/")]
        name, rest = "/".join(parts[:2]), parts[2:]
        directory = self.server.repositories.get(name)
        if directory is None:
            return self.fail(404, "RepoNotFound")
        if name == "org/gated" and token != "Bearer secret":
            return self.fail(403, "GatedRepo")
        revision = rest[1] if len(rest) > 1 else "main"
        commits = {"main": COMMIT, COMMIT: COMMIT, "v1": OLDER, OLDER: OLDER, "refs/pr/7": COMMIT}
        commit = (commits | dict.fromkeys(self.server.branches, COMMIT)).get(revision)
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
                "private": self.server.private,
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
        if with_body and "Range" in self.headers and self.server.has_ranges:
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
            file = unquote(urlsplit(self.path).path).rpartition("/")[2]
            self.server.sent[file] = self.server.sent.get(file, 0) + len(body[:sent])
            self.wfile.write(body[:sent])

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def environment(server: LocalHub, cache: Path) -> dict[str, str]:
    """Of a process whose Hub is the server: the client reads its endpoint and its cache at import."""
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return os.environ | settings | {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}


def use(server: LocalHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the server the Hub of this process."""
    url = server.url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    values = {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_CACHE": str(cache / "hub")}
    values |= {"HF_TOKEN_PATH": str(cache / "token")}
    flags = {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_OFFLINE": False}
    for name, value in (values | flags).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # it knows the proxies that there were


def python(script: str, server: LocalHub, cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment(server, cache) | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
