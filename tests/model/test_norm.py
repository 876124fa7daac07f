"""A norm that is computed together with the sum before it is a module like any other: hooks and subclasses see x."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama4.model.multimodal import Llama4Model
from llama4.model.norm import RMSNorm
from tests import small_model

IDS = torch.arange(40)[None]


class HalfNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


@pytest.fixture
def model() -> Llama4Model:
    return small_model.model()


@torch.no_grad()
def test_hooks(model: Llama4Model) -> None:
    layer, seen = small_model.layers(model)[1], dict[nn.Module, tuple[Any, Any]]()
    wanted = model(IDS)
    modules = layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm
    for module in modules:
        module.register_forward_hook(lambda module, given, out: seen.update({module: (given, out)}))
    assert torch.equal(model(IDS), wanted)
    ((x_ND,), _), (_, attended_ND), ((sum_ND,), normed_ND) = (seen[module] for module in modules)
    assert torch.equal(sum_ND, x_ND + attended_ND)
    assert torch.equal(normed_ND, RMSNorm.forward(layer.post_attention_layernorm, sum_ND))


@torch.no_grad()
@pytest.mark.parametrize("place", ["class", "hook", "forward"])
def test_other_norms(model: Llama4Model, place: str) -> None:
    norm = small_model.layers(model)[1].post_attention_layernorm
    norm.weight /= 2
    wanted = model(IDS)
    norm.weight *= 2
    if place == "class":
        norm.__class__ = HalfNorm
    elif place == "hook":
        norm.register_forward_hook(lambda module, given, out: out / 2)
    else:
        norm.forward = lambda x: RMSNorm.forward(norm, x) / 2
    assert torch.equal(model(IDS), wanted)


def test_gradients(model: Llama4Model) -> None:
    norm, seen = small_model.layers(model)[1].post_attention_layernorm, list[tuple[Any, Any]]()
    norm.register_full_backward_hook(lambda module, *gradients: seen.append(gradients))
    model(IDS).sum().backward()
    (((of_x,), (of_out,)),) = seen
    assert of_x.shape == of_out.shape == (40, 48)
