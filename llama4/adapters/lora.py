"""Low-rank additions to the modules of a model (Hu et al. 2021), on any base: float, or packed and left packed.

An `Adapter` owns its matrices and hangs on the model's modules from outside, as hooks: the model's parameters keep
their names and values, and taking the adapter off leaves nothing. Stacked experts have one product for the adapters of
all of them.

Shapes: N tokens, R routed rows sorted by expert, I inputs, O outputs, r rank, E experts, D hidden size, F expert width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama4.adapters.config import LoraConfig, target_of
from llama4.errors import ArgumentError, Llama4Error
from llama4.model.experts import Experts
from llama4.model.moe import Router
from llama4.model.multimodal import Llama4Model
from llama4.ops.low_rank import low_rank, low_rank_experts
from llama4.ops.precision import upcast
from llama4.ops.swiglu import swiglu
from llama4.quantization.modules import QuantizedEmbedding, QuantizedExperts
from llama4.quantization.weight import QuantizedWeight

STACKS = ("gate_up_proj", "down_proj")
"""Parameters of stacked experts."""
TIED = "this model ties its head to its embeddings; leave the target 'embeddings' out"


class Lora(nn.Module):
    """A and B of one matrix, or of those of all experts: what is added to x W^T is scale * x A^T B^T.

    Args:
        shape: (O, I), or (E, O, I) of experts.
        rank: r.
        scale: factor of what is added.
        dropout: share of the inputs that are zero in training.

    Attributes:
        a: [r, I] or [E, r, I], uniform at first as a Linear's weights are.
        b: [O, r] or [E, O, r], zero at first, so that nothing is added.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        *experts, outputs, inputs = shape
        self.scale, self.dropout = scale, dropout
        self.a = nn.Parameter(torch.empty(*experts, rank, inputs, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(*experts, outputs, rank, dtype=torch.float32))

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def reset(self, generator: torch.Generator | None = None) -> None:
        """The values of the beginning."""
        bound = self.a.shape[-1] ** -0.5
        with torch.no_grad():
            self.a.uniform_(-bound, bound, generator=generator)
            self.b.zero_()

    def added(self, x: Tensor) -> Tensor:
        """What is added to the output for x [..., I], in float32 or better."""
        x = F.dropout(x, self.dropout, self.training).to(torch.promote_types(x.dtype, self.a.dtype))
        return low_rank(x, self.a.to(x.dtype), self.b.to(x.dtype), self.scale)

    def added_by_expert(self, x_RI: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """The same of experts, for rows sorted by expert."""
        x_RI = x_RI.to(torch.promote_types(x_RI.dtype, self.a.dtype))
        a, b = self.a.to(x_RI.dtype), self.b.to(x_RI.dtype)
        return low_rank_experts(x_RI, num_tokens_per_expert_E, a, b, self.scale)

    def delta(self, expert: int | None = None) -> Tensor:
        """What is added to the matrix [O, I], or to that of an expert, in float32 or better."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        return b.detach() @ a.detach() * self.scale

    def forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """As the forward hook of a Linear, a packed weight or an embedding."""
        return (output + self.added(inputs[0])).to(output.dtype)


class EmbeddingLora(Lora):
    """Of an embedding [V, D]: a row of it is a column of W [D, V]."""

    def added(self, x: Tensor) -> Tensor:
        """The same for ids [...]."""
        return F.linear(self.a.mT[x], self.b) * self.scale


class Addition(Protocol):
    """What is added to a product with a matrix, or with those of experts: `Lora`, or those of several adapters."""

    def added(self, x: Tensor) -> Tensor: ...
    def added_by_expert(self, x_RI: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor: ...


def router_methods(router: Router, lora: Addition) -> dict[str, Callable[..., Any]]:
    """Those of a router whose logits have an addition. Its forward is that of its class: it is replaced for those who
    compute what a module does without calling it (ops/hooks.py)."""

    def logits(x_ND: Tensor) -> Tensor:
        return Router.logits(router, x_ND) + lora.added(upcast(x_ND))

    return {"logits": logits, "forward": partial(Router.forward, router)}


def experts_forward(experts: Experts | QuantizedExperts, loras: Mapping[str, Addition]) -> Callable[..., Tensor]:
    """The forward of stacked experts with additions to one or both matrices."""
    gate_up, down = (loras.get(stack) for stack in STACKS)

    def forward(x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        if not len(x_RD):
            return x_RD
        gate_up_R2F = experts.gate_up(x_RD, num_tokens_per_expert_E)
        if gate_up is not None:
            added = gate_up.added_by_expert(x_RD, num_tokens_per_expert_E)
            gate_up_R2F = (gate_up_R2F + added).to(gate_up_R2F.dtype)
        hidden_RF = swiglu(*gate_up_R2F.chunk(2, dim=-1))
        out_RD = experts.down(hidden_RF, num_tokens_per_expert_E)
        if down is not None:
            out_RD = (out_RD + down.added_by_expert(hidden_RF, num_tokens_per_expert_E)).to(out_RD.dtype)
        return out_RD

    return forward


class Adapter(nn.Module):
    """Additions to some modules of a model.

    Args:
        config: what it was made with.
        loras: name of a module, or of a parameter of stacked experts -> what is added to it.

    Attributes:
        is_attached: whether the model computes with it.
    """

    def __init__(self, config: LoraConfig, loras: Mapping[str, Lora]) -> None:
        super().__init__()
        self.config = config
        self.names = tuple(loras)
        self.loras = nn.ModuleList(loras.values())
        self._undo: list[Callable[[], object]] = []

    @classmethod
    def create(cls, model: Llama4Model, config: LoraConfig, *, seed: int = 0) -> Adapter:
        """A new one that adds nothing yet, on the model's device.

        Raises:
            ArgumentError: the model has nothing of what shall be changed, or ties its embeddings, which then cannot
                be; or its experts stay on another device.
        """
        if "experts" in config.targets and (elsewhere := _experts_elsewhere(model)):
            raise ArgumentError(
                f"{elsewhere[0]} stay on another device, where no adapter reaches them; load the model without "
                "experts_device, or leave the target 'experts' out"
            )
        generator = torch.Generator().manual_seed(seed)
        loras: dict[str, Lora] = {}
        for name, shape in targets_of(model).items():
            target = target_of(name)
            if target not in config.targets:
                continue
            if target == "embeddings" and model.config.text.tie_word_embeddings:
                raise ArgumentError(TIED)
            kind = EmbeddingLora if name.endswith("embed_tokens") else Lora
            dropout = 0.0 if target in ("experts", "router", "embeddings") else config.dropout
            loras[name] = kind(shape, config.rank_of(target), config.scale, dropout)
            loras[name].reset(generator)
        if not loras:
            raise ArgumentError(f"this model has no {' and no '.join(config.targets)}; choose other targets")
        return cls(config, loras).to(model.device)

    def items(self) -> Iterator[tuple[str, Lora]]:
        for name, lora in zip(self.names, self.loras, strict=True):
            assert isinstance(lora, Lora)
            yield name, lora

    @property
    def is_attached(self) -> bool:
        return bool(self._undo)

    def attach(self, model: Llama4Model) -> None:
        """Make the model compute with it.

        Raises:
            Llama4Error: the model has other shapes than the adapter, or keeps its experts on another device.
        """
        assert not self._undo, "it is attached already"
        self.check(model)
        try:
            self._attach(model)
        except BaseException:
            self.detach()
            raise

    def _attach(self, model: Llama4Model) -> None:
        stacks: dict[str, dict[str, Lora]] = {}
        for name, lora in self.items():
            path, _, leaf = name.rpartition(".")
            if lora.a.ndim == 3:
                stacks.setdefault(path, {})[leaf] = lora
            elif isinstance(module := model.get_submodule(name), Router):
                for method, own in router_methods(module, lora).items():
                    self._override(module, method, own)
            else:
                self._undo.append(module.register_forward_hook(lora).remove)
        for path, loras in stacks.items():
            experts = model.get_submodule(path)
            assert isinstance(experts, (Experts, QuantizedExperts))
            self._override(experts, "forward", experts_forward(experts, loras))

    def _override(self, module: nn.Module, name: str, method: Callable[..., Any]) -> None:
        assert name not in vars(module)
        vars(module)[name] = method
        self._undo.append(lambda: vars(module).pop(name, None))

    def detach(self) -> None:
        """Make the model compute without it."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    @contextmanager
    def detached(self, model: Llama4Model) -> Iterator[None]:
        """Inside, the model computes without it."""
        self.detach()
        try:
            yield
        finally:
            self.attach(model)

    def check(self, model: Llama4Model) -> None:
        """Raises:
        Llama4Error: it does not fit a model; with the first name that does not.
        """
        there = targets_of(model)
        for name, lora in self.items():
            if name not in there:
                raise Llama4Error(f"the adapter changes {name}, which this model does not have or cannot adapt")
            shape = (*lora.a.shape[:-2], lora.b.shape[-2], lora.a.shape[-1])
            if shape != there[name]:
                wanted = list(there[name])
                raise Llama4Error(f"the adapter changes {name} of {list(shape)}, but here it is {wanted}")

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def targets_of(model: Llama4Model) -> dict[str, tuple[int, ...]]:
    """All that an adapter could change: names, and shapes (O, I) or (E, O, I)."""
    shapes: dict[str, tuple[int, ...]] = {}
    elsewhere = tuple(f"{name}." for name in _experts_elsewhere(model))
    for name, module in model.named_modules():
        if name.startswith(elsewhere):
            continue
        if isinstance(module, (Experts, QuantizedExperts)):
            E, D, F_ = model.config.text.num_local_experts, model.config.text.hidden_size, _width(model)
            shapes |= {f"{name}.gate_up_proj": (E, 2 * F_, D), f"{name}.down_proj": (E, D, F_)}
        elif target_of(name) is not None and isinstance(module, QuantizedEmbedding):
            shapes[name] = module.shape[::-1]
        elif target_of(name) is not None and isinstance(module, (nn.Linear, QuantizedWeight)):
            shapes[name] = tuple(module.weight.shape) if isinstance(module, nn.Linear) else module.shape
        elif target_of(name) is not None and isinstance(module, nn.Embedding):
            shapes[name] = (module.embedding_dim, module.num_embeddings)
    return shapes


def _experts_elsewhere(model: Llama4Model) -> list[str]:
    """Layers' experts that something else computes, with copies of their weights."""
    layers = ((name, module) for name, module in model.named_modules() if name.endswith(".experts"))
    return [name for name, module in layers if not isinstance(module, (Experts, QuantizedExperts))]


def _width(model: Llama4Model) -> int:
    return model.config.text.intermediate_size
