"""Checkpoints of GPTQ and AWQ: words are packed here bit by bit as the two packages do, numbers are computed in
float64, and logits are transformers' with those numbers for weights."""

from __future__ import annotations

import copy
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama4 import Llama4
from llama4.adapters.config import LoraConfig
from llama4.adapters.lora import Adapter
from llama4.adapters.merge import merge_adapter
from llama4.engine.fused_model import Description
from llama4.errors import CheckpointError
from llama4.ops import quantized
from llama4.reading import read_json
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.convert import convert, convert_to_gguf
from tests.marks import needs_kernels
from tests.parity.references import reference_config, reference_model, relative_error
from tests.quantization.test_checkpoints import IDS, loaded, packed, same
from tests.quantization.test_modelopt import describe, theirs

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
QUANTIZED = re.compile(
    r".*(self_attn\.[qkvo]_proj|feed_forward\..*(gate|up|down)_proj|mlp\.(gate|up|down)_proj)(\.weight)?"
)


@dataclass(frozen=True)
class Writer:
    """What a package is asked for."""

    method: str = "gptq"
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    act_order: bool = False
    version: str = "gptq"

    @property
    def config(self) -> dict[str, Any]:
        content = {"quant_method": self.method, "bits": self.bits, "group_size": self.group}
        if self.method == "awq":
            return content | {"zero_point": True, "version": "gemm"}
        return content | {"sym": self.symmetric, "desc_act": self.act_order, "checkpoint_format": self.version}

    def __call__(self, weight_OI: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The tensors of a Linear, and the numbers that they stand for."""
        outputs, inputs = weight_OI.shape
        size, top = (self.group if self.group > 0 else inputs), 2**self.bits - 1
        g_idx = torch.arange(inputs) // size
        if self.act_order:
            g_idx = g_idx[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        scale, zero = torch.empty(outputs, inputs // size), torch.empty(outputs, inputs // size)
        for group in range(inputs // size):
            some = weight_OI[:, g_idx == group].double()
            if self.symmetric:
                scale[:, group], zero[:, group] = 2 * some.abs().amax(1) / top, 2 ** (self.bits - 1)
            else:
                scale[:, group] = (some.amax(1).clamp(min=0) - some.amin(1).clamp(max=0)) / top
                zero[:, group] = (-some.amin(1).clamp(max=0) / scale[:, group]).round()
        scale = scale.half()
        scales, zeros = scale.double()[:, g_idx], zero.long()[:, g_idx]
        values = ((weight_OI.double() / scales).round().long() + zeros).clamp(0, top)
        parts = {"scales": scale.mT.contiguous()}
        if self.method == "awq":
            for name, numbers in {"qweight": values.mT, "qzeros": zero.long().mT}.items():
                places = torch.tensor([8 * word + i for word in range(outputs // 8) for i in AWQ_ORDER])
                parts[name] = run_of_bits(numbers[:, places], 4)
        else:
            parts["qweight"] = run_of_bits(values, self.bits).mT.contiguous()
            parts["qzeros"] = self.packed_zeros(zero.long().mT)
            parts["g_idx"] = g_idx.int()
        return parts, ((values - zeros) * scales).float()

    def packed_zeros(self, zero: Tensor) -> Tensor:
        """Version 1 stores them less 1; GPTQModel subtracts from whole words, unless values lie across words."""
        if self.version != "gptq":
            return run_of_bits(zero, self.bits)
        if self.bits == 3:
            return run_of_bits((zero - 1) % 8, 3)
        return run_of_bits(zero, self.bits) - run_of_bits(torch.ones_like(zero), self.bits)


def run_of_bits(values: Tensor, bits: int) -> Tensor:
    """[N, K] -> [N, K * bits / 32], int32, the first value lowest."""
    rows = []
    for row in values.tolist():
        number = sum(value << bits * i for i, value in enumerate(row))
        rows.append([number >> 32 * i & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))])
    return torch.tensor(rows).to(torch.int32)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Llama 4, with rows of 256 inputs, where words and outputs are as many: 32."""
    directory = tmp_path_factory.mktemp("plain") / "model"
    config = reference_config(head_dim=32, num_hidden_layers=2, num_local_experts=2, intermediate_size=256)
    reference_model(config, 3).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense") / "model"
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write(
    plain: Path, target: Path, writer: Writer, *, stacked: bool = False, biases: bool = False
) -> dict[str, Tensor]:
    """A checkpoint as the package gives it; returns the weights that it stands for."""
    shutil.copytree(plain, target)
    written, truth = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in load_file(plain / "model.safetensors").items():
        truth[key] = tensor
        if not QUANTIZED.fullmatch(key) or "vision" in key:
            written[key] = tensor
        elif tensor.ndim == 2:
            parts, truth[key] = writer(tensor)
            parts |= {"bias": torch.zeros(len(tensor), dtype=torch.float16)} if biases else {}
            written |= {f"{key.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
        else:
            names = ("gate", "up") if key.endswith("gate_up_proj") else ("down",)
            done = [[writer(half.mT.contiguous()) for half in expert.chunk(len(names), 1)] for expert in tensor]
            truth[key] = torch.stack([torch.cat([numbers.mT for _, numbers in halves], 1) for halves in done])
            path, matrix = key.rsplit(".", 1)
            for part in done[0][0][0]:
                values = [[parts[part] for parts, _ in halves] for halves in done]
                if stacked:
                    whole = [halves[0] if part == "g_idx" else torch.cat(halves, -1) for halves in values]
                    written[f"{path}.{matrix}.{part}"] = torch.stack(whole)
                    continue
                for i, halves in enumerate(values):
                    written |= {f"{path}.{i}.{name}_proj.{part}": v for name, v in zip(names, halves, strict=True)}
    save_file(written, target / "model.safetensors", metadata={"format": "pt"})
    describe(target, writer.config)
    return truth


@pytest.mark.parametrize(
    ("writer", "runs_as"),
    [
        (Writer(), "int4"),
        (Writer(version="gptq_v2"), "int4"),
        (Writer(group=-1), "int4"),
        (Writer(bits=2), "int4"),
        (Writer(bits=3), "int4"),
        (Writer(bits=8, group=-1), "int8"),
        (Writer(bits=8), None),
        (Writer(symmetric=False), "int4_zeros"),
        (Writer(symmetric=False, bits=3), "int4_zeros"),
        (Writer(symmetric=False, bits=2, version="gptq_v2"), "int4_zeros"),
        (Writer(act_order=True), "int4"),
        (Writer(act_order=True, version="gptq_v2", group=64), "int4"),
        (Writer(act_order=True, bits=3), "int4"),
        (Writer(act_order=True, symmetric=False), "int4_zeros"),
        (Writer(act_order=True, symmetric=False, version="gptq_v2"), "int4_zeros"),
        (Writer(act_order=True, symmetric=False, bits=8), None),
        (Writer("awq", symmetric=False), "int4_zeros"),
        (Writer("awq", symmetric=False, group=64), "int4_zeros"),
    ],
    ids=str,
)
@torch.inference_mode()
def test_read_and_computed(plain: Path, tmp_path: Path, writer: Writer, runs_as: str | None) -> None:
    truth = write(plain, tmp_path / "model", writer)
    ours = loaded(tmp_path / "model")
    assert {module.format.kind for _, module in packed(ours)} == ({runs_as} if runs_as else set())
    assert relative_error(ours(IDS), theirs(plain, truth)(IDS).logits) < 1e-5


@needs_kernels
@pytest.mark.parametrize("writer", [Writer(), Writer(bits=8, group=-1), Writer("awq", symmetric=False)], ids=str)
def test_kernels_read_them(dense: Path, tmp_path: Path, writer: Writer) -> None:
    """Scales of these packages are in float16; what is saved has them again."""
    truth = write(dense, tmp_path / "model", writer)
    ours = loaded(tmp_path / "model")
    for path, module in packed(ours):
        parts = module.stack()
        assert parts is not None and module.matrix() is not None, path
        assert quantized.unsupported_reason(torch.zeros(1, module.shape[-1]), parts) is None, path
        if "mlp" in path or path.endswith("o_proj"):
            assert torch.equal(module.dequantize(), truth[f"{path.replace('language_model.', '')}.weight"]), path
        if "weight_scale" in module.specs:
            assert module.checkpoint_layout("weight_scale").dtype == torch.float16


@pytest.mark.parametrize("writer", [Writer(), Writer("awq", symmetric=False), Writer(act_order=True)], ids=str)
@torch.inference_mode()
def test_stacked_experts(plain: Path, tmp_path: Path, writer: Writer) -> None:
    write(plain, tmp_path / "apart", writer)
    write(plain, tmp_path / "stacked", writer, stacked=True)
    assert torch.equal(loaded(tmp_path / "stacked")(IDS), loaded(tmp_path / "apart")(IDS))


@pytest.mark.parametrize("writer", [Writer(), Writer("awq", symmetric=False)], ids=str)
def test_experts_that_are_larger_than_memory_are_stacked(plain: Path, tmp_path: Path, writer: Writer) -> None:
    """They are not run as they lie in the files, so that in memory they may as well have the kernels' order."""
    write(plain, tmp_path / "model", writer)
    _, source = open_checkpoint(tmp_path / "model", room=0)
    assert any(name.endswith("experts.gate_up_proj.weight_packed") for name in source.names())
    assert not any("reads the rest from the files" in note for note in source.notes)


@pytest.mark.parametrize(
    "writer",
    [
        Writer(),
        Writer(symmetric=False, group=64),
        Writer(act_order=True),
        Writer(act_order=True, symmetric=False, group=64, version="gptq_v2"),
        Writer("awq", symmetric=False),
    ],
    ids=str,
)
@torch.inference_mode()
def test_dense_llama(dense: Path, tmp_path: Path, writer: Writer) -> None:
    """Rows of q and k change their order, and scales and zero points with them; a bias of zeros is none."""
    truth = write(dense, tmp_path / "model", writer, biases=writer.method == "gptq")
    other = LlamaForCausalLM.from_pretrained(dense).eval()
    other.load_state_dict(truth | {"lm_head.weight": truth["lm_head.weight"]})
    ours = loaded(tmp_path / "model")
    assert relative_error(ours(IDS), other(IDS).logits) < 1e-5
    assert len(list(packed(ours))) == 14
    for path, module in packed(ours):
        if "mlp" in path or path.endswith("o_proj"):
            weight = truth[f"{path.replace('language_model.', '')}.weight"]
            assert relative_error(module.dequantize(), weight) < 1e-6, path


@pytest.mark.parametrize(
    "writer", [Writer(), Writer(symmetric=False, group=64), Writer("awq", symmetric=False)], ids=str
)
@torch.inference_mode()
def test_saved_as_compressed_tensors(plain: Path, tmp_path: Path, writer: Writer) -> None:
    """W4A16, or W4A16_ASYM, of which transformers and compressed-tensors make the same weights."""
    truth = write(plain, tmp_path / "model", writer)
    convert(tmp_path / "model", tmp_path / "hf", "hf", progress=False)
    assert torch.equal(loaded(tmp_path / "hf")(IDS), loaded(tmp_path / "model")(IDS))
    name = "language_model.model.layers.0.self_attn.k_proj"
    parts = {
        key.removeprefix(f"{name}."): tensor for key, tensor in load_file(tmp_path / "hf" / "model.safetensors").items()
    }
    group = read_json(tmp_path / "hf" / "config.json")["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(group)
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(parts, scheme)["weight"]
    assert torch.equal(theirs, truth[f"{name}.weight"].to(theirs.dtype))
    convert(tmp_path / "hf", tmp_path / "again", "hf", progress=False)
    assert same(tmp_path / "hf", tmp_path / "again")


def test_a_zero_point_of_zero_borrows(plain: Path, tmp_path: Path) -> None:
    """Version 1 stores them less 1, a word at a time: 0 becomes 15, and takes 1 from its neighbour."""
    weights = {
        key: t.abs() if QUANTIZED.fullmatch(key) else t for key, t in load_file(plain / "model.safetensors").items()
    }
    shutil.copytree(plain, tmp_path / "positive")
    save_file(weights, tmp_path / "positive" / "model.safetensors", metadata={"format": "pt"})
    truth = write(tmp_path / "positive", tmp_path / "model", Writer(symmetric=False))
    written = load_file(tmp_path / "model" / "model.safetensors")
    assert any((value == -0x11111111).any() for key, value in written.items() if key.endswith("qzeros"))
    weights = {f"{name}.weight": module.dequantize() for name, module in packed(loaded(tmp_path / "model"))}
    name = "language_model.model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(weights[name], truth[name])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 5}, r"by GPTQ to 5 bits in the format 'gptq'.* take one of 2, 3, 4, 8 bits in 'gptq' or 'gptq_v2'"),
        ({"checkpoint_format": "gptq_p"}, r"in the format 'gptq_p', which this library does not read"),
        ({"is_marlin_format": True}, r"in the format 'marlin'"),
        ({"quant_method": "awq", "version": "GEMV"}, r"by AWQ to 4 bits in the version 'GEMV'.* 4 bits in 'gemm'"),
        ({"quant_method": "awq", "w_bit": 3, "bits": 3}, r"by AWQ to 3 bits"),
    ],
)
def test_other_layouts_are_refused(plain: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    """Before anything is read: there are no weights."""
    shutil.copytree(plain, tmp_path / "model")
    describe(tmp_path / "model", {"quant_method": "gptq", "bits": 4} | config)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda parts: parts.pop("qzeros"), r"some parts are missing.*self_attn\.o_proj\.qzeros"),
        (lambda parts: parts["scales"].resize_(1, 64), r"o_proj is stored in GPTQ of 4 bits.* and has qzeros \[4, 8\]"),
        (lambda parts: parts["g_idx"].fill_(9), r"o_proj.* cannot be read: its groups are 9 to 9, and there are 4"),
        (lambda parts: parts["qzeros"].fill_(0x66666666), r"a zero point is 7, which in symmetric weights is 8"),
        (
            lambda parts: parts["g_idx"].unsqueeze_(1),
            r"o_proj is stored in GPTQ.* and has g_idx of the shape \[128, 1\]",
        ),
        (
            lambda parts: parts["scales"].resize_(0, 64),
            r"o_proj is stored in GPTQ.* and has scales of the shape \[0, 64\]",
        ),
    ],
    ids=["missing", "shape", "groups", "zero points", "dimensions", "nothing"],
)
def test_damaged(plain: Path, tmp_path: Path, changed: Any, message: str) -> None:
    write(plain, tmp_path / "model", Writer())
    path, module = tmp_path / "model" / "model.safetensors", "language_model.model.layers.0.self_attn.o_proj."
    content = load_file(path)
    parts = {key.removeprefix(module): content.pop(key) for key in [*content] if key.startswith(module)}
    changed(parts)
    save_file(content | {module + part: value.contiguous() for part, value in parts.items()}, path)
    with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL)):
        loaded(tmp_path / "model")


LAST_DOWN = "language_model.model.layers.1.feed_forward.down_proj"


@pytest.mark.parametrize("symmetric", [True, False])
def test_in_the_order_of_activations(dense: Path, tmp_path: Path, symmetric: bool) -> None:
    """Products, their gradients, memory, moves, and why a decoding step is not one call."""
    truth = write(dense, tmp_path / "model", Writer(act_order=True, symmetric=symmetric))
    model = loaded(tmp_path / "model")
    down, weight_OI = dict(packed(model))[LAST_DOWN], truth["model.layers.1.mlp.down_proj.weight"]
    x_NI, gradient_NO = torch.randn(3, 256, requires_grad=True), torch.randn(3, 128)
    y_NO = down(x_NI)
    assert relative_error(y_NO, x_NI @ weight_OI.mT) < 1e-6
    (gradient_NI,) = torch.autograd.grad(y_NO, x_NI, gradient_NO)
    assert relative_error(gradient_NI, gradient_NO @ weight_OI) < 1e-6
    assert sum(p.nbytes for p in down.parameters()) * 8 == 5 * weight_OI.numel()  # a float32 for 32 weights of 4 bits
    assert torch.equal(copy.deepcopy(down).to("cpu", torch.bfloat16)(x_NI), y_NO)
    assert down.matrix() is None
    reason = Description.of(model.requires_grad_(False)).unsupported_reason
    assert reason is not None and reason.endswith("q_proj has its inputs in an order of their own")


def test_groups_of_several_sizes_are_dequantized(dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(dense, tmp_path / "model", Writer(act_order=True))
    path, key = tmp_path / "model" / "model.safetensors", "model.layers.0.mlp.down_proj.g_idx"
    content = load_file(path)
    save_file(content | {key: content[key].where(content[key] != 1, 0)}, path, metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "llama4"):
        assert len(packed(loaded(tmp_path / "model"))) == 13
    (note,) = (record.getMessage() for record in caplog.records if "dequantized" in record.getMessage())
    assert "1 matrix is stored in GPTQ of 4 bits, groups in the order of activations and of several sizes, " in note


@torch.inference_mode()
def test_one_expert_in_order_of_those_of_a_layer(plain: Path, tmp_path: Path) -> None:
    """They are stacked only if all of them are in order."""
    truth = write(plain, tmp_path / "model", Writer(act_order=True))
    in_order = write(plain, tmp_path / "in_order", Writer())
    path = tmp_path / "model" / "model.safetensors"
    others = {key: t for key, t in load_file(tmp_path / "in_order" / path.name).items() if ".experts.0." in key}
    save_file(load_file(path) | others, path, metadata={"format": "pt"})
    for key in (key for key in truth if ".experts." in key):
        truth[key][0] = in_order[key][0]
    ours = loaded(tmp_path / "model")
    assert not any(".experts" in path for path, _ in packed(ours))
    assert relative_error(ours(IDS), theirs(plain, truth)(IDS).logits) < 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
@torch.inference_mode()
def test_an_order_of_activations_is_written_dequantized(dense: Path, tmp_path: Path, symmetric: bool) -> None:
    """By `convert`, as GGUF and by `save_pretrained`: the weights are those that the file stood for."""
    truth = write(dense, tmp_path / "model", Writer(act_order=True, symmetric=symmetric))
    Llama4.from_pretrained(tmp_path / "model", dtype="float32", progress=False).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "model", tmp_path / "converted", "hf", progress=False)
    for name in ("saved", "converted"):
        assert "quantization_config" not in read_json(tmp_path / name / "config.json")
        written = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(written[key], weight.to(written[key].dtype)) for key, weight in truth.items()), name
    convert_to_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32", progress=False)
    other = LlamaForCausalLM.from_pretrained(dense).eval()
    other.load_state_dict(truth)
    assert relative_error(loaded(tmp_path / "model.gguf")(IDS), other(IDS).logits) < 1e-5


def test_an_adapter_is_merged_in_the_order_of_activations(dense: Path, tmp_path: Path) -> None:
    """What is not the sum but for rounding would be half wrong: the adapter is as large as the matrix."""
    truth = write(dense, tmp_path / "model", Writer(act_order=True))["model.layers.1.mlp.down_proj.weight"]
    model = loaded(tmp_path / "model")
    adapter = Adapter.create(model, LoraConfig(rank=4))
    lora = dict(adapter.items())[LAST_DOWN]
    lora.b.data.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    lora.b.data *= truth.norm() / lora.delta().norm()
    merge_adapter(adapter, model)
    assert relative_error(dict(packed(model))[LAST_DOWN].dequantize(), truth + lora.delta()) < 0.2
