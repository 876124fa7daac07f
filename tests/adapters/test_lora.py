"""Low-rank additions against their definition, PEFT's, and finite differences; on float and on packed weights."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from llama4 import Engine
from llama4.adapters.config import TARGETS, LoraConfig
from llama4.adapters.lora import Adapter, Lora, targets_of
from llama4.adapters.merge import merge_adapter
from llama4.api import Llama4
from llama4.engine.offload import offload_experts
from llama4.errors import ArgumentError, Llama4Error
from llama4.model.experts import BACKENDS, Experts
from llama4.model.moe import Router
from llama4.model.multimodal import Llama4Model
from llama4.ops.experts import grouped_product, product_of_each
from llama4.ops.hooks import has_hook
from llama4.quantization.formats import FORMATS
from llama4.quantization.modules import QuantizedExperts
from llama4.quantization.weight import QuantizedWeight
from tests import small_model

IDS = torch.arange(40).view(1, 40) * 7 % 800
ALL = LoraConfig(rank=3, alpha=5.0, ranks={"experts": 2}, targets=tuple(TARGETS), rslora=True)


def random_adapter(model: Llama4Model, config: LoraConfig = ALL, seed: int = 1) -> Adapter:
    adapter = Adapter.create(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for _, lora in adapter.items():
        lora.b.data.normal_(0, 0.1, generator=generator)
    return adapter.eval()


def pixels() -> Tensor:
    return torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(5))


def logits(model: Llama4Model, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids)


def test_a_new_one_adds_nothing_and_leaves_nothing() -> None:
    model = small_model.model()
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    adapter = Adapter.create(model, ALL)
    assert {name.rpartition(".")[2] for name in adapter.names} >= {"q_proj", "gate_up_proj", "router", "fc1", "lm_head"}
    adapter.attach(model)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_parameters()] == names
    adapter.detach()
    other = random_adapter(model)
    other.attach(model)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with other.detached(model):
        assert torch.equal(logits(model), before)
    other.detach()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_equals_the_merged_model(backend: str) -> None:
    """A merged matrix is W + scale * B A by definition, and the unmerged model must compute the same."""
    model = Llama4Model(small_model.config(), BACKENDS[backend]).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    merged, adapter = copy.deepcopy(model), random_adapter(model)
    names, scale = dict(merged.named_parameters()), 5.0 / 3**0.5
    with torch.no_grad():
        for name, lora in adapter.items():
            a, b = lora.a.double(), lora.b.double()
            delta = scale * torch.einsum("...or,...ri->...io" if lora.a.ndim == 3 else "or,ri->oi", b, a)
            weight = names[name] if name in names else names[f"{name}.weight"]
            weight.add_((delta.mT if name.endswith("embed_tokens") else delta).float())
    ids = torch.cat([IDS, torch.tensor([[small_model.RANKS + 92]])], dim=1)
    adapter.attach(model)
    with torch.no_grad():
        found, wanted = model(ids, pixel_values=pixels()), merged(ids, pixel_values=pixels())
        assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
        adapter.detach()
        merge_adapter(adapter, model)
        assert (model(ids, pixel_values=pixels()) - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_gradients_against_finite_differences() -> None:
    """Along random directions through the whole model, vision, routers' scores and dispatch included, in float64."""
    model = small_model.model().double().requires_grad_(False)
    config = LoraConfig(rank=2, targets=("attention", "experts", "shared", "router", "vision", "projector"))
    adapter = random_adapter(model, config).double().train()
    adapter.attach(model)
    ids = torch.cat([IDS, torch.tensor([[small_model.RANKS + 92]])], dim=1)
    target = torch.randn(model(ids, pixel_values=pixels().double()).shape, dtype=torch.float64)

    def loss() -> Tensor:
        return (model(ids, pixel_values=pixels().double()).log_softmax(-1) * target).mean()

    loss().backward()
    generator = torch.Generator().manual_seed(3)
    for part in ("self_attn", "experts", "shared_expert", "router", "vision_model", "projector"):
        chosen = [p for name, lora in adapter.items() if part in name for p in (lora.a, lora.b)]
        ways = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in chosen]
        slope = sum((p.grad * way).sum() for p, way in zip(chosen, ways, strict=True) if p.grad is not None)
        ends = []
        for sign in (1e-6, -1e-6):
            with torch.no_grad():
                for p, way in zip(chosen, ways, strict=True):
                    p.add_(way, alpha=sign)
                ends.append(loss())
                for p, way in zip(chosen, ways, strict=True):
                    p.add_(way, alpha=-sign)
        found, wanted = float(slope), float(ends[0] - ends[1]) / 2e-6
        assert abs(found - wanted) < 1e-5 * max(abs(wanted), 1e-3), part


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_on_packed_weights(kind: str) -> None:
    """Outputs and gradients equal those of a float model of the dequantized weights; fp8 rounds its inputs, too, so
    that only its gradient is compared, for the same gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(96, 64, generator=generator)
    packed = QuantizedWeight.of(weight_OI, FORMATS[kind].for_matrices({"w": (96, 64)}))
    whole = packed.format.rows_of(packed, None, torch.float32)(slice(None))
    assert torch.allclose(whole, packed.dequantize().float(), rtol=1e-2)  # which rounds to the dtype of its scales
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    packed(x).backward(gradient := torch.randn(5, 96, generator=generator))
    assert x.grad is not None
    assert (x.grad - gradient @ whole).abs().max() < 1e-4
    assert not any(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_through_packed_experts(kind: str) -> None:
    """The gradients of an adapter's matrices on packed experts and on the same, dequantized."""
    config = small_model.config()
    model = Llama4Model(replace(config, text=replace(config.text, hidden_size=64))).requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    twin, packed = copy.deepcopy(model), QuantizedExperts()
    ours, whole = (small_model.layers(m)[1].feed_forward for m in (model, twin))
    for stack in ("gate_up_proj", "down_proj"):
        weight_EOI = getattr(ours.experts, stack).mT
        format = FORMATS[kind].for_matrices({stack: tuple(weight_EOI.shape)})
        setattr(packed, stack, weight := QuantizedWeight.of(weight_EOI, format))
        matrices = [format.rows_of(weight, i, torch.float32)(slice(None)).mT for i in range(8)]
        getattr(whole.experts, stack).data = torch.stack(matrices)
    ours.experts = packed
    gradients = []
    for m in (model, twin):
        adapter = random_adapter(m, LoraConfig(rank=4, targets=("experts", "attention")))
        adapter.attach(m)
        m(IDS).square().mean().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_grouped_products_of_any_rank() -> None:
    counts = torch.tensor([2, 0, 5, 1])
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    for rank in (1, 3, 8):
        w = torch.randn(4, 12, rank, generator=torch.Generator().manual_seed(rank))
        wanted = torch.cat([part.double() @ m.double() for part, m in zip(x.split(counts.tolist()), w, strict=True)])
        for product in (grouped_product, product_of_each):
            assert (product(x, counts, w) - wanted).abs().max() < 1e-5
    assert grouped_product(x[:0], torch.zeros(4, dtype=torch.int64), torch.ones(4, 12, 3)).shape == (0, 3)


def test_dropout_is_of_linears_in_training() -> None:
    model = small_model.model()
    adapter = random_adapter(model, LoraConfig(rank=2, dropout=0.5, targets=("attention", "experts")))
    assert {lora.dropout for name, lora in adapter.items() if "experts" in name} == {0.0}
    lora = next(lora for name, lora in adapter.items() if "q_proj" in name)
    lora.train()
    x = torch.ones(20_000, 48)
    torch.manual_seed(0)
    dropped = lora.added(x)
    assert torch.allclose(dropped.mean(0), lora.eval().added(x[0]), atol=0.05)
    assert len({tuple(row) for row in dropped.tolist()}) > 10_000


def test_what_does_not_fit_is_refused() -> None:
    model = small_model.model()
    with pytest.raises(ArgumentError, match="'heads' is not known; choose of attention, experts"):
        LoraConfig(targets=("heads",))
    with pytest.raises(ArgumentError, match="rank is 0"):
        LoraConfig(ranks={"experts": 0})
    with pytest.raises(ArgumentError, match="no dense"):
        Adapter.create(model, LoraConfig(targets=("dense",)))
    name = next(name for name in targets_of(model) if name.endswith("q_proj"))
    with pytest.raises(Llama4Error, match=r"\[48, 32\], but here it is \[48, 48\]"):
        Adapter(LoraConfig(), {name: Lora((48, 32), 2, 1.0)}).attach(model)
    assert "forward" not in vars(model.language_model)


def test_every_target_is_something() -> None:
    """No pattern that nothing matches: of this model, which has no dense layers, and of one with only such."""
    names = targets_of(small_model.model())
    assert {target for target in TARGETS if any(map(matcher(target), names))} == set(TARGETS) - {"dense"}
    assert all(any(matcher(target)(name) for target in TARGETS) for name in names)


def matcher(target: str) -> Any:
    return lambda name: re.fullmatch(TARGETS[target], name)


def test_routers_and_experts_compute_by_classes_again_afterwards() -> None:
    model = small_model.model()
    adapter = random_adapter(model)
    adapter.attach(model)
    replaced = [m for m in model.modules() if isinstance(m, (Router, Experts))]
    assert all(has_hook(m) for m in replaced)
    adapter.detach()
    assert not any(has_hook(m) for m in model.modules())


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_experts_elsewhere_are_not_left_out_in_silence(tmp_path: Path, quantization: str | None) -> None:
    directory = small_model.write(tmp_path / "model")
    model = Llama4.from_pretrained(directory, quantization=quantization).model
    adapter = Adapter.create(model, LoraConfig(targets=("experts",)))
    offload_experts(model, torch.device("cpu"))
    with pytest.raises(ArgumentError, match=r"experts stay on another device.*leave the target 'experts' out"):
        Adapter.create(model, LoraConfig(targets=("attention", "experts")))
    with pytest.raises(Llama4Error, match="does not have or cannot adapt"):
        adapter.attach(model)
    assert all(".experts" not in name for name in Adapter.create(model, LoraConfig(targets=("attention",))).names)


def test_no_keys_of_another_adapter_are_reused(tmp_path: Path) -> None:
    """However a kept cache comes back: put there by hand, after a merge, from a file."""
    llm = Llama4.from_pretrained(small_model.write(tmp_path / "model"), progress=False)
    for seed, name in enumerate(("a", "b")):
        llm.adapters.add(name, random_adapter(llm.model, LoraConfig(rank=2), seed))
    question = " ".join(["word"] * 100)

    def ask() -> tuple[str, int]:
        before = llm.cache
        text = llm.chat(question, max_new_tokens=8).text
        assert llm.cache is not before
        return text, len(llm.cache or "")

    def alone() -> tuple[str, int]:
        llm.cache = None
        return ask()

    llm.set_adapter("a")
    expected = alone()
    kept = llm.cache
    assert kept is not None
    kept.save(tmp_path / "kept")
    for other in ("b", None):
        llm.set_adapter(other)
        fresh = alone()
        llm.cache = kept
        assert ask() == fresh != expected
        with pytest.raises(Llama4Error):
            llm.load_cache(tmp_path / "kept")
    base = llm.cache
    llm.adapters.activate("b")  # which leaves the cache where it is
    assert ask() == alone()
    llm.set_adapter("a")
    llm.load_cache(tmp_path / "kept")
    assert llm.cache is not None and len(llm.cache) == len(kept) and ask() == expected
    llm.merge_adapter()
    fresh = alone()
    llm.cache = base
    assert ask() == fresh


def test_a_reply_is_of_one_adapter(tmp_path: Path) -> None:
    """However it is changed meanwhile; what is chosen again is no change."""
    llm = Llama4.from_pretrained(small_model.write(tmp_path / "model"), progress=False)
    for name in ("a", "b"):
        llm.adapters.add(name, random_adapter(llm.model, LoraConfig(rank=2)))
    llm.set_adapter("a")

    def set_aside() -> None:
        llm.set_adapter("b")
        llm.set_adapter("a")

    for change in (set_aside, lambda: llm.set_adapter(None), lambda: llm.set_adapter("a"), llm.merge_adapter):
        reply = llm.stream("hello", max_new_tokens=30)
        next(reply)
        change()
        with pytest.raises(Llama4Error, match="another adapter was chosen, or one was merged"):
            list(reply)
    reply = llm.stream("hello", max_new_tokens=30)
    next(reply)
    llm.set_adapter(None)
    list(reply)


def test_none_is_in_use_after_one_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = Llama4.from_pretrained(small_model.write(tmp_path / "model"), progress=False)
    without = logits(llm.model)
    for name in ("a", "b"):
        llm.adapters.add(name, random_adapter(llm.model, LoraConfig(rank=2, targets=("attention", "experts"))))
    llm.set_adapter("a")
    monkeypatch.setattr(Adapter, "_override", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        llm.set_adapter("b")
    monkeypatch.undo()
    assert llm.adapters.active is None and torch.equal(logits(llm.model), without)
    assert not llm.adapters["b"].is_attached
    llm.set_adapter("a")
    assert not torch.equal(logits(llm.model), without)


def test_a_reply_that_overlaps_a_merge_ends_with_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that begins and ends while weights are being added to."""
    llm = Llama4.from_pretrained(small_model.write(tmp_path / "model"), progress=False)
    llm.adapters.add("a", random_adapter(llm.model, LoraConfig(rank=2)))
    llm.set_adapter("a")
    errors = []

    def merge(adapter: Adapter, model: Llama4Model, *, progress: bool) -> None:
        with pytest.raises(Llama4Error, match="or one was merged") as error:
            llm.chat("hello", max_new_tokens=3)
        errors.append(error)
        merge_adapter(adapter, model, progress=progress)

    monkeypatch.setattr("llama4.adapters.loaded.merge_adapter", merge)
    llm.merge_adapter()
    assert errors and llm.chat("hello", max_new_tokens=3).usage.completion_tokens


def test_a_merge_that_breaks_off_is_told_by_every_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = Llama4.from_pretrained(small_model.write(tmp_path / "model"), progress=False)
    llm.adapters.add("a", random_adapter(llm.model, LoraConfig(rank=2)))
    llm.set_adapter("a")
    calls: list[object] = []

    def delta(lora: Lora, expert: int | None = None) -> Tensor:
        calls.append(lora)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(lora, expert)

    whole = Lora.delta
    monkeypatch.setattr(Lora, "delta", delta)
    with pytest.raises(KeyboardInterrupt):
        llm.merge_adapter()

    def serve() -> None:
        with Engine(llm) as engine:
            list(engine.stream("hello"))

    for use in (
        lambda: llm.chat("hello"),
        lambda: llm.chat_batch(["hello", "bye"]),
        lambda: llm.set_adapter("a"),
        lambda: llm.adapters.activate(None),
        lambda: llm.save_pretrained(tmp_path / "saved"),
        serve,
    ):
        with pytest.raises(Llama4Error, match=r"merging an adapter broke off, .* load the model again"):
            use()


def test_an_adapter_that_cannot_be_merged_stays_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = Llama4.from_pretrained(small_model.write(tmp_path / "model"), progress=False)
    llm.adapters.add("a", random_adapter(llm.model, LoraConfig(rank=2, targets=("embeddings",))))
    llm.set_adapter("a")
    expected, kept = llm.chat("hello", max_new_tokens=8).text, llm.cache
    text = replace(llm.config.text, tie_word_embeddings=True)
    with monkeypatch.context() as patch:
        patch.setattr(llm.model, "config", replace(llm.config, text=text))
        with pytest.raises(Llama4Error, match="is also the head"):
            llm.merge_adapter()
    assert llm.adapters.active == "a" and llm.cache is kept is not None
    assert llm.chat("hello", max_new_tokens=8).text == expected


def test_what_computes_while_an_adapter_is_merged_keeps_its_weights() -> None:
    model = small_model.model()
    adapter = random_adapter(model, LoraConfig(rank=2))
    merged = copy.deepcopy(model)
    before = {name: (parameter, parameter.clone()) for name, parameter in merged.named_parameters()}
    merge_adapter(adapter, merged)
    after = dict(merged.named_parameters())
    assert all(torch.equal(parameter, values) for parameter, values in before.values())
    assert sum(after[name] is not parameter for name, (parameter, _) in before.items()) == len(adapter.names)


def test_tied_embeddings_are_not_merged() -> None:
    model = small_model.model()
    adapter = random_adapter(model, LoraConfig(rank=2, targets=("embeddings",)))
    text = replace(model.config.text, tie_word_embeddings=True)
    tied = Llama4Model(replace(model.config, text=text))
    with pytest.raises(Llama4Error, match="is also the head"):
        merge_adapter(adapter, tied)
