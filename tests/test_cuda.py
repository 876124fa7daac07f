"""What only a GPU can show: `pytest -m cuda`. Held to the same model on the CPU, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llama4 import Llama4
from llama4.config import Llama4Config
from llama4.kernels.triton import support
from llama4.model.moe import MixtureOfExperts
from llama4.model.multimodal import Llama4Model
from llama4.ops import fp8
from llama4.quantization.fp8 import Fp8
from llama4.quantization.int4 import Int4
from llama4.quantization.int8 import Int8
from llama4.quantization.modules import QuantizedExperts, swap_modules
from llama4.quantization.plan import make_plan
from llama4.quantization.weight import WeightFormat
from tests import small_model
from tests.quantization.test_weight import name_of, packed

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
FORMATS = [Int4(32), Int4(128), Int8(), Fp8()]
SCHEMES = [None, "int4", "int8", "fp8"]
IDS = torch.randint(0, small_model.RANKS, (2, 50), generator=torch.Generator().manual_seed(0))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm()).item()


def config(layers: int = 4) -> Llama4Config:
    """The small model, with sizes that every format holds."""
    small = small_model.config()
    text = replace(small.text, hidden_size=128, intermediate_size=64, head_dim=32)
    text = replace(text, num_hidden_layers=layers, moe_layers=None, layer_types=None, no_rope_layers=None)
    assert small.vision is not None
    vision = replace(small.vision, projector_output_dim=24)
    return replace(small, text=text, vision=vision)


def quantized_model(scheme: str | None, layers: int = 4) -> Llama4Model:
    model = Llama4Model(config(layers)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    if scheme is None:
        return model
    weights = dict(model.named_parameters())
    plan = make_plan(scheme, {name: tuple(weight.shape) for name, weight in weights.items()})
    swap_modules(model, plan)
    for name, format in plan.items():
        experts = weights[name].ndim == 3
        module = model.get_submodule(name.removesuffix(".weight"))
        filled = packed(weights[name].detach().mT if experts else weights[name].detach(), format)
        module.load_state_dict(filled.state_dict(), assign=True)
    return model


def packed_experts(format: WeightFormat, E: int, D: int, F: int, dtype: torch.dtype) -> QuantizedExperts:
    experts = QuantizedExperts()
    generator = torch.Generator().manual_seed(0)
    experts.gate_up_proj = packed((torch.randn(E, 2 * F, D, generator=generator) * D**-0.5).to(dtype), format)
    experts.down_proj = packed((torch.randn(E, D, F, generator=generator) * F**-0.5).to(dtype), format)
    return experts


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_model(scheme: str | None, dtype: torch.dtype) -> None:
    """Prefill and decoding."""
    model = quantized_model(scheme)
    with torch.inference_mode():
        truth = model(IDS)
        model = model.to("cuda", dtype)
        whole = model(IDS.cuda())
        cache = model.new_cache(2)
        steps = [model(ids, cache=cache) for ids in IDS.cuda().split([40, *[1] * 10], dim=1)]
    # float32 differs by the order of its sums, unless rounding the inputs of fp8 differs; bfloat16 sends some tokens
    # to other experts
    bound = 0.15 if dtype == torch.bfloat16 else 1e-2 if scheme == "fp8" else 1e-4
    assert relative(whole, truth) < bound
    assert relative(torch.cat(steps, dim=1), truth) < bound


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_reply(scheme: str | None, tmp_path: Path) -> None:
    small_model.write(tmp_path)
    if scheme == "int4":
        pytest.skip("the small model's rows are too short for it")
    there = Llama4.from_pretrained(tmp_path, device="cuda", dtype="float32", quantization=scheme, progress=False)
    here = Llama4.from_pretrained(tmp_path, device="cpu", dtype="float32", quantization=scheme, progress=False)
    assert there.chat("hi", max_new_tokens=12).usage == here.chat("hi", max_new_tokens=12).usage


@pytest.mark.parametrize("rows", [1, 4, 16, 100, 600])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_experts_of_scouts_size(format: WeightFormat, rows: int) -> None:
    experts = packed_experts(format, 4, 5120, 8192, torch.bfloat16)
    matrices = [(experts.gate_up_proj.dequantize(i).cuda(), experts.down_proj.dequantize(i).cuda()) for i in range(4)]
    experts = experts.cuda()
    x = torch.randn(rows, 5120, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
    for counts in ([0, 0, rows, 0], [rows // 4, rows - 3 * (rows // 4), rows // 4, rows // 4]):
        truth = []
        for part, (gate_up, down) in zip(x.float().split(counts), matrices, strict=True):
            gate, up = (part @ gate_up.float().mT).chunk(2, dim=-1)
            truth.append((nn.functional.silu(gate) * up) @ down.float().mT)
        y = experts(x, torch.tensor(counts, device="cuda"))
        assert relative(y, torch.cat(truth)) < (0.06 if format.kind == "fp8" else 1e-2), "inputs of fp8 are rounded"


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_the_host_does_not_wait(format: WeightFormat, rows: int) -> None:
    layer = MixtureOfExperts(config().text, lambda text: packed_experts(format, 8, 128, 128, torch.bfloat16))  # type: ignore[arg-type]
    layer = layer.cuda().bfloat16()
    x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        truth = layer(x)  # compiles
        with waiting_is_an_error():
            again = layer(x)
    assert torch.equal(again, truth)


@pytest.mark.parametrize("rows", [4, 48])
@pytest.mark.parametrize("format", FORMATS, ids=name_of)
def test_a_launch_is_replayed_for_other_counts(format: WeightFormat, rows: int) -> None:
    """In a CUDA graph: nothing about the counts is in the launch."""
    experts = packed_experts(format, 4, 256, 128, torch.bfloat16).cuda()
    x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    counts = torch.tensor([rows, 0, 0, 0], device="cuda")
    with torch.inference_mode():
        experts(x, counts)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = experts(x, counts)
        for other in ([0, 0, 0, rows], [1, rows - 3, 0, 2]):
            counts.copy_(torch.tensor(other))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, experts(x, counts))


def test_fp8_by_torch_and_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if not fp8.has_fp8_matmul(torch.device("cuda"), grouped=True):
        pytest.skip("torch has no grouped product of e4m3 for this GPU")
    experts = packed_experts(Fp8(), 4, 256, 128, torch.bfloat16).cuda()
    x = torch.randn(100, 256, device="cuda", dtype=torch.bfloat16)
    counts = torch.tensor([50, 0, 9, 41], device="cuda")
    by_torch = experts(x, counts)
    monkeypatch.setattr(fp8, "has_fp8_matmul", lambda device, grouped=False: False)
    assert relative(by_torch, experts(x, counts)) < 1e-2


def test_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own products give the same."""
    experts = packed_experts(Int4(32), 4, 256, 128, torch.bfloat16).cuda()
    x, counts = torch.randn(20, 256, device="cuda").bfloat16(), torch.tensor([10, 0, 3, 7], device="cuda")
    ours = experts(x, counts)
    monkeypatch.setattr(support, "unsupported_reason", lambda device, dtype: "switched off")
    assert relative(ours, experts(x, counts)) < 1e-2
