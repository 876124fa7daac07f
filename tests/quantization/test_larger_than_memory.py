"""Quantized checkpoints that are larger than memory: their routed experts are computed from the files' memory map."""

from __future__ import annotations

import copy
import mmap
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama4.api import Llama4
from llama4.engine.fused_cpu import FusedCpuRunner
from llama4.model.attention import Attention
from llama4.model.moe import Router
from llama4.ops import cpu_kernels
from llama4.ops.linear import Linear
from llama4.quantization import modules
from llama4.quantization.modules import MappedEmbedding, MappedExperts, SeparateExperts
from llama4.quantization.weight import QuantizedWeight
from llama4.weights import first_use, memory
from llama4.weights import load as load_module
from llama4.weights.convert import quantize
from tests.marks import needs_kernels
from tests.parity.references import reference_config, reference_model
from tests.quantization.test_checkpoints import same

linux = pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux says what is mapped")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "model"
    reference_model(reference_config(head_dim=32), 3).bfloat16().save_pretrained(directory)
    return directory


def mapped_files() -> list[tuple[int, int, str]]:
    """Begin, end and file of each map of a file of weights."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [(line[0].split("-"), line[-1]) for line in lines if line[-1].endswith(".safetensors")]
    return [(int(begin, 16), int(end, 16), file) for (begin, end), file in ranges]


def is_mapped(tensor: Tensor) -> bool:
    return any(begin <= tensor.data_ptr() < end for begin, end, _ in mapped_files())


def larger_than_memory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Llama4:
    """A checkpoint in bfloat16 on a machine that has less memory than its weights take."""
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    monkeypatch.setattr(memory, "total", lambda device: int(0.9 * size))
    return Llama4.from_pretrained(directory, dtype="bfloat16", progress=False)


@linux
@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
def test_experts_stay_in_the_files(
    plain: Path,
    tmp_path: Path,
    scheme: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same logits, bit by bit, and the same checkpoint when it is saved again."""
    quantize(plain, tmp_path / "packed", scheme, progress=False)
    whole = Llama4.from_pretrained(tmp_path / "packed", dtype="bfloat16", progress=False)
    assert not any(isinstance(module, SeparateExperts) for module in whole.model.modules())
    caplog.clear()
    llm = larger_than_memory(tmp_path / "packed", monkeypatch)
    assert "reads the rest from the files" in caplog.text
    experts = [module for module in llm.model.modules() if isinstance(module, MappedExperts)]
    weights = [weight for each in experts for weight in each.modules() if isinstance(weight, QuantizedWeight)]
    assert len(weights) == 3 * sum(len(list(each.children())) for each in experts) > 0
    assert all(is_mapped(weight.part(part)) for weight in weights for part in weight.format.parts)
    assert type(llm.model.language_model.model.embed_tokens) is MappedEmbedding
    ids = torch.randint(0, llm.config.text.vocab_size, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for tokens in (ids, ids[:, :1]):
            assert torch.equal(llm.model(tokens), whole.model(tokens))
    threads: list[int] = []
    hooks = [each.register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads())) for each in experts]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        llm.runner.step(ids[0, :1], llm.model.new_cache(1))
    finally:
        torch.set_num_threads(before)
        for hook in hooks:
            hook.remove()
    with torch.inference_mode():
        reasons = [FusedCpuRunner(each.model).unsupported_reason(each.model.new_cache(1)) for each in (whole, llm)]
    if cpu_kernels.library_unsupported_reason() is None:
        assert reasons == [None, "its routed experts stay in files"]
        assert threads == [1] * len(experts)
    llm.save_pretrained(tmp_path / "again")
    assert same(tmp_path / "again", tmp_path / "packed")


def logits(llm: Llama4) -> Tensor:
    with torch.inference_mode():
        return llm.model(torch.arange(20)[None]).clone()


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packed") / "model"
    quantize(plain, directory, "int4", progress=False)
    return directory


def needed_by_every_token(llm: Llama4) -> list[Tensor]:
    """Parameters of Linears, quantized or not, that are no experts."""
    return [
        parameter
        for name, module in llm.model.language_model.named_modules()
        if isinstance(module, (QuantizedWeight, Linear)) and ".experts." not in name
        for parameter in module.parameters()
    ]


def attention(llm: Llama4, layer: int) -> Attention:
    found = llm.model.language_model.model.layers[layer].self_attn
    assert isinstance(found, Attention)
    return found


def query_of(llm: Llama4, layer: int) -> QuantizedWeight:
    found = attention(llm, layer).q_proj
    assert isinstance(found, QuantizedWeight)
    return found


def has_hooks(llm: Llama4) -> bool:
    return any(module._forward_pre_hooks for module in llm.model.language_model.modules())


def first_uses(llm: Llama4) -> list[first_use.FirstUse]:
    hooks = [hook for module in llm.model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, first_use.FirstUse)]


@linux
@needs_kernels
def test_what_every_token_needs_is_copied_when_a_layer_first_computes(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = larger_than_memory(packed, monkeypatch)
    parameters = needed_by_every_token(llm)
    assert len(parameters) == 7 * 2 * llm.config.text.num_hidden_layers + 1
    assert all(map(is_mapped, parameters))
    before = {name: values.clone() for name, values in llm.model.state_dict().items()}
    seen: list[bool] = []
    hook = attention(llm, 1).register_forward_hook(
        lambda *_: seen.extend(is_mapped(query_of(llm, i).part("weight_packed")) for i in (1, 3))
    )
    first = logits(llm)
    hook.remove()
    assert seen == [False, True]
    assert not any(map(is_mapped, parameters))
    assert all(a is b for a, b in zip(needed_by_every_token(llm), parameters, strict=True))
    assert not has_hooks(llm)
    after = llm.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(llm), first)


@linux
@needs_kernels
def test_a_copy_of_a_model_copies_its_own(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = larger_than_memory(packed, monkeypatch)
    twin = copy.deepcopy(llm)
    first = logits(llm)
    assert has_hooks(twin)
    assert torch.equal(logits(twin), first)
    assert not has_hooks(twin)
    assert query_of(twin, 3).in_kernel_layout


@linux
@needs_kernels
def test_what_was_replaced_before_its_first_use_is_left(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use.FirstUse, "begin", first_use.FirstUse._copy)  # when a thread would begin, at once
    llm = larger_than_memory(packed, monkeypatch)
    scale = query_of(llm, 1).part("weight_scale") * 2
    attention(llm, 0).register_forward_hook(lambda *_: query_of(llm, 1).set_part("weight_scale", scale))
    logits(llm)
    assert torch.equal(query_of(llm, 1).part("weight_scale"), scale)
    assert not query_of(llm, 1).in_kernel_layout
    assert query_of(llm, 2).in_kernel_layout


@linux
@needs_kernels
def test_what_was_replaced_before_it_is_copied_keeps_its_values(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a file are dropped when they have been copied; those of a tensor of somebody's own are not."""
    llm = larger_than_memory(packed, monkeypatch)
    first = query_of(llm, 1).part("weight_packed").clone()
    assert first.nbytes % mmap.PAGESIZE == 0
    pages = mmap.mmap(-1, first.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    own = torch.frombuffer(pages, dtype=first.dtype).view_as(first).copy_(first)
    query_of(llm, 1).set_part("weight_packed", own)
    result = logits(llm)
    assert torch.equal(own, first)
    assert torch.equal(result, logits(larger_than_memory(packed, monkeypatch)))


@linux
@needs_kernels
@pytest.mark.parametrize("when", ["before it is copied", "before it is used"])
def test_what_was_written_to_in_place_counts(packed: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    monkeypatch.setattr(first_use.FirstUse, "begin", first_use.FirstUse._copy)  # when a thread would begin, at once
    whole = Llama4.from_pretrained(packed, dtype="bfloat16", progress=False)
    llm = larger_than_memory(packed, monkeypatch)
    doubled = {"weight_scale": query_of(llm, 1).part("weight_scale") * 2}

    def change(model: Llama4) -> None:
        query_of(model, 1).load_state_dict(doubled, strict=False)

    change(whole)
    if when == "before it is copied":
        change(llm)
    else:
        attention(llm, 0).register_forward_hook(lambda *_: change(llm))
    assert torch.equal(logits(llm), logits(whole))


@linux
@needs_kernels
def test_what_was_written_to_in_place_outlives_copies_that_are_lost(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of a file's memory map are dropped when copies have taken their places, and not before."""
    llm = larger_than_memory(packed, monkeypatch)
    own = first_uses(llm)
    weight = query_of(llm, 1)
    with torch.no_grad():
        weight.part("weight_packed").bitwise_xor_(0x11)
    changed = weight.part("weight_packed").clone()
    for hook in own:
        hook._copy()
        hook._copied = None
    assert torch.equal(weight.part("weight_packed"), changed)


@linux
@needs_kernels
def test_interrupted_when_copies_are_put(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = logits(larger_than_memory(packed, monkeypatch))
    llm = larger_than_memory(packed, monkeypatch)
    put = first_use._Copied.put

    def interrupted(copied: first_use._Copied) -> None:
        monkeypatch.setattr(first_use._Copied, "put", put)
        name, values = next(iter(copied.copies.items()))
        copied.module.get_parameter(name).data = values
        raise KeyboardInterrupt

    monkeypatch.setattr(first_use._Copied, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        logits(llm)
    assert torch.equal(logits(llm), first)


@linux
@needs_kernels
def test_interrupted_when_the_next_are_begun(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are begun once."""
    llm = larger_than_memory(packed, monkeypatch)
    begin, begun = first_use.FirstUse.begin, list[threading.Thread]()

    def interrupted(hook: first_use.FirstUse) -> None:
        monkeypatch.setattr(first_use.FirstUse, "begin", begin)
        hook.begin()
        assert hook._thread is not None
        begun.append(hook._thread)
        hook.begin()
        assert hook._thread is begun[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(first_use.FirstUse, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        logits(llm)
    assert torch.equal(logits(llm), logits(larger_than_memory(packed, monkeypatch)))


@linux
@needs_kernels
def test_a_fork_while_copies_are_made(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has no thread that would make them, or give a lock back."""
    llm = larger_than_memory(packed, monkeypatch)
    held = first_uses(llm)
    assert held
    for hook in held:
        hook._lock.acquire()
    memory._regions._lock.acquire()
    child = os.fork()
    if not child:
        logits(llm)
        os._exit(0)
    memory._regions._lock.release()
    for hook in held:
        hook._lock.release()
    deadline = time.monotonic() + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
    assert done == (child, 0)


@linux
@needs_kernels
@pytest.mark.parametrize("is_used", [False, True])
def test_compiled(packed: Path, monkeypatch: pytest.MonkeyPatch, is_used: bool) -> None:
    llm = larger_than_memory(packed, monkeypatch)
    if is_used:
        logits(llm)
    compiled = torch.compile(llm.model, backend="eager")
    with torch.inference_mode():
        result = compiled(torch.arange(20)[None])
    assert torch.allclose(result, logits(llm), rtol=0, atol=0.05)


@linux
def test_copies_without_threads(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = logits(larger_than_memory(packed, monkeypatch))

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    llm = larger_than_memory(packed, monkeypatch)
    assert torch.equal(logits(llm), first)
    assert not any(map(is_mapped, needed_by_every_token(llm)))


def test_experts_are_read_before_they_compute(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next expert of a layer; and where all of them are needed, the first one of the next layer."""
    llm = larger_than_memory(packed, monkeypatch)
    layers = [[*module.children()] for module in llm.model.modules() if isinstance(module, MappedExperts)]
    names = {id([*expert.parameters()][-1]): (i, k) for i, own in enumerate(layers) for k, expert in enumerate(own)}
    sizes = [sum(parameter.nbytes for parameter in expert.parameters()) for expert in layers[0]]
    monkeypatch.setattr(modules, "MAX_WAITING", sizes[0] + sizes[1] - 1)
    read: list[tuple[int, int]] = []
    monkeypatch.setattr(
        modules,
        "read_ahead",
        lambda parameters: read.extend(names[id(each)] for each in parameters if id(each) in names),
    )
    chosen: list[int] = []
    for module in llm.model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(
                lambda module, inputs, out: (out[0], torch.tensor(chosen or [0, 1, 2, 3])[:, None])
            )
    ids = torch.arange(4)[None]
    with torch.inference_mode():
        llm.model(ids)
        whole = [(i, k) for i in range(len(layers)) for k in range(4)]
        assert read == [each for i, k in whole for each in [(i, k)] * (2 if i and not k else 1)]
        read.clear()
        chosen.extend([1, 1, 3, 1])
        llm.model(ids)
        assert read == [(i, k) for i in range(len(layers)) for k in (1, 3)]


@linux
def test_the_tower_is_read_before_it_computes(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, pixels = larger_than_memory(packed, monkeypatch), torch.rand(2, 3, 56, 56)
    read: list[Tensor] = []
    monkeypatch.setattr(load_module, "read_ahead", read.extend)
    features = llm.model.encode_images(pixels)
    assert llm.model.vision_model is not None
    assert llm.model.multi_modal_projector is not None
    tower, projector = llm.model.vision_model, llm.model.multi_modal_projector
    assert all(a is b for a, b in zip(read, [*tower.parameters(), *projector.parameters()], strict=True))
    monkeypatch.undo()
    whole = Llama4.from_pretrained(packed, dtype="bfloat16", progress=False)
    assert torch.equal(whole.model.encode_images(pixels), features)


def test_a_model_of_which_too_much_is_no_expert(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantize(plain, tmp_path / "packed", "int4", progress=False)
    monkeypatch.setattr(memory, "total", lambda device: 1000)
    with pytest.raises(ValueError, match="do not fit into the 1000 bytes of memory"):
        Llama4.from_pretrained(tmp_path / "packed", progress=False)
