"""Putting packed weights in the places of a model's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from llama4.errors import ArgumentError, CheckpointError, Llama4Error
from llama4.model.feed_forward import FeedForward
from llama4.ops.experts import loop_over_experts
from llama4.ops.linear import Linear
from llama4.ops.memory import read_ahead
from llama4.ops.quantized import swiglu_experts
from llama4.ops.swiglu import swiglu
from llama4.quantization.plan import PARTS, QuantizationPlan
from llama4.quantization.weight import QuantizedWeight, Shape, WeightFormat
from llama4.vision.linear import TowerLinear

_EXPERTS = re.compile(r"(?P<path>.*\.experts|experts)\.(?P<matrix>gate_up|gate|up|down)_proj")
_EXPERT = re.compile(r"(?P<path>.*\.experts|experts)\.\d+\.(gate|up|down)_proj\.weight")

MAX_WAITING = 512 << 20
"""Bytes of experts that are read before it is known that they are needed."""


def choose_activations(model: nn.Module, activations: str, device: torch.device, dtype: torch.dtype) -> None:
    """In what packed weights of a model are multiplied by CPU kernels: "int8" rounds their inputs, with a scale for
    each group of them, where the format has such products; "auto" does so in bfloat16, for formats of which the
    weights' own rounding is much larger; in the head, which a third of the error comes from, not for all of them.

    Raises:
        ArgumentError: "int8", and no product is of integers there.
    """
    has_kernels = has_products = False
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            is_head = re.fullmatch(PARTS["head"], f"{name}.weight") is not None
            format = module.format
            is_default = format.int8_activations and dtype == torch.bfloat16 and (format.int8_head or not is_head)
            rounded = format.with_int8_activations()
            has_products |= rounded is not format
            has_kernels |= rounded.has_cpu_kernels
            if activations == "int8" or (activations == "auto" and is_default):
                module.format = rounded
    if activations == "int8":
        reasons = {
            "no weight of this model is in int4, int8 or blocks of GGUF": has_products,
            f"the model is on {device}": device.type == "cpu",
            f"it computes in {str(dtype).removeprefix('torch.')}": dtype in (torch.float32, torch.bfloat16),
            "there are no CPU kernels (`llama4 info --system` says why)": has_kernels,
        }
        if reason := next((reason for reason, is_met in reasons.items() if not is_met), None):
            raise ArgumentError(f"activations='int8' does nothing here: {reason}; choose 'float' or 'auto'")


class QuantizedEmbedding(QuantizedWeight):
    """Rows of a packed matrix [V, D] by their numbers, in float32, in which the decoder adds them up."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.format.rows(self, ids)


class QuantizedExperts(nn.Module):
    """The routed experts over packed weights: all of them at once on a GPU, elsewhere one after the other. Experts that
    no token chose are not read."""

    matrices: tuple[str, ...] = ("gate_up_proj", "down_proj")
    gate_up_proj: QuantizedWeight
    down_proj: QuantizedWeight

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """See `Experts.forward`."""
        stacks = self.gate_up_proj.stack(), self.down_proj.stack()
        return swiglu_experts(self.expert, x_RD, num_tokens_per_expert_E, *stacks)

    def gate_up(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """See `Experts.gate_up`."""
        return loop_over_experts(self.gate_up_of, x_RD, num_tokens_per_expert_E)

    def down(self, hidden_RF: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """See `Experts.down`."""
        return loop_over_experts(self.down_of, hidden_RF, num_tokens_per_expert_E)

    def gate_up_of(self, x_RD: Tensor, expert: int) -> Tensor:
        """The first product of one expert."""
        return self.gate_up_proj.product(x_RD, expert)

    def down_of(self, hidden_RF: Tensor, expert: int) -> Tensor:
        """The last product of one expert."""
        return self.down_proj.product(hidden_RF, expert)

    def expert(self, x_RD: Tensor, expert: int) -> Tensor:
        """The output of one expert for its tokens."""
        return self.down_of(swiglu(*self.gate_up_of(x_RD, expert).chunk(2, dim=-1)), expert)


class SplitExperts(QuantizedExperts):
    """With gate and up in a stack each, as NF4 checkpoints may have them."""

    matrices = ("gate_proj", "up_proj", "down_proj")
    gate_proj: QuantizedWeight
    up_proj: QuantizedWeight

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        return loop_over_experts(self.expert, x_RD, num_tokens_per_expert_E)

    def gate_up_of(self, x_RD: Tensor, expert: int) -> Tensor:
        return torch.cat([self.gate_proj.product(x_RD, expert), self.up_proj.product(x_RD, expert)], dim=-1)


class SeparateExperts(QuantizedExperts):
    """With three Linears per expert, named 0, 1, ..., each packed or not, as NF4 checkpoints may have them."""

    matrices = ()

    def __init__(self, count: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        for i in range(count):
            self.add_module(str(i), FeedForward(hidden_size, intermediate_size))

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        return loop_over_experts(self.expert, x_RD, num_tokens_per_expert_E)

    def gate_up_of(self, x_RD: Tensor, expert: int) -> Tensor:
        own = self.get_submodule(str(expert))
        return torch.cat([own.get_submodule(f"{matrix}_proj")(x_RD) for matrix in ("gate", "up")], dim=-1)

    def down_of(self, hidden_RF: Tensor, expert: int) -> Tensor:
        out: Tensor = self.get_submodule(f"{expert}.down_proj")(hidden_RF)
        return out


class MappedExperts(SeparateExperts):
    """Those that stay in the memory map of a checkpoint that is larger than memory: while one computes, the next is
    read. A prompt that needs all of them will need those of the next layer, too: the first of these are read while
    attention computes.

    Args:
        experts: their Linears.
        of_layers: those of all layers, one after the other; to be filled by the caller.
    """

    def __init__(self, experts: SeparateExperts, of_layers: Sequence[MappedExperts]) -> None:
        super().__init__(0, 0, 0)
        for i, expert in experts.named_children():
            self.add_module(i, expert)
        self._of_layers = of_layers

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        chosen = num_tokens_per_expert_E.nonzero().flatten().tolist()
        following = dict(pairwise([None, *chosen]))
        needs_all = len(chosen) == len(num_tokens_per_expert_E)

        def expert(x_ND: Tensor, i: int) -> Tensor:
            if i in following:
                self._read_ahead(following[i])
            elif needs_all:
                self._read_next_layer()
            return self.expert(x_ND, i)

        if chosen:
            self._read_ahead(chosen[0])
        return loop_over_experts(expert, x_RD, num_tokens_per_expert_E)

    def _read_next_layer(self) -> None:
        """Its first experts, as many as may wait in memory."""
        after = self._of_layers.index(self) + 1
        if after < len(self._of_layers):
            parameters = list(self._of_layers[after].parameters())
            sizes = accumulate(parameter.nbytes for parameter in parameters)
            read_ahead(parameters[: sum(size <= MAX_WAITING for size in sizes)])

    def _read_ahead(self, expert: int) -> None:
        read_ahead(self.get_submodule(str(expert)).parameters())


class MappedEmbedding(nn.Embedding):
    """Rows that stay in the memory map of a checkpoint that is larger than memory: they alone are read, while a page
    that is found missing is read with the megabytes around it, which takes the place of experts.

    Args:
        embedding: their matrix.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        rows, width = embedding.weight.shape
        super().__init__(rows, width, _weight=embedding.weight)
        self.weight = embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight.detach()
        read_ahead(rows[i] for i in ids.unique().tolist())
        return super().forward(ids)


def swap_modules(model: nn.Module, plan: QuantizationPlan) -> None:
    """Put packed weights, without values yet, where a plan wants them; the model is on the meta device.

    Experts appear in a plan as `gate_up_proj` and `down_proj`, or as `gate_proj`, `up_proj` and `down_proj`, or, as a
    Linear each, as `7.gate_proj.weight` and so on.

    Raises:
        Llama4Error: one of the matrices of a layer's experts is quantized and another is not; or, as `CheckpointError`,
            a matrix that this library does not run quantized, or whose shape is not that of its format.
    """
    with torch.device("meta"):
        for path in dict.fromkeys(match["path"] for name in plan if (match := _EXPERT.fullmatch(name))):
            E, D, F_ = _sizes(model, path)
            _put(model, path, SeparateExperts(E, D, F_))
        for path in dict.fromkeys(match["path"] for name in plan if (match := _EXPERTS.fullmatch(name))):
            _pack_experts(model, path, plan)
        for name, format in plan.items():
            if _EXPERTS.fullmatch(name) or format is None:
                continue
            path = name.removesuffix(".weight")
            linear = model.get_submodule(path)
            if isinstance(linear, nn.Embedding) and format.has_rows:
                _pack_embedding(model, name, linear, format)
                continue
            if type(linear) not in (nn.Linear, Linear, TowerLinear):
                raise CheckpointError(f"{name} is quantized, which this library does not run; take it unquantized")
            assert isinstance(linear, nn.Linear)
            shape = (linear.out_features, linear.in_features)
            packed = _packed(name, format, shape, bias=linear.bias is not None)
            packed.keeps_checkpoint_layout = _EXPERT.fullmatch(name) is not None
            _put(model, path, packed)


def _pack_embedding(model: nn.Module, name: str, embedding: nn.Embedding, format: WeightFormat) -> None:
    """Also in a head that is tied to it."""
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    packed = _packed(name, format, shape, kind=QuantizedEmbedding)
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear) and module.weight is embedding.weight:
            head = _packed(name, format, shape)
            for part in format.parts:
                head.register_parameter(part, packed.get_parameter(part))
            _put(model, path, head)
    _put(model, name.removesuffix(".weight"), packed)


def _pack_experts(model: nn.Module, path: str, plan: QuantizationPlan) -> None:
    E, D, F_ = _sizes(model, path)
    shapes = {"gate_up": (E, 2 * F_, D), "gate": (E, F_, D), "up": (E, F_, D), "down": (E, D, F_)}
    found = [name for name in plan if name.startswith(f"{path}.")]
    experts = SplitExperts() if {f"{path}.gate_proj", f"{path}.up_proj"} & {*found} else QuantizedExperts()
    if missing := [matrix for matrix in experts.matrices if f"{path}.{matrix}" not in found]:
        raise Llama4Error(
            f"{found[0]} is quantized and {path}.{missing[0]} is not; all matrices of the experts must be, or none"
        )
    for matrix in experts.matrices:
        format = plan[f"{path}.{matrix}"]
        assert format is not None
        setattr(experts, matrix, _packed(f"{path}.{matrix}", format, shapes[matrix.removesuffix("_proj")]))
    _put(model, path, experts)


def _packed(
    name: str, format: WeightFormat, shape: Shape, bias: bool = False, kind: type[QuantizedWeight] = QuantizedWeight
) -> QuantizedWeight:
    try:
        return kind(format, shape, bias=bias)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be loaded: {error}") from None


def _sizes(model: nn.Module, path: str) -> tuple[int, int, int]:
    """E, D, F of a layer's experts."""
    E, F_, D = model.get_parameter(f"{path}.down_proj").shape
    return E, D, F_


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, module)
