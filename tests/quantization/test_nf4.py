"""Checkpoints that bitsandbytes quantized: what that package makes of random models, read, computed with and written.

Its kernel for dequantizing on a CPU is wrong where a row is shorter than a block, so it is asked for one long row.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama4.api import Llama4
from llama4.cli.main import main
from llama4.errors import CheckpointError
from llama4.model.multimodal import Llama4Model
from llama4.quantization.modules import SplitExperts
from llama4.quantization.nf4 import Nf4
from llama4.quantization.weight import QuantizedWeight
from llama4.weights.convert import convert, quantize
from tests.parity.references import PATCH, ReferenceModel, reference_config, reference_model, relative_error

IDS = torch.randint(0, 490, (2, 40), generator=torch.Generator().manual_seed(8))
LEFT = ("embed", "lm_head", "router")
TOWER = ("vision_model", "multi_modal_projector")
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMS = ["apart", "below", "stacked"]
QUERIES = "language_model.model.layers.1.self_attn.q_proj.weight"
Tensors = dict[str, Tensor]


def encoded(weight: Tensor, *, nested: bool = True, kind: str = "nf4", block: int = 64) -> tuple[Tensors, Tensor]:
    """The parts of a tensor, by what is added to its name, and what they stand for."""
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    parts = {"": codes} | {f".{name}": part for name, part in state.as_dict(packed=True).items()}
    flat = copy.copy(state)
    flat.shape = torch.Size((1, weight.numel()))
    return parts, functional.dequantize_4bit(codes, flat).view(weight.shape)


def quantized(
    tensors: Tensors, form: str, nested: bool = True, left: tuple[str, ...] = LEFT
) -> tuple[Tensors, Tensors]:
    """A checkpoint in NF4, its experts in one of three forms, and the one that it stands for."""
    written, truth = Tensors(), Tensors()

    def put(name: str, weight: Tensor) -> Tensor:
        if any(part in name for part in left):
            written[name] = weight.contiguous()
            return weight
        parts, meant = encoded(weight.contiguous(), nested=nested)
        written.update({name + part: value for part, value in parts.items()})
        return meant

    for name, tensor in tensors.items():
        path, _, matrix = name.rpartition(".")
        halves = [f"{half}_proj.weight" for half in matrix.removesuffix("_proj").split("_")]
        count = len(tensor)
        if not path.endswith(".experts"):
            is_matrix = tensor.ndim == 2 and matrix == "weight"
            truth[name] = put(name, tensor) if is_matrix else written.setdefault(name, tensor)
        elif form == "stacked":
            truth[name] = put(name, tensor)
        elif form == "below":
            pieces = zip(halves, tensor.chunk(len(halves), -1), strict=True)
            truth[name] = torch.cat(
                [put(f"{path}.{h}", p.flatten(0, 1)).unflatten(0, (count, -1)) for h, p in pieces], -1
            )
        else:
            rows = [zip(halves, expert.mT.chunk(len(halves)), strict=True) for expert in tensor]
            apart = [torch.cat([put(f"{path}.{i}.{h}", p) for h, p in row]).mT for i, row in enumerate(rows)]
            truth[name] = torch.stack(apart)
    return written, truth


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint, as transformers writes it."""
    directory = tmp_path_factory.mktemp("plain") / "model"
    reference_model(reference_config(head_dim=32), 3).bfloat16().save_pretrained(directory)
    return directory


def write(directory: Path, plain: Path, tensors: Tensors, content: dict[str, object] = CONFIG) -> Path:
    directory.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": content}))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def loaded(directory: Path, dtype: str = "float32") -> Llama4Model:
    return Llama4.from_pretrained(directory, dtype=dtype, progress=False).model


def same(a: Path, b: Path) -> bool:
    one, other = (load_file(path / "model.safetensors") for path in (a, b))
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


@pytest.mark.parametrize("shape", [(2, 4096, 3), (4096, 3)])
def test_rows_that_are_multiplied_at_once_may_divide_blocks(shape: tuple[int, ...]) -> None:
    size, generator = math.prod(shape), torch.Generator().manual_seed(0)
    stored = (*shape[:-2], shape[-1], shape[-2]) if len(shape) == 3 else shape
    with torch.device("meta"):
        weight = QuantizedWeight(Nf4(2048, "", stored, torch.float32), shape)
    parts = {
        "weight": torch.randint(0, 256, (size // 2, 1), dtype=torch.uint8, generator=generator),
        "absmax": torch.rand(size // 2048, generator=generator),
        "quant_map": torch.linspace(-1, 1, 16),
    }
    weight.set_parts(parts)
    x_NI = torch.randn(5, shape[-1], generator=generator, requires_grad=True)
    for expert in range(shape[0]) if len(shape) == 3 else [None]:
        matrix_OI = weight.format.dequantize(weight, expert)
        product_NO = weight.format.product(weight, x_NI, expert)
        torch.testing.assert_close(product_NO, x_NI @ matrix_OI.mT)
        gradient_NI = weight.format.input_gradient(weight, product_NO.detach(), expert)
        torch.testing.assert_close(gradient_NI, product_NO.detach() @ matrix_OI)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@torch.inference_mode()
def test_read_computed_and_written(plain: Path, tmp_path: Path, form: str, nested: bool) -> None:
    """Text and an image, against transformers with what bitsandbytes dequantizes; the tower is quantized in one."""
    left = LEFT if form == "apart" else (*LEFT, *TOWER)
    written, truth = quantized(load_file(plain / "model.safetensors"), form, nested, left)
    directory = write(tmp_path / "model", plain, written)
    other = ReferenceModel(reference_config(head_dim=32)).eval()
    other.load_state_dict({name: tensor.float() for name, tensor in truth.items()})
    ours = loaded(directory)
    packed = [module for module in ours.modules() if isinstance(module, QuantizedWeight)]
    assert len(packed) == sum("quant_state" in key for key in written)
    ids, pixels = IDS.clone(), torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    ids[0, 5:9] = PATCH
    assert relative_error(ours(ids, pixel_values=pixels), other(ids, pixel_values=pixels).logits) < 1e-5
    Llama4(loaded(directory, "bfloat16"), None).save_pretrained(tmp_path / "saved")
    convert(directory, tmp_path / "converted", "hf", progress=False)
    assert same(directory, tmp_path / "saved")
    assert same(directory, tmp_path / "converted")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["quantization_config"], config["dtype"]) == (CONFIG, "bfloat16")


@torch.inference_mode()
def test_transformers_reads_what_is_written(plain: Path, tmp_path: Path) -> None:
    """Which wants experts apart; those of one layer are not quantized. All in float32, and as in training: otherwise
    bitsandbytes multiplies in bfloat16 on some CPUs."""
    experts = "language_model.model.layers.2.feed_forward.experts"
    wide = {name: tensor.float() for name, tensor in load_file(plain / "model.safetensors").items()}
    written, _ = quantized(wide, "apart", left=(*LEFT, *TOWER, experts))
    content = CONFIG | {"llm_int8_skip_modules": ["lm_head", *TOWER, experts]}
    directory = write(tmp_path / "model", plain, written, content)
    Llama4(loaded(directory), None).save_pretrained(tmp_path / "saved")
    assert same(directory, tmp_path / "saved")
    theirs = ReferenceModel.from_pretrained(tmp_path / "saved", dtype=torch.float32, device_map="cpu").train()
    assert relative_error(loaded(tmp_path / "saved")(IDS), theirs(IDS).logits) < 1e-5


def test_a_matrix_of_an_expert_that_is_not_quantized(plain: Path, tmp_path: Path) -> None:
    left = (*LEFT, *TOWER, "layers.2.feed_forward.experts.1.up_proj")
    written, truth = quantized(load_file(plain / "model.safetensors"), "apart", left=left)
    directory = write(tmp_path / "model", plain, written)
    other = ReferenceModel(reference_config(head_dim=32)).eval()
    other.load_state_dict({name: tensor.float() for name, tensor in truth.items()})
    with torch.inference_mode():
        assert relative_error(loaded(directory)(IDS), other(IDS).logits) < 1e-5


def test_a_router_that_is_quantized_is_dequantized(plain: Path, tmp_path: Path) -> None:
    """Older versions of transformers did so; it is saved as it is computed with."""
    written, truth = quantized(load_file(plain / "model.safetensors"), "below", left=(*LEFT[:2], *TOWER))
    directory = write(tmp_path / "model", plain, written)
    model = loaded(directory, "bfloat16")
    for name, parameter in model.named_parameters():
        assert "router" not in name or torch.equal(parameter, truth[name])
    convert(directory, tmp_path / "converted", "hf", progress=False)
    assert torch.equal(loaded(tmp_path / "converted")(IDS), loaded(directory)(IDS))


# -- one matrix ----------------------------------------------------------------------------------------------------


def matrix(
    weight: Tensor, *, nested: bool = True, block: int = 64, bias: Tensor | None = None
) -> tuple[QuantizedWeight, Tensor]:
    """Packed, and what it stands for; of three dimensions, experts in x out."""
    parts, truth = encoded(weight, nested=nested, block=block)
    state = parts.pop(".quant_state.bitsandbytes__nf4")
    shape = tuple(weight.shape) if weight.ndim == 2 else (weight.shape[0], weight.shape[2], weight.shape[1])
    packed = QuantizedWeight(Nf4.read(bytes(state.tolist()).decode()), shape, bias=bias is not None)
    for name, value in parts.items():
        getattr(packed, name.removeprefix(".") or "weight").data = value
    if bias is not None and packed.bias is not None:
        packed.bias.data = bias
    return packed, truth


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "nested", "block"),
    [
        ((96, 128), True, 64),
        ((2048, 12), True, 128),
        ((64, 588), False, 64),
        ((3, 64, 128), True, 64),
        ((2, 32, 64), False, 32),
    ],
)
def test_numbers_are_those_of_bitsandbytes(
    dtype: torch.dtype, shape: tuple[int, ...], nested: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, whatever the rows, the blocks and the blocks of scales; and products are those of the matrix."""
    monkeypatch.setattr("llama4.quantization.weight.ROWS", 64)
    packed, truth = matrix(normal(*shape).to(dtype), nested=nested, block=block)
    for expert in range(shape[0]) if len(shape) == 3 else [None]:
        weight = truth if expert is None else truth[expert].mT
        assert torch.equal(packed.dequantize(expert), weight)
        x = normal(5, weight.shape[1], seed=1).to(dtype)
        y = packed.product(x, expert).double()
        exact = x.double() @ weight.double().mT
        bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert ((y - exact).norm() / exact.norm()).item() < bound
        assert packed.product(x[:0], expert).shape == (0, weight.shape[0])


def test_casts_and_copies_keep_the_bits_and_cast_the_bias() -> None:
    packed, truth = matrix(normal(64, 128).bfloat16(), bias=normal(64))
    x = normal(3, 128)
    assert torch.allclose(packed(x), x @ truth.float().mT + normal(64), atol=1e-6)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed).double().to("cpu")):
        assert torch.equal(other.dequantize(), truth)
    half = copy.deepcopy(packed).half()
    assert half.bias is not None
    assert half.bias.dtype == torch.float16
    assert half(x.half()).dtype == torch.float16


def test_an_expert_that_no_token_chose_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, used = SplitExperts(), []
    for name in experts.matrices:
        setattr(experts, name, matrix(normal(4, 64, 64).bfloat16())[0])
    product = QuantizedWeight.product

    def watched(self: QuantizedWeight, x_NI: Tensor, expert: int | None = None) -> Tensor:
        used.append(expert)
        return product(self, x_NI, expert)

    monkeypatch.setattr(QuantizedWeight, "product", watched)
    experts(normal(5, 64), torch.tensor([0, 4, 0, 1]))
    assert used == [1, 1, 1, 3, 3, 3]


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_bytes_that_are_stored_as_numbers(storage: str, plain: Path, tmp_path: Path) -> None:
    """As bitsandbytes does it for FSDP; they are written as bytes."""
    dtype = getattr(torch, storage)
    weight = torch.randn(8, 64)
    packed, _ = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", quant_storage=dtype)
    assert packed.dtype == dtype and torch.equal(packed.view(-1).view(torch.uint8), encoded(weight)[0][""].view(-1))

    content = {**CONFIG, "bnb_4bit_quant_storage": storage}
    written, _ = quantized(load_file(plain / "model.safetensors"), "apart")
    values = {name.partition(".quant_state")[0] for name in written if ".quant_state" in name}
    stored = {name: t.view(-1).view(dtype)[:, None] if name in values else t for name, t in written.items()}
    bytes_ = write(tmp_path / "bytes", plain, written)
    llm = Llama4.from_pretrained(write(tmp_path / "stored", plain, stored, content), dtype="float32", progress=False)
    assert torch.equal(llm.model(IDS), loaded(bytes_)(IDS))
    llm.save_pretrained(tmp_path / "again")
    assert same(tmp_path / "again", bytes_)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_storage"] == "uint8"


# -- what cannot be run, and what is damaged -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"load_in_8bit": True}, "'LLM.int8', which this library does not run; take one in 'nf4'"),
        ({"_load_in_8bit": True, "_load_in_4bit": False}, "'LLM.int8'"),
        ({"bnb_4bit_quant_type": "fp4"}, "as 'fp4'"),
    ],
)
def test_what_is_not_run_is_refused_by_name(
    plain: Path, tmp_path: Path, content: dict[str, object], message: str
) -> None:
    """Before anything is read: there are no weights."""
    directory = write(tmp_path / "model", plain, {}, CONFIG | content)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=message):
        loaded(directory)


def state(content: dict[str, object]) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def edited(tensors: Tensors, **changes: object) -> Tensors:
    """The same with something else said of the matrix."""
    key = f"{QUERIES}.quant_state.bitsandbytes__nf4"
    return tensors | {key: state(json.loads(bytes(tensors[key].tolist())) | changes)}


def without(tensors: Tensors, key: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != key}


DAMAGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no scales": (
        lambda t: without(t, f"{QUERIES}.absmax"),
        r"do not fit together.*\n  missing: .*q_proj.weight.absmax",
    ),
    "no codes": (lambda t: without(t, QUERIES), r"missing: language_model.model.layers.1.self_attn.q_proj.weight$"),
    "no state": (
        lambda t: without(t, f"{QUERIES}.quant_state.bitsandbytes__nf4"),
        r"q_proj.weight is \[4096, 1\], wanted",
    ),
    "half of the codes": (
        lambda t: t | {QUERIES: t[QUERIES][:100]},
        r"q_proj.weight is \[100, 1\], wanted \[4096, 1\]",
    ),
    "scales in full": (
        lambda t: t | {f"{QUERIES}.absmax": t[f"{QUERIES}.absmax"].float()},
        r"absmax in torch.float32, wanted torch.uint8",
    ),
    "another kind": (
        lambda t: edited(t, quant_type="fp4"),
        r"q_proj.weight cannot be loaded: it is quantized as 'fp4'",
    ),
    "no JSON": (
        lambda t: t | {f"{QUERIES}.quant_state.bitsandbytes__nf4": torch.tensor([123, 34], dtype=torch.uint8)},
        r"q_proj.weight cannot be loaded: its quant_state cannot be read \(ConfigError",
    ),
    "odd blocks": (lambda t: edited(t, blocksize=100), r"its blocks of 100 do not fill its shape \[128, 64\]"),
    "another dtype": (lambda t: edited(t, dtype="int8"), r"its dtype is 'int8', not one of bfloat16"),
    "other blocks of scales": (
        lambda t: edited(t, nested_blocksize=64),
        r"its scales are not quantized in blocks of 256",
    ),
    "another shape": (
        lambda t: edited(t, shape=[64, 128]),
        r"q_proj.weight cannot be loaded: it is stored as \[64, 128\], where the model wants \[128, 64\]",
    ),
}


@pytest.fixture(scope="module")
def packed_tensors(plain: Path) -> Tensors:
    return quantized(load_file(plain / "model.safetensors"), "below", left=(*LEFT, *TOWER))[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(plain: Path, tmp_path: Path, packed_tensors: Tensors, damage: str) -> None:
    change, message = DAMAGES[damage]
    directory = write(tmp_path / "model", plain, change(packed_tensors))
    with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL | re.MULTILINE)):
        loaded(directory)


def test_experts_are_whole_or_not_at_all(plain: Path, tmp_path: Path, packed_tensors: Tensors) -> None:
    key = "language_model.model.layers.1.feed_forward.experts.up_proj.weight"
    left = {name: tensor for name, tensor in packed_tensors.items() if not name.startswith(key)}
    with pytest.raises(ValueError, match=r"is quantized and .*layers.1.feed_forward.experts.up_proj is not"):
        loaded(write(tmp_path / "model", plain, left))


def test_embeddings_are_not_run_in_few_bits(plain: Path, tmp_path: Path) -> None:
    written, _ = quantized(load_file(plain / "model.safetensors"), "below", left=("lm_head", "router", *TOWER))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is quantized, which this library does not run"):
        loaded(write(tmp_path / "model", plain, written))


def test_info_and_refusals(
    plain: Path, tmp_path: Path, packed_tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write(tmp_path / "model", plain, packed_tensors)
    assert main(["info", str(directory), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["quantization"]
    states = [json.loads(bytes(t.tolist())) for key, t in packed_tensors.items() if "quant_state" in key]
    assert facts["quantized_parameters"] == sum(math.prod(state["shape"]) for state in states)
    held = [t for key, t in packed_tensors.items() if f"{key.partition('.weight')[0]}.weight.absmax" in packed_tensors]
    size = sum(tensor.nbytes for tensor in held) - sum(len(json.dumps(state)) for state in states)
    assert facts["bits_per_weight"] == round(8 * size / facts["quantized_parameters"], 2)
    assert main(["info", str(directory)]) == 0
    assert "nf4, a scale per 64 weights, in a byte; " in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"quantized already \(nf4\)"):
        quantize(directory, tmp_path / "again", "int4", progress=False)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@torch.inference_mode()
def test_dense_llama(tmp_path: Path, nested: bool) -> None:
    """Rows of q and k move between file and model, so these are dequantized; what is saved transformers reads."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "plain")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items()}
    written, truth = quantized(tensors, "apart", nested)
    directory = write(tmp_path / "model", tmp_path / "plain", written)
    model.load_state_dict({name: tensor.float() for name, tensor in truth.items()})
    ours = loaded(directory)
    packed = {name.rpartition(".")[2] for name, module in ours.named_modules() if isinstance(module, QuantizedWeight)}
    assert packed == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert relative_error(ours(IDS), model(IDS).logits) < 1e-5
    Llama4(loaded(directory, "bfloat16"), None).save_pretrained(tmp_path / "saved")
    assert relative_error(loaded(tmp_path / "saved")(IDS), ours(IDS)) < 1e-2  # q and k are now in bfloat16
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in theirs.named_modules()}
    assert (kinds["q_proj"], kinds["k_proj"], kinds["v_proj"]) == ("Linear", "Linear", "Linear4bit")
    assert relative_error(ours(IDS), theirs(IDS).logits.float()) < 0.05  # bitsandbytes multiplies in bfloat16 here
