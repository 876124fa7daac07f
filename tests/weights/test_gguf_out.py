"""What is written as GGUF: it is read back as the same model, by this library and by the package `gguf`."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from llama4 import Llama4
from llama4.cli.main import main
from llama4.errors import ArgumentError, CheckpointError
from llama4.gguf import GgufFile
from llama4.model.rope_scaling import rope_frequencies
from llama4.weights.convert import convert_to_gguf
from llama4.weights.gguf.write import FILE_TYPES
from tests import small_model
from tests.weights import gguf_files

IDS = torch.arange(80)[None] * 7 % 1024


def logits(llm: Llama4) -> Tensor:
    with torch.inference_mode():
        found: Tensor = llm.model(IDS)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def original(directory: Path) -> Llama4:
    return Llama4.from_pretrained(directory, dtype="float32", progress=False)


def test_the_same_model(directory: Path, original: Llama4, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit by bit, with vision tower, tokenizer, and what llama.cpp has fixed: chunk, temperature and the rest."""
    assert main(["convert", str(directory), str(tmp_path / "a.gguf"), "--type", "f32"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "mmproj-a.gguf"]
    llm = Llama4.from_pretrained(tmp_path, dtype="float32", progress=False)
    assert torch.equal(logits(llm), logits(original))
    found, wanted = llm.config.text, original.config.text
    assert torch.equal(rope_frequencies(found)[0], rope_frequencies(wanted)[0])
    assert found == dataclasses.replace(wanted, eos_token_id=found.eos_token_id, rope_scaling=found.rope_scaling)
    assert llm.config.vision == original.config.vision
    weights = dict(original.model.named_parameters())
    assert all(torch.equal(weights[name], parameter) for name, parameter in llm.model.named_parameters())
    for text in ("ab cd  12345 it's\n\n é", "<|eot|>"):
        assert llm.tokenizer.encode(text) == original.tokenizer.encode(text)
    assert llm.tokenizer.special_tokens == original.tokenizer.special_tokens


def test_names_and_values_are_those_of_llama_cpp(directory: Path, original: Llama4, tmp_path: Path) -> None:
    """Against what its converter writes, which `gguf_files` does by hand, and read by the package `gguf`."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is another reader of the format")
    convert_to_gguf(directory, tmp_path / "a.gguf", "f32", progress=False)
    wanted = gguf_files.tensors_of(original.model) | {"rope_freqs.weight": torch.tensor(gguf_files.DIVISORS)}
    found: dict[str, Tensor] = {}
    for name in ("a.gguf", "mmproj-a.gguf"):
        reader = gguf.GGUFReader(tmp_path / name)
        found |= {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    metadata = GgufFile.read(tmp_path / "a.gguf").metadata
    keys = gguf_files.metadata_of(original.config)
    assert {key: metadata[key] for key in keys} == {
        key: np.float32(value) if isinstance(value, float) else value for key, value in keys.items()
    }


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_types(kind: str, tmp_path: Path) -> None:
    """Rounded as the package `gguf` rounds, bit by bit."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is the truth of its types")
    rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    rows[0] = 0
    wanted = gguf.quantize(rows.numpy(), gguf.GGMLQuantizationType[FILE_TYPES[kind].type])
    assert np.array_equal(FILE_TYPES[kind].encode(rows).numpy().ravel(), wanted.view(np.uint8).ravel())


def test_rounded_models(directory: Path, original: Llama4, tmp_path: Path) -> None:
    wanted = logits(original)
    for kind in ("bf16", "q8_0"):
        convert_to_gguf(directory, tmp_path / f"{kind}.gguf", kind, progress=False)
        llm = Llama4.from_pretrained(tmp_path / f"{kind}.gguf", dtype="float32", progress=False)
        assert (logits(llm) - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_a_gguf_file_as_another(tmp_path: Path, original: Llama4) -> None:
    """Its vocabulary stays as it is."""
    source = gguf_files.small(tmp_path / "a.gguf")
    convert_to_gguf(source, tmp_path / "b.gguf", "f32", progress=False)
    llm = Llama4.from_pretrained(tmp_path / "b.gguf", dtype="float32", progress=False)
    assert torch.equal(logits(llm), logits(original))
    a, b = (GgufFile.read(tmp_path / name).metadata for name in ("a.gguf", "b.gguf"))
    keys = [key for key in a if key.startswith("tokenizer.")]
    assert keys and all(np.array_equal(a[key], b[key]) for key in keys)


def test_what_llama_cpp_would_compute_otherwise(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        convert_to_gguf(directory, tmp_path / "a.gguf", progress=False)
    assert "its chunk is 8192 tokens, not 32; its temperature grows by 0.1 after 8192 tokens" in caplog.text
    assert main(["convert", str(directory), str(tmp_path / "b.gguf"), "--for", "llama.cpp"]) == 1
    assert "llama.cpp will compute this model otherwise" in capsys.readouterr().err
    assert not (tmp_path / "b.gguf").exists()


def test_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="type 'q3' is not written; choose one of f32, f16, bf16, q8_0, q4_0"):
        convert_to_gguf(directory, tmp_path / "a.gguf", "q3")
    with pytest.raises(ArgumentError, match=r"let it end in \.gguf"):
        convert_to_gguf(directory, tmp_path / "a", "f32")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        convert_to_gguf(directory, tmp_path / "a.gguf", "f32")
    from llama4.weights.convert import quantize

    quantize(directory, tmp_path / "int8", "int8", progress=False)
    with pytest.raises(CheckpointError, match=r"is in int8, .*, of which no GGUF is made; convert the original"):
        convert_to_gguf(tmp_path / "int8", tmp_path / "b.gguf", "f32")
