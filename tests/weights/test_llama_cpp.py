"""What is written as GGUF, run by llama.cpp through its Python package llama-cpp-python (`pip install llama-cpp-python`
builds it, which takes minutes; without it these tests are skipped). A model with llama.cpp's fixed constants gives the
same logits, the same greedy tokens, the same tokens of texts and the same embeddings of pictures.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama4 import Llama4
from llama4.gguf import TYPE_NUMBERS, GgufFile
from llama4.quantization.gguf_encoding import ENCODERS
from llama4.weights.convert import convert_to_gguf
from tests import small_model
from tests.families import test_llama_api as dense
from tests.weights.test_gguf_out import ROWS

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama.cpp's Python package is not installed")

TEXTS = (
    *("Hello world 123  45 it's  fine\n\n ok", "a 5", "  12", "\t\n 3 x\r\n", "don't DON'T we'll CamelCaseHTTP"),
    *("é 日本 😀 ﷺ", "x" * 300, "1" * 50, "def f(x):\n    return x ** 2  # ok", " leading", "trailing ", "\x07\x0b"),
    *("\u00a0\u2003 x", "<|eot|>", "<|header_start|>user", "ab?\n\n\nb", "L'été, 3.14!", "ﬁ Ǆ ½ Ⅳ", "a\u0301 \r\r\n ."),
)


def theirs(path: Path, length: int) -> Any:
    """llama.cpp, with keys and values in float32."""
    options = {"n_ctx": length, "n_batch": 2048, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}
    return llama_cpp.Llama(str(path), **options, logits_all=True, flash_attn=False, swa_full=True, verbose=False)


def logits(llm: Llama4, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = llm.model(torch.tensor([ids]))[0]
    return found


def check(path: Path, ids: list[int], new: int = 16) -> None:
    other, llm = theirs(path, len(ids) + new), Llama4.from_pretrained(path, dtype="float32", progress=False)
    other.eval(ids)
    wanted = logits(llm, ids)
    assert (torch.from_numpy(other.scores[: len(ids)]) - wanted).abs().max() < 1e-3
    for _ in range(new):
        token = int(wanted[-1].argmax())
        assert int(np.argmax(other.scores[len(ids) - 1])) == token
        other.eval([token])
        ids = [*ids, token]
        wanted = logits(llm, ids)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_model` with the constants that llama.cpp has fixed, and its vision tower."""
    directory = small_model.write(tmp_path_factory.mktemp("hf") / "model")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] |= {"attention_chunk_size": 8192, "floor_scale": 8192, "max_position_embeddings": 16384}
    (directory / "config.json").write_text(json.dumps(config))
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    convert_to_gguf(directory, path, "f32", for_llama_cpp=True, progress=False)
    return path


def test_llama4(path: Path) -> None:
    check(path, [i * 7 % 896 for i in range(100)])


def test_past_the_border_of_a_chunk(path: Path) -> None:
    """There the temperature grows, too."""
    check(path, [i * i % 896 for i in range(8192 + 8)], new=0)


@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 32, "tie_word_embeddings": True}, {"attention_bias": True}], ids=str
)
def test_llama(changes: dict[str, Any], tmp_path: Path) -> None:
    dense.write(tmp_path / "model", **changes)
    convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf", "f32", for_llama_cpp=True, progress=False)
    check(tmp_path / "a.gguf", [i * 7 % 896 for i in range(60)])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope(rope: dict[str, Any], tmp_path: Path) -> None:
    dense.write(tmp_path / "model", rope_parameters={"rope_theta": 1e4, **rope})
    convert_to_gguf(tmp_path / "model", tmp_path / "a.gguf", "f32", progress=False)
    check(tmp_path / "a.gguf", [i * 7 % 896 for i in range(120)], new=4)


def test_tokens(path: Path) -> None:
    llm, other = Llama4.from_pretrained(path, progress=False), theirs(path, 512)
    for text in TEXTS:
        assert other.tokenize(text.encode(), add_bos=False, special=False) == llm.tokenizer.encode(text), text
    prompt = llm.processor([{"role": "user", "content": "ab it's 12?"}]).input_ids[0].tolist()
    written = "<|begin_of_text|><|header_start|>user<|header_end|>\n\nab it's 12?<|eot|><|header_start|>assistant"
    assert other.tokenize(f"{written}<|header_end|>\n\n".encode(), add_bos=False, special=True) == prompt


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind not in ("F32", "F16", "BF16")])
def test_types(kind: str) -> None:
    """Bit by bit; of those that fit scales and minima, where sums in another order decide otherwise here and there,
    most blocks, and with the same error."""
    ggml = pytest.importorskip("llama_cpp._ggml").libggml
    number, rows = TYPE_NUMBERS[kind], ROWS.numpy()
    found = ENCODERS[kind](ROWS).numpy()
    wanted = np.zeros_like(found)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    size = ctypes.c_int64
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (rows, wanted))
    ggml.ggml_quantize_chunk(number, *pointers, size(0), size(len(rows)), size(rows.shape[1]), None)
    if not kind.endswith("_K"):
        assert np.array_equal(found, wanted)
        return
    gguf = pytest.importorskip("gguf", reason="the package gguf is the truth of its types")
    blocks = (found.reshape(len(rows) * 2, -1) == wanted.reshape(len(rows) * 2, -1)).all(1)
    assert blocks.mean() > 0.7
    errors = [np.linalg.norm(gguf.dequantize(stored, number) - rows) for stored in (found, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=3e-3)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k_m", "q8_0"])
def test_mixtures(kind: str, tmp_path: Path) -> None:
    """The types are those of llama-quantize, and its reader takes the file."""
    sizes: dict[str, Any] = {"num_hidden_layers": 16, "hidden_size": 256, "intermediate_size": 288, "head_dim": 32}
    dense.write(tmp_path / "model", **sizes)
    convert_to_gguf(tmp_path / "model", tmp_path / "f32.gguf", "f32", progress=False)
    convert_to_gguf(tmp_path / "model", tmp_path / "ours.gguf", kind, progress=False)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = GgufFile.read(tmp_path / "ours.gguf").metadata["general.file_type"]
    paths = (str(tmp_path / name).encode() for name in ("f32.gguf", "theirs.gguf"))
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) == 0
    found, wanted = (
        {name: tensor.type.name for name, tensor in GgufFile.read(tmp_path / f"{file}.gguf").tensors.items()}
        for file in ("ours", "theirs")
    )
    assert found == wanted
    assert np.isfinite(theirs(tmp_path / "ours.gguf", 64).eval([1, 2, 3]) or 0.0)


def test_pictures(path: Path) -> None:
    """Of a tile's size: llama.cpp cuts and shrinks larger ones otherwise than Llama 4 does, and says that its pictures
    are known to be worse."""
    mtmd = pytest.importorskip("llama_cpp.mtmd_cpp")
    llm, other = Llama4.from_pretrained(path, dtype="float32", progress=False), theirs(path, 64)
    pixels = torch.randint(256, (28, 28, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    options = mtmd.mtmd_context_params_default()
    options.use_gpu, options.warmup, options.n_threads, options.flash_attn_type = False, False, 1, 0
    mmproj = str(path.with_name(f"mmproj-{path.name}")).encode()
    context = mtmd.mtmd_init_from_file(mmproj, other.model, options)
    assert context
    data = (ctypes.c_uint8 * pixels.numel()).from_buffer_copy(pixels.numpy().tobytes())
    bitmap = mtmd.mtmd_bitmap_init(28, 28, data)
    chunks = mtmd.mtmd_input_chunks_init()
    text = mtmd.mtmd_input_text(mtmd.mtmd_default_marker(), len(mtmd.mtmd_default_marker()), False, True)
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
    found = []
    for i in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, i)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            assert mtmd.mtmd_encode_chunk(context, chunk) == 0
            count = mtmd.mtmd_input_chunk_get_n_tokens(chunk) * llm.config.text.hidden_size
            found.append(np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (count,)).copy())
    wanted = llm.model.encode_images((pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5)
    assert len(found) == 1
    assert (torch.from_numpy(found[0]).view_as(wanted) - wanted).abs().max() < 1e-3 * wanted.abs().max()
