"""Quantized matrices: what a format of weights says and computes (`WeightFormat`), and the module that holds a matrix,
or those of all experts of a layer, in such a format (`QuantizedWeight`).

A quantized weight takes the place of a Linear or, with E matrices, stands inside `QuantizedExperts`; the model around
it does not know. Its parameters are the tensors of a checkpoint in that format, most often compressed-tensors, with
experts stacked, so that it loads from and saves to any such checkpoint bit by bit. Where a CPU kernel reads them in
another order, they have that order from loading on, and `checkpoint_layout` gives a checkpoint's.

Shapes: N tokens, R routed rows sorted by expert, O outputs, I inputs, E experts, G groups that share a scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from llama4.kernels.abi import Matrix
from llama4.ops import quantized
from llama4.ops.frozen import frozen_product
from llama4.ops.hooks import has_global_hook, has_hook
from llama4.ops.linear import PackedLinear, linear
from llama4.ops.precision import upcast
from llama4.progress import track

MAX_QUANTIZED_AT_ONCE = 1 << 20
"""Weights that are quantized at a time: bounds the temporary memory."""
ROWS = 1024
"""Outputs that are dequantized at a time."""

Shape = tuple[int, ...]


class TensorSpec(NamedTuple):
    """What can be known of a tensor without reading it."""

    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WeightFormat(ABC):
    """How the weights of a matrix [O, I] are stored, and how to multiply with them.

    A new format is a subclass, and a line in `formats.FORMATS`. What has a `part` in its name is about one of the
    tensors that store a matrix: quantized values, scales and so on.

    Attributes:
        group_size: neighbours along I that share a scale; None: all of a row.
        activations: "float", or "int8": CPU kernels round the inputs of products, with a scale for each group of them.
        order: [I], int32: the inputs of a matrix in the order that its parts have them, where its groups are no runs
            of inputs (`sort`, `unsort`). It is of one matrix: two formats that differ in it alone are the same.
    """

    kind: ClassVar[str]
    """Name in schemes, and in the kernels."""
    bits: ClassVar[int]
    """Of a quantized value."""
    parts: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    """Names of the tensors that store a matrix, the quantized values first; those of compressed-tensors, if that has
    the format."""
    per_matrix: ClassVar[tuple[str, ...]] = ()
    """Of `parts`, those that have the same value for every output of a matrix, and lie in files once."""
    int8_activations: ClassVar[bool] = False
    """Whether inputs are rounded to int8 by default: where that is small beside how far the weights are rounded."""
    int8_head: ClassVar[bool] = True
    """Whether that holds with the head's inputs rounded, too."""
    has_int8_products: ClassVar[bool] = False
    """Whether the CPU kernels multiply with inputs that are rounded to int8, too."""
    rounds_inputs: ClassVar[bool] = False
    """Whether inputs are rounded, too, while the model runs."""
    float32_scales_on_gpu: ClassVar[bool] = False
    """Whether products on a GPU take scales in float32 alone."""
    rows_on_gpu: ClassVar[int] = ROWS
    """Outputs that are dequantized at a time there for a gradient: more where a kernel does that, and makes nothing
    beside the result."""
    has_rows: ClassVar[bool] = False
    """Whether rows are dequantized alone, as those of embeddings are (`rows`)."""
    compressed_name: ClassVar[str | None] = None
    """What compressed-tensors calls the format on disk; None if it has no such format."""

    group_size: int | None = None
    activations: str = field(default="float", kw_only=True)
    order: Tensor | None = field(default=None, kw_only=True, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.kind}, a scale per {f'{self.group_size} weights' if self.group_size else 'output'}"

    # -- what is stored ------------------------------------------------------------------------------------------------

    @classmethod
    def for_matrices(cls, shapes: Mapping[str, Shape]) -> Self:
        """This kind of format with options that suit a model's matrices.

        Args:
            shapes: matrices [O, I] and stacks of experts [E, O, I], by name.

        Raises:
            Llama4Error: a matrix that it cannot store.
        """
        return cls()

    def check(self, shape: Shape) -> None:  # noqa: B027 (most formats can be of any shape)
        """Raises:
        Llama4Error: a matrix [O, I], or a stack [E, O, I], that this format cannot be of; with the reason.
        """

    @abstractmethod
    def part_specs(self, shape: Shape) -> dict[str, TensorSpec]:
        """The tensors that store a matrix [O, I] or a stack [E, O, I]; scales may come in another float dtype."""

    def quantize(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """The parts of a matrix, contiguous; scales have its dtype. Works on a few rows at a time."""
        rows = max(1, MAX_QUANTIZED_AT_ONCE // weight_OI.shape[1])
        blocks = [self._quantize_rows(block) for block in track(weight_OI.split(rows))]
        return {part: torch.cat([block[part] for block in blocks]).contiguous() for part in self.parts}

    def _quantize_rows(self, weight_OI: Tensor) -> dict[str, Tensor]:
        raise AssertionError(f"{self.kind} is read, not written")

    @property
    def is_written(self) -> bool:
        """Whether `quantize` can make it."""
        return type(self)._quantize_rows is not WeightFormat._quantize_rows

    def weights_in(self, part: str, spec: TensorSpec) -> int:
        """How many weights are stored in a part."""
        return math.prod(spec.shape) * spec.dtype.itemsize * 8 // self.bits if part == self.parts[0] else 0

    def sort(self, columns: Tensor) -> Tensor:
        """[..., I], inputs as the model has them -> in the order of the parts."""
        return columns if self.order is None else columns.index_select(-1, self.order.to(columns.device))

    def unsort(self, columns: Tensor) -> Tensor:
        """The way back."""
        return columns if self.order is None else columns.index_select(-1, self.order.argsort().to(columns.device))

    # -- how compressed-tensors describes it ---------------------------------------------------------------------------

    @classmethod
    def from_compressed(cls, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Self | None:
        """The format that a group of a compressed-tensors configuration means, if it is of this kind and its tensors
        are those of that package.

        Args:
            weights: `weights` of the group.
            inputs: `input_activations` of the group.
        """
        return None

    def to_compressed(self) -> dict[str, Any]:
        """`weights` and `input_activations` of a group in a compressed-tensors configuration."""
        raise AssertionError(f"compressed-tensors has no {self.kind}")

    # -- what is computed ----------------------------------------------------------------------------------------------

    @abstractmethod
    def dequantize(self, weight: QuantizedWeight, expert: int | None = None) -> Tensor:
        """The matrix [O, I] in the dtype of its scales. Here and below inputs are in the order of the parts."""

    @abstractmethod
    def product(self, weight: QuantizedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        """x W^T, [N, O], in the dtype of x."""

    def rows_of(self, weight: QuantizedWeight, expert: int | None, dtype: torch.dtype) -> Callable[[slice], Tensor]:
        """What dequantizes some rows of the matrix, [rows, I], to a dtype without rounding them to a narrower one. A
        format that can dequantize rows alone does so."""
        weight_OI = self.dequantize(weight, expert)
        return lambda rows: weight_OI[rows].to(dtype)

    def rows(self, weight: QuantizedWeight, ids: Tensor) -> Tensor:
        """Rows of the matrix, [..., I], in float32; only if `has_rows`."""
        raise AssertionError(f"{self.kind} has no rows")

    def input_gradient(self, weight: QuantizedWeight, gradient_NO: Tensor, expert: int | None = None) -> Tensor:
        """The gradient of x for that of `product`, [N, I], in its dtype: dy W, some rows of W at a time. Where inputs
        are rounded, it is as if they were not."""
        rows_of = self.rows_of(weight, expert, gradient_NO.dtype)
        sums = gradient_NO.new_zeros(len(gradient_NO), weight.shape[-1], dtype=upcast(gradient_NO[:0]).dtype)
        at_once = self.rows_on_gpu if gradient_NO.is_cuda else ROWS
        for at in range(0, weight.shape[-2], at_once):
            rows = slice(at, at + at_once)
            sums += gradient_NO[:, rows] @ rows_of(rows)
        return sums.to(gradient_NO.dtype)

    def with_int8_activations(self) -> Self:
        """The same format for products of CPU kernels with inputs rounded to int8; itself where there are none."""
        return replace(self, activations="int8") if self.has_int8_products else self

    # -- how CPU kernels read it ---------------------------------------------------------------------------------------

    @property
    def has_cpu_kernels(self) -> bool:
        """Whether there are compiled kernels for this kind of format."""
        return quantized.has_kernels(self.kind, self.activations)

    def has_kernel_layout(self, shape: Shape) -> bool:
        """Whether the CPU kernels of this machine read such a matrix in an order of their own; `product` then takes it
        from `kernel_parts`."""
        return False

    def to_kernel_layout(self, part: str, values: Tensor) -> Tensor:
        """A part in that order, as a view of any shape; only if `has_kernel_layout`."""
        return values

    def from_kernel_layout(self, part: str, values: Tensor) -> Tensor:
        """A part, or a whole number of kernel tiles of its rows, in a checkpoint's order."""
        return values

    def stack(self, weight: QuantizedWeight) -> quantized.Parts | None:
        """A matrix, or those of all experts, as kernels take it; None if there are none for this kind of format."""
        if "weight_scale" not in self.parts:
            return None
        values, scale = weight.part(self.parts[0]), weight.part("weight_scale")
        return self.parts_of(weight, values, scale)

    def parts_of(self, weight: QuantizedWeight, values: Tensor, scale: Tensor | None) -> quantized.Parts:
        """The tensors of a matrix, or of those of all experts, for kernels."""
        return quantized.Parts(
            self.kind,
            values,
            scale,
            weight.shape[-1],
            (self.group_size or 0) if scale is not None else 0,
            weight.in_kernel_layout,
            self.activations,
        )

    def kernel_parts(self, weight: QuantizedWeight, expert: int | None = None) -> quantized.Parts:
        """A matrix as kernels take it for one product: on a CPU in their order, as a copy if the weight has not."""
        parts = {name: weight.part(name, expert) for name in self.parts}
        is_on_cpu = parts[self.parts[0]].is_cpu
        is_copied = is_on_cpu and weight.keeps_checkpoint_layout and self.has_kernel_layout(weight.shape)
        if is_copied:
            parts = {name: quantized.copied(self.to_kernel_layout(name, part), part) for name, part in parts.items()}
        ordered = self.parts_of(weight, parts[self.parts[0]], parts.get("weight_scale"))
        return ordered._replace(is_interleaved=ordered.is_interleaved or is_copied)

    def matrix(self, weight: QuantizedWeight) -> Matrix | None:
        """What the fused CPU kernels need to know of a matrix, valid as long as its parameters stay where they are;
        None if they cannot read it."""
        parts = self.stack(weight)
        return None if parts is None else quantized.matrix(parts)


class QuantizedWeight(PackedLinear):
    """y = x W^T + b, with W [O, I], or E of them without b, in a quantized format.

    Args:
        format: of W; the bias is not quantized.
        shape: (O, I) or (E, O, I).
        bias: whether to add one.

    Attributes:
        in_kernel_layout: whether the parts are in the order of the CPU kernels; else in a checkpoint's.
        keeps_checkpoint_layout: whether they have a checkpoint's order on a CPU, too, so that they can be its memory
            map; see `WeightFormat.kernel_parts`.
        order: `WeightFormat.order`, on the device of the parts.

    Raises:
        Llama4Error: a shape that the format cannot have.
    """

    def __init__(self, format: WeightFormat, shape: Shape, *, bias: bool = False) -> None:
        super().__init__()
        format.check(shape)
        assert format.order is None or len(shape) == 2, "experts have no orders of their own"
        self.format, self.shape, self.in_kernel_layout = format, shape, False
        self.keeps_checkpoint_layout = False
        self.specs = format.part_specs(shape)
        self.order: Tensor | None
        self.register_buffer("order", format.order, persistent=False)
        self._narrow: dict[str, torch.dtype] = {}  # of a part that became float32, what it is in its checkpoint
        for name, spec in self.specs.items():
            self.register_parameter(name, nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype), requires_grad=False))
        self.bias = nn.Parameter(torch.empty(shape[-2])) if bias else None

    @classmethod
    def of(cls, weight: Tensor, format: WeightFormat) -> QuantizedWeight:
        """A matrix [O, I], or a stack [E, O, I], quantized."""
        matrices = [format.quantize(format.sort(matrix)) for matrix in weight.reshape(-1, *weight.shape[-2:])]
        with torch.device("meta"):
            packed = cls(format, tuple(weight.shape))
        parts = {part: torch.stack([matrix[part] for matrix in matrices]) for part in format.parts}
        packed.set_parts({part: values.view(*weight.shape[:-1], -1) for part, values in parts.items()})
        return packed

    # -- parts ---------------------------------------------------------------------------------------------------------

    def part(self, name: str, expert: int | None = None) -> Tensor:
        """A part as it lies in memory, of all experts or of one."""
        values: Tensor = getattr(self, name)
        return values if expert is None else values[expert]

    def set_part(self, name: str, values: Tensor) -> None:
        """Make a part these values, which are in the order that `in_kernel_layout` says."""
        values = self._as_computed(name, values).contiguous()
        self.register_parameter(name, nn.Parameter(values, requires_grad=False))

    def _as_computed(self, name: str, values: Tensor) -> Tensor:
        """A part in the dtype that it is computed from; that of its checkpoint is noted."""
        self._narrow.pop(name, None)
        if values.dtype == torch.float8_e4m3fn:
            return values.view(torch.uint8)  # torch cannot pickle e4m3
        if values.dtype == torch.float16 or (  # which no kernel reads
            values.dtype == torch.bfloat16 and values.is_cuda and self.format.float32_scales_on_gpu
        ):
            self._narrow[name] = values.dtype
            return values.float()
        return values

    def checkpoint_layout(self, name: str) -> Tensor:
        """A part as a checkpoint has it."""
        values = self.to_checkpoint_layout(name, self.part(name).detach())
        dtype = self.checkpoint_dtype(name)
        if name in self._narrow:
            return values.to(dtype)
        return values if values.dtype == dtype else values.view(dtype)

    def checkpoint_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a checkpoint has a part: e4m3 lies in memory as bytes, narrow scales may as float32."""
        dtype = self.part(name).dtype
        if name in self._narrow:
            return self._narrow[name]
        return self.specs[name].dtype if dtype == torch.uint8 else dtype

    def to_checkpoint_layout(self, name: str, values: Tensor) -> Tensor:
        """A part, or a multiple of 16 of its rows, from this module's order to a checkpoint's."""
        return self.format.from_kernel_layout(name, values) if self.in_kernel_layout else values

    def from_checkpoint_layout(self, name: str, values: Tensor) -> Tensor:
        """A part from a checkpoint's order to this module's: the same, or a view of another shape."""
        return self.format.to_kernel_layout(name, values) if self.in_kernel_layout else values

    def choose_layout(self, device: torch.device) -> None:
        """Before the parts are set: expect them in the order that is read on a device."""
        is_reordered = device.type == "cpu" and not self.keeps_checkpoint_layout
        self.in_kernel_layout = is_reordered and self.format.has_kernel_layout(self.shape)
        self.order = None if self.order is None else self.order.to(device)

    def set_parts(self, parts: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        """Set all parts as a checkpoint has them, to compute on a device: by default on the one they are on."""
        self.choose_layout(device or next(iter(parts.values())).device)
        for name, values in parts.items():
            self.set_part(name, self.from_checkpoint_layout(name, values).reshape(values.shape))

    def change_layout(self, device: torch.device) -> None:
        """Bring the parts into the order that is read on a device, wherever they are."""
        self.set_parts({name: self.checkpoint_layout(name) for name in self.specs}, device)

    # -- products ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """As a Linear: [..., I] -> [..., O]."""
        y = self.product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], self.shape[-2])
        return y if self.bias is None else y + self.bias

    def product(self, x_NI: Tensor, expert: int | None = None) -> Tensor:
        """x W^T, [N, O], in the dtype of x, with one matrix."""
        return frozen_product(
            x_NI if self.order is None else x_NI.index_select(1, self.order),
            lambda x_NI: self.format.product(self, x_NI, expert),
            lambda gradient_NO: self.format.input_gradient(self, gradient_NO, expert),
        )

    def together(self, modules: Sequence[nn.Module], x_NI: Tensor) -> list[Tensor] | None:
        """In one launch, or with the rows rounded once, where all are quantized alike; see `PackedLinear`."""
        matrices = (module.alone() if isinstance(module, QuantizedWeight) else None for module in modules)
        return quantized.linears_at_once(self.format.kind, self.format.group_size or 0, x_NI, matrices)

    def of_swiglu(self, gate_NI: Tensor, up_NI: Tensor) -> Tensor | None:
        """Rounded as it is computed, where inputs are rounded; see `PackedLinear`."""
        parts = self.alone() if self.format.rounds_inputs else None
        return None if parts is None else quantized.linear_of_swiglu(gate_NI, up_NI, parts)

    def alone(self) -> quantized.Parts | None:
        """The matrix as kernels take it, if a call of this module is its product and nothing else."""
        is_product = type(self) is QuantizedWeight and self.bias is None and self.order is None
        return self.stack() if is_product and not has_hook(self) and not has_global_hook() else None

    def dequantize(self, expert: int | None = None) -> Tensor:
        """The matrix [O, I] in the dtype of its scales."""
        return self.format.unsort(self.format.dequantize(self, expert))

    def stack(self) -> quantized.Parts | None:
        """All matrices for a grouped product, see `WeightFormat.stack`."""
        return self.format.stack(self)

    def matrix(self) -> Matrix | None:
        """What the fused CPU kernels need to know, see `WeightFormat.matrix`; None if they would be wrong: a bias and
        an order of inputs are not theirs."""
        return None if self.bias is not None or self.order is not None else self.format.matrix(self)

    # -- as a torch module ---------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        """Moves reach all parameters, casts the bias alone: quantized values and their scales belong together. On a CPU
        parts have the order of its kernels, elsewhere a checkpoint's."""
        first = self.format.parts[0]
        was_on_cpu = self.part(first).is_cpu
        for name, parameter in self.named_parameters(recurse=False):
            moved = fn(parameter.data)
            kept = moved if moved.dtype == parameter.dtype or name == "bias" else parameter.data.to(moved.device)
            self.register_parameter(name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        device = self.part(first).device
        self.order = None if self.order is None else self.order.to(device)
        if (device.type == "cpu") != was_on_cpu:
            self.change_layout(device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_kernel_layout or self._narrow:
            destination.update({prefix + name: self.checkpoint_layout(name) for name in self.specs})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        """Parts come in the order and the dtypes of a checkpoint."""
        parts = {}
        for name in (name for name in self.specs if prefix + name in state_dict):
            values, own = state_dict[prefix + name], self.part(name)
            if local_metadata.get("assign_to_params_buffers", False):
                values = self._as_computed(name, values)
            elif self._narrow.get(name) != values.dtype:
                self._narrow.pop(name, None)
                values = values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values
            if self.in_kernel_layout and values.shape == own.shape:
                values = self.from_checkpoint_layout(name, values).reshape(own.shape)
            parts[prefix + name] = values
        super()._load_from_state_dict(state_dict | parts, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return f"{self.format.kind}, {list(self.shape)}, group_size={self.format.group_size}"


def in_blocks(rows_of: Callable[[slice], Tensor], outputs: int, x_NI: Tensor) -> Tensor:
    """x W^T, [N, O], where `rows_of` dequantizes some rows of W: never a whole matrix at once."""
    blocks = [linear(x_NI, rows_of(slice(at, at + ROWS)).to(x_NI.dtype)) for at in range(0, outputs, ROWS)]
    return torch.cat(blocks, dim=-1) if len(blocks) > 1 else blocks[0]
