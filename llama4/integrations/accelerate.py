"""`accelerate`: this library's experts in a Llama 4 model of transformers.

Shapes: N tokens of all rows, D hidden size, E experts, k experts per token, R = N * k routed rows.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from llama4.errors import ArgumentError
from llama4.model.dispatch import LocalDispatcher
from llama4.model.experts import BACKENDS, Experts, resolve_experts

Model = TypeVar("Model", bound=nn.Module)


class RoutedMoe(Llama4TextMoe):
    """transformers' layer of experts with its parameters, its router and its results, but for how they are computed:
    each token by the experts that were chosen for it, where transformers runs all."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """-> output [N, D] and the router's logits [N, E], as transformers has them."""
        x_ND = hidden_states.reshape(-1, self.hidden_dim)
        scores_NE, logits_NE = self.router(x_ND)
        experts_Nk = torch.topk(logits_NE, self.top_k, dim=1).indices
        dispatcher = LocalDispatcher(self.num_experts)
        routed = dispatcher.dispatch(x_ND, scores_NE.gather(1, experts_Nk), experts_Nk)
        routed_RD = self.experts(routed.x_RD, routed.num_tokens_per_expert_E)  # called, so that hooks and adapters are
        out_ND = self.shared_expert(x_ND)
        return dispatcher.combine(routed_RD, routed, out_ND).type_as(out_ND), logits_NE


def _with_forward_of(backend: type[Experts]) -> Any:
    """transformers' parameters, a backend's forward. It stays a subclass of transformers' own, by which others know
    it."""
    return type(f"Llama4Text{backend.__name__}", (backend, Llama4TextExperts), {"__module__": __name__})


EXPERTS = {name: _with_forward_of(backend) for name, backend in BACKENDS.items()}
"""Name of a backend -> what stands in the place of transformers' class."""


def accelerate(model: Model, experts: str = "auto") -> Model:
    """Compute the experts of a transformers Llama 4 model as this library does, forward and backward: each token by the
    experts that it is routed to. Everything else stays transformers': parameters and their names, `generate`,
    `save_pretrained`, `Trainer`, adapters.

    Args:
        model: of transformers, with Llama 4 layers somewhere inside, in place.
        experts: "loop", "grouped", "megablocks", or "auto" for the best on the model's device.

    Returns:
        The same model.

    Raises:
        ArgumentError: no such layers, layers whose experts something has replaced (by quantized ones, for instance), or
            a backend that cannot run there.
    """
    layers = [module for module in model.modules() if isinstance(module, Llama4TextMoe)]
    if not layers:
        raise ArgumentError(
            f"{type(model).__name__} has no mixture of experts of transformers' Llama 4; give a "
            "Llama4ForCausalLM or Llama4ForConditionalGeneration, before it is wrapped or quantized"
        )
    for layer in layers:
        if type(layer.experts) not in {Llama4TextExperts, *EXPERTS.values()}:
            raise ArgumentError(
                f"the experts are {type(layer.experts).__name__}, not transformers' own; call accelerate before "
                "adapters are added, and on a model that is not quantized"
            )
    for layer in layers:
        weight = layer.experts.gate_up_proj
        layer.experts.__class__ = EXPERTS[resolve_experts(experts, weight.device, weight.dtype).name]
        layer.__class__ = RoutedMoe
    return model
