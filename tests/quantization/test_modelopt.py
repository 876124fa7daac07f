"""Checkpoints of ModelOpt, and of MXFP4 as transformers writes it: names and layouts are those that their writers give,
numbers are computed here in float64, and logits are transformers' with those numbers for weights."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from llama4.analysis.info import describe_quantization, find
from llama4.api import Llama4
from llama4.errors import CheckpointError
from llama4.weights.convert import convert
from tests.parity.references import ReferenceModel, reference_config, reference_model, relative_error
from tests.quantization.test_checkpoints import IDS, loaded, packed, same

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
QUANTIZED = ("experts.", "shared_expert.", "self_attn.")

Parts = dict[str, Tensor]
"""What stands behind a weight's name, "" for the weight itself -> tensor."""
Scheme = Callable[[Tensor], tuple[Parts, Tensor]]
"""Matrices [..., O, I] -> their tensors, and what these stand for, in float64."""


def e2m1(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest values: their codes, packed, and the numbers that they stand for."""
    codes = torch.bucketize(numbers.abs().contiguous(), (E2M1[1:] + E2M1[:-1]) / 2)
    rounded = E2M1[codes] * numbers.sign()
    codes = (codes + 8 * (numbers < 0)).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, rounded


def nvfp4(weight: Tensor) -> tuple[Parts, Tensor]:
    groups = weight.double().unflatten(-1, (-1, 16))
    second = (weight.double().abs().max() / (6 * 448)).float()
    scale = (groups.abs().amax(-1, keepdim=True) / 6 / second).float().to(torch.float8_e4m3fn)
    scales = scale.double() * second.double()
    codes, numbers = e2m1(groups / scales)
    return {"": codes.flatten(-2), "weight_scale": scale.squeeze(-1), "weight_scale_2": second}, numbers * scales


def fp8(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = (weight.double().abs().max() / 448).float()
    values = (weight.double() / scale).float().to(torch.float8_e4m3fn)
    return {"": values, "weight_scale": scale}, values.double() * scale.double()


def fp8_per_output(weight: Tensor) -> tuple[Parts, Tensor]:
    scale = (weight.double().abs().amax(-1) / 448).float()
    values = (weight.double() / scale[..., None]).float().to(torch.float8_e4m3fn)
    return {"": values, "weight_scale": scale}, values.double() * scale[..., None].double()


def mxfp4(weight: Tensor) -> tuple[Parts, Tensor]:
    groups = weight.double().unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    codes, numbers = e2m1(groups / 2**exponent)
    return {"_blocks": codes, "_scales": (exponent + 127).squeeze(-1).to(torch.uint8)}, numbers * 2**exponent


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "model"
    reference_model(reference_config(head_dim=32), 3).bfloat16().save_pretrained(directory)
    return directory


def write(plain: Path, target: Path, scheme: Scheme) -> dict[str, Tensor]:
    """A checkpoint as the scheme's writer gives it; returns the weights that it stands for."""
    shutil.copytree(plain, target)
    written, truth = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in load_file(plain / "model.safetensors").items():
        truth[key] = tensor.float()
        if not any(part in key for part in QUANTIZED) or "vision" in key:
            written[key] = tensor
            continue
        is_stack, module = tensor.ndim == 3, key.removesuffix(".weight")
        parts, numbers = scheme(tensor.mT if is_stack else tensor)
        numbers = numbers.flatten(-2) if numbers.ndim > tensor.ndim else numbers
        truth[key] = (numbers.mT if is_stack else numbers).float()
        for part, value in parts.items():
            if part.startswith("_"):
                name = f"{key}{part}"
            elif part == "":
                name = key
            else:
                name = f"{module}{'_' if is_stack else '.'}{part}"
            is_turned = is_stack and value.ndim == 3 and not part.startswith("_")
            written[name] = (value.mT if is_turned else value).contiguous()
        if "" in parts:
            written[f"{module}{'_' if is_stack else '.'}input_scale"] = torch.tensor(0.01)
        for name in "kv":
            if f"{name}_proj" in key and "" in parts:
                written[f"{module}.{name}_scale"] = torch.tensor(1.0)
    save_file(written, target / "model.safetensors", metadata={"format": "pt"})
    return truth


def describe(directory: Path, content: dict[str, Any]) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": content}))
    return directory


def in_second_file(directory: Path, content: dict[str, Any]) -> Path:
    content = {"producer": {"name": "modelopt", "version": "0.33"}, "quantization": content}
    (directory / "hf_quant_config.json").write_text(json.dumps(content))
    return directory


def theirs(plain: Path, truth: dict[str, Tensor]) -> ReferenceModel:
    model = ReferenceModel.from_pretrained(plain, dtype=torch.float32).eval()
    model.load_state_dict({name: truth[name] for name in model.state_dict()})
    return model


def round_inputs(model: ReferenceModel) -> None:
    """To e4m3, with a scale per token, wherever weights are quantized."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 448
        scale[scale == 0] = 1
        return (x / scale).to(torch.float8_e4m3fn).float() * scale

    def experts_forward(module: Any, x: Tensor) -> Tensor:
        x = rounded(x).view(module.gate_up_proj.shape[0], -1, module.hidden_size)
        gate, up = (x @ module.gate_up_proj).chunk(2, dim=-1)
        return (rounded(up * module.act_fn(gate)) @ module.down_proj).view(-1, module.hidden_size)

    for name, module in model.named_modules():
        if isinstance(module, Llama4TextExperts):
            module.forward = partial(experts_forward, module)  # type: ignore[method-assign]
        elif isinstance(module, torch.nn.Linear) and "language_model" in name and any(p in name for p in QUANTIZED):
            module.register_forward_pre_hook(lambda _, inputs: rounded(inputs[0]))


@pytest.mark.parametrize("second_file", [False, True], ids=["config.json", "hf_quant_config.json"])
@torch.inference_mode()
def test_nvfp4(plain: Path, tmp_path: Path, second_file: bool) -> None:
    truth = write(plain, tmp_path / "model", nvfp4)
    excluded = ["lm_head", "*router*", "vision_model*"]
    if second_file:
        in_second_file(tmp_path / "model", {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": excluded})
    else:
        describe(tmp_path / "model", {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": excluded})
    ours = loaded(tmp_path / "model")
    assert {module.format.kind for _, module in packed(ours)} == {"nvfp4"}
    assert len(packed(ours)) == 4 * (4 + 3 + 2)
    assert relative_error(ours(IDS), theirs(plain, truth)(IDS).logits) < 1e-5
    facts = describe_quantization(find(str(tmp_path / "model")))
    assert facts is not None
    assert facts["quant_method"] == "modelopt"
    assert facts["formats"] == ["nvfp4, a scale per 16 weights"]
    assert 4.5 <= facts["bits_per_weight"] < 5.2  # rows of 64 weights have 32 bits more each


@torch.inference_mode()
def test_experts_that_are_three_linears_each(plain: Path, tmp_path: Path) -> None:
    """As ModelOpt writes those of models that it has no stacks for; each matrix with its own second scale."""
    truth = write(plain, tmp_path / "model", nvfp4)
    path, written = tmp_path / "model" / "model.safetensors", dict[str, Tensor]()
    for key, tensor in load_file(path).items():
        match = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj(_(?P<part>\w+))?", key)
        if match is None:
            written[key] = tensor
            continue
        halves = ("gate", "up") if match[2] == "gate_up" else ("down",)
        for i in range(4):
            for k, half in enumerate(halves):
                value = tensor[i].mT.chunk(len(halves))[k].contiguous() if tensor.ndim == 3 else tensor.clone()
                if match["part"] == "weight_scale_2" and half == "up":
                    value *= 2
                written[f"{match[1]}.{i}.{half}_proj.{match['part'] or 'weight'}"] = value
    save_file(written, path, metadata={"format": "pt"})
    in_second_file(tmp_path / "model", {"quant_algo": "NVFP4"})
    for name in truth:
        if name.endswith("gate_up_proj"):
            truth[name] = torch.cat([truth[name][..., :128], 2 * truth[name][..., 128:]], dim=-1)
    assert relative_error(loaded(tmp_path / "model")(IDS), theirs(plain, truth)(IDS).logits) < 1e-5


@pytest.mark.parametrize("scheme", [fp8, fp8_per_output], ids=["per tensor", "per output"])
@torch.inference_mode()
def test_fp8(plain: Path, tmp_path: Path, scheme: Scheme) -> None:
    """Under the names of NVIDIA's files, in which the decoder has no prefix and the vision tower has its own."""
    truth = write(plain, tmp_path / "model", scheme)
    path = tmp_path / "model" / "model.safetensors"
    save_file({k.removeprefix("language_model."): v for k, v in load_file(path).items()}, path)
    in_second_file(tmp_path / "model", {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"})
    ours = loaded(tmp_path / "model")
    assert {module.format.kind for _, module in packed(ours)} == {"fp8"}
    for name, module in packed(ours):
        weight = truth[name].mT if ".experts." in name else truth[f"{name}.weight"]
        assert torch.equal(module.dequantize(), weight)
    other = theirs(plain, truth)
    round_inputs(other)
    wanted = other(IDS).logits
    assert (ours(IDS) - wanted).norm() < 0.02 * wanted.norm()  # a sum in another order may round an input otherwise


@torch.inference_mode()
def test_mxfp4_of_transformers(plain: Path, tmp_path: Path) -> None:
    truth = write(plain, tmp_path / "model", mxfp4)
    describe(tmp_path / "model", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    ours = loaded(tmp_path / "model")
    assert {module.format.kind for _, module in packed(ours)} == {"mxfp4"}
    assert relative_error(ours(IDS), theirs(plain, truth)(IDS).logits) < 1e-5


@pytest.mark.parametrize("scheme", [nvfp4, mxfp4], ids=["nvfp4", "mxfp4"])
@torch.inference_mode()
def test_four_bits_are_saved_as_compressed_tensors_has_them(plain: Path, tmp_path: Path, scheme: Scheme) -> None:
    """By a model and by the converter, the same files; transformers reads them as compressed-tensors'."""
    truth = write(plain, tmp_path / "model", scheme)
    method = {"quant_method": "modelopt", "quant_algo": "NVFP4"} if scheme is nvfp4 else {"quant_method": "mxfp4"}
    describe(tmp_path / "model", method)
    Llama4(loaded(tmp_path / "model", dtype="bfloat16"), None).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "model", tmp_path / "converted", "hf", progress=False)
    assert same(tmp_path / "saved", tmp_path / "converted")
    keys = load_file(tmp_path / "saved" / "model.safetensors")
    parts = {"weight_packed", "weight_scale"} | ({"weight_global_scale"} if scheme is nvfp4 else set())
    assert {key.rpartition(".")[2] for key in keys if "experts.0" in key} == parts
    wanted = theirs(plain, truth)(IDS).logits
    assert relative_error(loaded(tmp_path / "saved")(IDS), wanted) < 1e-5
    other = ReferenceModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval()
    assert sum(getattr(m, "quantization_scheme", None) is not None for m in other.modules()) == 4 * (4 + 3 + 3 * 4)
    assert (other(IDS).logits - wanted).norm() < 0.04 * wanted.norm()  # in bfloat16


@torch.inference_mode()
def test_unquantized_with_a_quantized_cache(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What it says is of the cache alone: the weights are as they are."""
    shutil.copytree(plain, tmp_path / "model")
    content = load_file(plain / "model.safetensors")
    content |= {k.replace("weight", "k_scale"): torch.tensor(1.0) for k in content if k.endswith("k_proj.weight")}
    content = {k: v for k, v in content.items() if not k.startswith("vision") or not k.endswith("k_scale")}
    save_file(content, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    in_second_file(tmp_path / "model", {"quant_algo": None, "kv_cache_quant_algo": "FP8"})
    with caplog.at_level(logging.WARNING, "llama4"):
        ours = loaded(tmp_path / "model")
    (note,) = (record.getMessage() for record in caplog.records)
    assert "4 tensors are left out: scales for a quantized cache" in note
    assert torch.equal(ours(IDS), loaded(plain)(IDS))
    assert not packed(ours)


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "NVFP4_SVD", "MIXED_PRECISION"])
def test_other_algorithms_are_refused_by_name(plain: Path, tmp_path: Path, algorithm: str) -> None:
    """Before anything is read: there are no weights."""
    shutil.copytree(plain, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    content: dict[str, Any] = {"quant_algo": algorithm}
    if algorithm == "MIXED_PRECISION":
        content["quantized_layers"] = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "INT8_SQ"}}
    in_second_file(tmp_path / "model", content)
    named = "INT8_SQ" if algorithm == "MIXED_PRECISION" else algorithm
    with pytest.raises(CheckpointError, match=rf"quantized by ModelOpt as {named} \(quant_algo in .*; take one in FP8"):
        Llama4.from_pretrained(tmp_path / "model")


def test_scales_must_be_there_and_fit(plain: Path, tmp_path: Path) -> None:
    write(plain, tmp_path / "model", nvfp4)
    in_second_file(tmp_path / "model", {"quant_algo": "NVFP4"})
    path = tmp_path / "model" / "model.safetensors"
    content, scale = load_file(path), "language_model.model.layers.1.feed_forward.experts.down_proj_weight_scale"
    for key, replacement in ((scale, content[scale][:, :-1]), (f"{scale}_2", torch.ones(3))):
        save_file(content | {key: replacement.contiguous()}, path)
        with pytest.raises(CheckpointError, match=rf"wrong shape: {key} is"):
            loaded(tmp_path / "model")
    del content[scale]
    save_file(content, path)
    with pytest.raises(CheckpointError, match=rf"a scale is missing; fetch it again\n  missing: {scale}"):
        loaded(tmp_path / "model")
