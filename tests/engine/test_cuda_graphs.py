"""Steps from CUDA graphs are what eager steps compute. Without a GPU the kernels are interpreted, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama4.engine.cuda_graphs import CudaGraphRunner
from llama4.engine.runner import EagerRunner, ModelRunner
from llama4.engine.static_step import StaticStep
from llama4.kernels.triton import common, launch_products, support
from llama4.model.experts import GroupedExperts
from llama4.model.multimodal import Llama4Model
from llama4.ops import attention_gpu, quantized_gpu
from tests import small_model
from tests.kernels.interpreter import (
    DEVICE,
    INTERPRETED,
    launches_in_the_interpreter,  # noqa: F401
    needs_the_interpreter,
    on_a_device,
    run_again,
)
from tests.test_cuda import quantized_model

pytest.importorskip("triton")
IDS = torch.randint(0, small_model.RANKS, (3, 300), generator=torch.Generator().manual_seed(0))
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
CAPTURE = CudaGraphRunner.capture
BOUND = 1e-4 if INTERPRETED else 0.05
"""Sums in another order; in bfloat16 a token may go to another expert."""


@pytest.fixture(autouse=True)
def as_if_on_a_gpu(launches_in_the_interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    if INTERPRETED:
        monkeypatch.setattr(CudaGraphRunner, "device", "cpu")
        monkeypatch.setattr(CudaGraphRunner, "capture", lambda self, step: None)  # steps are computed kernel by kernel
        monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: None)
        monkeypatch.setattr(attention_gpu, "unsupported_reason", lambda *arguments: None)
        monkeypatch.setitem(common.GPUS, torch.device("cpu"), common.Gpu(0, 3))  # the keys of one row are shared out


def build(**changes: Any) -> Llama4Model:
    config = small_model.config()
    shape: dict[str, Any] = {
        "head_dim": 16,
        "num_hidden_layers": 2,
        "no_rope_layers": (1, 0),
        "moe_layers": None,
        "layer_types": None,
    }
    built = Llama4Model(replace(config, text=replace(config.text, **shape | changes)), GroupedExperts).eval()
    built.init_weights(torch.Generator().manual_seed(0))
    return built.to(DEVICE, DTYPE)


@pytest.fixture
def model() -> Iterator[Llama4Model]:
    with torch.inference_mode():
        yield build()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


@on_a_device
@pytest.mark.filterwarnings("ignore:.* encountered in multiply")  # of scales in slots without a token
@pytest.mark.parametrize(
    ("prompt", "padding", "format"),
    [
        (1, [0, 0, 0], None),
        (30, [0, 5, 12], None),
        (30, [0, 1, 2], "int8"),
        (254, [0, 3, 220], None),
        (254, [1, 0, 0], "fp8"),
        (30, [2, 0, 2], "int4"),
    ],
)
def test_is_what_eager_steps_are(model: Llama4Model, prompt: int, padding: list[int], format: str | None) -> None:
    """Of rows of different length, across borders of chunks of 32 tokens and of blocks of 256."""
    bound = max(BOUND, 2e-2 if format else 0)  # the last bit of a key may be rounded another way
    mask = torch.arange(prompt) >= torch.tensor(padding)[:, None]
    cache = model.new_cache(3, format)
    model(IDS[:, :prompt].to(DEVICE), cache=cache, attention_mask=mask)
    other, runner = cache.fork(), ModelRunner(model, [CudaGraphRunner(model), EagerRunner(model)])
    assert runner.choose(cache).name == "CUDA graph"
    for ids_B in IDS[:, prompt : prompt + 3].unbind(1):
        eager = model(ids_B[:, None].to(DEVICE), cache=other)[:, 0]
        step = runner.step(ids_B, cache)
        assert relative(step, eager) < bound
        greedy, logprobs = runner._sessions[id(cache)][0].greedy_token()
        assert greedy == step.float().argmax(-1).tolist()
        assert torch.tensor(logprobs).allclose(step.float().log_softmax(-1).amax(-1).cpu(), atol=1e-3)
    assert cache.next_position == other.next_position


@on_a_device
@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts_per_tok": 2},
        {"moe_layers": ()},
        {"moe_layers": (1,), "head_dim": 24, "attention_bias": True},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ],
)
def test_shapes(changes: dict[str, Any]) -> None:
    with torch.inference_mode():
        model = build(**changes)
        cache, runner = model.new_cache(2), ModelRunner(model, [CudaGraphRunner(model), EagerRunner(model)])
        model(IDS[:2, :10].to(DEVICE), cache=cache)
        other = cache.fork()
        for ids_B in IDS[:2, 10:12].unbind(1):
            assert runner.choose(cache).name == "CUDA graph"
            eager = model(ids_B[:, None].to(DEVICE), cache=other)[:, 0]
            assert relative(runner.step(ids_B, cache), eager) < BOUND


@on_a_device
def test_until_a_window_slides() -> None:
    """Then steps are eager."""
    with torch.inference_mode():
        model = build(sliding_window=12, attention_chunk_size=None, no_rope_layers=(1, 1))
        cache, runner = model.new_cache(1), ModelRunner(model, [CudaGraphRunner(model), EagerRunner(model)])
        model(IDS[:1, :10].to(DEVICE), cache=cache)
        other, names = cache.fork(), []
        for ids in IDS[1, :4].split(1):
            names.append(runner.choose(cache).name)
            eager = model(ids[None].to(DEVICE), cache=other)[:, 0]
            assert relative(runner.step(ids, cache), eager) < BOUND
    assert names == ["CUDA graph"] * 2 + ["eager"] * 2


@on_a_device
@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
def test_quantized(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several matrices are multiplied in one launch."""
    if INTERPRETED:
        if scheme != "int8":
            pytest.skip("the interpreter takes long; test_triton has the kernels")
        monkeypatch.setattr(quantized_gpu, "unsupported_reason", lambda *arguments: None)
    launched, products = 0, launch_products.products

    def counted(*arguments: Any, **named: Any) -> Tensor:
        nonlocal launched
        launched += 1
        return products(*arguments, **named)

    monkeypatch.setattr(launch_products, "products", counted)
    with torch.inference_mode():
        quantized = quantized_model(scheme, layers=1).to(DEVICE, DTYPE)
        runner, cache = CudaGraphRunner(quantized), quantized.new_cache(2)
        assert runner.unsupported_reason(cache) is None
        quantized(IDS[:2, :10].to(DEVICE), cache=cache)
        eager = quantized(IDS[:2, 10:11].to(DEVICE), cache=cache.fork())[:, 0]
        step = ModelRunner(quantized, [runner, EagerRunner(quantized)]).step(IDS[:2, 10], cache)
    assert relative(step, eager) < (0.1 if scheme == "fp8" else BOUND)
    assert launched >= 2 * len(small_model.layers(quantized))


@on_a_device
def test_two_caches_in_turns(model: Llama4Model) -> None:
    """They use the same buffers, one after the other."""
    runner, caches = CudaGraphRunner(model), []
    stepper = ModelRunner(model, [runner, EagerRunner(model)])
    for row in range(2):
        cache = model.new_cache(1)
        model(IDS[row : row + 1, : 10 + row].to(DEVICE), cache=cache)
        caches.append((cache, cache.fork()))
    for ids in IDS[2, :3].split(1):
        for cache, other in caches:
            eager = model(ids[None].to(DEVICE), cache=other)[:, 0]
            assert relative(stepper.step(ids, cache), eager) < BOUND
    assert len(runner._steps) == 1


@on_a_device
def test_graphs_used_longest_ago_go(model: Llama4Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama4.engine.cuda_graphs.MAX_GRAPHS", 2)
    runner = CudaGraphRunner(model)
    one, _ = (runner.step_of(model.new_cache(rows), 1) for rows in (1, 2))
    assert runner.step_of(model.new_cache(1), 1) is one
    runner.step_of(model.new_cache(3), 1)
    assert [rows for rows, _, _ in runner._steps] == [1, 3]


@on_a_device
def test_wider_tables(model: Llama4Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than a graph was made for."""
    monkeypatch.setattr("llama4.engine.cuda_graphs.LEAST_WIDTH", 1)
    cache, runner = model.new_cache(1), CudaGraphRunner(model)
    model(IDS[:1, :255].to(DEVICE), cache=cache)
    stepper, other = ModelRunner(model, [runner, EagerRunner(model)]), cache.fork()
    for ids in IDS[1, :3].split(1):
        eager = model(ids[None].to(DEVICE), cache=other)[:, 0]
        assert relative(stepper.step(ids, cache), eager) < BOUND
    assert [width for _, width, _ in runner._steps] == [1, 2]


@on_a_device
def test_what_changes_the_model(model: Llama4Model) -> None:
    """A hook keeps from it, and other weights are seen."""
    cache, runner = model.new_cache(1), CudaGraphRunner(model)
    model(IDS[:1, :5].to(DEVICE), cache=cache)
    assert runner.unsupported_reason(cache) is None
    layer = small_model.layers(model)[0]
    hook = layer.self_attn.register_forward_hook(lambda *arguments: None)
    assert runner.unsupported_reason(cache) == (
        "language_model.model.layers.0.self_attn has a hook, or a forward of its own"
    )
    hook.remove()
    stepper = ModelRunner(model, [runner, EagerRunner(model)])
    stepper.step(IDS[0, 5:6], cache)
    first = runner.snapshot
    layer.self_attn.q_proj.weight = torch.nn.Parameter(-layer.self_attn.q_proj.weight, requires_grad=False)
    stepper.release(cache)
    other = cache.fork()
    eager = model(IDS[:1, 6:7].to(DEVICE), cache=other)[:, 0]
    assert relative(stepper.step(IDS[0, 6:7], cache), eager) < BOUND
    assert runner.snapshot is not first


@on_a_device
def test_a_graph_that_cannot_be_captured(
    model: Llama4Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps are then eager, and that is said once."""

    def broken(self: StaticStep, pool: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nat line 7")

    monkeypatch.setattr(CudaGraphRunner, "capture", CAPTURE)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(StaticStep, "capture", broken)
    runner, cache = CudaGraphRunner(model), model.new_cache(1)
    model(IDS[:1, :5].to(DEVICE), cache=cache)
    stepper, other = ModelRunner(model, [runner, EagerRunner(model)]), cache.fork()
    for ids in IDS[1, :3].split(1):
        eager = model(ids[None].to(DEVICE), cache=other)[:, 0]
        assert torch.equal(stepper.step(ids, cache), eager)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("faster: a step could not be captured: CUDA error: out of memory")


@on_a_device
def test_outside_of_inference_mode(model: Llama4Model) -> None:
    cache = model.new_cache(1)
    model(IDS[:1, :5].to(DEVICE), cache=cache)
    runner = ModelRunner(model, [CudaGraphRunner(model), EagerRunner(model)])
    with torch.inference_mode(False):
        for _ in range(2):
            session = runner.run([3], cache)
            assert len(session.greedy_token()[0]) == 1


@on_a_device
def test_what_it_does_not_compute(model: Llama4Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, cache = CudaGraphRunner(model), model.new_cache(1)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # no GPU, no autocast
        assert runner.unsupported_reason(cache) == "autocast chooses dtypes"
    with torch.inference_mode(False), torch.enable_grad():
        assert "gradients" in (runner.unsupported_reason(cache) or "")
    small_model.layers(model)[1].feed_forward.experts = torch.nn.Identity()
    assert runner.unsupported_reason(cache) == "layers.1.feed_forward.experts is Identity, which it does not compute"


@needs_the_interpreter
def test_in_the_interpreter() -> None:
    run_again(__file__)


@pytest.mark.skipif(INTERPRETED, reason="the kernels seem to run on the CPU")
def test_on_a_cpu() -> None:
    model = small_model.model()
    assert CudaGraphRunner(model).unsupported_reason(model.new_cache(1)) == "they are for GPUs, not for cpu"
