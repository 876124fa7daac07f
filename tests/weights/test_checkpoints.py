"""Checkpoints in both directions with transformers, and every way in which one can be broken."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig

from llama4.errors import CheckpointError
from llama4.model.multimodal import Llama4Model
from llama4.text.tokenizer import Tokenizer
from llama4.weights import huggingface
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.load import load
from llama4.weights.safetensors import open_safetensors
from llama4.weights.save import save
from tests import small_model
from tests.parity.references import ReferenceModel, reference_config, reference_model, relative_error

IDS = torch.arange(40)[None]


def text_config(**text: Any) -> Llama4TextConfig:
    config = reference_config(**text).text_config
    assert isinstance(config, Llama4TextConfig)
    return config


def load_ours(directory: Path, dtype: torch.dtype | None = None) -> Llama4Model:
    config, source = open_checkpoint(directory)
    with torch.device("meta"):
        model = Llama4Model(config)
    load(model, source, dtype=dtype)
    return model.eval()


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return reference_model(reference_config())


@pytest.fixture
def checkpoint(tmp_path: Path, reference: ReferenceModel) -> Path:
    reference.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_loads_what_transformers_writes(checkpoint: Path, reference: ReferenceModel) -> None:
    ours = load_ours(checkpoint)
    assert relative_error(ours(IDS), reference(IDS).logits) < 1e-5


def test_loads_shards(tmp_path: Path, reference: ReferenceModel) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert relative_error(load_ours(tmp_path)(IDS), reference(IDS).logits) < 1e-5


def test_loads_a_text_only_checkpoint(tmp_path: Path) -> None:
    theirs = Llama4ForCausalLM(text_config()).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_ours(tmp_path)
    assert ours.vision_model is None
    assert relative_error(ours(IDS), theirs(IDS).logits) < 1e-5
    save(ours, ours.config, tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()


def test_loads_tied_embeddings(tmp_path: Path) -> None:
    theirs = Llama4ForCausalLM(text_config(tie_word_embeddings=True)).eval()
    theirs.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    ours = load_ours(tmp_path)
    assert ours.language_model.lm_head.weight is ours.language_model.model.embed_tokens.weight
    assert relative_error(ours(IDS), theirs(IDS).logits) < 1e-5


@pytest.mark.parametrize("has", ["both", "another head", "the head alone"])
def test_tied_embeddings_are_what_is_there_of_them(tmp_path: Path, has: str) -> None:
    """As in transformers, which writes the embeddings alone."""
    torch.manual_seed(0)
    Llama4ForCausalLM(text_config(tie_word_embeddings=True)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = torch.randn_like(embeddings) if has == "another head" else embeddings.clone()
    if has == "the head alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, ours = Llama4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), load_ours(tmp_path)
    assert ours.config.text.tie_word_embeddings == (has != "another head")
    with torch.inference_mode():
        assert relative_error(ours(IDS), theirs(IDS).logits) < 1e-5


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 200_000])
def test_transformers_loads_what_we_write(tmp_path: Path, shard_bytes: int) -> None:
    ours = small_model.model()
    tokenizer = Tokenizer(
        small_model.write_tokenizer(tmp_path / "tokenizer.model"), num_special_tokens=small_model.SPECIAL
    )
    save(ours, ours.config, tmp_path / "model", tokenizer=tokenizer, max_shard_bytes=shard_bytes)
    theirs = ReferenceModel.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    pixels = torch.randn(2, 3, 28, 28)
    ids = IDS.clone()
    ids[0, 3] = ids[0, 9] = ours.config.image_token_index
    assert relative_error(ours(ids, pixel_values=pixels), theirs(ids, pixel_values=pixels).logits) < 1e-5
    text = "a question about <|eot|> pictures"
    theirs_ids = AutoTokenizer.from_pretrained(tmp_path / "model").encode("a question")
    assert theirs_ids == [tokenizer.bos_id, *tokenizer.encode("a question")]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    images = processor.image_processor
    assert (type(processor).__name__, images.max_patches, images.size["height"]) == ("Llama4Processor", 4, 28)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    ours = small_model.model().to(dtype)
    save(ours, ours.config, tmp_path / "model")
    again = load_ours(tmp_path / "model")
    assert again.config.dtype == str(dtype).removeprefix("torch.")
    for (name, a), (other, b) in zip(ours.named_parameters(), again.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


def test_loading_maps_the_file_and_never_writes_to_it(checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    ours = load_ours(checkpoint)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_saving_over_the_model_in_use(tmp_path: Path) -> None:
    """The old file is mapped while the new one is written beside it."""
    directory = small_model.write(tmp_path / "model")
    (directory / "notes.txt").write_text("mine")
    ours = load_ours(directory)
    truth = ours(IDS)
    save(ours, ours.config, directory, max_shard_bytes=100_000)
    assert (directory / "notes.txt").read_text() == "mine"
    assert not (directory / "model.safetensors").exists(), "the old weights are gone"
    assert torch.equal(load_ours(directory)(IDS), truth)


class Tampered:
    """A checkpoint whose tensors a test changes before it is loaded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors = load_file(directory / "model.safetensors")

    def load(self) -> Llama4Model:
        save_file(self.tensors, self.directory / "model.safetensors", metadata={"format": "pt"})
        return load_ours(self.directory)


def test_every_wrong_key_is_listed(checkpoint: Path) -> None:
    tampered = Tampered(checkpoint)
    del tampered.tensors["language_model.model.norm.weight"]
    del tampered.tensors["vision_model.class_embedding"]
    tampered.tensors["language_model.model.layers.9.extra"] = torch.zeros(1)
    router = "language_model.model.layers.0.feed_forward.router.weight"
    tampered.tensors[router] = tampered.tensors[router].T.contiguous()
    with pytest.raises(CheckpointError) as caught:
        tampered.load()
    assert set(caught.value.missing) == {"language_model.model.norm.weight", "vision_model.class_embedding"}
    assert caught.value.unexpected == ("language_model.model.layers.9.extra",)
    assert caught.value.mismatched == ((router, (64, 4), (4, 64)),)
    for key in (*caught.value.missing, *caught.value.unexpected, router, "[64, 4]", "[4, 64]"):
        assert key in str(caught.value)


def test_every_wrong_key_of_a_text_only_checkpoint_is_listed(tmp_path: Path) -> None:
    """One stray key does not make it a multimodal one, of which every key would be wrong."""
    Llama4ForCausalLM(text_config()).save_pretrained(tmp_path)
    tampered = Tampered(tmp_path)
    del tampered.tensors["model.norm.weight"]
    tampered.tensors["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        tampered.load()
    wrong = caught.value
    assert (wrong.missing, wrong.unexpected, wrong.mismatched) == (("model.norm.weight",), ("extra",), ())


def test_a_missing_shard_is_named(tmp_path: Path, reference: ReferenceModel) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="300KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"missing: {gone.name}"):
        load_ours(tmp_path)


def test_a_truncated_shard_is_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short or damaged.*fetch it again"):
        load_ours(checkpoint)


def test_an_index_that_promises_too_much(tmp_path: Path, reference: ReferenceModel) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="300KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost.weight"] = next(iter(index["weight_map"].values()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"ghost\.weight"):
        load_ours(tmp_path)


def test_the_index_says_whose_tensor_counts(tmp_path: Path) -> None:
    """Of a key that two shards have."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for value, name in enumerate(names):
        save_file({"a": torch.full((2,), value), f"own{value}": torch.zeros(1)}, tmp_path / name)
    for chosen in (0, 1):
        places = {"a": names[chosen], "own0": names[0], "own1": names[1]}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        files = open_safetensors(tmp_path)
        assert files.read("a").tolist() == [chosen] * 2 and files.origin("a").file == names[chosen]


def test_an_index_that_points_elsewhere(tmp_path: Path, reference: ReferenceModel) -> None:
    reference.save_pretrained(tmp_path / "model")
    index = {"weight_map": {"lm_head.weight": "../model/model.safetensors"}}
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its directory"):
        open_safetensors(tmp_path / "bad")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_safetensors(tmp_path)


def test_an_unwritable_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ours = small_model.model()
    with pytest.raises(CheckpointError, match="could not write the model to"):
        save(ours, ours.config, tmp_path / "file" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_half_way_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = small_model.write(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_safetensors", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device; free space") as caught:
        save(small_model.model(seed=1), small_model.config(), directory)
    assert isinstance(caught.value, OSError), "the disk is the user's"
    assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes are limited with setrlimit")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """Stood in for by a limit on the size of files, in a process of its own; in both layouts."""
    script = f"""
import resource, signal, sys
from llama4.errors import CheckpointError
from llama4.weights.directory import complete_directory
from llama4.weights.meta.write import write_ranks
from llama4.weights.model_source import ModelSource
from llama4.weights.save import save
sys.path.append({str(Path(__file__).parents[2])!r})
from tests import small_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
def in_metas_layout(model, config, directory):
    with complete_directory(directory) as partial:
        write_ranks(ModelSource(model), config, partial)
for write in (save, in_metas_layout):
    try:
        write(small_model.model(), small_model.config(), {str(tmp_path / "model")!r})
    except CheckpointError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("could not write the model to") for line in lines)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = small_model.write(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface, "write_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(small_model.model(seed=1), small_model.config(), directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_loading(tmp_path: Path, dtype: str) -> None:
    """A bf16 checkpoint in bf16 is mapped and costs nothing; converted to fp32 there are never two copies: the peak is
    the fp32 model, one tensor, and what the system keeps of the file. Measured in a process of its own. Tolerance:
    25 MB for the allocator."""
    torch.manual_seed(0)
    big = nn.ModuleDict({str(i): nn.Linear(2048, 2048, bias=False) for i in range(12)}).bfloat16()
    save_file(big.state_dict(), tmp_path / "model.safetensors")
    script = f"""
import re, torch
from pathlib import Path
from torch import nn
from llama4.weights.load import load
from llama4.weights.safetensors import open_safetensors
with torch.device("meta"):
    model = nn.ModuleDict({{str(i): nn.Linear(2048, 2048, bias=False) for i in range(12)}})
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.set_num_threads(1)  # each has buffers
torch.ones(1).bfloat16().float()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
before = peak()
load(model, open_safetensors({str(tmp_path)!r}), dtype=torch.{dtype})
print(peak() - before)
"""
    grown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    model, one, on_disk = 12 * 2048**2 * 4, 2048**2 * 4, 12 * 2048**2 * 2
    peak = int(grown.stdout) * 1024
    if dtype == "bfloat16":
        assert peak < 25e6
    else:
        assert model * 0.9 < peak < model + one + on_disk + 25e6  # pages of the mapped file count as resident


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    save(small_model.model(), small_model.config(), tmp_path / "model")
    with safe_open(tmp_path / "model/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
