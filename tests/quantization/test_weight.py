"""Packed weights against the matrices that they stand for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from llama4.config import TextConfig
from llama4.kernels import loader
from llama4.model.experts import LoopExperts
from llama4.ops import fp8 as ops_fp8
from llama4.quantization import fp8, int4
from llama4.quantization.fp8 import Fp8
from llama4.quantization.int4 import Int4
from llama4.quantization.int8 import Int8
from llama4.quantization.modules import QuantizedExperts, swap_modules
from llama4.quantization.plan import make_plan
from llama4.quantization.schemes import SCHEMES
from llama4.quantization.weight import QuantizedWeight, WeightFormat
from tests.marks import needs_kernels

FORMATS = [Int4(32), Int4(128), Int8(), Fp8()]
BOUNDS = {"int4": 0.11, "int8": 0.008, "fp8": 0.03}
"""Largest relative error of normal weights: a step of 1/7.5 of the largest of a group, of 1/127 of a row; 3 bits of
mantissa."""


def name_of(format: WeightFormat) -> str:
    return f"{format.kind}-{format.group_size}" if format.group_size else format.kind


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def packed(weight: Tensor, format: WeightFormat) -> QuantizedWeight:
    """A module that holds a matrix [O, I], or several."""
    return QuantizedWeight.of(weight, format)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_the_weights_is_that_of_their_bits(format: WeightFormat, dtype: torch.dtype) -> None:
    weight = normal(96, 256).to(dtype)
    error = relative(packed(weight, format).dequantize(), weight)
    assert BOUNDS[format.kind] / 4 < error < BOUNDS[format.kind]


def test_int4_is_closer_than_plain_rounding() -> None:
    """Plain: the largest of a group to the end of the range, as compressed-tensors' own min-max does. For normal
    weights, and for such as have outliers."""
    outliers = normal(128, 256) * (1 + 8 * (torch.rand(128, 256, generator=torch.Generator().manual_seed(1)) > 0.99))
    for weight in (normal(128, 256), outliers):
        groups = weight.unflatten(-1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True) / 7.5
        plain = ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)
        assert relative(packed(weight, Int4(32)).dequantize(), weight) < 0.95 * relative(plain, weight)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_what_is_zero_stays_zero(kind: str) -> None:
    weight = normal(32, 64)
    weight[3] = 0
    weight[:, :32] = 0
    module = packed(weight, {"int4": Int4(32), "int8": Int8(), "fp8": Fp8()}[kind])
    assert torch.equal(module.dequantize()[weight == 0], torch.zeros_like(weight[weight == 0]))
    assert module(torch.zeros(2, 64)).abs().max() == 0


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_a_scale_that_rounds_to_zero(kind: str) -> None:
    weight = torch.full((2, 64), 3e-6, dtype=torch.float16)
    module = packed(weight, {"int4": Int4(32), "int8": Int8(), "fp8": Fp8()}[kind])
    assert (module.dequantize().float() - weight).abs().max() <= 3e-6


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
@pytest.mark.parametrize(
    "way", [*(pytest.param(way, marks=needs_kernels) for way in ("few", "many")), "torch", "scaled_mm"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_is_that_of_the_dequantized_matrix(
    format: WeightFormat, way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel for few tokens, that for many, and without any. Of fp8 with the inputs rounded in the same way."""
    if way in ("torch", "scaled_mm"):
        monkeypatch.setattr(loader, "library", lambda: None)
        monkeypatch.setattr(ops_fp8, "has_fp8_matmul", lambda device, grouped=False: way == "scaled_mm")
        monkeypatch.setattr("llama4.quantization.weight.ROWS", 40)
    module = packed(normal(160, 256).to(dtype), format)
    rows = 5 if way == "few" else 9
    x = normal(2, rows, 256, seed=2).to(dtype)
    truth = x.double()
    if format.kind == "fp8":
        scale = x.float().abs().amax(-1, keepdim=True) / 448
        truth = (x.float() / scale).to(torch.float8_e4m3fn).double() * scale
    truth = truth @ module.dequantize().double().mT
    assert module(x).dtype == dtype
    assert module(x).shape == (2, rows, 160)
    assert relative(module(x), truth) < (1e-6 if dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 2e-3)
    assert module(x[:0]).shape == (0, rows, 160)


def test_every_code_of_e4m3() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 127) != 127]  # the others are NaN
    assert torch.equal(fp8.from_fp8(numbers).float(), numbers.view(torch.float8_e4m3fn).float())


def test_packing_is_that_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = torch.randint(-8, 8, (24, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(int4.pack(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack_from_int32(int4.pack(codes), 4, codes.shape), codes)
    assert torch.equal(int4.unpack(int4.pack(codes)), codes)


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_casts_and_copies_keep_the_bits(format: WeightFormat) -> None:
    module = packed(normal(64, 128).bfloat16(), format)
    before = {part: module.checkpoint_layout(part).clone() for part in module.specs}
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).float().half().to("cpu")]
    for other in copies:
        for part, values in before.items():
            assert other.checkpoint_layout(part).dtype == values.dtype
            assert torch.equal(other.checkpoint_layout(part).view(torch.uint8), values.view(torch.uint8))
        x = normal(3, 128, seed=4)
        assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_parts_move_with_their_module(format: WeightFormat) -> None:
    module = packed(normal(2, 64, 128).bfloat16(), format).to("meta")
    for part, (shape, dtype) in format.part_specs((2, 64, 128)).items():
        assert module.checkpoint_layout(part).shape == shape
        assert module.checkpoint_layout(part).dtype == dtype
        assert module.checkpoint_layout(part).device.type == "meta"


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_a_state_dict_comes_back(format: WeightFormat, dtype: torch.dtype, assign: bool) -> None:
    """Scales in float16 become float32, and e4m3 lies in memory as bytes: neither is a state dict's."""
    module, x = packed(normal(64, 128).to(dtype), format), normal(3, 128, seed=4)
    other = packed(normal(64, 128, seed=1), format)
    other.load_state_dict(module.state_dict(), assign=assign)
    assert torch.equal(other(x), module(x))
    dtypes = [parameter.dtype for parameter in module.parameters()]
    assert not assign or [parameter.dtype for parameter in other.parameters()] == dtypes
    again = packed(normal(64, 128, seed=2).to(dtype), format)
    again.load_state_dict(module.state_dict(), assign=assign)
    for part in module.specs:
        found, wanted = again.checkpoint_layout(part), module.checkpoint_layout(part)
        assert found.dtype == wanted.dtype and torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@needs_kernels
@pytest.mark.parametrize(
    ("group", "shape"),
    [(32, (64, 256)), (32, (64, 576)), (32, (3, 48, 256)), (128, (64, 256)), (128, (3, 48, 256))],
    ids=str,
)
def test_the_order_of_the_kernels_stays_inside(group: int, shape: tuple[int, ...]) -> None:
    """A checkpoint, a state dict and another device get four bits as they are stored. Rows are whole groups."""
    format = Int4(group)
    weight, x, expert = normal(*shape).bfloat16(), normal(3, shape[-1], seed=4), 1 if len(shape) == 3 else None
    module = packed(weight, format)
    assert module.in_kernel_layout
    matrices = [format.quantize(matrix) for matrix in weight.view(-1, *shape[-2:])]
    stored = {part: torch.stack([matrix[part] for matrix in matrices]) for part in module.specs}
    stored = {part: values.view_as(module.checkpoint_layout(part)) for part, values in stored.items()}
    for part, values in stored.items():
        assert torch.equal(module.checkpoint_layout(part), values)
        assert torch.equal(module.state_dict()[part], values)
        assert not torch.equal(getattr(module, part), values)
    other = packed(torch.zeros_like(weight), format)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.product(x, expert), module.product(x, expert))
    assert not copy.deepcopy(module).to("meta").get_parameter("weight_packed").is_cpu
    as_it_was, matrix = module.product(x, expert), module.dequantize(expert)
    module.change_layout(torch.device("meta"))
    assert all(torch.equal(getattr(module, part), values) for part, values in stored.items())
    assert torch.equal(module.dequantize(expert), matrix)
    assert relative(module.product(x, expert), as_it_was) < 1e-6


def test_outputs_that_are_not_sixteens() -> None:
    module, x = packed(normal(40, 128), Int4(32)), normal(3, 128, seed=4)
    assert relative(module(x), x.double() @ module.dequantize().double().mT) < 1e-6
    assert module.matrix() is None


@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_a_matrix_is_quantized_a_few_rows_at_a_time(format: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = format.quantize(normal(112, 128))
    monkeypatch.setattr("llama4.quantization.weight.MAX_QUANTIZED_AT_ONCE", 32 * 128)
    for part, values in format.quantize(normal(112, 128)).items():
        assert torch.equal(values.view(torch.uint8), whole[part].view(torch.uint8))


@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_experts_are_those_of_the_dequantized_matrices(
    format: WeightFormat, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wide are computed in one call, if there is a compiler."""
    plain = LoopExperts(TextConfig(hidden_size=width, intermediate_size=width, num_local_experts=5))
    experts = QuantizedExperts()
    experts.gate_up_proj = packed(normal(5, 2 * width, width), format)
    experts.down_proj = packed(normal(5, width, width, seed=5), format)
    for name in ("gate_up_proj", "down_proj"):
        matrices = [getattr(experts, name).dequantize(i).mT for i in range(5)]
        setattr(plain, name, nn.Parameter(torch.stack(matrices)))
    for counts_E in ([2, 0, 4, 0, 1], [0, 30, 11, 0, 70]):
        x, counts = normal(sum(counts_E), width, seed=6), torch.tensor(counts_E)
        truth = plain(x, counts)
        with monkeypatch.context() as patch:
            if width == 512 and loader.library() is not None:
                patch.delattr("llama4.ops.experts.loop_over_experts")
            ours = experts(x, counts)
        assert relative(ours, truth) < (0.06 if format.kind == "fp8" else 1e-5)
    assert experts(x[:0], torch.zeros(5, dtype=torch.int64)).shape == (0, width)


def test_an_expert_that_no_token_chose_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = QuantizedExperts()
    experts.gate_up_proj = packed(normal(4, 64, 32), Int4(32))
    experts.down_proj = packed(normal(4, 32, 32), Int4(32))
    used = []
    product = QuantizedWeight.product

    def watched(self: QuantizedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        used.append(expert)
        return product(self, x_NI, expert)

    monkeypatch.setattr(QuantizedWeight, "product", watched)
    experts(normal(5, 32), torch.tensor([0, 4, 0, 1]))
    assert used == [1, 1, 3, 3]


SHAPES = {
    "language_model.model.embed_tokens.weight": (512, 256),
    "language_model.lm_head.weight": (512, 256),
    "language_model.model.layers.0.self_attn.q_proj.weight": (256, 256),
    "language_model.model.layers.0.self_attn.o_proj.weight": (256, 256),
    "language_model.model.layers.0.input_layernorm.weight": (256,),
    "language_model.model.layers.0.feed_forward.gate_proj.weight": (512, 256),
    "language_model.model.layers.1.feed_forward.router.weight": (4, 256),
    "language_model.model.layers.1.feed_forward.experts.gate_up_proj": (4, 256, 512),
    "language_model.model.layers.1.feed_forward.experts.down_proj": (4, 256, 256),
    "language_model.model.layers.1.feed_forward.shared_expert.up_proj.weight": (256, 256),
    "language_model.model.layers.2.feed_forward.experts.gate_up_proj": (4, 256, 512),
    "vision_model.model.layers.0.mlp.fc1.weight": (256, 256),
    "multi_modal_projector.linear_1.weight": (256, 256),
}


def short(plan: dict[str, WeightFormat]) -> set[str]:
    return {name.removeprefix("language_model.").removeprefix("model.layers.").removesuffix(".weight") for name in plan}


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
def test_which_weights_a_scheme_takes(scheme: str) -> None:
    every = {
        "0.self_attn.q_proj",
        "0.self_attn.o_proj",
        "0.feed_forward.gate_proj",
        "1.feed_forward.experts.gate_up_proj",
        "1.feed_forward.experts.down_proj",
        "1.feed_forward.shared_expert.up_proj",
        "2.feed_forward.experts.gate_up_proj",
    }
    assert short(make_plan(scheme, SHAPES)) == every
    assert short(make_plan(scheme, SHAPES, head=True)) == every | {"lm_head"}
    assert set(make_plan(scheme, SHAPES).values()) == {{"int4": Int4(128), "int8": Int8(), "fp8": Fp8()}[scheme]}


def test_metas_mixes() -> None:
    experts = {f"1.feed_forward.experts.{name}_proj" for name in ("gate_up", "down")}
    last = "2.feed_forward.experts.gate_up_proj"
    shared = "1.feed_forward.shared_expert.up_proj"
    assert short(make_plan("int4_mixed", SHAPES)) == experts | {last, shared}
    assert short(make_plan("fp8_mixed", SHAPES)) == experts, "not in the first and the last layer"


def test_a_plan_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"quantization='int3' is not known; choose one of int4, int8"):
        make_plan("int3", SHAPES)
    odd = {"language_model.model.layers.0.self_attn.q_proj.weight": (64, 48)}
    with pytest.raises(ValueError, match=r"q_proj.weight has 48 inputs and 64 outputs; int4 takes multiples of 32"):
        make_plan("int4", odd)
    with pytest.raises(ValueError, match=r"'fp8_mixed' is for experts, of which this model has none"):
        make_plan("fp8_mixed", odd)
    assert make_plan("int4", {next(iter(odd)): (64, 160)}) == {next(iter(odd)): Int4(32)}
    assert set(SCHEMES) == {"int4", "int8", "fp8", "int4_mixed", "fp8_mixed"}


def test_experts_are_packed_whole_or_not_at_all() -> None:
    model = nn.Module()
    model.experts = LoopExperts(TextConfig(hidden_size=64, intermediate_size=64, num_local_experts=2))
    with pytest.raises(ValueError, match=r"experts.gate_up_proj is quantized and experts.down_proj is not"):
        swap_modules(model, {"experts.gate_up_proj": Int8()})
