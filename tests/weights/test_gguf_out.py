"""What is written as GGUF: it is read back as the same model, by this library and by the package `gguf`."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama4 import Llama4
from llama4.cli.main import main
from llama4.config import Llama4Config
from llama4.errors import ArgumentError, CheckpointError
from llama4.families import PRESETS
from llama4.gguf import GgufFile
from llama4.model.rope_scaling import rope_frequencies
from llama4.quantization.gguf_encoding import ENCODERS
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.convert import convert, convert_to_gguf, quantize
from llama4.weights.gguf.types import FILE_TYPES, type_of
from llama4.weights.gguf.write import differences
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
    assert f"{tmp_path}/a.gguf and {tmp_path}/mmproj-a.gguf: GGUF, f32" in capsys.readouterr().err.splitlines()[-1]
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


ROWS = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 2, 64)[:, None]
ROWS[0], ROWS[1], ROWS[2, :300], ROWS[3], ROWS[4] = 0, 0.5, 0, ROWS[3].abs(), -ROWS[4].abs()


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if not kind.endswith("_K")])
def test_types(kind: str) -> None:
    """Rounded as the package `gguf` rounds, bit by bit."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is the truth of its types")
    wanted = gguf.quantize(ROWS.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(ENCODERS[kind](ROWS).numpy().ravel(), wanted.view(np.uint8).ravel())


@pytest.mark.parametrize(("kind", "error"), [("Q4_K", 0.0715), ("Q5_K", 0.0362), ("Q6_K", 0.0176)])
def test_k_types(kind: str, error: float) -> None:
    """The package reads them, and does not write them. The error is ggml's own on normal numbers, to 1%: see
    test_llama_cpp.py."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is the truth of its types")
    found = gguf.dequantize(ENCODERS[kind](ROWS).numpy(), gguf.GGMLQuantizationType[kind])
    difference = torch.from_numpy(found) - ROWS
    assert difference[5:].norm() < error * ROWS[5:].norm()
    assert (difference[:5].abs().amax(-1) <= error * ROWS[:5].abs().amax(-1)).all()
    assert not difference[0].any()


# -- mixtures ----------------------------------------------------------------------------------------------------------


def kinds(config: Llama4Config, file_type: str, width: int) -> dict[str, str]:
    names = {"token_embd.weight": 2, "output.weight": 2, "output_norm.weight": 1}
    for i in range(config.text.num_hidden_layers):
        names |= {f"blk.{i}.attn_{matrix}.weight": 2 for matrix in ("q", "k", "v", "output")}
        names |= {f"blk.{i}.ffn_down.weight": 2, f"blk.{i}.ffn_down_exps.weight": 3, f"blk.{i}.ffn_gate_inp.weight": 2}
    shapes = {name: (4, 4, width)[-count:] for name, count in names.items()}
    return {name: type_of(name, shape, FILE_TYPES[file_type], config.text) for name, shape in shapes.items()}


def test_mixtures() -> None:
    """What llama-quantize chooses, read off its output for Llama 3.2 1B (16 layers), Llama 2 70B, and SmolLM2, whose
    rows of 576 blocks of 256 do not fill."""
    small = kinds(PRESETS["llama-3.2-1b"](), "q4_k_m", 256)
    more = {i for i in range(16) if small[f"blk.{i}.attn_v.weight"] == "Q6_K"}
    assert more == {0, 1, 4, 7, 10, 13, 14, 15} == {i for i in range(16) if small[f"blk.{i}.ffn_down.weight"] == "Q6_K"}
    assert {small[f"blk.{i}.attn_{name}.weight"] for i in range(16) for name in ("q", "k", "output")} == {"Q4_K"}
    assert small["token_embd.weight"] == "Q6_K" and small["output_norm.weight"] == "F32"
    large = kinds(PRESETS["llama-2-70b"](), "q4_k_m", 256)
    assert (large["token_embd.weight"], large["output.weight"]) == ("Q4_K", "Q6_K")
    assert {large[f"blk.{i}.attn_v.weight"] for i in range(80)} == {"Q5_K", "Q6_K"}
    odd = kinds(PRESETS["smollm2-135m"](), "q4_k_m", 576)
    assert {odd[f"blk.{i}.attn_v.weight"] for i in range(30)} == {"Q5_0", "Q8_0"} and odd["token_embd.weight"] == "Q8_0"
    assert {*kinds(PRESETS["smollm2-135m"](), "q4_0", 580).values()} == {"F16", "F32"}
    experts = kinds(PRESETS["scout"](), "mxfp4", 256)
    assert experts["blk.0.ffn_down_exps.weight"] == "MXFP4" and experts["blk.0.ffn_gate_inp.weight"] == "F32"
    assert experts["blk.0.attn_q.weight"] == experts["output.weight"] == "Q8_0"
    assert kinds(PRESETS["llama-2-7b"](), "mxfp4", 256)["blk.0.attn_q.weight"] == "MXFP4"


def test_rounded_models(directory: Path, original: Llama4, tmp_path: Path) -> None:
    wanted = logits(original)
    for kind, error in {"bf16": 0.02, "q8_0": 0.02, "q4_0": 0.3, "q4_k_m": 0.3, "mxfp4": 0.3}.items():
        convert_to_gguf(directory, tmp_path / f"{kind}.gguf", kind, progress=False)
        llm = Llama4.from_pretrained(tmp_path / f"{kind}.gguf", dtype="float32", progress=False)
        assert 0 < (logits(llm) - wanted).norm() < error * wanted.norm()


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
    directory: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with caplog.at_level(logging.WARNING):
        convert_to_gguf(directory, tmp_path / "a.gguf", progress=False)
    wanted = "a.gguf otherwise than llama4: it assumes chunks of 8192 tokens, not 32; a temp"
    assert caplog.text.count(wanted) == 1
    monkeypatch.setattr("llama4.weights.convert.write_gguf", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_to_gguf(directory, tmp_path / "c.gguf", progress=False)
    assert caplog.text.count("otherwise than llama4") == 2  # before the hours that a large one takes
    assert main(["convert", str(directory), str(tmp_path / "b.gguf"), "--for", "llama.cpp"]) == 1
    assert "would compute this model otherwise" in capsys.readouterr().err
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("preset", "changes", "words"),
    [
        ("scout", {}, ""),
        ("maverick", {}, ""),
        ("llama-3.1-405b", {}, ""),
        ("scout", {"attention_chunk_size": 4096}, "chunks of 8192 tokens, not 4096"),
        ("scout", {"attention_chunk_size": None}, "chunks of 8192 tokens, not of all"),
        ("scout", {"attention_chunk_size": None, "max_position_embeddings": 8192}, ""),
        ("scout", {"attention_chunk_size": 4096, "max_position_embeddings": 4096}, ""),
        ("scout", {"attn_scale": 0.2}, "from 8192 tokens on, not one that grows by 0.2 from 8192"),
        ("scout", {"attn_scale": 0.2, "max_position_embeddings": 8191}, ""),
        ("scout", {"attn_scale": 0.2, "max_position_embeddings": 8192}, "a temperature that grows"),
        ("scout", {"attn_temperature_tuning": False}, "grows by 0.1 from 8192 tokens on, not one that stays"),
        ("scout", {"attn_temperature_tuning": False, "max_position_embeddings": 8191}, ""),
        ("scout", {"floor_scale": 4096}, "not one that grows by 0.1 from 4096 tokens on"),
        ("scout", {"use_qk_norm": False}, "norms of queries and keys unless experts are 128"),
        ("maverick", {"use_qk_norm": True}, "norms of queries and keys unless experts are 128"),
        ("scout", {"no_rope_layers": (1,) * 48}, "every fourth layer without RoPE"),
        ("scout", {"attention_bias": True}, "attention without biases"),
        ("guard4", {}, "experts in every model"),
    ],
)
def test_differences(preset: str, changes: dict[str, Any], words: str) -> None:
    """As in src/models/llama4.cpp; only what lies within the window counts."""
    config = PRESETS[preset]()
    found = differences(dataclasses.replace(config, text=dataclasses.replace(config.text, layer_types=None, **changes)))
    assert (words in "; ".join(found)) if words else found == []


def test_how_tokens_are_chosen(directory: Path, tmp_path: Path) -> None:
    """Keys of llama.cpp's, so that its own defaults do not stand in for what is not said."""
    shutil.copytree(directory, tmp_path / "model")
    said = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({**said, "eos_token_id": [904]}))
    convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf", progress=False)
    keys = {k: v for k, v in GgufFile.read(tmp_path / "a.gguf").metadata.items() if k.startswith("general.sampling.")}
    wanted = {"temp": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0, "penalty_repeat": 1.1, "penalty_last_n": -1}
    assert {key.removeprefix("general.sampling."): value for key, value in keys.items()} == pytest.approx(wanted)
    found = Llama4.from_pretrained(tmp_path / "a.gguf", progress=False).generation_config
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0, "repetition_penalty": 1.1}
    assert found.do_sample and found.sampling() == pytest.approx(settings) and 904 in (found.eos_token_id or ())
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"do_sample": False, "min_new_tokens": 4}))
    convert_to_gguf(tmp_path / "model", tmp_path / "b.gguf", progress=False)
    assert GgufFile.read(tmp_path / "b.gguf").metadata["general.sampling.temp"] == 0
    assert not Llama4.from_pretrained(tmp_path / "b.gguf", progress=False).generation_config.do_sample


def test_yarn(tmp_path: Path) -> None:
    """All that it says, also where it is not as usual."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    rope = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 1e4}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=256, rope_parameters=rope)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf", "f32", progress=False)
    found, wanted = (open_checkpoint(tmp_path / name)[0].text for name in ("a.gguf", "model"))
    assert found.rope_scaling is not None and found.rope_scaling.beta_fast == 16
    assert torch.equal(rope_frequencies(found)[0], rope_frequencies(wanted)[0])
    assert rope_frequencies(found)[1] == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("kind", "rope"),
    [("bf16", None), ("f16", None), ("f32", {"rope_type": "linear", "factor": 4.0})],
    ids=["bf16", "f16", "linear"],
)
def test_back_to_hugging_face(kind: str, rope: dict[str, Any] | None, tmp_path: Path) -> None:
    """A file has its matrices in one type and its vectors in float32; and the window that scaling gives."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"rope_parameters": {"rope_theta": 1e4, **rope}} if rope is not None else {}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=256))
    model.to({"bf16": torch.bfloat16}.get(kind, torch.float16)).save_pretrained(tmp_path / "model")
    convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf", kind, progress=False)
    convert(tmp_path / "a.gguf", tmp_path / "back", "hf", progress=False)
    found, wanted = (
        LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("back", "model")
    )
    assert all(torch.equal(*pair) for pair in zip(found.parameters(), wanted.parameters(), strict=True))
    window = [open_checkpoint(tmp_path / name)[0].text.max_position_embeddings for name in ("back", "a.gguf", "model")]
    assert window == [1024 if rope is not None else 256] * 3


def test_what_no_key_says(directory: Path, tmp_path: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    shutil.copytree(directory, tmp_path / "model")
    config["text_config"]["layer_types"] = ["full_attention"] * config["text_config"]["num_hidden_layers"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="GGUF has no key for which layers have experts"):
        convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf", progress=False)


def test_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ArgumentError, match="type 'q3' is not written; choose one of f32, f16, bf16, q8_0, q4_0, q4_k_m, mxfp4"
    ):
        convert_to_gguf(directory, tmp_path / "a.gguf", "q3")
    with pytest.raises(ArgumentError, match=r"let it end in \.gguf"):
        convert_to_gguf(directory, tmp_path / "a", "f32")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        convert_to_gguf(directory, tmp_path / "a.gguf", "f32")
    quantize(directory, tmp_path / "int8", "int8", progress=False)
    with pytest.raises(CheckpointError, match=r"is in int8, .*, of which no GGUF is made; convert the original"):
        convert_to_gguf(tmp_path / "int8", tmp_path / "b.gguf", "f32")
