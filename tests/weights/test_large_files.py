"""Bytes and numbers beyond 2^31 and 2^32, in sparse files: what nobody wrote takes no room on a disk, and what nobody
reads none in memory."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama4.api import Llama4
from llama4.engine.fused_cpu import FusedCpuRunner
from llama4.kernels import cpu
from llama4.kernels.abi import Matrix
from llama4.ops import cpu_kernels, linear
from llama4.quantization.formats import FORMATS
from llama4.quantization.modules import MappedEmbedding, MappedExperts
from llama4.quantization.weight import QuantizedWeight, TensorSpec
from llama4.weights import memory
from llama4.weights.convert import quantize
from llama4.weights.safetensors import open_safetensors
from tests.marks import needs_kernels
from tests.parity.references import reference_config, reference_model, write_mixed

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files elsewhere may not be sparse")

NAMES = {torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16"}
BORDER = 1 << 31


def write_sparse(path: Path, tensors: Mapping[str, TensorSpec], written: Mapping[str, Tensor]) -> None:
    """A safetensors file in which tensors lie in their order, zeros but for the last numbers that are given of some."""
    ends = dict(zip(tensors, itertools.accumulate(spec.nbytes for spec in tensors.values()), strict=True))
    header = {
        name: {
            "dtype": NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [ends[name] - spec.nbytes, ends[name]],
        }
        for name, spec in tensors.items()
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + max(ends.values()))
        for name, values in written.items():
            file.seek(8 + len(text) + ends[name] - values.nbytes)
            file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def sparse(directory: Path, spec: TensorSpec, written: Tensor) -> Tensor:
    """The memory map of one tensor, of which the last numbers are given."""
    directory.mkdir()
    write_sparse(directory / "model.safetensors", {"all": spec}, {"all": written})
    try:
        tensor = open_safetensors(directory).read("all")
    except RuntimeError as error:
        pytest.skip(f"this machine maps no such file: {error}")
    on_disk = os.stat(directory / "model.safetensors").st_blocks * 512
    assert on_disk < spec.nbytes / 8
    return tensor


def numbers(*shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-99, 99, shape, generator=generator, dtype=dtype)


def test_tensors_begin_and_end_anywhere(tmp_path: Path) -> None:
    specs = {
        "up to 2^31": TensorSpec((BORDER - 99,), torch.int8),
        "across it": TensorSpec((99, 2), torch.int8),
        "more numbers than 2^31": TensorSpec((4, 3 << 14, 1 << 14), torch.int8),
        "the last": TensorSpec((5,), torch.bfloat16),
    }
    written = {
        "across it": numbers(99, 2),
        "more numbers than 2^31": numbers(1 << 14),
        "the last": numbers(5, dtype=torch.bfloat16),
    }
    write_sparse(tmp_path / "model.safetensors", specs, written)
    source = open_safetensors(tmp_path)
    assert {name: source.spec(name) for name in source.names()} == specs
    try:
        stacked = source.read("more numbers than 2^31")
    except RuntimeError as error:
        pytest.skip(f"this machine maps no such file: {error}")
    assert torch.equal(source.read("across it"), written["across it"])
    assert torch.equal(source.read("the last"), written["the last"])
    assert torch.equal(stacked[3, -1], written["more numbers than 2^31"])
    assert torch.equal(memory.in_large_pages(stacked[3, -2:])[1], written["more numbers than 2^31"])
    assert not stacked[3, -2].any()
    assert not stacked[1, 0].any()


@pytest.mark.parametrize("kind", [nn.Embedding, MappedEmbedding])
def test_rows_of_an_embedding(tmp_path: Path, kind: type[nn.Embedding]) -> None:
    width = 4096
    last = numbers(8, width, dtype=torch.bfloat16)
    count = BORDER // width + 4
    embedding = nn.Embedding(1, 1)
    embedding.weight = nn.Parameter(sparse(tmp_path / "model", TensorSpec((count, width), torch.bfloat16), last), False)
    if kind is MappedEmbedding:
        embedding = MappedEmbedding(embedding)
    ids = torch.tensor([[count - 1, count - 8], [7, count - 4]])  # of the last two the first number has the index 2^31
    expected = torch.stack([last[7], last[0], torch.zeros(width), last[4]]).view(2, 2, width)
    assert torch.equal(embedding(ids), expected)


@needs_kernels
def test_the_compiled_step_finds_a_row_of_an_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "MIN_MATRIX", 1)
    llm = Llama4.from_pretrained(write_mixed(tmp_path / "small"), dtype="bfloat16", progress=False)
    embedding = llm.model.language_model.model.embed_tokens
    width, last = embedding.weight.shape[1], embedding.weight.detach().clone()
    count = BORDER // width + 99

    @torch.inference_mode()
    def hidden(id_: int) -> Tensor:
        """What a head is given; there is none of so many rows."""
        cache, runner = llm.model.new_cache(1), FusedCpuRunner(llm.model)
        assert runner.unsupported_reason(cache) is None
        session, out = runner.open(cache), torch.zeros(1, width, dtype=torch.bfloat16)
        decoder = session.description.decoder
        assert decoder is not None
        session.vocab_size = decoder.head.O = len(embedding.weight)
        session._tokens.num_outputs, session._tokens.hidden = 0, out.data_ptr()
        session.run([id_], cache)
        return out

    expected = [hidden(id_) for id_ in (3, len(last) - 1)]
    embedding.weight = nn.Parameter(sparse(tmp_path / "model", TensorSpec((count, width), torch.bfloat16), last), False)
    assert not torch.equal(*expected)
    assert torch.equal(hidden(count - len(last) + 3), expected[0])
    assert torch.equal(hidden(count - 1), expected[1])


@needs_kernels
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_the_kernels_find_a_quantized_expert(tmp_path: Path, kind: str) -> None:
    """The last of a stack computes what it does alone."""
    width, hidden = 512, 1024
    format = FORMATS[kind]()
    x = numbers(3, width, dtype=torch.bfloat16)
    alone = [
        QuantizedWeight.of(numbers(1, *shape, dtype=torch.bfloat16), format)
        for shape in ((2 * hidden, width), (width, hidden))
    ]
    whole = []
    for i, weight in enumerate(alone):
        count = (2 * BORDER) // alone[0].part(format.parts[0]).nbytes + 3
        with torch.device("meta"):
            stack = QuantizedWeight(format, (count, *weight.shape[1:]))
        stack.in_kernel_layout = weight.in_kernel_layout
        for name in format.parts:
            part = weight.part(name)
            spec = TensorSpec((count, *part.shape[1:]), part.dtype)
            stack.set_part(name, sparse(tmp_path / f"{i} {name}", spec, part))
        whole.append(stack)
    counts = torch.zeros(whole[0].shape[0], dtype=torch.int64)
    counts[-1] = len(x)
    expected = experts(x, torch.tensor([len(x)]), [weight.matrix() for weight in alone])
    assert expected.isfinite().all()
    assert expected.any()
    assert torch.equal(experts(x, counts, [weight.matrix() for weight in whole]), expected)
    last = whole[0].shape[0] - 1
    assert torch.equal(whole[0].product(x, last), alone[0].product(x, 0))
    assert torch.equal(whole[0].dequantize(last), alone[0].dequantize(0))


def experts(x: Tensor, counts: Tensor, matrices: Sequence[Matrix | None]) -> Tensor:
    gate_up, down = matrices
    assert gate_up is not None
    assert down is not None
    return cpu.experts(x, counts, gate_up, down)


@needs_kernels
def test_the_kernels_find_an_expert(tmp_path: Path) -> None:
    width, hidden = 512, 1024
    shapes = (width, 2 * hidden), (hidden, width)
    x = numbers(3, width, dtype=torch.bfloat16)
    alone = [numbers(1, *shape, dtype=torch.bfloat16) for shape in shapes]
    count = BORDER // alone[0].numel() + 2
    whole = [
        sparse(tmp_path / str(i), TensorSpec((count, *each.shape[1:]), each.dtype), each)
        for i, each in enumerate(alone)
    ]
    counts = torch.zeros(count, dtype=torch.int64)
    counts[-1] = len(x)
    expected, found = (
        experts(x, c, [linear.in_out_matrix(weight, x.dtype) for weight in weights])
        for c, weights in ((counts[-1:], alone), (counts, whole))
    )
    assert expected.any()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("fits", [True, False], ids=["in memory", "larger than memory"])
def test_a_checkpoint(tmp_path: Path, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a matrix of the vision tower of 4.3 GB, with which nobody looks."""
    small, large = tmp_path / "small", tmp_path / "large"
    reference_model(reference_config(head_dim=32), 3).bfloat16().save_pretrained(tmp_path / "plain")
    quantize(tmp_path / "plain", small, "int4", progress=False)
    large.mkdir()
    content, width = json.loads((small / "config.json").read_text()), 46400
    own = content["vision_config"]["projector_output_dim"]
    content["vision_config"] |= dict.fromkeys(
        ("projector_input_dim", "projector_output_dim", "vision_output_dim"), width
    )
    (large / "config.json").write_text(json.dumps(content))
    source = open_safetensors(small)
    is_widened = re.compile(r"vision_model\.vision_adapter\..*|multi_modal_projector\..*").fullmatch
    specs = {}
    for name in sorted(source.names(), key=lambda name: not is_widened(name)):
        spec = source.spec(name)
        if is_widened(name):
            spec = spec._replace(shape=tuple(width if size == own else size for size in spec.shape))
        specs[name] = spec
    specs["multi_modal_projector.linear_1.weight"] = TensorSpec((64, width), torch.bfloat16)
    written = {name: source.read(name) for name in specs if not is_widened(name)}
    assert sum(specs[name].nbytes for name in specs.keys() - written.keys()) > 2 * BORDER
    write_sparse(large / "model.safetensors", specs, written)
    expected = Llama4.from_pretrained(small, dtype="bfloat16", progress=False).model
    if not fits:
        monkeypatch.setattr(memory, "total", lambda device: 3 << 20)
    try:
        model = Llama4.from_pretrained(large, dtype="bfloat16", progress=False).model
    except RuntimeError as error:
        pytest.skip(f"this machine maps no such file: {error}")
    assert any(isinstance(module, MappedExperts) for module in model.modules()) is not fits
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids), expected(ids))
