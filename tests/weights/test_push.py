"""What goes to the Hub: `push_to_hub` through the client's own upload, and the model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig

from llama4.api import Llama4
from llama4.cli.main import main
from llama4.weights import hub
from llama4.weights.model_card import model_card
from llama4.weights.side_files import SideFiles
from llama4.weights.summary import WeightsSummary
from tests import small_model
from tests.weights.local_hub import COMMIT, LocalHub, use

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""What the Hub's client causes in its own."""


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


# -- the model card ------------------------------------------------------------------------------------------------

SOURCE_CARD = """---
license: other
license_name: llama4
license_link: https://example.org/LICENSE
language: [en, de]
base_model: somebody/else
extra_gated_prompt: not for others
---
# The base model, and all that it can do
"""


def data_of(text: str) -> dict[str, Any]:
    """The head of a card, as the Hub's own client reads it."""
    return dict(ModelCard(text).data.to_dict())  # type: ignore[no-untyped-call]


def test_the_card_of_what_was_made_from_a_model_on_the_hub(
    server: LocalHub, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(directory, base)
    (base / "README.md").write_text(SOURCE_CARD)
    (base / "LICENSE").write_text("Read me.")
    server.repositories["org/base"] = base
    Llama4.from_pretrained("org/base", quantization="int8", progress=False).push_to_hub("org/new", token="secret")
    card = server.committed["README.md"].decode()
    assert data_of(card) == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "language": ["en", "de"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "llama4",
        "license_link": "https://example.org/LICENSE",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llama4", "int8"],
    }
    assert server.committed["LICENSE"] == b"Read me."
    assert f"commit {COMMIT}" in card
    size = len(server.committed["model.safetensors"])
    measured = re.search(r"int8, a scale per output; .* weights of (\S+) bits, scales included; (\d+) KiB in all", card)
    assert measured is not None
    assert 0.9 * size < int(measured[2]) << 10 < size, "the rest is the header"
    assert json.loads(server.committed["config.json"])["hub_origin"] == {"repo_id": "org/base", "commit": COMMIT}

    lines = re.search(r"```python\n(.*)```", card, re.DOTALL)
    assert lines is not None
    for name, content in server.committed.items():
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "new" / name).write_bytes(content)
    server.repositories["org/new"] = tmp_path / "new"
    assert len(lines[1].splitlines()) == 3
    exec(lines[1].replace('blue?")', 'blue?", max_new_tokens=4)'), {})
    assert capsys.readouterr().out.strip()
    assert main(["info", "org/new"]) == 0
    out = capsys.readouterr().out
    assert f"on the Hub  org/new at commit {COMMIT}" in out
    assert f"made from   org/base at commit {COMMIT}" in out
    assert "  ignored " not in out, "the record is a field that is known"

    AutoConfig.from_pretrained(tmp_path / "new")  # the record is no field of transformers'
    again = Llama4.from_pretrained(tmp_path / "new", progress=False)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card, "it is the same model still"
    assert json.loads((tmp_path / "again" / "config.json").read_text())["hub_origin"]["repo_id"] == "org/base"


def test_the_card_of_a_command(server: LocalHub, directory: Path, tmp_path: Path) -> None:
    for source in ("org/model", str(directory)):
        target = tmp_path / "out" / ("remote" if source == "org/model" else "local")
        assert main(["quantize", source, str(target), "--scheme", "fp8"]) == 0
        data = data_of((target / "README.md").read_text())
        assert (data["pipeline_tag"], data["tags"]) == ("image-text-to-text", ["llama4", "fp8"])
        assert data.get("base_model") == ("org/model" if source == "org/model" else None)
        assert "license" not in data
        assert f'from_pretrained("{target.name}")' in (target / "README.md").read_text()


def test_cards_that_are_kept(directory: Path, tmp_path: Path) -> None:
    """That of a model that is saved again, and that of the directory to which it goes; not one of other weights."""
    shutil.copytree(directory, tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text(SOURCE_CARD)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "README.md").write_text("I was here first.")
    Llama4.from_pretrained(tmp_path / "mine").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == SOURCE_CARD
    quantized = Llama4.from_pretrained(tmp_path / "mine", quantization="int8")
    quantized.save_pretrained(tmp_path / "there")
    assert (tmp_path / "there" / "README.md").read_text() == "I was here first."
    assert (tmp_path / "there" / "config.json").is_file()
    quantized.save_pretrained(tmp_path / "int8")
    data = data_of((tmp_path / "int8" / "README.md").read_text())
    assert (data["base_model"], data["base_model_relation"]) == ("somebody/else", "quantized")


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"LICENSE.md": "x"}, {"license": "other", "license_link": "LICENSE.md"}),
        ({"README.md": "---\nlicense: mit\n---\n", "LICENSE": "x"}, {"license": "mit"}),
        ({"README.md": "---\n: [broken\n---\n"}, {}),
        ({"README.md": "\ufeff---\nlicense: mit\nlanguage: no\n---\n"}, {"license": "mit"}),
        ({"README.md": "---\nlicense: caf\udce9\n---\n"}, {}),  # no UTF-8
        ({"README.md": "no head"}, {}),
        ({}, {}),
    ],
)
def test_the_licence(files: dict[str, str], licence: dict[str, str]) -> None:
    side_files = SideFiles({name: text.encode(errors="surrogateescape") for name, text in files.items()})
    summary = WeightsSummary((), 0, 0, ("bfloat16",), 1 << 30)
    card = model_card("me/mine", replace(small_model.config(), vision=None), summary, side_files)
    data = data_of(card)
    assert {key: data[key] for key in data if key.startswith(("license", "language"))} == licence
    assert (data["pipeline_tag"], data.get("base_model")) == ("text-generation", None)
    assert "Weights: bfloat16; 1.0 GiB in all." in card
