"""What goes to the Hub: `push_to_hub` through the client's own upload, and the model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama4.api import Llama4
from llama4.weights import hub
from tests import small_model
from tests.weights.local_hub import COMMIT, LocalHub, use


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def server(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    local = LocalHub({"org/model": directory})
    use(local, tmp_path / "cache", monkeypatch)
    yield local
    local.shutdown()
    local.server_close()


@pytest.fixture
def there(server: LocalHub, tmp_path: Path) -> Path:
    """A repository with an older model in two files, and a card."""
    repo = tmp_path / "there"
    repo.mkdir()
    for name in ("README.md", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "notes.txt"):
        (repo / name).write_text("older")
    (repo / "model.safetensors.index.json").write_text("{}")
    server.repositories["org/new"] = repo
    return repo


def test_an_older_model_goes_and_its_card_stays(server: LocalHub, there: Path, directory: Path) -> None:
    llm = Llama4.from_pretrained(directory, progress=False)
    url = llm.push_to_hub("org/new", token="secret", commit_message="Better")
    assert url == f"{server.url}/org/new/commit/{COMMIT}"
    assert server.commits == [
        {
            "revision": "main",
            "is_pr": False,
            "message": "Better",
            "deleted": [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        }
    ]
    assert "README.md" not in server.committed
    assert {"config.json", "model.safetensors"} <= server.committed.keys()


@pytest.mark.parametrize(
    ("options", "revision", "branches"),
    [
        ({"revision": "dev"}, "dev", ["dev"]),
        ({"revision": "refs/pr/7"}, "refs/pr/7", []),
        ({"create_pr": True}, "main", []),
    ],
)
def test_where_it_goes(
    server: LocalHub, directory: Path, options: dict[str, Any], revision: str, branches: list[str]
) -> None:
    url = hub.push(directory, "org/new", token="secret", **options)
    is_pr = "create_pr" in options
    assert [(commit["revision"], commit["is_pr"]) for commit in server.commits] == [(revision, is_pr)]
    assert server.branches == branches
    assert server.commits[0]["message"] == "Upload model"
    assert url == f"{server.url}/org/new/" + ("discussions/1" if is_pr else f"commit/{COMMIT}")


def test_private_is_private(server: LocalHub, there: Path, directory: Path) -> None:
    with pytest.raises(ValueError, match="org/new exists and is public; make it private in its settings"):
        hub.push(directory, "org/new", token="secret", private=True)
    assert not server.commits
    server.private = True
    hub.push(directory, "org/new", token="secret", private=True)
    assert len(server.commits) == 1
