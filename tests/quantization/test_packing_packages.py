"""GPTQ and AWQ against the packages that write such files: what they pack is read, and stands for the very numbers that
they dequantize.

These packages pin other versions of the rest, or break PEFT, so they are in no extra. Where one is installed, in an
environment of its own, its tests run. Only their modules that pack are imported, not the packages around these.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llama4.quantization.weight import QuantizedWeight
from tests.parity.references import relative_error
from tests.quantization.test_checkpoints import IDS, loaded
from tests.quantization.test_modelopt import describe

GROUP = 32
Packed = tuple[dict[str, Tensor], Tensor]
"""The tensors of a Linear, and the weights that its package makes of them, [O, I] in float16."""


def module_of(name: str, *bare: str) -> Any:
    """A module of a package that may not be installed. What packages in `bare` import themselves is left out."""
    package = name.partition(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    for path in bare:
        if path not in sys.modules:
            found = importlib.util.find_spec(path)
            assert found is not None and found.submodule_search_locations is not None
            sys.modules[path] = empty = types.ModuleType(path)
            empty.__path__ = [*found.submodule_search_locations]
    return importlib.import_module(name)


def group_of_inputs(weight: Tensor, act_order: bool) -> Tensor:
    """[I], int32: runs, or as in the order of activations."""
    inputs = weight.shape[1]
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(3)) if act_order else torch.arange(inputs)
    return (order // GROUP).int()


def ranges(weight: Tensor, group_of: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points [O, G]."""
    groups, top = weight[:, group_of.argsort()].unflatten(1, (-1, GROUP)), 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        return (2 * groups.abs().amax(-1) / top).half().float(), torch.full_like(low, 2 ** (bits - 1))
    scale = ((high - low) / top).half().float()
    return scale, (-low / scale).round().clamp(1, top)


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear


def rounded(weight: Tensor, group_of: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Numbers that the packages can store: they do not clip."""
    scale, zero = scale[:, group_of], zero[:, group_of]
    return (((weight / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


def auto_gptq(weight: Tensor, bits: int, symmetric: bool, act_order: bool) -> Packed:
    module = module_of("auto_gptq.nn_modules.qlinear.qlinear_cuda", "auto_gptq", "auto_gptq.nn_modules")
    group_of = group_of_inputs(weight, act_order)
    scale, zero = ranges(weight, group_of, bits, symmetric)
    packer = module.QuantLinear(bits, GROUP, weight.shape[1], weight.shape[0], False, weight_dtype=torch.float16)
    linear = linear_of(rounded(weight, group_of, scale, zero, bits))
    packer.pack(linear, scale, zero.clone(), group_of)
    packer.scales = packer.scales.half()
    theirs = packer(torch.eye(weight.shape[1]).half()).mT
    return {name: getattr(packer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}, theirs


def gptqmodel(weight: Tensor, bits: int, symmetric: bool, act_order: bool) -> Packed:
    module = module_of("gptqmodel.nn_modules.qlinear.torch")
    group_of = group_of_inputs(weight, act_order)
    scale, zero = ranges(weight, group_of, bits, symmetric)
    packer = module.TorchLinear(bits, GROUP, symmetric, act_order, weight.shape[1], weight.shape[0])
    linear = linear_of(rounded(weight, group_of, scale, zero, bits))
    packer.pack(linear, scale, zero, group_of)
    packer.eval().post_init()
    theirs = packer.dequantize_weight().mT
    return {name: getattr(packer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}, theirs


def autoawq(weight: Tensor, bits: int, symmetric: bool, act_order: bool) -> Packed:
    module = module_of("awq.modules.linear.gemm", "awq")
    group_of = group_of_inputs(weight, act_order)
    scale, zero = ranges(weight, group_of, bits, symmetric)
    linear = linear_of(rounded(weight, group_of, scale, zero, bits))
    device, module.get_best_device = module.get_best_device, lambda: "cpu"
    try:
        packer = module.WQLinear_GEMM.from_linear(
            linear, bits, GROUP, scales=scale.mT.contiguous(), zeros=zero.mT.contiguous()
        )
    finally:
        module.get_best_device = device
    theirs = module.dequantize_gemm(packer.qweight, packer.qzeros, packer.scales, bits, GROUP).mT
    return {name: getattr(packer, name) for name in ("qweight", "qzeros", "scales")}, theirs


GPTQ: dict[str, Any] = {"quant_method": "gptq", "group_size": GROUP}
PACKERS: dict[str, tuple[Callable[[Tensor, int, bool, bool], Packed], dict[str, Any]]] = {
    "auto-gptq": (auto_gptq, {**GPTQ, "checkpoint_format": "gptq"}),
    "gptqmodel": (gptqmodel, {**GPTQ, "checkpoint_format": "gptq_v2"}),
    "autoawq": (autoawq, {"quant_method": "awq", "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}
CASES = [
    *itertools.product(["auto-gptq", "gptqmodel"], [2, 3, 4, 8], [True, False], [False, True]),
    ("autoawq", 4, False, False),
]


@pytest.mark.parametrize(("package", "bits", "symmetric", "act_order"), CASES)
@torch.inference_mode()
def test_their_numbers(tmp_path: Path, package: str, bits: int, symmetric: bool, act_order: bool) -> None:
    """Weight by weight as they round them, to float16; and in logits."""
    packer, config = PACKERS[package]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1))
    model.eval().save_pretrained(tmp_path)
    written, truth = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in load_file(tmp_path / "model.safetensors").items():
        written[key] = tensor
        if key.endswith("_proj.weight"):
            parts, truth[key] = packer(written.pop(key), bits, symmetric, act_order)
            written |= {f"{key.removesuffix('.weight')}.{name}": part.contiguous() for name, part in parts.items()}
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    gptq_alone = {} if package == "autoawq" else {"sym": symmetric, "desc_act": act_order}
    describe(tmp_path, {**config, "bits": bits, **gptq_alone})
    ours = loaded(tmp_path)
    for path in ("mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj"):
        module = ours.get_submodule(f"language_model.model.layers.0.{path.replace('mlp', 'feed_forward')}")
        weight = module.dequantize() if isinstance(module, QuantizedWeight) else module.get_parameter("weight")
        assert torch.equal(weight.half(), truth[f"model.layers.0.{path}.weight"].half()), path
    model.load_state_dict(model.state_dict() | {key: tensor.float() for key, tensor in truth.items()})
    assert relative_error(ours(IDS), model(IDS).logits) < 2e-3, "theirs are rounded to float16"
