"""compressed-tensors' schemes, as that package writes them, against transformers with the weights that it dequantizes.

Inputs that a scheme rounds to integers are not rounded here: what is computed is the unrounded model.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama4.weights.checkpoint import open_checkpoint
from tests.parity.references import ReferenceModel, reference_config, reference_model, relative_error
from tests.quantization.test_checkpoints import IDS, loaded, packed

UNQUANTIZED = (".norm.", "norm", "router", "embed", "vision", "multi_modal", "lm_head")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint, as transformers writes it: two layers."""
    directory = tmp_path_factory.mktemp("plain") / "model"
    reference_model(reference_config(head_dim=32, num_hidden_layers=2), 3).bfloat16().save_pretrained(directory)
    return directory


def linears(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint, three Linears in place of each expert."""
    for key, tensor in load_file(directory / "model.safetensors").items():
        path, _, name = key.rpartition(".")
        if ".experts." not in key:
            yield key, tensor
            continue
        halves = ("gate", "up") if name.startswith("gate") else ("down",)
        for i, matrix in enumerate(tensor):
            for half, part in zip(halves, matrix.mT.chunk(len(halves)), strict=True):
                yield f"{path}.{i}.{half}_proj.weight", part.contiguous()


def stacked(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back."""
    whole: dict[str, Tensor] = {}
    experts: dict[str, list[list[Tensor]]] = {}
    for key, tensor in weights.items():
        if ".experts." not in key:
            whole[key] = tensor
            continue
        path, index, matrix = key.removesuffix("_proj.weight").rsplit(".", 2)
        name = f"{path}.{'down' if matrix == 'down' else 'gate_up'}_proj"
        experts.setdefault(name, []).extend([] for _ in range(len(experts.get(name, [])), int(index) + 1))
        experts[name][int(index)].append(tensor)
    return whole | {name: torch.stack([torch.cat(m).mT for m in rows]).contiguous() for name, rows in experts.items()}


def blocks_of(weight: Tensor, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of what shares a scale."""
    args = scheme.weights
    assert args is not None
    if args.strategy == "tensor":
        return weight.amin().view(1), weight.amax().view(1)
    rows, columns = args.block_structure or (1, args.group_size or weight.shape[1])
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def write(
    source: Path,
    target: Path,
    scheme: QuantizationScheme | Callable[[str], QuantizationScheme | None],
    **changes: Any,
) -> dict[str, Tensor]:
    """Quantize with compressed-tensors. Returns the weights that it dequantizes, in float32."""
    written, dense = dict[str, Tensor](), dict[str, Tensor]()
    schemes: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    for name, weight in linears(source):
        one = None if any(part in name for part in UNQUANTIZED) else scheme(name) if callable(scheme) else scheme
        if one is None:
            written[name] = weight
            dense[name] = weight.float()
            continue
        assert one.weights is not None
        format = infer_module_format(torch.nn.Linear, one)
        compressor = BaseCompressor.get_value_from_registry(format.value)
        scale, zeros = calculate_qparams(*blocks_of(weight, one), one.weights)
        parts = {"weight": weight, "weight_scale": scale.bfloat16(), "weight_zero_point": zeros}
        parts = compressor.compress(parts, one)
        module = name.removesuffix(".weight")
        again = parts | {"weight_scale": parts["weight_scale"].float()}
        dense[name] = compressor.decompress(again, one)["weight"].float()
        if one.input_activations is not None and not one.input_activations.dynamic:
            parts["input_scale"] = torch.tensor([0.01]).bfloat16()
        written |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        text = one.model_copy(update={"format": format}).model_dump_json()
        schemes.setdefault(text, (one, []))[1].append(module)
    shutil.copytree(source, target)
    save_file(written, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    groups = {
        f"group_{i}": json.loads(text) | {"targets": ["Linear"] if len(schemes) == 1 else modules}
        for i, (text, (_, modules)) in enumerate(schemes.items())
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": next(iter(groups.values()))["format"] if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["re:.*router", "re:.*lm_head", "re:.*vision_model.*", "re:.*multi_modal_projector.*"],
    } | changes
    (target / "config.json").write_text(json.dumps(config))
    return dense


def preset(name: str, *, inputs: dict[str, Any] | None = None, **changes: Any) -> QuantizationScheme:
    """One of compressed-tensors', with other groups, as the model is small."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    content = scheme.model_dump()
    content["weights"] |= changes
    if inputs is not None:
        content["input_activations"] = (content["input_activations"] or {}) | inputs if inputs else None
    return QuantizationScheme.model_validate(content)


def with_weights(plain: Path, dense: dict[str, Tensor]) -> ReferenceModel:
    model = ReferenceModel.from_pretrained(plain, dtype=torch.float32).eval()
    model.load_state_dict(stacked(dense))
    return model


NATIVE = {
    "W8A8": (preset("W8A8"), "int8"),
    "W8A8 per tensor": (preset("W8A8", strategy="tensor"), "int8"),
    "W4A8": (preset("W4A8", group_size=32), "int4"),
    "W4AFP8": (preset("W4AFP8", group_size=32), "int4"),
    "W4A16": (preset("W4A16", group_size=64), "int4"),
}
DEQUANTIZED = {
    "W8A16": preset("W8A16", group_size=32),
    "W4A16_ASYM": preset("W4A16_ASYM", group_size=32),
    "W4A16 per channel": preset("W4A16", strategy="channel", group_size=None),
    "W4A16 in groups of 16": preset("W4A16", group_size=16),
    "W8A8 with zero points": preset("W8A8", symmetric=False),
    "W8A16_ASYM": preset("W8A16", symmetric=False, group_size=32),
    "FP8 without inputs": preset("FP8_DYNAMIC", inputs={}),
    "FP8_BLOCK without inputs": preset("FP8_BLOCK", block_structure=[48, 32], inputs={}),
    "FP8_BLOCK that does not divide": preset("FP8_BLOCK", block_structure=[24, 24], inputs={"group_size": 24}),
    **{f"W{n}A16": preset(f"W{n}A16", group_size=32) for n in (2, 3, 5, 6, 7)},
}
FP8 = {
    "FP8": preset("FP8"),
    "FP8 per channel, static inputs": preset("FP8", strategy="channel"),
    "FP8_DYNAMIC": preset("FP8_DYNAMIC"),
    "FP8_BLOCK": preset("FP8_BLOCK", block_structure=[32, 32], inputs={"group_size": 32}),
    "FP8_BLOCK whose rows do not divide": preset("FP8_BLOCK", block_structure=[48, 16], inputs={"group_size": 16}),
}


@pytest.mark.parametrize("name", NATIVE)
@torch.inference_mode()
def test_integers_are_multiplied_as_they_are_stored(plain: Path, tmp_path: Path, name: str) -> None:
    scheme, kind = NATIVE[name]
    truth = with_weights(plain, write(plain, tmp_path / "model", scheme))
    ours = loaded(tmp_path / "model")
    assert {module.format.kind for _, module in packed(ours)} == {kind}
    assert relative_error(ours(IDS), truth(IDS).logits) < 1e-5


@pytest.mark.parametrize("name", DEQUANTIZED)
@torch.inference_mode()
def test_what_has_no_kernels_is_dequantized(
    plain: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In float32 exactly; in bf16 each weight is rounded once; and it is said."""
    dense = write(plain, tmp_path / "model", DEQUANTIZED[name])
    with caplog.at_level(logging.WARNING, "llama4"):
        ours = loaded(tmp_path / "model")
    (note,) = (record.getMessage() for record in caplog.records)
    assert "38 matrices are stored in" in note
    assert "dequantized to float32" in note
    assert not packed(ours)
    assert relative_error(ours(IDS), with_weights(plain, dense)(IDS).logits) < 1e-5
    _, source = open_checkpoint(tmp_path / "model")
    rounded = {key: tensor.bfloat16() for key, tensor in stacked(dense).items()}
    assert all(torch.equal(source.read(key), tensor) for key, tensor in rounded.items())


@pytest.mark.parametrize("name", FP8)
@torch.inference_mode()
def test_fp8_is_multiplied_as_it_is_stored(plain: Path, tmp_path: Path, name: str) -> None:
    """The very weights; inputs are rounded to e4m3, with a scale per token or per group, and never clipped."""
    dense = write(plain, tmp_path / "model", FP8[name])
    ours = loaded(tmp_path / "model")
    assert {module.format.kind for _, module in packed(ours)} == {"fp8"}
    for path, module in packed(ours):
        values, scale = module.checkpoint_layout("weight").float(), module.part("weight_scale").float()
        weight = values * scale.repeat_interleave(values.shape[-1] // scale.shape[-1], -1)
        whole = stacked(dense)
        truth = whole[f"{path}.weight"] if weight.ndim == 2 else whole[path].mT
        assert torch.equal(weight, truth)
    got, truth = ours(IDS), with_weights(plain, dense)(IDS).logits
    error = (got - truth).abs().amax(-1) / truth.abs().amax(-1)
    assert error.median() < 0.1, "of tokens: three bits of each input, and a few are sent to other experts"
