"""What a model was made of when a faster way to compute it was prepared, and whether it still is.

A runner that does not call the modules of a model computes what their classes say. So it must know that nobody has put
another module, parameter, dispatcher or setting in a place, nor hung a hook anywhere.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from llama4.model.decoder import Decoder, LanguageModel
from llama4.model.dispatch import LocalDispatcher
from llama4.model.moe import MixtureOfExperts
from llama4.model.multimodal import Llama4Model
from llama4.model.norm import RMSNorm
from llama4.ops.hooks import has_global_hook, has_hook

_SETTINGS = "is_batch_invariant", "head_dim", "eps", "qk_norm_eps", "k", "max_norm"
"""Attributes of modules that a runner takes over."""


class UnsupportedError(Exception):
    """What a faster way cannot compute."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedError(reason)


def check_frame(model: Llama4Model, embeddings: Collection[type[nn.Module]]) -> None:
    """What stands around the layers, and how tokens reach experts: a subclass or a wrapper may compute something else.

    Args:
        embeddings: classes that may be `embed_tokens`.

    Raises:
        UnsupportedError: it does.
    """
    inner = model.language_model
    frame = (
        ("the model", model, Llama4Model),
        ("language_model", inner, LanguageModel),
        ("its model", inner.model, Decoder),
    )
    for name, module, known in frame:
        require(type(module) is known, f"{name} is {type(module).__name__}, which it does not compute")
    embedding = inner.model.embed_tokens
    is_known = type(embedding) in embeddings and getattr(embedding, "max_norm", None) is None
    require(is_known, "embed_tokens was replaced")
    require(type(inner.model.norm) is RMSNorm, "the last norm was replaced")
    for name, module in inner.model.layers.named_modules():
        if isinstance(module, MixtureOfExperts):
            is_local, replaced = type(module.dispatcher) is LocalDispatcher, type(module.dispatcher).__name__
            require(is_local, f"layers.{name}.dispatcher is {replaced}, which it does not compute")


@dataclass(kw_only=True)
class Snapshot:
    """The parts of a model. It does not keep the model alive.

    Attributes:
        modules: those of the language model, by name.
        children: (parent, name, child) of each module.
        parameters: (module, name, address) of each parameter.
        dispatchers: that of each layer with experts, which is no module.
        settings: the class of the model and of each module, and their attributes.
    """

    modules: dict[str, nn.Module]
    children: list[tuple[nn.Module, str, nn.Module]]
    parameters: list[tuple[nn.Module, str, int]]
    dispatchers: list[tuple[MixtureOfExperts, LocalDispatcher]]
    settings: list[tuple[object, ...]]

    @staticmethod
    def taken(model: Llama4Model) -> Snapshot:
        modules = dict(model.language_model.named_modules())
        experts = [module for module in modules.values() if isinstance(module, MixtureOfExperts)]
        return Snapshot(
            modules=modules,
            children=[
                (parent, name, child)
                for parent in modules.values()
                for name, child in parent._modules.items()
                if child is not None
            ],
            parameters=[
                (module, name, parameter.data_ptr())
                for module in modules.values()
                for name, parameter in module._parameters.items()
                if parameter is not None
            ],
            dispatchers=[(module, module.dispatcher) for module in experts],
            settings=[_settings(module) for module in (model, *modules.values())],
        )

    def is_current(self, model: Llama4Model) -> bool:
        """Whether every module, dispatcher and setting is still in its place, and every parameter at its address."""
        return (
            model.language_model is self.modules[""]
            and all(parent._modules.get(name) is child for parent, name, child in self.children)
            and all(module.dispatcher is dispatcher for module, dispatcher in self.dispatchers)
            and all(
                (parameter := module._parameters.get(name)) is not None and parameter.data_ptr() == address
                for module, name, address in self.parameters
            )
            and [_settings(module) for module in (model, *self.modules.values())] == self.settings
        )

    def hooked(self, model: Llama4Model) -> str | None:
        """The name of a module whose call does more than its class says, by a hook or a forward of its own."""
        if has_hook(model):
            return "the model"
        for name, module in self.modules.items():
            if has_hook(module):
                return f"language_model.{name}".rstrip(".")
        if has_global_hook():
            return "every module"
        return None

    def weights(self) -> list[torch.Tensor]:
        """The parameters, to be kept in memory while their addresses are in use."""
        found = [module._parameters[name] for module, name, _ in self.parameters]
        return [weight.detach() for weight in found if weight is not None]


def _settings(module: nn.Module) -> tuple[object, ...]:
    return type(module), *map(module.__dict__.get, _SETTINGS)
