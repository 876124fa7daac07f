"""The page at `/`: what is sent, and that it is sent to everybody who may have it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from starlette.testclient import TestClient

from llama4 import Engine, Llama4
from llama4.serve import page
from llama4.serve.app import Server, Settings


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(Llama4.from_pretrained("tiny", progress=False), cache_memory="8MiB") as engine:
        yield engine


def client(engine: Engine, **settings: object) -> TestClient:
    return TestClient(Server(engine, Settings("tiny", **settings)).app, "http://localhost")  # type: ignore[arg-type]


def test_the_page_needs_no_key_and_what_it_asks_does(engine: Engine) -> None:
    asked = client(engine, api_key="secret")
    assert asked.get("/").text == page.files()["index.html"].decode()
    for name, content in page.files().items():
        answer = asked.get(f"/page/{name}")
        assert (answer.status_code, answer.content) == (200, content)
        assert asked.get(f"/page/{name}", headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    assert asked.get("/v1/models").status_code == asked.get("/props").status_code == 401


@pytest.mark.parametrize("name", ["none.js", "__init__.py", "..%2fapp.py", "%2e%2e/app.py", "../page/main.js%00"])
def test_nothing_else_is_sent(engine: Engine, name: str) -> None:
    answer = client(engine).get(f"/page/{name}")
    assert answer.status_code == 404
    assert "error" in answer.json()


def test_no_page(engine: Engine) -> None:
    asked = client(engine, has_page=False)
    assert asked.get("/").status_code == asked.get("/page/main.js").status_code == 404
    assert asked.get("/health").status_code == 200


def test_headers_forbid_what_is_not_ours(engine: Engine) -> None:
    for path in ("/", "/page/main.js", "/page/icon.svg"):
        headers = client(engine).get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_every_file_is_used_and_names_no_other_address() -> None:
    files = {name: content.decode() for name, content in page.files().items()}
    named = set(re.findall(r'(?:src|href)="page/([\w.]+)"', files["index.html"]))
    for content in files.values():
        named |= set(re.findall(r'from "\./([\w.]+)"', content))
        addresses = set(re.findall(r"https?://[\w.]+", content))
        assert addresses <= {"http://www.w3.org"}, "the name of SVG"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", content)
    assert named | {"index.html"} == set(files)
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", files["index.html"])


def test_files_are_small() -> None:
    assert max(len(content.splitlines()) for content in page.files().values()) < 260
    assert sum(map(len, page.files().values())) < 120_000
