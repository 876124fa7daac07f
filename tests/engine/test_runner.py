"""Which runner computes a step, and what is said where it is not the fastest."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama4.api import Llama4
from llama4.cache.sequence import SequenceCache
from llama4.engine.fused_cpu import FusedCpuRunner
from llama4.engine.runner import EagerRunner, ModelRunner
from llama4.kernels import loader
from llama4.model.dispatch import LocalDispatcher
from llama4.model.moe import MixtureOfExperts
from llama4.model.multimodal import Llama4Model
from llama4.ops import cpu_kernels
from llama4.quantization.nf4 import Nf4
from llama4.quantization.weight import QuantizedWeight
from tests.marks import needs_kernels
from tests.parity.references import reference_config, reference_model, relative_error

pytestmark = needs_kernels
PROMPT = torch.randint(0, 490, (2, 20), generator=torch.Generator().manual_seed(8))
STEPS = torch.randint(0, 490, (2, 30), generator=torch.Generator().manual_seed(9))


@pytest.fixture(autouse=True)
def _small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "MIN_WIDTH", 1)
    monkeypatch.setattr(cpu_kernels, "MIN_MATRIX", 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text: dict[str, Any] = {"intermediate_size": 128, "intermediate_size_mlp": 256, "num_hidden_layers": 4}
    config = reference_config(head_dim=32, hidden_size=128, num_experts_per_tok=2, interleave_moe_layer_step=2, **text)
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    reference_model(config, 3).bfloat16().save_pretrained(path)
    return path


@pytest.fixture
def model(directory: Path) -> Llama4Model:
    return Llama4.from_pretrained(directory, dtype="float32", progress=False).model


def part(model: Llama4Model, path: str) -> Any:
    """A module of the decoder."""
    return model.language_model.model.get_submodule(path)


def eager(model: Llama4Model) -> ModelRunner:
    return ModelRunner(model, [EagerRunner(model)])


@torch.inference_mode()
def decoded(runner: ModelRunner, steps: int = 12) -> Tensor:
    """Logits of some steps after a prompt, across chunk borders."""
    cache = runner.model.new_cache(2)
    runner.model(PROMPT, cache=cache)
    return torch.stack([runner.step(STEPS[:, i], cache) for i in range(steps)])


@torch.inference_mode()
def reason(model: Llama4Model, rows: int = 2, dtype: str | None = None) -> str | None:
    """Why the fused runner does not take the step after a prompt."""
    cache = model.new_cache(rows, dtype)
    model(PROMPT[:1].expand(rows, -1), cache=cache)
    return FusedCpuRunner(model).unsupported_reason(cache)


@torch.inference_mode()
def prefilled(model: Llama4Model) -> SequenceCache:
    cache = model.new_cache(2)
    model(PROMPT, cache=cache)
    return cache


# ---- what the fused runner does not take


def test_a_plain_model_is_taken(model: Llama4Model) -> None:
    assert reason(model) is None
    assert isinstance(ModelRunner(model).choose(model.new_cache(2)), FusedCpuRunner), "steps record no gradients"


@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize(
    "path", ["", "language_model", "language_model.model.layers.1.feed_forward.router", "language_model.lm_head"]
)
def test_a_hook(model: Llama4Model, path: str, pre: bool) -> None:
    module = model.get_submodule(path)
    handle = (module.register_forward_pre_hook if pre else module.register_forward_hook)(lambda *_: None)
    assert f"{path or 'the model'} has a hook" in str(reason(model))
    handle.remove()
    assert reason(model) is None


def test_a_hook_on_every_module(model: Llama4Model) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert "every module has a hook" in str(reason(model))
    handle.remove()


def test_a_forward_of_its_own(model: Llama4Model) -> None:
    """As accelerate puts it in a module's place."""
    norm = part(model, "layers.2.input_layernorm")
    norm.forward = norm.forward
    assert "layers.2.input_layernorm has a hook, or a forward of its own" in str(reason(model))


class Adapter(nn.Module):
    """A low-rank adapter around a Linear, as fine-tuning libraries put it in its place."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.in_features, 4, bias=False)
        self.up = nn.Linear(4, inner.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + self.up(self.down(x))
        return out


def adapt(model: Llama4Model) -> None:
    attention = part(model, "layers.2.self_attn")
    attention.v_proj = Adapter(attention.v_proj)


def test_an_adapter(model: Llama4Model) -> None:
    adapt(model)
    assert "layers.2.self_attn.v_proj is Adapter, which it does not compute" in str(reason(model))


def test_a_replaced_head(model: Llama4Model) -> None:
    model.language_model.add_module("lm_head", Adapter(model.language_model.lm_head))
    assert "lm_head is Adapter" in str(reason(model))


def test_a_subclass(model: Llama4Model) -> None:
    attention = part(model, "layers.0.self_attn")
    attention.__class__ = type("OtherAttention", (type(attention),), {})
    assert "layers.0.self_attn is OtherAttention" in str(reason(model))


def test_a_replaced_dispatcher(model: Llama4Model) -> None:
    """One that is put in its place later is seen, and so is its removal."""
    runner, cache = FusedCpuRunner(model), model.new_cache(1)
    layer = next(module for module in model.modules() if isinstance(module, MixtureOfExperts))
    with torch.inference_mode():
        assert runner.unsupported_reason(cache) is None
        local = layer.dispatcher
        layer.dispatcher = type("OtherDispatcher", (LocalDispatcher,), {})(local.num_experts)
        assert "feed_forward.dispatcher is OtherDispatcher" in str(runner.unsupported_reason(cache))
        layer.dispatcher = local
        assert runner.unsupported_reason(cache) is None


def test_an_attention_bias(model: Llama4Model) -> None:
    attention = part(model, "layers.1.self_attn")
    attention.q_proj.bias = nn.Parameter(torch.ones(attention.q_proj.out_features))
    assert "layers.1.self_attn.q_proj has a bias" in str(reason(model))


def test_nf4(model: Llama4Model) -> None:
    attention = part(model, "layers.1.self_attn")
    shape = tuple(attention.k_proj.weight.shape)
    attention.k_proj = QuantizedWeight(Nf4(64, stored=shape), shape)
    with torch.inference_mode():
        assert "k_proj is nf4 weights" in str(FusedCpuRunner(model).unsupported_reason(model.new_cache()))


def test_other_experts(directory: Path) -> None:
    grouped = Llama4.from_pretrained(directory, dtype="float32", experts="grouped", progress=False).model
    assert "feed_forward.experts is GroupedExperts" in str(reason(grouped))


def test_gradients(model: Llama4Model) -> None:
    assert "gradients are being recorded" in str(FusedCpuRunner(model).unsupported_reason(model.new_cache()))


@torch.inference_mode()
def test_a_compiler(model: Llama4Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, runner = model.new_cache(), FusedCpuRunner(model)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "torch.compile" in str(runner.unsupported_reason(cache))


def test_another_dtype(model: Llama4Model) -> None:
    assert "not in torch.float64" in str(reason(model.double()))


@torch.no_grad()
def test_a_part_in_another_dtype(model: Llama4Model) -> None:
    part(model, "layers.1.feed_forward.router").bfloat16()
    assert "layers.1.feed_forward.router is not torch.float32" in str(reason(model))


def test_a_cache_in_another_dtype(model: Llama4Model) -> None:
    assert "the cache is in torch.bfloat16, the model in torch.float32" in str(reason(model, dtype="bfloat16"))


def test_a_forward_that_broke_off(model: Llama4Model) -> None:
    cache = model.new_cache(2)
    handle = part(model, "layers.2").register_forward_hook(lambda *_: 1 / 0)
    with torch.inference_mode():
        with pytest.raises(ZeroDivisionError):
            model(PROMPT, cache=cache)
        handle.remove()
        assert "broke off" in str(FusedCpuRunner(model).unsupported_reason(cache))


# ---- what is said


def test_a_reason_is_logged_once(model: Llama4Model, caplog: pytest.LogCaptureFixture) -> None:
    adapt(model)
    runner = ModelRunner(model)
    with caplog.at_level(logging.DEBUG, "llama4.engine"):
        decoded(runner, steps=3)
        decoded(runner, steps=3)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("llama4.engine", logging.WARNING)
    assert record.getMessage() == (
        "decoding without the fused CPU runner, which is faster: layers.2.self_attn.v_proj is Adapter, "
        "which it does not compute"
    )


def test_it_is_said_before_the_reply(caplog: pytest.LogCaptureFixture) -> None:
    llm = Llama4.from_pretrained("tiny", progress=False)
    adapt(llm.model)
    pieces = llm.stream("ab", max_new_tokens=6)
    with caplog.at_level(logging.DEBUG, "llama4.engine"):
        next(pieces)
        assert len(caplog.records) == 1
        list(pieces)
    assert len(caplog.records) == 1


def test_no_warning_where_nothing_is_lost(
    model: Llama4Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader, "library", lambda: None)
    with caplog.at_level(logging.DEBUG, "llama4.engine"):
        decoded(ModelRunner(model), steps=2)
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "they are switched off" in record.getMessage()


def test_a_model_on_another_device_is_not_meant_for_it(model: Llama4Model) -> None:
    assert not FusedCpuRunner(model.to("meta")).is_worthwhile()


def test_a_chat_says_nothing(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = Llama4.from_pretrained(directory, dtype="float32", progress=False)
    with caplog.at_level(logging.DEBUG, "llama4.engine"):
        decoded(llm.runner)
    assert not caplog.records


# ---- a runner computes what the model computes


def hook(model: Llama4Model) -> None:
    part(model, "layers.3.self_attn.o_proj").register_forward_hook(lambda _module, _given, out: 1.5 * out)


def swap_layers(model: Llama4Model) -> None:
    layers = model.language_model.model.layers
    layers[0], layers[2] = layers[2], layers[0]


def scale_a_weight(model: Llama4Model) -> None:
    weight = part(model, "layers.0.feed_forward.down_proj").weight
    weight.data = 2 * weight.data


def to_bfloat16(model: Llama4Model) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [hook, adapt, swap_layers, scale_a_weight, to_bfloat16])
def test_changes_are_seen(model: Llama4Model, change: Callable[[Llama4Model], None]) -> None:
    runner = ModelRunner(model)
    before = decoded(runner)
    change(model)
    ours, truth = decoded(runner), decoded(eager(model))
    assert ours.dtype == truth.dtype == model.dtype
    if model.dtype == torch.float32:
        assert relative_error(ours, before) > 1e-2
        assert relative_error(ours, truth) < 1e-5
    else:
        assert relative_error(ours, truth) < 0.1


@pytest.mark.parametrize("rows", [1, 12, 13, 50])
def test_any_number_of_rows(model: Llama4Model, rows: int) -> None:
    lengths = torch.arange(rows) % 30 + 1
    prompts = torch.randint(0, 490, (rows, 30), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(30) >= 30 - lengths[:, None]
    outputs = []
    with torch.inference_mode():
        for runner in (ModelRunner(model), eager(model)):
            cache = model.new_cache(rows)
            model(prompts, cache=cache, attention_mask=mask)
            outputs.append(torch.stack([runner.step(prompts[:, i], cache) for i in range(10)]))
        assert isinstance(ModelRunner(model).choose(cache), FusedCpuRunner)
    assert relative_error(*outputs) < 1e-5


@torch.inference_mode()
def test_caches_in_turn(model: Llama4Model) -> None:
    """Steps of several caches of one runner, one after the other, disturb each other in nothing."""
    runner, truth = ModelRunner(model), eager(model)
    pairs = [(model.new_cache(2), model.new_cache(2)) for _ in range(3)]
    for i, pair in enumerate(pairs):
        for cache in pair:
            model(PROMPT[:, : 5 + 6 * i], cache=cache)
    for i in range(20):
        for ours, theirs in pairs:
            assert relative_error(runner.step(STEPS[:, i], ours), truth.step(STEPS[:, i], theirs)) < 1e-5


def test_two_models(model: Llama4Model) -> None:
    other = copy.deepcopy(model)
    scale_a_weight(other)
    truths = [decoded(eager(each)) for each in (model, other)]
    runners = [ModelRunner(each) for each in (model, other)]
    for _ in range(2):
        for runner, truth in zip(runners, truths, strict=True):
            assert relative_error(decoded(runner), truth) < 1e-5


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda runner: pickle.loads(pickle.dumps(runner))])
def test_a_copy_runs_the_copied_model(model: Llama4Model, duplicate: Callable[[ModelRunner], ModelRunner]) -> None:
    runner = ModelRunner(model)
    truth = decoded(runner)
    other = duplicate(runner)
    assert other.model is not model
    scale_a_weight(model)
    assert relative_error(decoded(other), truth) < 1e-6
    assert relative_error(decoded(runner), truth) > 1e-2


def test_threads(model: Llama4Model) -> None:
    """Each with a cache of its own."""
    runner, truth = ModelRunner(model), decoded(eager(model), steps=30)
    found: dict[int, list[Tensor]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        found[i] += [decoded(runner, steps=30) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = [result for each in found.values() for result in each]
    assert len(results) == 12
    assert max(relative_error(result, truth) for result in results) < 1e-5


def test_llm_runner_follows_the_model(directory: Path) -> None:
    llm, other = (Llama4.from_pretrained(directory, dtype="float32", progress=False) for _ in range(2))
    first = llm.runner
    assert llm.runner is first
    llm.model = other.model
    assert llm.runner.model is other.model


class Steered(Llama4Model):
    """A model with a forward of its own."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return -super().forward(*arguments, **options)


def test_a_subclass_of_the_model(model: Llama4Model) -> None:
    steered = Steered.__new__(Steered)  # around the same parts
    steered.__dict__.update(model.__dict__)
    assert reason(steered) == "the model is Steered, which it does not compute"
    step = ModelRunner(steered).step(STEPS[:, 0], prefilled(model))
    assert torch.equal(step, -ModelRunner(model, [EagerRunner(model)]).step(STEPS[:, 0], prefilled(model)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_has_blocks_of_its_own(
    model: Llama4Model, duplicate: Callable[[SequenceCache], SequenceCache]
) -> None:
    runner, original = ModelRunner(model), prefilled(model)
    runner.step(STEPS[:, 0], original)
    truth, copied = original.fork(), duplicate(original)
    runner.step(STEPS[:, 1], copied)
    runner.step(STEPS[:, 2], original)
    expected = eager(model)
    expected.step(STEPS[:, 1], truth)
    assert relative_error(runner.step(STEPS[:, 3], copied), expected.step(STEPS[:, 3], truth)) < 1e-5


def test_ids_of_another_shape(model: Llama4Model) -> None:
    for wrong in (STEPS[:, :1], STEPS[:, 0].float()):
        with pytest.raises(ValueError, match=r"ids must be \[B\] integers"):
            ModelRunner(model).step(wrong, prefilled(model))


def test_choosing_outside_of_inference_mode(model: Llama4Model, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(ModelRunner(model).choose(prefilled(model)), FusedCpuRunner)
    assert not caplog.records
