"""The loss in slices against torch's on all logits, finite differences and transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llama4.adapters.config import LoraConfig
from llama4.adapters.lora import Adapter
from llama4.adapters.merge import merge_adapter
from llama4.train.loss import IGNORED, RouterWatch, balance_loss, cross_entropy, router_z_loss, tokens_per_slice
from tests import small_model


@pytest.mark.parametrize("slice_size", [1, 3, 7, None])
def test_slices_are_the_whole(slice_size: int | None) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, 11).double(), torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, IGNORED, 3, 10, IGNORED, 0, 5])
    weights = torch.rand(7, dtype=torch.float64)
    trained = [head.weight, head.bias]
    found = cross_entropy(hidden, labels, head, weights_N=weights, trained=trained, slice_size=slice_size)
    each = F.cross_entropy(head(hidden), labels, ignore_index=IGNORED, reduction="none")
    wanted = (each * weights).sum()
    assert torch.allclose(found, wanted, rtol=1e-12)
    for one, other in zip(
        torch.autograd.grad(2 * found, [hidden, *trained]),
        torch.autograd.grad(2 * wanted, [hidden, *trained]),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_gradients_against_finite_differences() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    labels = torch.tensor([3, 8, IGNORED, 0, 2])

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return cross_entropy(hidden, labels, lambda x: x @ weight.mT, trained=[weight], slice_size=2)

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def test_sums_in_float32_of_bfloat16() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 32).bfloat16(), torch.randn(4096, 8, dtype=torch.bfloat16)
    labels = torch.randint(0, 32, (4096,))
    found = cross_entropy(hidden, labels, head, slice_size=1)
    wanted = F.cross_entropy(head(hidden).double(), labels, reduction="sum")
    assert found.dtype == torch.float32 and abs(found / wanted - 1) < 1e-5


def test_nothing_to_learn_is_zero() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    loss = cross_entropy(hidden, torch.full((3,), IGNORED), nn.Linear(4, 5))
    loss.backward()
    assert loss == 0 and hidden.grad is not None and not hidden.grad.any()


def test_never_all_logits() -> None:
    """The largest call of the head is a slice."""
    seen: list[int] = []

    def head(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x

    cross_entropy(torch.randn(100, 50), torch.zeros(100, dtype=torch.int64), head, slice_size=16)
    assert max(seen) == 16 and sum(seen) == 100
    assert tokens_per_slice(202_048) * 202_048 * 4 <= 64 << 20


def test_equals_transformers(tmp_path: Path) -> None:
    from transformers import Llama4ForConditionalGeneration

    theirs = Llama4ForConditionalGeneration.from_pretrained(small_model.write(tmp_path), dtype=torch.float32).eval()
    model, ids = small_model.model(), torch.arange(90).view(2, 45) * 11 % 800
    wanted = theirs(ids, labels=ids).loss
    wanted.backward()
    hidden, _ = model.hidden_states(ids)
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED).flatten()
    head = model.language_model.lm_head
    loss = cross_entropy(hidden, labels, head, trained=[head.weight], slice_size=13) / (labels != IGNORED).sum()
    loss.backward()
    assert abs(loss.item() / wanted.item() - 1) < 1e-6
    names = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            other = names[name].grad
            assert (parameter.grad - other).abs().max() <= 2e-5 * other.abs().max(), name
    assert model.language_model.model.embed_tokens.weight.grad is not None


def test_balance_against_its_definition() -> None:
    """And against transformers' for one expert per token."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    experts = logits.argmax(-1, keepdim=True)
    found = balance_loss(logits, experts)
    assert torch.allclose(found, torch.as_tensor(load_balancing_loss_func((logits,), 5, 1)))
    even = torch.zeros(40, 5)
    assert balance_loss(even, torch.arange(40)[:, None] % 5) == pytest.approx(1.0)
    assert router_z_loss(even) == pytest.approx(float(torch.tensor(5.0).log() ** 2))


def test_routers_are_watched() -> None:
    model, ids, gradients = small_model.model(), torch.arange(64).view(1, 64), []
    for recomputed in (False, True):
        model.checkpoint_activations(recomputed)
        model.zero_grad()
        with RouterWatch(model) as watch:
            hidden, _ = model.hidden_states(ids)
            losses = watch.losses(balance=0.5, z_loss=0.1)
            assert losses is not None
            (hidden.square().mean() + losses).backward()
        assert [len(watch.loads), int(sum(load.sum() for load in watch.loads.values()))] == [4, 4 * 64]
        shares = watch.shares()["language_model.model.layers.2.feed_forward.router"]
        assert len(shares) == 8 and sum(shares) == pytest.approx(1)
        gradient = model.get_parameter("language_model.model.layers.0.feed_forward.router.weight").grad
        assert gradient is not None
        gradients.append(gradient.clone())
    assert torch.allclose(gradients[0], gradients[1])
    assert not any(module._forward_hooks for module in model.modules())


def test_a_routers_adapter_is_watched() -> None:
    """The losses are those of the logits that it makes, and it learns from them."""
    model, ids, losses = small_model.model(), torch.arange(64).view(1, 64), []
    adapter = Adapter.create(model, LoraConfig(rank=2, targets=("router",)))
    for _, lora in adapter.items():
        torch.nn.init.normal_(lora.b)
    model.requires_grad_(False)
    adapter.attach(model)
    for is_merged in (False, True):
        if is_merged:
            adapter.detach()
            merge_adapter(adapter, model)
        with RouterWatch(model) as watch:
            model.hidden_states(ids)
            found = watch.losses(balance=1.0, z_loss=1.0)
        assert found is not None
        losses.append(found)
    losses[0].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
