"""Python and C++ agree, and a library that differs is refused."""

from __future__ import annotations

import ctypes
import logging

import pytest
import torch

from llama4 import Llama4
from llama4.cache.formats import QUANTIZED
from llama4.engine.fused_cpu import FusedCpuRunner
from llama4.engine.fused_model import Description
from llama4.kernels import abi, build, cpu, loader
from llama4.quantization.formats import FORMATS
from tests.marks import needs_kernels


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The library, whatever it says."""
    found: list[ctypes.CDLL] = []
    monkeypatch.setattr(abi, "bind", found.append)
    loader._find(build.directory())
    monkeypatch.undo()
    return found[0]


@needs_kernels
def test_all_kernels_are_bound(compiled: ctypes.CDLL) -> None:
    assert set(abi.bind(compiled).functions) == {(name, dtype) for name in abi.SIGNATURES for dtype in abi.DTYPES}


@needs_kernels
def test_formats_are_those_of_the_registries(compiled: ctypes.CDLL) -> None:
    """By name, each with a number of its own."""
    library = abi.bind(compiled)
    kinds = {kind.removesuffix("_int8") for kind in library.weight_formats}
    assert kinds <= set(FORMATS)
    assert set(library.cache_formats) == {"unquantized", *QUANTIZED}
    for formats, dense in ((library.weight_formats, len(abi.MatrixLayout)), (library.cache_formats, 0)):
        assert [format.number for format in formats.values()] == [dense + i for i in range(len(formats))]


@needs_kernels
@pytest.mark.parametrize("name", ["MAX_GEMV_ROWS", "MAX_HEAD_DIM", "LANES", "INTERLEAVE", "STRIP", "CACHE_BLOCK"])
def test_another_constant_is_refused(name: str, compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    value = getattr(abi, name)
    monkeypatch.setattr(abi, name, value + 1)
    with pytest.raises(abi.AbiError, match=f"is {value + 1} in Python and {value} in C"):
        abi.bind(compiled)


@needs_kernels
def test_other_structures_are_refused(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    class LayerStep(ctypes.Structure):
        _fields_ = [(name, ctypes.c_int64) for name in ("temperatures", "rotations", "lengths", "block_table", "width")]

    monkeypatch.setattr(abi, "LayerStep", LayerStep)
    with pytest.raises(abi.AbiError) as error:
        abi.bind(compiled)
    for difference in (
        "LayerStep is 40 in Python and 48 in C++",
        "LayerStep.rotations is 8 in Python and 0 in C++",
        "LayerStep.format is None in Python and 40 in C++",
    ):
        assert difference in str(error.value)


@needs_kernels
def test_another_signature_is_refused(compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(abi.SIGNATURES, "swiglu", abi.SIGNATURES["swiglu"][:-1])
    with pytest.raises(abi.AbiError, match=r"'swiglu', 'float32'.* is qppqqq in Python and qppqqqp in C"):
        abi.bind(compiled)


@needs_kernels
def test_a_refused_library_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """torch does the work, and an error says why."""
    monkeypatch.setattr(abi, "STRIP", 16)
    monkeypatch.setattr(loader, "_found", None)
    with caplog.at_level(logging.WARNING):
        assert loader.library() is None
    assert "strip is 16 in Python and 32 in C++" in caplog.text


@needs_kernels
class TestArguments:
    """A kernel compares what it is told before it touches memory."""

    def test_a_sequence_longer_than_its_blocks(self) -> None:
        block = torch.zeros(2 * 256 * 16 * 4, dtype=torch.uint8)
        table, q = torch.tensor([[block.data_ptr(), 0]]), torch.zeros(1, 1, 16)
        cpu.attend(q, table, torch.tensor([256]), 1, "unquantized")
        for length, problem in (
            (257, "a block is missing"),
            (513, "longer than its blocks"),
            (0, "longer than"),
            (-1, "longer than"),
        ):
            with pytest.raises(abi.KernelArgumentError, match=problem):
                cpu.attend(q, table, torch.tensor([length]), 1, "unquantized")
        k = v = torch.zeros(1, 1, 16)
        cpu.attend_causal(q, k, v, table[0], 256, "unquantized")
        with pytest.raises(abi.KernelArgumentError, match="a block is missing"):
            cpu.attend_causal(q, k, v, table[0], 257, "unquantized")
        with pytest.raises(abi.KernelArgumentError, match="longer than its blocks"):
            cpu.attend_causal(q, k, v, table[0, :1], 257, "unquantized")

    def test_sizes_that_do_not_fit(self) -> None:
        x = torch.zeros(1, 64)
        at, linear = x.data_ptr(), loader.function("linear", x.dtype)
        with pytest.raises(abi.KernelArgumentError, match="layout that is not known"):
            abi.check(linear(1, at, 1, 64, 1, 99, at, None, 0, 0, at))
        kind = loader.loaded().weight_formats["int8"].number
        with pytest.raises(abi.KernelArgumentError, match="no scales"):
            abi.check(linear(1, at, 1, 64, 1, kind, at, None, 0, 0, at))
        with pytest.raises(abi.KernelArgumentError, match="rows of a dense matrix are odd"):
            cpu.linear(torch.zeros(1, 17), torch.zeros(3, 17))
        with pytest.raises(abi.KernelArgumentError, match="multiple of key heads"):
            cpu.attend_causal(
                torch.zeros(1, 3, 16), torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), None, 0, "unquantized"
            )
        with pytest.raises(abi.KernelArgumentError, match="fit the format"):
            cpu.attend_causal(torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), None, 0, "int4")
        with pytest.raises(abi.KernelArgumentError, match="an address is null"):
            abi.check(loader.function("rms_norm", x.dtype)(1, None, 1, 64, x.data_ptr(), 0.0, x.data_ptr()))

    def test_a_step(self) -> None:
        """Whatever is wrong with it, nothing is computed."""
        llm = Llama4.from_pretrained("tiny")
        cache = llm.model.new_cache(1)
        with torch.inference_mode():
            llm.model(torch.arange(10)[None], cache=cache)
            runner = FusedCpuRunner(llm.model)
            runner._description = Description.of(llm.model)
            session = runner.open(cache)
        threads, model, layers, tokens = *session._model, session._tokens
        decode = loader.function("decode", llm.model.dtype)
        assert decode(threads, model, layers, 0, tokens) is None
        width = layers[0].width

        def refused(problem: str, step: int = 0) -> None:
            with pytest.raises(abi.KernelArgumentError, match=problem):
                abi.check(decode(threads, model, layers, step, tokens))

        refused("no such step", step=-1)
        session._ids[0] = -1
        refused("outside the vocabulary")
        session._ids[0] = llm.config.text.vocab_size
        refused("outside the vocabulary")
        session._ids[0] = 0
        embedding, (outputs, layout) = model.embedding, (model.embedding.O, model.embedding.layout)
        embedding.O = 1
        refused("embeddings do not fit the head")
        embedding.O, embedding.layout = outputs, 99
        refused("layout that is not known")
        embedding.layout = layout
        layers[0].width = 0
        refused("there are no blocks")
        layers[0].width, layers[0].format = width, 77
        refused("format of the cache is not known")
        layers[0].format = 0
        tokens.num_outputs = 2
        refused("more outputs than tokens")
        tokens.num_outputs, tokens.B = 1, 0
        refused("there are no sequences")
        tokens.B, model.num_layers = 1, 0
        refused("no layer")
