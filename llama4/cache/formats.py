"""How keys and values are stored: unquantized, or in eight or four bits with a scale per token and head.

Shapes: C head_dim; the dimensions before it may be any. Scales are bfloat16, one for each run of C numbers;
quantized values are of the number divided by the rounded scale.

The command line imports this file for its names; so functions import torch, not the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llama4.errors import ArgumentError
from llama4.units import dtype_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Unquantized:
    """Numbers of any dtype."""

    dtype: torch.dtype
    name: ClassVar[str] = "unquantized"
    """Of the format in the compiled kernels (kernels/cpp/kv_cache.h)."""
    scaled: ClassVar[bool] = False

    def bytes(self, C: int) -> int:
        """Of the values of one token and head, keys or values."""
        return C * self.dtype.itemsize

    def view(self, data: Tensor) -> Tensor:
        """Bytes [..., bytes(C)] as values."""
        return data.view(self.dtype)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., C] -> values and, if scaled, scales [...]."""
        return x.to(self.dtype), None

    def decode(self, values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        """-> [..., C] of a dtype."""
        return values.to(dtype)


@dataclass(frozen=True)
class _Scaled:
    """Quantized values, each to be multiplied by its scale."""

    scaled: ClassVar[bool] = True

    def bytes(self, C: int) -> int:
        return C

    def decode(self, values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert scales is not None
        return (values.float() * scales.float()[..., None]).to(dtype)


@dataclass(frozen=True)
class CacheInt8(_Scaled):
    """-127 to 127; the largest magnitude of a head is 127."""

    name: ClassVar[str] = "int8"

    def view(self, data: Tensor) -> Tensor:
        import torch

        return data.view(torch.int8)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        x, scales = _divided(x, x.abs().amax(-1) / 127)
        return x.round().clamp(-127, 127).to(torch.int8), scales


@dataclass(frozen=True)
class CacheFp8(_Scaled):
    """e4m3; the largest magnitude of a head is 448, the largest there is."""

    name: ClassVar[str] = "fp8"

    def view(self, data: Tensor) -> Tensor:
        import torch

        return data.view(torch.float8_e4m3fn)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        x, scales = _divided(x, x.abs().amax(-1) / 448)
        return x.clamp(-448, 448).to(torch.float8_e4m3fn), scales


@dataclass(frozen=True)
class CacheInt4(_Scaled):
    """-8 to 7, plus 8; the number of the largest magnitude is -8, so all sixteen values are of use. Byte i holds number
    i, low, and number i + C / 2, high."""

    name: ClassVar[str] = "int4"

    def bytes(self, C: int) -> int:
        if C % 2:
            raise ArgumentError(f"cache_dtype='int4' needs an even head_dim, not {C}; choose 'int8' or 'fp8'")
        return C // 2

    def view(self, data: Tensor) -> Tensor:
        return data

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        import torch

        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
        x, scales = _divided(x, largest / -8)
        low, high = (x.round().clamp(-8, 7) + 8).to(torch.uint8).chunk(2, dim=-1)
        return low | high << 4, scales

    def decode(self, values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
        import torch

        numbers = torch.cat((values & 15, values >> 4), dim=-1).to(torch.int8) - 8
        return super().decode(numbers, scales, dtype)


CacheFormat = Unquantized | CacheInt8 | CacheFp8 | CacheInt4
QUANTIZED: dict[str, CacheFormat] = {format.name: format for format in (CacheFp8(), CacheInt8(), CacheInt4())}


def resolve_format(name: str | torch.dtype | None, dtype: torch.dtype) -> CacheFormat:
    """The format that a user asked for, of the cache of a model that computes in `dtype`.

    Raises:
        Llama4Error: no such format.
    """
    import torch

    if name is None or name in ("auto", dtype):
        return Unquantized(dtype)
    if isinstance(name, torch.dtype) or dtype_name(name) in ("bfloat16", "float16", "float32", "float64"):
        given = name if isinstance(name, torch.dtype) else getattr(torch, dtype_name(name))
        if given.is_floating_point and given.itemsize > 1:
            return Unquantized(given)
    elif name in QUANTIZED:
        return QUANTIZED[name]
    raise ArgumentError(
        f"cache_dtype={name!r} is not known; choose 'auto', 'bfloat16', {', '.join(map(repr, QUANTIZED))}"
    )


def _divided(x: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers over their scales, and the scales, rounded: NaN if one of the numbers is NaN or infinite."""
    import torch

    scales = (scales + (scales - scales)).to(torch.bfloat16)
    scales = torch.where(scales == 0, 1.0, scales)
    return x.float() / scales.float()[..., None], scales
