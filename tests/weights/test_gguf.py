"""Models in GGUF: read as llama.cpp writes them, computed as they lie, refused where they are damaged."""

from __future__ import annotations

import dataclasses
import logging
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama4 import Llama4
from llama4.cli.main import main
from llama4.config import Llama4Config, TextConfig
from llama4.engine.fused_cpu import FusedCpuRunner
from llama4.errors import ArgumentError, CheckpointError, Llama4Error
from llama4.gguf import _TYPES, GgufFile
from llama4.kernels import loader
from llama4.model.multimodal import Llama4Model
from llama4.model.rope_scaling import rope_frequencies
from llama4.ops import cpu_kernels
from llama4.quantization.gguf_blocks import GGUF_FORMATS, GgufBlocks
from llama4.quantization.modules import QuantizedEmbedding
from llama4.quantization.weight import QuantizedWeight
from llama4.text.tokenizer import Tokenizer
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.convert import convert, convert_to_gguf
from tests import small_model
from tests.families import test_llama_api as dense
from tests.marks import needs_kernels
from tests.text.test_generations import train
from tests.weights import gguf_files, mutated_gguf
from tests.weights.local_hub import LocalHub, use

QUESTION = [{"role": "user", "content": "ab?"}]
PICTURE = Path(__file__).parents[2] / "examples" / "shapes.png"


def loaded(path: Path | str, **options: Any) -> Llama4:
    return Llama4.from_pretrained(path, dtype="float32", progress=False, **options)


def logits(llm: Llama4, length: int = 80) -> Tensor:
    ids = torch.arange(length)[None] * 7 % llm.config.text.vocab_size
    with torch.inference_mode():
        found: Tensor = llm.model(ids)
    return found


# -- a whole model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_model` in GGUF, with its vision tower beside it."""
    directory = tmp_path_factory.mktemp("gguf")
    gguf_files.small(
        directory / "small-f32.gguf", **{"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    )
    gguf_files.small_mmproj(directory / "mmproj-small-f32.gguf")
    return directory


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Llama4:
    return loaded(small_model.write(tmp_path_factory.mktemp("hf") / "model"))


def test_the_same_model(directory: Path, original: Llama4) -> None:
    """Past the chunk's border, with a picture, and with the tokens of the other layout."""
    llm = loaded(directory)
    wanted = dataclasses.replace(original.config, dtype="float32")
    found, config = llm.config.text, wanted.text
    assert found == dataclasses.replace(config, eos_token_id=found.eos_token_id, rope_scaling=found.rope_scaling)
    assert torch.equal(rope_frequencies(found)[0], rope_frequencies(config)[0])
    assert set(found.eos_token_id) == set(config.eos_token_id)
    assert llm.config.vision == wanted.vision and llm.config.image_token_index == wanted.image_token_index
    assert torch.equal(logits(llm), logits(original))
    picture = [{"role": "user", "content": [{"type": "image", "image": str(PICTURE)}, {"type": "text", "text": "abc"}]}]
    inputs = original.processor(picture)
    with torch.inference_mode():
        both = [m.model(inputs.input_ids, pixel_values=inputs.pixel_values) for m in (llm, original)]
    assert torch.equal(*both)
    for text in ("ab cd  12345 it's\n\n é 日本", "<|eot|>", "CamelCase"):
        assert llm.tokenizer.encode(text) == original.tokenizer.encode(text)
    assert llm.tokenizer.special_tokens == original.tokenizer.special_tokens
    assert (llm.tokenizer.bos_id, llm.tokenizer.eos_id, llm.tokenizer.pad_id) == (896, 904, 914)


def test_weights_stay_in_the_file(directory: Path) -> None:
    path = directory / "small-f32.gguf"
    embedding = loaded(path).model.language_model.model.embed_tokens.weight
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("small-f32.gguf")]
    begins = [[int(address, 16) for address in line.split()[0].split("-")] for line in maps]
    assert any(begin <= embedding.data_ptr() < end for begin, end in begins)


def test_the_files_template_writes_prompts(directory: Path) -> None:
    llm = loaded(directory / "small-f32.gguf")
    assert llm.processor(QUESTION).input_ids[0].tolist() == [896, *llm.tokenizer.encode("ab?")]


@pytest.mark.parametrize(
    "command", [["info"], ["info", "--json"], ["plan"], ["generate", "ab", "--max-new-tokens", "2"]]
)
def test_commands(directory: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name, *options = command
    model = ["--model", str(directory)] if name == "generate" else [str(directory / "small-f32.gguf")]
    assert main([name, *model, *options]) == 0
    assert name == "generate" or "float32" in capsys.readouterr().out


def test_as_another_layout(directory: Path, original: Llama4, tmp_path: Path) -> None:
    assert main(["convert", str(directory), str(tmp_path / "hf"), "--to", "hf"]) == 0
    llm = loaded(tmp_path / "hf")
    assert torch.equal(logits(llm), logits(original))
    assert llm.tokenizer.encode("ab it's 12") == original.tokenizer.encode("ab it's 12")


# -- which files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def split(directory: Path, tmp_path: Path) -> Path:
    gguf_files.split(directory / "small-f32.gguf", tmp_path)
    return tmp_path


def test_a_split(split: Path, original: Llama4) -> None:
    for name in (split, split / "small-00001-of-00003.gguf", split / "small-00002-of-00003.gguf"):
        assert torch.equal(logits(loaded(name)), logits(original))
    (split / "small-00001-of-00003.gguf").rename(split / "kept")
    with pytest.raises(CheckpointError, match="holds some files of a GGUF model, and not the first; fetch all of them"):
        loaded(split)
    (split / "kept").rename(split / "small-00001-of-00003.gguf")
    (split / "small-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match="is one of 3 files; fetch the others, too\n  missing: small-00003-of"):
        loaded(split)


def test_files_of_two_splits(split: Path, directory: Path) -> None:
    (split / "small-00003-of-00003.gguf").write_bytes((split / "small-00002-of-00003.gguf").read_bytes())
    with pytest.raises(CheckpointError, match=r"number 0 of 3 files.* tensors, and is number 0 of 3 with"):
        loaded(split)


def test_several_models(directory: Path, tmp_path: Path) -> None:
    for name in ("a-Q4_K_M.gguf", "a-Q8_0.gguf"):
        (tmp_path / name).write_bytes((directory / "small-f32.gguf").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds 2 models in GGUF; name one of them\n  missing: .*/a-Q4_K_M.gguf"):
        loaded(tmp_path)
    assert loaded(tmp_path / "a-Q8_0.gguf").config.vision is None
    gguf_files.small_mmproj(tmp_path / "mmproj-a-Q8_0.gguf")
    other = dict(gguf_files.tensors_of(small_model.model()))["mm.model.fc.weight"].new_zeros(7, 24)
    gguf_files.write(tmp_path / "mmproj-BF16.gguf", {"general.architecture": "clip"}, {"mm.model.fc.weight": other})
    assert loaded(tmp_path / "a-Q8_0.gguf").config.vision is not None
    assert loaded(tmp_path / "a-Q4_K_M.gguf").config.vision is None  # another model's


def test_a_vision_tower_elsewhere(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes((directory / "small-f32.gguf").read_bytes())
    assert loaded(tmp_path / "a.gguf").config.vision is None
    llm = loaded(tmp_path / "a.gguf", mmproj=directory / "mmproj-small-f32.gguf")
    assert llm.config.vision == small_model.config().vision
    for path, reason in (
        (tmp_path / "none.gguf", "there is no file .*none.gguf; mmproj names the one with the vision tower"),
        (tmp_path, "there is no file"),
        (tmp_path / "a.gguf", "is of architecture 'llama4', and no vision tower"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            loaded(tmp_path / "a.gguf", mmproj=path)
    dense.write(tmp_path / "text")
    convert_to_gguf(tmp_path / "text", tmp_path / "text.gguf", "f32", progress=False)
    with pytest.raises(CheckpointError, match="takes no pictures: it is of architecture 'llama'; leave out mmproj"):
        loaded(tmp_path / "text.gguf", mmproj=directory / "mmproj-small-f32.gguf")
    with pytest.raises(Llama4Error, match="mmproj is for models in GGUF"):
        Llama4.from_pretrained("tiny", mmproj=directory / "mmproj-small-f32.gguf")


@pytest.fixture
def server(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    several = tmp_path / "several"
    (several / "Q8_0").mkdir(parents=True)
    for name in ("a-f32.gguf", "Q8_0/a-q8_0.gguf"):
        (several / name).write_bytes((directory / "small-f32.gguf").read_bytes())
    local = LocalHub({"org/one": directory, "org/several": several})
    use(local, tmp_path / "cache", monkeypatch)
    yield local
    local.shutdown()
    local.server_close()


def test_on_the_hub(server: LocalHub) -> None:
    assert loaded("org/one").config.vision is not None
    assert loaded("org/one/small-f32.gguf").config.vision is not None
    assert loaded("org/several/a-f32.gguf").config.vision is None
    assert loaded("org/several/Q8_0/a-q8_0.gguf").config.vision is None
    assert loaded("org/several", subfolder="Q8_0").config.vision is None
    with pytest.raises(
        CheckpointError, match=r"has no file b\.gguf; its models in GGUF are\n  missing: org/several/Q8_0/a-"
    ):
        loaded("org/several/b.gguf")
    with pytest.raises(
        CheckpointError, match="holds 2 models in GGUF; name one of them\n  missing: org/several/Q8_0/a-"
    ):
        loaded("org/several")


@pytest.mark.parametrize(("name", "values"), [("image_mean", [0.5, 0.5]), ("image_std", [0.5, 0.0, 0.5])])
def test_pixels_that_cannot_be(name: str, values: list[float], directory: Path, tmp_path: Path) -> None:
    file = GgufFile.read(directory / "mmproj-small-f32.gguf")
    said = struct.pack("<IIQ", 9, 6, len(values)) + np.array(values, np.float32).tobytes()
    tensors = {
        name: tensor for name, tensor in gguf_files.tensors_of(small_model.model()).items() if name in file.tensors
    }
    gguf_files.write(tmp_path / "mmproj.gguf", {**file.metadata, f"clip.vision.{name}": said}, tensors)
    with pytest.raises(Llama4Error, match=r"mmproj\.gguf: image_mean and image_std must have a number for each of 3"):
        loaded(directory / "small-f32.gguf", mmproj=tmp_path / "mmproj.gguf")


# -- quantized -------------------------------------------------------------------------------------------------------

NUMBERS = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82)}
"""Where in a block its float16 are; of other types at its beginning alone."""


def random_blocks(kind: str, *shape: int, seed: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor of a type with every bit drawn, and scales that are about as large as in models."""
    type_ = next(each for each in _TYPES.values() if each.name == kind)
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // type_.block, type_.nbytes), np.uint8)
    for at in () if kind == "MXFP4" else NUMBERS.get(kind, (0,)):
        scales = rng.uniform(-0.01, 0.01, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = rng.integers(115, 124, blocks.shape[:-1])
    return kind, shape, blocks.tobytes()


def truth(stored: tuple[str, tuple[int, ...], bytes]) -> Tensor:
    """What the package `gguf` makes of a tensor."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is the truth of its types")
    kind, shape, content = stored
    rows = np.frombuffer(content, np.uint8).reshape(*shape[:-1], -1)
    return torch.from_numpy(gguf.dequantize(rows, gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", GGUF_FORMATS)
def test_blocks(kind: str) -> None:
    """Bit by bit; products by their definition."""
    stored = random_blocks(kind, 48, 512)
    format = GGUF_FORMATS[kind]
    with torch.device("meta"):
        weight = QuantizedWeight(format, (48, 512))
    weight.set_parts({"weight": torch.frombuffer(bytearray(stored[2]), dtype=torch.uint8).view(48, -1)})
    wanted = truth(stored)
    assert torch.equal(weight.dequantize(), wanted)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight(x), (x.double() @ wanted.double().T).float(), rtol=1e-4, atol=1e-4)
    assert format.weights_in("weight", weight.specs["weight"]) == 48 * 512


@pytest.mark.parametrize("exponent", [0, 1, 2, 127, 254, 255])
def test_powers_of_mxfp4(exponent: int) -> None:
    kind, shape, content = random_blocks("MXFP4", 1, 32)
    stored = kind, shape, bytes([exponent]) + content[1:]
    found = GGUF_FORMATS["MXFP4"].decode(torch.frombuffer(bytearray(stored[2]), dtype=torch.uint8)[None])
    with np.errstate(over="ignore"):
        assert torch.equal(found, truth(stored))


def quantized(path: Path, kinds: dict[str, str], **changes: Any) -> tuple[Path, Llama4Model]:
    """A model with experts, of which tensors are in these types, by what their names hold; and the model that it is."""
    sizes: dict[str, Any] = {
        **{"vocab_size": 96, "hidden_size": 256, "intermediate_size": 256, "intermediate_size_mlp": 256},
        **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
        **{"num_local_experts": 3, "interleave_moe_layer_step": 2, "max_position_embeddings": 8192},
        **{"bos_token_id": None, "eos_token_id": (), "pad_token_id": None},
    }
    text = TextConfig(**sizes | changes)
    config = Llama4Config(text, vision=None, dtype="float32")
    model = Llama4Model(config).eval()
    model.init_weights(torch.Generator().manual_seed(1))
    tensors: dict[str, Any] = dict(gguf_files.tensors_of(model))
    for i, name in enumerate(tensors):
        kind = next((kind for part, kind in kinds.items() if part in name), None)
        if kind not in (None, "F32") and tensors[name].ndim > 1:
            tensors[name] = random_blocks(kind, *tensors[name].shape, seed=i)
    there = {name: truth(tensor) if isinstance(tensor, tuple) else tensor for name, tensor in tensors.items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer in range(4):
            path_ = f"language_model.model.layers.{layer}.feed_forward"
            if f"{path_}.experts.down_proj" in parameters:
                gate, up, down = (
                    there.pop(f"blk.{layer}.ffn_{matrix}_exps.weight") for matrix in ("gate", "up", "down")
                )
                parameters[f"{path_}.experts.gate_up_proj"].copy_(torch.cat((gate, up), dim=1).mT)
                parameters[f"{path_}.experts.down_proj"].copy_(down.mT)
        for name, target in _names(model).items():
            if name in there:
                parameters[target].copy_(there[name])
    return gguf_files.write(path, gguf_files.metadata_of(config), tensors), model


def _names(model: Llama4Model) -> dict[str, str]:
    """Name in the file -> parameter; experts aside."""
    names: dict[str, str] = {}
    for name in dict(model.named_parameters()):
        if name in gguf_files.OTHERS:
            names[gguf_files.OTHERS[name]] = name
        elif ".experts." not in name:
            layer, _, rest = name.partition(".model.layers.")[2].partition(".")
            module, _, part = rest.rpartition(".")
            names[f"blk.{layer}.{gguf_files.NAMES[module]}.{part}"] = name
    return names


MIXES = {
    "K": {"attn_v": "Q6_K", "ffn_down": "Q6_K", "attn": "Q4_K", "ffn": "Q4_K", "token_embd": "Q4_K", "output.": "Q6_K"},
    "one type each": {
        **{"attn_q": "Q8_0", "attn_k": "Q5_0", "attn_v": "Q5_1", "attn_output": "IQ4_NL", "ffn_gate": "Q4_0"},
        **{"ffn_up": "Q4_1", "ffn_down": "Q5_K", "output.": "MXFP4"},
    },
    "experts in part": {"ffn_gate_exps": "IQ4_XS", "ffn_up_exps": "Q8_0", "attn_q": "Q2_K"},
    "routers": {"ffn_gate_inp": "Q8_0", "exps": "MXFP4"},
}


@pytest.mark.parametrize("mix", MIXES)
def test_quantized_models(mix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Logits are those of the dequantized model."""
    path, model = quantized(tmp_path / "a.gguf", MIXES[mix])
    with caplog.at_level(logging.WARNING):
        llm = loaded(path)
    wanted = logits(Llama4(model, None, progress=False), 40)
    found = logits(llm, 40)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    said = [record.message for record in caplog.records if "dequantized" in record.message]
    assert [word for word in ("IQ4_XS", "Q2_K") if any(word in each for each in said)] == (
        ["IQ4_XS", "Q2_K"] if mix == "experts in part" else []
    )
    if mix == "K":
        assert llm.model.get_submodule("language_model.lm_head").format == GGUF_FORMATS["Q6_K"]
    half = Llama4.from_pretrained(path, dtype="bfloat16", progress=False)
    assert (logits(half, 40).float() - wanted).abs().mean() < 0.1 * wanted.abs().mean()


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mix", ["K", "one type each"])
def test_steps_of_packed_models(
    mix: str, tied: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is one call, with embeddings as they lie in the file, also as the head, and gate and up of experts apart."""
    monkeypatch.setattr(cpu_kernels, "MIN_WIDTH", 1)
    kinds = {"ffn_gate_inp": "F32", "token_embd": "Q5_0", **MIXES[mix]}
    path, _ = quantized(tmp_path / "a.gguf", kinds, tie_word_embeddings=tied)
    model = Llama4.from_pretrained(path, dtype=dtype, progress=False).model
    language_model = model.language_model
    embedding, head = language_model.model.embed_tokens, language_model.lm_head
    assert isinstance(embedding, QuantizedEmbedding)
    assert (head.weight is embedding.weight) == tied
    maps = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "a.gguf" in line]
    for weight in (embedding.weight, head.weight):
        assert any(int(begin, 16) <= weight.data_ptr() < int(end, 16) for begin, end in maps)
    ids, runner = torch.arange(12)[None], FusedCpuRunner(model)
    with torch.inference_mode():
        wanted = model(ids)[0, 4:]
        cache = model.new_cache(1)
        model(ids[:, :4], cache=cache)
        assert runner.unsupported_reason(cache) is None
        session = runner.open(cache)
        for step, token in enumerate(ids[0, 4:].tolist()):
            session.run([token], cache)
            error = (session.logits_BV[0] - wanted[step]).float().abs().max() / wanted.float().abs().max()
            assert error < (1e-5 if dtype == "float32" else 5e-2)


@needs_kernels
def test_activations(tmp_path: Path) -> None:
    """Rounding to int8 changes little; by default it is in bfloat16 alone, beside weights of up to six bits, but not
    in a head of six."""
    kinds = {"ffn_gate_inp": "F32", **MIXES["one type each"], "attn_output": "Q6_K", "output.": "Q6_K"}
    path, _ = quantized(tmp_path / "a.gguf", kinds)
    rounded: dict[tuple[str, str], dict[tuple[str, bool], bool]] = {}
    results = {}
    for dtype, activations in (("float32", "float"), ("float32", "int8"), ("float32", "auto"), ("bfloat16", "auto")):
        llm = Llama4.from_pretrained(path, dtype=dtype, activations=activations, progress=False)
        rounded[dtype, activations] = {
            (module.format.kind, name.endswith("lm_head")): module.format.activations == "int8"
            for name, module in llm.model.named_modules()
            if isinstance(module, QuantizedWeight) and isinstance(module.format, GgufBlocks)
        }
        results[dtype, activations] = logits(llm, 40).float()
    assert not any(rounded["float32", "float"].values()) and not any(rounded["float32", "auto"].values())
    assert all(rounded["float32", "int8"].values())
    assert {("q6_k", False), ("q6_k", True), ("q4_0", False)} <= rounded["bfloat16", "auto"].keys()
    for (kind, is_head), is_rounded in rounded["bfloat16", "auto"].items():
        assert is_rounded == (kind != "q8_0" and (kind, is_head) != ("q6_k", True)), kind
    exact = results["float32", "float"]
    assert torch.equal(results["float32", "auto"], exact)
    error = (results["float32", "int8"] - exact).abs().mean() / exact.abs().mean()
    assert 1e-5 < error < 0.1
    with pytest.raises(ArgumentError, match="activations='fp4' is not known; choose one of auto, float, int8"):
        Llama4.from_pretrained(path, activations="fp4")


def test_activations_that_nothing_is_multiplied_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused, with the reason, as experts= is; "float" and "auto" are not."""
    path, _ = quantized(tmp_path / "a.gguf", {"ffn_gate_inp": "F32", **MIXES["one type each"]})
    with pytest.raises(
        ArgumentError, match=r"activations='int8' does nothing here: no weight .* in int4, int8 or blocks of GGUF"
    ):
        Llama4.from_pretrained("tiny", activations="int8", progress=False)
    with pytest.raises(ArgumentError, match="does nothing here: it computes in float64; choose 'float' or 'auto'"):
        Llama4.from_pretrained(path, dtype="float64", activations="int8", progress=False)
    monkeypatch.setattr(loader, "library", lambda: None)
    with pytest.raises(ArgumentError, match="does nothing here: there are no CPU kernels"):
        Llama4.from_pretrained(path, activations="int8", progress=False)
    Llama4.from_pretrained(path, activations="auto", progress=False)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = quantized(tmp_path / "a.gguf", {"attn_q": "Q2_K"})
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"tensors in Q2_K, which the package gguf decodes.* `pip install gguf`"):
        loaded(path)


# -- what old and careless converters wrote ---------------------------------------------------------------------------

KINDS = gguf_files.vocabulary()["tokenizer.ggml.token_type"]
ODD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no padding": ({"tokenizer.ggml.padding_token_id": 2**32 - 1, "tokenizer.ggml.unknown_token_id": 2**32 - 1}, ()),
    "no pre": ({}, ("tokenizer.ggml.pre",)),
    "pre by default": ({"tokenizer.ggml.pre": "default"}, ()),
    "no types": ({}, ("tokenizer.ggml.token_type",)),
    "types in bytes": (
        {"tokenizer.ggml.token_type": struct.pack("<IIQ", 9, 0, len(KINDS)) + bytes(KINDS.tolist())},
        (),
    ),
    "a number as a flag": ({"tokenizer.ggml.add_bos_token": struct.pack("<IB", 0, 1)}, ()),
    "a blank template": ({"tokenizer.chat_template": " \n"}, ()),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_metadata(case: str, original: Llama4, tmp_path: Path) -> None:
    """It is the same model, with the same tokens and prompts."""
    changes, missing = ODD[case]
    config = small_model.config()
    metadata = gguf_files.metadata_of(config) | gguf_files.vocabulary() | changes
    tensors = {name: tensor for name, tensor in gguf_files.tensors_of(small_model.model()).items() if name[:2] != "v."}
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith("mm.")}
    path = tmp_path / "a.gguf"
    gguf_files.write(path, {key: value for key, value in metadata.items() if key not in missing}, text)
    llm = loaded(path)
    for words in ("ab cd  12345 it's\n\n é 日本", "<|eot|>", "CamelCase"):
        assert llm.tokenizer.encode(words) == original.tokenizer.encode(words)
    assert llm.processor(QUESTION).input_ids.tolist() == original.processor(QUESTION).input_ids.tolist()
    assert llm.processor.complete("ab").input_ids.tolist() == original.processor.complete("ab").input_ids.tolist()
    assert llm.tokenizer.special_tokens == original.tokenizer.special_tokens
    assert set(llm.stop_ids) == set(original.stop_ids)


def test_pieces_without_types(tmp_path: Path) -> None:
    """Of a vocabulary of SentencePiece, bytes and control tokens are told by their texts."""
    dense.write(tmp_path / "model", vocab_size=700, eos_token_id=2)
    train(tmp_path / "model" / "tokenizer.model")
    convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf", "f32", progress=False)
    file, wanted = GgufFile.read(tmp_path / "a.gguf"), Tokenizer(tmp_path / "a.gguf")
    scores = file.metadata["tokenizer.ggml.scores"]
    floats = struct.pack("<IIQ", 9, 6, len(scores)) + scores.tobytes()
    metadata = {**file.metadata, "tokenizer.ggml.scores": floats}
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer(gguf_files.write(tmp_path / "b.gguf", metadata, {}))
    for words in ("Some words é 🦙", "<s> a </s>", "<0x0A>"):
        assert tokenizer.encode(words) == wanted.encode(words)
    assert tokenizer.decode(tokenizer.encode("🦙 é")).strip() == "🦙 é"


def test_pieces_as_a_file_of_sentencepiece(tmp_path: Path) -> None:
    """A vocabulary of SentencePiece goes to the other layouts: sentencepiece itself and we read the same, and
    back in GGUF it is what it was."""
    sentencepiece: Any = pytest.importorskip("sentencepiece")
    dense.write(tmp_path / "model", vocab_size=700, eos_token_id=2)
    train(tmp_path / "model" / "tokenizer.model")
    convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf", "f32", progress=False)
    convert(tmp_path / "a.gguf", tmp_path / "hf", "hf", progress=False)
    convert(tmp_path / "a.gguf", tmp_path / "meta", "meta", progress=False)
    convert_to_gguf(tmp_path / "hf", tmp_path / "b.gguf", "f32", progress=False)
    wanted = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model" / "tokenizer.model"))
    for name in ("hf", "meta"):
        found = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / name / "tokenizer.model"))
        for words in ("Some words é 🦙", "<s> a </s>", "  two  blanks ", ""):
            assert found.encode(words) == wanted.encode(words) == Tokenizer(tmp_path / name).encode(words)
    first, second = (GgufFile.read(tmp_path / name).metadata for name in ("a.gguf", "b.gguf"))
    for key in (key for key in first if key.startswith("tokenizer.")):
        assert np.array_equal(first[key], second[key]), key


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"general.architecture": "qwen2"}, "a model of architecture 'qwen2'; this library runs 'llama4' and 'llama'"),
        ({"llama4.block_count": 3_000_000}, "llama4.block_count is 3000000, which should be 0 to 1,024"),
        ({"llama4.block_count": "4"}, "llama4.block_count is '4'"),
        ({"llama4.attention.scale": 0.5}, "has llama4.attention.scale, which this library does not compute"),
        ({"llama4.rope.dimension_count": 8}, "llama4.rope.dimension_count is not the 12"),
        ({"llama4.attention.head_count_kv": np.array([2, 2, 2, 1], np.int32)}, "head_count_kv differs by layer"),
        ({"general.alignment": 3}, "general.alignment is 3, which should be a power of two"),
        ({"tokenizer.ggml.pre": "other"}, "splits text as 'other' does, which is not known"),
        (
            {"tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": [f"t{i}" for i in range(1024)]},
            r"does not say how text is split \(tokenizer.ggml.pre\), as an old converter wrote it",
        ),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token is 'yes', which should be true or false"),
        ({"tokenizer.ggml.model": "t5"}, "a vocabulary of kind 't5'"),
        ({"llama4.rope.freq_base": 0.0}, "llama4.rope.freq_base is 0.0, which must be above 0"),
        ({"llama4.attention.temperature_floor": 0}, "floor_scale must be at least 1, not 0"),
        ({"llama4.attention.no_rope_layers": np.array([2, 1, 1, 0], np.int32)}, "must have 0 or 1 for each of 4"),
        *(
            ({key: np.array(content, np.int32)}, rf"a\.gguf.* {re.escape(key)} is .*, which should be ")
            for key in ("general.architecture", "tokenizer.ggml.pre", "tokenizer.ggml.model")
            for content in ([], [1, 2])
        ),
        ({"llama4.attention.qk_norm": np.array([1], np.int32)}, "qk_norm is .*, which should be true or false"),
        ({"split.count": np.array([], np.int32)}, "split.count differs by layer"),
        ({"tokenizer.chat_templates": 5}, "tokenizer.chat_templates is 5, which should be a list of texts"),
        ({"tokenizer.ggml.bos_token_id": 5000}, "bos_token_id is 5000, and there are 1024 tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = gguf_files.small(tmp_path / "a.gguf", **changes)
    with pytest.raises(Llama4Error, match=reason):
        loaded(path)


@pytest.mark.parametrize(
    ("at", "content", "reason"),
    [
        (0, b"GGML", "it begins with b'GGML'"),
        (4, struct.pack("<I", 1), "version 1, and versions 2 and 3 are read"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 60), "it says that it has .* tensors"),
        (16, struct.pack("<Q", 1 << 60), "it says that it has .* keys"),
        (24, struct.pack("<Q", 1 << 63), "it is cut short"),
        (24 + 8 + len("general.architecture"), struct.pack("<I", 77), "is of a type, 77, that is not known"),
    ],
)
def test_damaged_heads(at: int, content: bytes, reason: str, directory: Path, tmp_path: Path) -> None:
    data = bytearray((directory / "small-f32.gguf").read_bytes())
    data[at : at + len(content)] = content
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"a\.gguf cannot be read as GGUF: .*{reason}.*; fetch it again"):
        loaded(tmp_path / "a.gguf")


@pytest.mark.parametrize("size", [0, 3, 24, 5000, 100_000])
def test_cut_short(size: int, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes((directory / "small-f32.gguf").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"cannot be read as GGUF: .*(too short|cut short)"):
        loaded(tmp_path / "a.gguf")


def test_mutated_files(tmp_path: Path) -> None:
    """Each loads or is refused: nothing else is raised, and nothing is read beside the file. `python -m
    tests.weights.mutated_gguf 1000` runs more of them."""
    for kind, files in mutated_gguf.models(tmp_path).items():
        assert mutated_gguf.run(*files, 25) > 8, kind


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="holds pointers of Git LFS"):
        loaded(tmp_path / "a.gguf")


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "vocab.gguf", {"general.architecture": "llama4"} | gguf_files.vocabulary(), {})
    assert Tokenizer(path).decode(Tokenizer(path).encode("ab 12 é")) == "ab 12 é"
    with pytest.raises(Llama4Error, match=r"has no token_embd\.weight, and so no weights"):
        open_checkpoint(path)
