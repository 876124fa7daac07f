"""Models whose weights stay on the Hub: `llama4 quantize` file by file, `llama4 info` from headers; subfolders, and
repositories without anything to load. The client runs in this process, with its constants set to the local server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from llama4.api import Llama4
from llama4.cli.main import main
from llama4.weights import hub, hub_shards, safetensors
from llama4.weights.convert import quantize
from llama4.weights.directory import work_of
from llama4.weights.save import save
from tests import small_model
from tests.weights.local_hub import COMMIT, LocalHub, use

SHARD = 120_000
FIRST_BYTES = 1 << 16


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in over ten files."""
    directory = small_model.write(tmp_path_factory.mktemp("hub") / "model")
    (directory / "model.safetensors").unlink()
    config = small_model.config()
    save(small_model.model(), config, directory.parent / "saved", max_shard_bytes=SHARD)
    for file in (directory.parent / "saved").glob("model*"):
        shutil.move(file, directory)
    assert len(list(directory.glob("model-*.safetensors"))) > 10
    return directory


@pytest.fixture(scope="module")
def int8(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized here."""
    directory = tmp_path_factory.mktemp("int8") / "model"
    quantize(sharded, directory, "int8", max_shard_bytes=200_000, progress=False)
    return directory


@pytest.fixture
def server(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    local = LocalHub({"org/model": sharded})
    use(local, tmp_path / "cache", monkeypatch)
    yield local
    local.shutdown()
    local.server_close()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code, captured = main(list(map(str, arguments))), capsys.readouterr()
    return code, captured.out, captured.err


def weights_of(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in directory.glob("*.safetensors")}


def same_files(a: Path, b: Path) -> bool:
    """Whether directories are the same but for where they say that the model comes from, and the stamp of that."""
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    configs = [json.loads((directory / "config.json").read_text()) for directory in (a, b)]
    for config in configs:
        config.pop("hub_origin", None)
    others = set(names) - {"README.md", "config.json"}
    return configs[0] == configs[1] and all(without_stamp(a / name) == without_stamp(b / name) for name in others)


def without_stamp(path: Path) -> bytes:
    return re.sub(rb'"llama4_stamp": ?"[0-9a-f]{32}"', b"", path.read_bytes())


QUANTIZE = ("quantize", "org/model", "--scheme", "int8", "--shard-gb", "0.0002")


def test_quantizing_fetches_each_file_once_and_keeps_one(
    server: LocalHub,
    sharded: Path,
    int8: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, kept, fetch = tmp_path / "out", list[int](), huggingface_hub.hf_hub_download

    def watched(*arguments: Any, **options: Any) -> str:
        folder = work_of(target) / "downloads"
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
        assert not maps, "a file that is mapped takes room even when it is deleted"
        path = fetch(*arguments, **options)
        kept.append(len(list(folder.rglob("*.safetensors"))))
        return path

    monkeypatch.setattr(hub_shards, "hf_hub_download", watched)
    code, out, err = run(capsys, *QUANTIZE, target)
    assert (code, out) == (0, ""), err
    sizes = weights_of(sharded)
    assert kept == [1] * len(sizes), "one file at a time is on the disk"
    assert {name: server.sent[name] for name in sizes} == {
        name: size + min(size, FIRST_BYTES) for name, size in sizes.items()
    }
    assert same_files(target, int8)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]
    count, total, largest = len(sizes), sum(sizes.values()), max(sizes.values())
    assert err.startswith(f"{count} of {count} files, {total / 2**20:.1f} MiB, come from the Hub, at most ")
    assert f" {largest / 1024:.0f} KiB at a time; with the result, " in err


def test_experts_apart_may_lie_in_two_files(
    server: LocalHub, sharded: Path, int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer's experts as Linears, some here and some in the next file: two files are kept, and each comes once."""
    repo = tmp_path / "repo"
    shutil.copytree(sharded, repo, ignore=lambda _, names: [name for name in names if name.startswith("model")])
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in small_model.model().state_dict().items():
        path, _, leaf = name.rpartition(".")
        if not path.endswith(".experts"):
            tensors[name] = tensor
            continue
        for i, expert in enumerate(tensor.mT):
            halves = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
            for half, matrix in zip(halves, expert.chunk(len(halves)), strict=True):
                tensors[f"{path}.{i}.{half}_proj.weight"] = matrix.contiguous()
    keys, places = sorted(tensors), dict[str, str]()
    for i in range(0, len(keys), 20):
        name = f"model-{i // 20 + 1:05d}-of-{-(-len(keys) // 20):05d}.safetensors"
        save_file({key: tensors[key] for key in keys[i : i + 20]}, repo / name)
        places |= dict.fromkeys(keys[i : i + 20], name)
    (repo / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    server.repositories["org/apart"] = repo
    code, _, err = run(capsys, *QUANTIZE[:1], "org/apart", *QUANTIZE[2:], tmp_path / "out")
    assert code == 0, err
    sizes = weights_of(repo)
    assert len(sizes) > 5
    assert {name: server.sent[name] for name in sizes} == {
        name: size + min(size, FIRST_BYTES) for name, size in sizes.items()
    }
    assert f" {sum(sorted(sizes.values())[-2:]) / 1024:.0f} KiB at a time" in err
    found, wanted = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for directory, content in ((tmp_path / "out", found), (int8, wanted)):
        for file in directory.glob("*.safetensors"):
            content |= load_file(file)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)


def test_files_in_the_cache_are_used_and_stay(
    server: LocalHub, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub.resolve("org/model", progress=False)
    gone = sorted(weights_of(sharded))[3]
    (snapshot / gone).resolve().unlink()
    (snapshot / gone).unlink()
    server.sent.clear()
    code, _, err = run(capsys, *QUANTIZE, tmp_path / "out")
    assert code == 0, err
    assert {name for name in server.sent if name.endswith(".safetensors")} == {gone}
    assert err.startswith(f"1 of {len(weights_of(sharded))} files, ")
    assert weights_of(snapshot).keys() == weights_of(sharded).keys() - {gone}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = run(capsys, *QUANTIZE, tmp_path / "again")
    assert (code, "org/model is not in the local cache and the Hub cannot be reached" in err) == (1, True)
    shutil.copy(sharded / gone, snapshot / gone)
    code, _, err = run(capsys, *QUANTIZE, tmp_path / "again")
    assert code == 0, err
    assert re.fullmatch(rf"{re.escape(str(tmp_path / 'again'))}: \S+, .* of weights\n", err)


def test_stopped_and_run_again(
    server: LocalHub,
    sharded: Path,
    int8: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files that were read whole are not fetched again, and what is left of them is one file."""
    save_shard, left = safetensors._save_shard, 2

    def stop(*arguments: Any) -> None:
        nonlocal left
        save_shard(*arguments)
        left -= 1
        if not left:
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors, "_save_shard", stop)
    assert run(capsys, *QUANTIZE, tmp_path / "out")[0] == 130
    assert not (tmp_path / "out").exists()
    assert len(list((work_of(tmp_path / "out") / "downloads").rglob("*.safetensors"))) == 1
    sizes = weights_of(sharded)
    whole = {name for name in sizes if server.sent[name] == sizes[name] + min(sizes[name], FIRST_BYTES)}
    assert 2 <= len(whole) < len(sizes)
    server.sent.clear()
    assert run(capsys, *QUANTIZE, tmp_path / "out")[0] == 0
    again = {name for name in sizes if server.sent[name] == sizes[name] + min(sizes[name], FIRST_BYTES)}
    assert again == sizes.keys() - whole, "the last one was still there"
    assert same_files(tmp_path / "out", int8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


def test_a_disk_without_the_room(
    server: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=2048, used=1024, free=1024)
    monkeypatch.setattr("llama4.weights.convert.disk_usage", lambda _: usage)
    code, _, err = run(capsys, *QUANTIZE, tmp_path / "out")
    assert code == 1
    assert f"{tmp_path} has 1.0 KiB, and " in err
    assert "are needed: free some, or choose another directory" in err
    assert all(sent <= FIRST_BYTES for name, sent in server.sent.items() if name.endswith(".safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("ranges", [True, False])
def test_info_reads_headers_only(
    server: LocalHub, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranges: bool
) -> None:
    server.has_ranges = ranges
    code, out, err = run(capsys, "info", "org/model", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)["checkpoint"]
    local = json.loads(run(capsys, "info", sharded, "--json")[1])["checkpoint"]
    assert facts["repository"] == {"repo_id": "org/model", "commit": COMMIT}
    assert facts["weights"] == local["weights"]
    parameters = sum(parameter.numel() for parameter in small_model.model().parameters())
    assert facts["weights"]["bytes"] == 4 * parameters
    assert facts["weights"]["dtypes"] == ["float32"]
    assert (local["repository"], local["fetched_bytes"]) == (None, 0)
    if ranges:
        assert facts["fetched_bytes"] == sum(server.sent[name] for name in weights_of(sharded))
        assert 0 < facts["fetched_bytes"] <= len(weights_of(sharded)) * FIRST_BYTES
    assert not {"tokenizer.json", "tokenizer.model"} & server.files_asked(), "they are not small"


def test_info_of_a_quantized_model_on_the_hub(
    server: LocalHub, int8: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories["org/int8"] = int8
    facts = [json.loads(run(capsys, "info", name, "--json")[1])["quantization"] for name in ("org/int8", int8)]
    assert facts[0] == facts[1]
    assert facts[0]["formats"] == ["int8, a scale per output"]
    text = run(capsys, "info", "org/int8")[1]
    assert f"on the Hub  org/int8 at commit {COMMIT}" in text
    assert "headers alone were fetched" in text
    plans = [json.loads(run(capsys, "plan", name, "--json")[1]) for name in ("org/int8", int8)]
    assert plans[0]["bytes_per_device"] == plans[1]["bytes_per_device"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, _ = run(capsys, "info", "org/int8")
    assert (code, "no weights here" in out) == (0, True)
    code, _, error = run(capsys, "plan", "org/int8")
    assert (code, "say it with --weights" in error) == (1, True)


@pytest.mark.parametrize("damage", ["header", "length", "end"])
def test_headers_that_are_damaged(
    server: LocalHub, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    shutil.copytree(sharded, tmp_path / "bad")
    path = sorted((tmp_path / "bad").glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[8:12] = b"oops"
    elif damage == "length":
        content[7] = 255
    else:
        del content[-10:]
    path.write_bytes(content)
    server.repositories["org/bad"] = tmp_path / "bad"
    code, _, err = run(capsys, "info", "org/bad")
    assert code == 1
    assert f"org/bad/{path.name} " in err
    assert err.endswith("ask for a new upload\n")


# -- elsewhere, and not there --------------------------------------------------------------------------------------


def test_a_model_in_a_subfolder(
    server: LocalHub, sharded: Path, int8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(sharded, repo / "bf" / "16")
    (repo / "README.md").write_text("two models\n")
    server.repositories["org/two"] = repo
    ask: Any = {"max_new_tokens": 4}
    answer = Llama4.from_pretrained(sharded).complete("hello", **ask).text
    assert run(capsys, *QUANTIZE[:1], "org/two", *QUANTIZE[2:], tmp_path / "out", "--subfolder", "bf/16")[0] == 0
    assert same_files(tmp_path / "out", int8)
    assert "float32; " in run(capsys, "info", "org/two", "--subfolder", "bf/16")[1]
    remote = Llama4.from_pretrained("org/two", subfolder="bf/16", progress=False)
    assert remote.complete("hello", **ask).text == answer
    assert all(path.startswith("bf/16/") for path in server.files_asked())
    why = "there is a model in 'bf/16': name it with subfolder='bf/16' (--subfolder bf/16)"
    assert f"org/two cannot be loaded: {why}" in run(capsys, "info", "org/two")[2]
    assert Llama4.from_pretrained(repo, subfolder="bf/16").complete("hello", **ask).text == answer
    assert why in run(capsys, "generate", "--model", repo, "hi")[2]
    with pytest.raises(ValueError, match="has no subfolder 'int4'"):
        Llama4.from_pretrained(repo, subfolder="int4")
    with pytest.raises(ValueError, match=r"subfolder is '\.\./else'; name one inside"):
        Llama4.from_pretrained(repo, subfolder="../else")


def test_weights_that_are_pickles_alone(
    server: LocalHub, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(sharded, repo, ignore=lambda _, names: [name for name in names if name.startswith("model")])
    torch.save({}, repo / "pytorch_model.bin")
    server.repositories["org/pickles"] = repo
    words = "its weights are pickles (pytorch_model.bin), which can run code when they are opened; take its safetensors"
    for command in (
        ["generate", "--model", "org/pickles", "hi"],
        ["generate", "--model", repo, "hi"],
        [*QUANTIZE[:1], "org/pickles", *QUANTIZE[2:], tmp_path / "out"],
        [*QUANTIZE[:1], repo, *QUANTIZE[2:], tmp_path / "out"],
        ["convert", "org/pickles", tmp_path / "out", "--to", "hf"],
    ):
        code, _, err = run(capsys, *command)
        assert (code, words in err) == (1, True), err
    code, out, _ = run(capsys, "info", "org/pickles")
    assert (code, words in out) == (0, True)
    (repo / "pytorch_model.bin").unlink()
    server.repositories["org/nothing"] = repo
    assert (
        "org/nothing cannot be loaded: it holds no weights"
        in run(capsys, "generate", "--model", "org/nothing", "hi")[2]
    )
