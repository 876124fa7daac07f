"""The real Hub client against a server on this machine that speaks the part of the Hub's API that we use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama4.weights import hub
from tests import small_model
from tests.weights.local_hub import COMMIT, OLDER, LocalHub, python
from tests.weights.test_meta import make_reference, params, write_meta


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
    needed = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.model", "README.md"}
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
    assert f"Llama4Error: {message}" in result.stderr


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
    assert "Llama4Error: org/model could not be fetched from the Hub: " in failed.stderr
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
    assert "Llama4Error: could not upload to org/new: " in result.stderr
    assert ("401" if reachable else "refused") in result.stderr.splitlines()[-1]


def test_local_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'no-such-model' is no model: give an embedded name"):
        hub.resolve("no-such-model")
    (tmp_path / "file").write_text("")
    assert hub.resolve(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="is a file; name the directory"):
        hub.resolve(tmp_path / "file")
