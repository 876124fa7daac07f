"""compressed-tensors' schemes, as that package writes them, against transformers with the weights that it dequantizes.

Inputs that a scheme rounds to integers are not rounded here: what is computed is the unrounded model.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.quantization_config import CompressedTensorsConfig

from llama4.api import Llama4
from llama4.cli.main import main
from llama4.config import Llama4Config
from llama4.errors import CheckpointError
from llama4.weights import memory
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.compressed import _Targets, read_groups
from llama4.weights.convert import convert, quantize
from llama4.weights.stored import StoredFormat
from tests.parity.references import PATCH, ReferenceModel, reference_config, reference_model, relative_error
from tests.quantization.test_checkpoints import IDS, loaded, packed

SHARED = "language_model.model.layers.0.feed_forward.shared_expert.up_proj"
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


def median_error(ours: Tensor, truth: Tensor) -> float:
    """Of tokens, as rounding sends some to other experts."""
    return ((ours - truth).abs().amax(-1) / truth.abs().amax(-1)).median().item()


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
    "W4A16_ASYM": (preset("W4A16_ASYM", group_size=32), "int4_zeros"),
    "W4A16_ASYM of 64": (preset("W4A16_ASYM", group_size=64), "int4_zeros"),
}
DEQUANTIZED = {
    "W8A16": preset("W8A16", group_size=32),
    "W4A16_ASYM in groups of 16": preset("W4A16_ASYM", group_size=16),
    "W4A16 per channel": preset("W4A16", strategy="channel", group_size=None),
    "W4A16 in groups of 16": preset("W4A16", group_size=16),
    "W8A8 with zero points": preset("W8A8", symmetric=False),
    "W8A16_ASYM": preset("W8A16", symmetric=False, group_size=32),
    "FP8 without inputs": preset("FP8_DYNAMIC", inputs={}),
    "FP8_BLOCK without inputs": preset("FP8_BLOCK", block_structure=[48, 32], inputs={}),
    "FP8_BLOCK": preset("FP8_BLOCK", block_structure=[32, 32], inputs={"group_size": 32}),
    "FP8_BLOCK that does not divide": preset("FP8_BLOCK", block_structure=[24, 24], inputs={"group_size": 24}),
    **{f"W{n}A16": preset(f"W{n}A16", group_size=32) for n in (2, 3, 5, 6, 7)},
    **{name: preset(name) for name in ("MXFP8", "MXFP6A16")},
}
FP8 = {
    "FP8": preset("FP8"),
    "FP8 per channel, static inputs": preset("FP8", strategy="channel"),
    "FP8_DYNAMIC": preset("FP8_DYNAMIC"),
    "FP8 in groups": preset("FP8_DYNAMIC", strategy="group", group_size=32),
}

SCHEMES = {name: scheme for name, (scheme, _) in NATIVE.items()} | DEQUANTIZED
REWRITTEN = ("W4A16_ASYM in groups of 16", "W8A8 with zero points", "FP8 without inputs", "FP8_BLOCK", "W5A16", "MXFP8")
"""Of those that are dequantized."""
FOUR_BITS = ("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP4xFP8")


@pytest.mark.parametrize("name", sorted(PRESET_SCHEMES.keys() - {"UNQUANTIZED"}))
def test_every_preset_is_read(name: str) -> None:
    group = json.loads(preset_name_to_scheme(name, ["Linear"]).model_dump_json())
    ((targets, format),) = read_groups({"config_groups": {"group_0": group}})
    assert targets == ["Linear"]
    bits = str(group["weights"]["num_bits"])
    assert bits in str(format).partition(",")[0]


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
    assert median_error(ours(IDS), with_weights(plain, dense)(IDS).logits) < 0.1, "inputs keep four bits"


# -- beside the schemes ----------------------------------------------------------------------------------------------


def edit(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **fields: Any) -> None:
    """Change the tensors of a checkpoint, and fields of its quantization_config."""
    content = load_file(directory / "model.safetensors")
    save_file(change(content), directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= fields
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", ["W4A16_ASYM in groups of 16", "W8A16", "FP8_BLOCK"])
def test_transformers_dequantizes_to_the_same(plain: Path, tmp_path: Path, name: str) -> None:
    write(plain, tmp_path / "model", DEQUANTIZED[name])
    config = CompressedTensorsConfig(dequantize=True)
    theirs = ReferenceModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16, quantization_config=config)
    truth = stacked(theirs.state_dict())
    assert all(
        torch.equal(value, truth[key])
        for key, value in loaded(tmp_path / "model", dtype="bfloat16").state_dict().items()
    )


@pytest.mark.parametrize("symmetric", [True, False])
@torch.inference_mode()
def test_groups_in_the_order_of_activations(plain: Path, tmp_path: Path, symmetric: bool) -> None:
    """`weight_g_idx`: shuffled columns have the group that their place had before."""
    scheme = preset("W4A16" if symmetric else "W4A16_ASYM", group_size=32)
    dense = write(plain, tmp_path / "model", scheme)
    generator = torch.Generator().manual_seed(1)

    def shuffle(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        written: dict[str, Tensor] = {}
        for key, value in tensors.items():
            module, _, part = key.rpartition(".")
            if part == "weight_packed":
                columns = 8 * value.shape[1]
                order = torch.randperm(columns, generator=generator)
                nibbles = value[:, :, None] >> torch.arange(0, 32, 4) & 15
                value = (nibbles.flatten(1)[:, order].unflatten(1, (-1, 8)).long() << torch.arange(0, 32, 4)).sum(-1)
                value = (value - (value >> 31 << 32)).to(torch.int32)
                dense[f"{module}.weight"] = dense[f"{module}.weight"][:, order]
                written[f"{module}.weight_g_idx"] = (order // 32).to(torch.int32)
            written[key] = value
        return written

    edit(tmp_path / "model", shuffle)
    ours = loaded(tmp_path / "model")
    kinds = {path: module.format.kind for path, module in packed(ours)}
    assert {*kinds.values()} == {"int4" if symmetric else "int4_zeros"}
    assert len(kinds) == 14 and not any(".experts." in path for path in kinds), "stacks have no orders of their own"
    assert relative_error(ours(IDS), with_weights(plain, dense)(IDS).logits) < 1e-5

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value + 9 if key.endswith("q_proj.weight_g_idx") else value for key, value in tensors.items()}

    edit(tmp_path / "model", damage)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_.* cannot be read: a column is of group 10, of 2"):
        loaded(tmp_path / "model")


@pytest.mark.parametrize("weights", [True, False], ids=["and weights", "the cache alone"])
@torch.inference_mode()
def test_scales_of_a_quantized_cache_are_left_out(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, weights: bool
) -> None:
    scheme = preset("W8A8")
    dense = write(plain, tmp_path / "model", scheme if weights else lambda name: None)
    kv = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    fields: dict[str, Any] = {"kv_cache_scheme": kv} | ({} if weights else {"config_groups": {}})
    attention = [f"language_model.model.layers.{i}.self_attn" for i in range(2)]
    names = [f"{path}.{name}" for path in attention for name in ("k_scale", "v_scale", "k_proj.output_scale")]
    edit(tmp_path / "model", lambda tensors: tensors | {name: torch.ones(1) for name in names}, **fields)
    with caplog.at_level(logging.WARNING, "llama4"):
        ours = loaded(tmp_path / "model")
    (note,) = (record.getMessage() for record in caplog.records)
    assert "6 tensors are left out: scales for a quantized cache" in note
    assert bool(packed(ours)) == weights
    assert relative_error(ours(IDS), with_weights(plain, dense)(IDS).logits) < 1e-5
    edit(tmp_path / "model", lambda tensors: tensors, kv_cache_scheme=None)
    with pytest.raises(CheckpointError, match=r"k_scale|no config_groups"):
        loaded(tmp_path / "model")


GROUPS: dict[str, dict[str, list[str]]] = {
    "exact names": {"int8": ["{o_proj}"], "int4": ["Linear"]},
    "an exact name before a pattern": {"int8": ["{o_proj}"], "int4": ["re:.*_proj"]},
    "a pattern before the class": {"int8": [r"re:.*\.self_attn\.o_proj$"], "int4": ["Linear"]},
    "the first pattern in their order": {"int8": ["re:.*o_proj"], "int4": ["re:.*proj", "re:.*p_proj"]},
}


@pytest.mark.parametrize("name", GROUPS)
@torch.inference_mode()
def test_which_group_a_module_is_of(plain: Path, tmp_path: Path, name: str) -> None:
    """That of compressed-tensors' own rule, on the same names."""
    from compressed_tensors.utils.match import match_targets

    schemes = {"int8": preset("W8A8"), "int4": preset("W4A16", group_size=32)}
    o_proj = [f"language_model.model.layers.{i}.self_attn.o_proj" for i in range(2)]
    targets = {
        kind: [t for each in given for t in (o_proj if each == "{o_proj}" else [each])]
        for kind, given in GROUPS[name].items()
    }
    of_target = {target: kind for kind, given in targets.items() for target in given}

    def kind(module: str) -> str:
        return of_target[match_targets(module, torch.nn.Linear(1, 1), of_target)[0]]

    dense = write(plain, tmp_path / "model", lambda key: schemes[kind(key.removesuffix(".weight"))])
    groups = {
        f"group_{i}": json.loads(schemes[kind].model_dump_json()) | {"targets": given}
        for i, (kind, given) in enumerate(sorted(targets.items()))
    }
    edit(tmp_path / "model", lambda tensors: tensors, config_groups=groups)
    ours = loaded(tmp_path / "model")
    assert {path: module.format.kind for path, module in packed(ours)} == {
        path: "int8" if path.endswith("o_proj") else "int4" for path, _ in packed(ours)
    }
    assert relative_error(ours(IDS), with_weights(plain, dense)(IDS).logits) < 1e-5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(self_attn", "is no regular expression"),
        ("((.|..)+)(?!.)[!?]", "takes more than"),
        ("(?R)", "calls itself"),
    ],
)
def test_a_target_that_is_no_pattern(
    pattern: str, message: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama4.weights.compressed._PATIENCE", 0.5)
    write(plain, tmp_path / "model", preset("W8A8"))
    group = json.loads(preset("W8A8").model_dump_json()) | {"targets": [f"re:{pattern}"]}
    edit(tmp_path / "model", lambda tensors: tensors, config_groups={"group_0": group})
    with pytest.raises(CheckpointError, match=f"a target in quantization_config.*{message}.*config.json"):
        loaded(tmp_path / "model")


def test_a_slow_target_and_many_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each match ends in time, and all of them do not."""
    format: Any = object()
    source: Any = SimpleNamespace(origin=lambda name: SimpleNamespace(key=name))
    groups: Any = [(["re:(a|aa)+$", "Linear"], format)]
    targets = _Targets(groups)
    for i in range(1000):
        assert targets.format_of(f"layers.{i}.up_proj", source) is format
    monkeypatch.setattr("llama4.weights.compressed._PATIENCE", 1.0)
    targets = _Targets(groups)

    def all_names() -> None:
        for i in range(100_000):
            seen.append(targets.format_of(f"{'a' * 16}{i}", source))

    begin, seen = time.process_time(), list[StoredFormat]()
    with pytest.raises(CheckpointError, match=r"takes more than 1 s, which is the limit of all targets for all names"):
        all_names()
    assert len(seen) > 1 and time.process_time() - begin < 30


@torch.inference_mode()
def test_what_is_ignored_and_what_the_model_has_no_place_for(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Some experts of a layer, one matrix of another, embeddings and routers: those are dequantized, the rest runs.
    What is said has the true reason: there are kernels for these formats."""
    int8, int4 = preset("W8A8"), preset("W4A16", group_size=32)
    monkey = [r"re:.*layers\.0\..*experts\.2\..*"]

    def scheme(key: str) -> QuantizationScheme | None:
        if "layers.0" in key and ".experts.2." in key:
            return None
        return int4 if "layers.1" in key and "experts.0.up" in key else int8

    dense = write(plain, tmp_path / "model", scheme, ignore=monkey)

    def more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for key in [key for key in tensors if key.endswith(("router.weight", "embed_tokens.weight"))]:
            weight = tensors.pop(key).float()
            scale = (weight.abs().amax(-1, keepdim=True) / 127).bfloat16()
            module, values = key.removesuffix(".weight"), (weight / scale.float()).round().to(torch.int8)
            dense[key] = values.float() * scale.float()
            tensors |= {key: values, f"{module}.weight_scale": scale}
        return tensors

    edit(tmp_path / "model", more)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    targets = next(
        g["targets"] for g in config["quantization_config"]["config_groups"].values() if len(g["targets"]) > 1
    )
    targets += ["Embedding", "re:.*router"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "llama4"):
        ours = loaded(tmp_path / "model")
    stored = {record.getMessage().partition(": ")[2] for record in caplog.records}
    assert stored == {
        "20 matrices are stored in int8, a scale per output, and others of the same layer's experts are not: "
        "dequantized to float32",
        "1 matrix is stored in int4, a scale per 32 weights, and others of the same layer's experts are not: "
        "dequantized to float32",
        "3 matrices are stored in int8, a scale per output, and here routers and embeddings are not quantized: "
        "dequantized to float32",
    }
    assert not any(".experts." in path for path, _ in packed(ours))
    assert {module.format.kind for _, module in packed(ours)} == {"int8"}
    assert relative_error(ours(IDS), with_weights(plain, dense)(IDS).logits) < 1e-5


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("name", [*FP8, *NATIVE, *REWRITTEN, "NVFP4", "MXFP4"])
@torch.inference_mode()
def test_saved_and_loaded_again_it_is_the_same(plain: Path, tmp_path: Path, name: str) -> None:
    """What runs as it was stored is written so; what was dequantized is written in bf16. transformers loads both."""
    if name in FOUR_BITS:
        write_four_bits(plain, tmp_path / "model", name)
    else:
        write(plain, tmp_path / "model", FP8[name] if name in FP8 else SCHEMES[name])
    ours = loaded(tmp_path / "model", dtype="bfloat16")
    Llama4(ours, None).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "model", tmp_path / "converted", "hf", progress=False)
    stored = Llama4Config.from_directory(tmp_path / "saved").quantization_config
    assert (stored is None) == (name in DEQUANTIZED)
    wanted = ours(IDS)
    for written in ("saved", "converted"):
        assert torch.equal(loaded(tmp_path / written, dtype="bfloat16")(IDS), wanted)
    dtype, tolerance = torch.float32, 0.1 if name in FP8 else 1e-5  # transformers rounds inputs with one scale
    if name in FOUR_BITS:
        dtype, tolerance = torch.bfloat16, 0.04  # to which compressed-tensors dequantizes
    options: dict[str, Any] = {}
    if name in ("W4A16_ASYM", "W4A16_ASYM of 64"):  # transformers loads zero points to bfloat16 only
        options, tolerance = {"quantization_config": CompressedTensorsConfig(dequantize=True)}, 0.01
    theirs = ReferenceModel.from_pretrained(tmp_path / "saved", dtype=dtype, **options).eval()
    assert median_error(loaded(tmp_path / "saved")(IDS), theirs(IDS).logits.float()) < tolerance


def test_scales_do_not_make_a_dtype(tmp_path: Path) -> None:
    """Most tensors are scales in float32, and all that is not quantized is in bf16: so is what is saved."""
    config = reference_config(num_hidden_layers=1, num_local_experts=16)
    reference_model(config).bfloat16().save_pretrained(tmp_path / "plain")
    write(tmp_path / "plain", tmp_path / "model", preset("W8A8"))
    edit(tmp_path / "model", lambda ts: {k: v.float() if k.endswith("_scale") else v for k, v in ts.items()})
    Llama4(loaded(tmp_path / "model", dtype="bfloat16"), None).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "model", tmp_path / "converted", "hf", progress=False)
    for name in ("saved", "converted"):
        assert Llama4Config.from_directory(tmp_path / name).dtype == "bfloat16"
        assert load_file(tmp_path / name / "model.safetensors")[f"{SHARED}.weight_scale"].dtype == torch.float32


@torch.inference_mode()
def test_a_part_of_the_vision_tower_is_quantized(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved says so module by module, to transformers, too."""
    monkeypatch.setattr("tests.quantization.test_presets.UNQUANTIZED", ())

    def scheme(key: str) -> QuantizationScheme | None:
        return preset("W8A8") if "vision_model" in key and ".self_attn." in key and key.endswith("weight") else None

    write(plain, tmp_path / "model", scheme)
    convert(tmp_path / "model", tmp_path / "converted", "hf", progress=False)
    pixels, ids = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1)), IDS[:1].clone()
    ids[0, 3:7] = PATCH
    ours = loaded(tmp_path / "converted")
    assert {path.split(".")[0] for path, _ in packed(ours)} == {"vision_model"}
    theirs = ReferenceModel.from_pretrained(tmp_path / "converted", dtype=torch.float32).eval()
    assert relative_error(ours(ids, pixel_values=pixels), theirs(ids, pixel_values=pixels).logits) < 1e-5


@torch.inference_mode()
def test_what_is_dequantized_can_be_quantized_again(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any checkpoint in bf16: the remedy where it would not fit into memory."""
    write(plain, tmp_path / "model", DEQUANTIZED["W4A16_ASYM in groups of 16"])
    assert main(["info", str(tmp_path / "model")]) == 0
    note = "38 matrices are stored in int4, a scale and a zero point per 16 weights, for which there are no kernels"
    assert f"loading     {note}" in capsys.readouterr().out
    quantize(tmp_path / "model", tmp_path / "int8", "int8", progress=False)
    truth = loaded(tmp_path / "model")(IDS)
    for again in (loaded(tmp_path / "model", "int8"), loaded(tmp_path / "int8")):
        assert {module.format.kind for _, module in packed(again)} == {"int8"}
        assert median_error(again(IDS), truth) < 0.05
    monkeypatch.setattr(memory, "total", lambda device: 400_000)
    with pytest.raises(CheckpointError, match=r"of weights do not fit into .* quantize them .*quantization='int4'"):
        loaded(tmp_path / "model", dtype="bfloat16")
    loaded(tmp_path / "model", "int8", dtype="bfloat16")


def four_bits(weight: Tensor, scheme: QuantizationScheme) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix as compressed-tensors packs it, with the scales of its observers; and what it stands for, in float64."""
    args = scheme.weights
    assert args is not None
    assert args.group_size is not None
    groups = weight.double().unflatten(1, (-1, args.group_size))
    largest, parts = groups.abs().amax(-1) / 6, dict[str, Tensor]()
    if args.group_size == 32:
        scale = 2 ** largest.log2().ceil()
        true_scale = scale
    else:
        parts["weight_global_scale"] = (448 / largest.max()).float().view(1)
        scale = (largest * parts["weight_global_scale"]).float().to(torch.float8_e4m3fn).double()
        true_scale = scale / parts["weight_global_scale"].double()
    format = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(format.value)
    parts = compressor.compress(parts | {"weight": weight.float(), "weight_scale": scale.float()}, scheme)
    codes = torch.stack([parts["weight_packed"] & 15, parts["weight_packed"] >> 4], dim=-1).flatten(1).long()
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    numbers = torch.cat([values, -values])[codes].view(groups.shape) * true_scale[..., None]
    assert (numbers - groups).norm() < 0.15 * groups.norm()
    return parts, numbers.view(weight.shape)


def write_four_bits(plain: Path, target: Path, name: str) -> dict[str, Tensor]:
    """A checkpoint of four-bit floats. Returns the weights that they stand for, in float32."""
    scheme = preset(name)
    written, dense = dict[str, Tensor](), dict[str, Tensor]()
    for key, weight in linears(plain):
        if any(part in key for part in UNQUANTIZED):
            written[key], dense[key] = weight, weight.float()
            continue
        parts, numbers = four_bits(weight, scheme)
        if name == "NVFP4":
            parts["input_global_scale"] = torch.tensor([300.0])
        written |= {f"{key.removesuffix('.weight')}.{part}": value.contiguous() for part, value in parts.items()}
        dense[key] = numbers.float()
    shutil.copytree(plain, target)
    save_file(written, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    group = json.loads(scheme.model_dump_json()) | {"targets": ["Linear"]}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (target / "config.json").write_text(json.dumps(config))
    return dense


@pytest.mark.parametrize("name", FOUR_BITS)
@torch.inference_mode()
def test_four_bit_floats_are_multiplied_as_they_are_stored(plain: Path, tmp_path: Path, name: str) -> None:
    """No weight is rounded, and no input either, whatever the scheme does with inputs."""
    dense = write_four_bits(plain, tmp_path / "model", name)
    ours = loaded(tmp_path / "model")
    assert {module.format.kind for _, module in packed(ours)} == {name[:5].lower()}
    assert relative_error(ours(IDS), with_weights(plain, dense)(IDS).logits) < 1e-5
