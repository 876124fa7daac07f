"""NVFP4 and MXFP4: every value and every scale, against arithmetic, compressed-tensors and transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama4.quantization.fp4 import Fp4, Mxfp4, Nvfp4
from llama4.quantization.weight import QuantizedWeight

POSITIVE = [0, 0.5, *((1 + mantissa / 2) * 2**exponent for exponent in range(3) for mantissa in range(2))]
"""One sign, two bits of exponent with bias 1, one of mantissa."""
FORMATS = (Mxfp4(), Nvfp4())


def e8m0(scale: Tensor) -> Tensor:
    return 2.0 ** (scale.double() - 127)


def truth(parts: dict[str, Tensor]) -> Tensor:
    """The matrix, in float64."""
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    values = torch.tensor([*POSITIVE, *(-value for value in POSITIVE)], dtype=torch.float64)
    numbers = torch.stack([values[(packed & 15).long()], values[(packed >> 4).long()]], dim=-1).flatten(-2)
    scales = e8m0(scale) if scale.dtype == torch.uint8 else scale.double()
    matrix = numbers * scales.repeat_interleave(numbers.shape[-1] // scale.shape[-1], dim=-1)
    return matrix / parts["weight_global_scale"].double() if "weight_global_scale" in parts else matrix


def random_parts(format: Fp4, *shape: int, seed: int = 0) -> dict[str, Tensor]:
    """Every byte, and scales of all sizes that checkpoints have."""
    generator = torch.Generator().manual_seed(seed)
    *rows, inputs = shape
    groups = (*rows, inputs // format.group_size)
    parts = {"weight_packed": torch.randint(0, 256, (*rows, inputs // 2), dtype=torch.uint8, generator=generator)}
    if isinstance(format, Mxfp4):
        parts["weight_scale"] = torch.randint(110, 130, groups, dtype=torch.uint8, generator=generator)
    else:
        scales = torch.randint(0, 0x7F, groups, dtype=torch.uint8, generator=generator)
        parts["weight_scale"] = scales.view(torch.float8_e4m3fn)
        parts["weight_global_scale"] = 1e4 * (1 + torch.rand(*rows, 1, generator=generator))
    return parts


def weight_of(format: Fp4, parts: dict[str, Tensor], *shape: int) -> QuantizedWeight:
    with torch.device("meta"):
        weight = QuantizedWeight(format, shape)
    weight.set_parts(parts)
    return weight


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.kind)
def test_dequantized_is_what_the_bytes_say(format: Fp4) -> None:
    parts = random_parts(format, 3, 48, 64)
    weight = weight_of(format, parts, 3, 48, 64)
    exact = truth(parts)
    for expert in range(3):
        found = weight.dequantize(expert).double()
        assert (found - exact[expert]).abs().max() <= exact.abs().max() * (0 if isinstance(format, Mxfp4) else 1e-7)


def test_every_scale() -> None:
    """All bytes of e8m0, and all of e4m3 that are numbers, with the largest and the smallest weight."""
    packed = torch.tensor([[0x71] + [0] * 15], dtype=torch.uint8).expand(256, 16)
    parts = {"weight_packed": packed, "weight_scale": torch.arange(256).to(torch.uint8)[:, None]}
    matrix = weight_of(Mxfp4(), parts, 256, 32).dequantize().double()
    scales = 2.0 ** torch.arange(-127.0, 125.0, dtype=torch.float64)  # six times the next is too large for bfloat16
    assert torch.equal(matrix[:252, :2], scales[:, None] * torch.tensor([0.5, 6.0], dtype=torch.float64))
    assert matrix[255].isnan().all()
    bytes_, packed = torch.arange(0x7F).to(torch.uint8)[:, None], packed[:0x7F, :8]
    parts = {
        "weight_packed": packed,
        "weight_scale": bytes_.view(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(0x7F, 1),
    }
    matrix = weight_of(Nvfp4(), parts, 0x7F, 16).dequantize().double()
    assert torch.equal(matrix[:, :2], parts["weight_scale"].double() * torch.tensor([0.5, 6.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.kind)
def test_products(format: Fp4, dtype: torch.dtype) -> None:
    """No weight is rounded: what differs is the sum, in the dtype of the inputs."""
    shape = (2, 1040, 64)  # more rows than are dequantized at a time
    parts = random_parts(format, *shape)
    weight, exact = weight_of(format, parts, *shape), truth(parts)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    for expert in range(2):
        wanted = x.double() @ exact[expert].mT
        found = weight.product(x, expert)
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() < tolerance * wanted.norm()
    assert weight.product(x[:0], 0).shape == (0, 1040)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.kind)
def test_as_compressed_tensors_reads_it(format: Fp4) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    described = format.to_compressed()
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**described["weights"]))
    parts = random_parts(format, 24, 64)
    if "weight_global_scale" in parts:
        parts["weight_global_scale"] = parts["weight_global_scale"][:1].expand(24, 1)
    given = {name: value[:1, 0] if name == "weight_global_scale" else value for name, value in parts.items()}
    assert format.compressed_name is not None
    theirs = BaseCompressor.get_value_from_registry(format.compressed_name).decompress(given, scheme)["weight"]
    ours = weight_of(format, parts, 24, 64).dequantize()
    assert (theirs.float() - ours.float()).norm() < 3e-3 * ours.float().norm()  # theirs is rounded to bfloat16
    assert type(format).from_compressed(described["weights"], None) == format


def test_as_transformers_reads_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts = random_parts(Mxfp4(), 2, 24, 64)
    blocks = parts["weight_packed"].view(2, 24, 2, 16)
    theirs = convert_moe_packed_tensors(blocks, parts["weight_scale"], dtype=torch.float32)  # in x out
    weight = weight_of(Mxfp4(), parts, 2, 24, 64)
    for expert in range(2):
        assert torch.equal(theirs[expert].mT, weight.dequantize(expert).float())


def test_groups_must_fill_the_rows() -> None:
    with pytest.raises(ValueError, match=r"its groups of 32 do not fill its 48 inputs"):
        QuantizedWeight(Mxfp4(), (16, 48))
