"""Quantized checkpoints: ours, those of compressed-tensors, and each read by the other."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llama4.api import Llama4
from llama4.errors import CheckpointError
from llama4.model.multimodal import Llama4Model
from llama4.ops import cpu_kernels
from llama4.quantization.modules import swap_modules
from llama4.quantization.schemes import SCHEMES
from llama4.quantization.weight import QuantizedWeight
from llama4.weights.checkpoint import open_checkpoint
from llama4.weights.compressed import read_groups
from llama4.weights.convert import convert, quantize
from llama4.weights.load import load
from llama4.weights.model_source import ModelSource
from tests.marks import needs_kernels
from tests.parity.references import ReferenceModel, reference_config, reference_model, relative_error, write_large

IDS = torch.randint(0, 490, (2, 40), generator=torch.Generator().manual_seed(8))
SHARD = 150_000


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint, as transformers writes it."""
    directory = tmp_path_factory.mktemp("plain") / "model"
    model = reference_model(reference_config(head_dim=32), 3).bfloat16()
    model.save_pretrained(directory)
    return directory


def loaded(directory: Path, quantization: str | None = None, dtype: str = "float32") -> Llama4Model:
    return Llama4.from_pretrained(directory, quantization=quantization, dtype=dtype, progress=False).model


def theirs(directory: Path) -> ReferenceModel:
    return ReferenceModel.from_pretrained(directory, dtype=torch.float32).eval()


def tensors(directory: Path) -> dict[str, Tensor]:
    """All of a directory, as bytes."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= {key: value.contiguous().view(torch.uint8) for key, value in load_file(path).items()}
    return found


def same(a: Path, b: Path) -> bool:
    one, other = tensors(a), tensors(b)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@needs_kernels
@pytest.mark.parametrize("scheme", ["int4", "int8"])
@torch.inference_mode()
def test_inputs_rounded_to_int8(plain: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That changes little; by default it is in bfloat16 alone, beside int4."""
    monkeypatch.setattr(cpu_kernels, "MIN_MATRIX", 1)

    def logits(dtype: str, activations: str) -> tuple[Tensor, set[str]]:
        model = Llama4.from_pretrained(
            plain, quantization=scheme, dtype=dtype, activations=activations, progress=False
        ).model
        formats = [module.format for module in model.modules() if isinstance(module, QuantizedWeight)]
        return model(IDS).float(), {format.activations for format in formats}

    exact, kept = logits("float32", "auto")
    rounded, asked = logits("float32", "int8")
    assert kept == {"float"} and asked == {"int8"}
    assert logits("bfloat16", "auto")[1] == {"int8" if scheme == "int4" else "float"}
    assert 1e-5 < (rounded - exact).abs().mean() / exact.abs().mean() < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.inference_mode()
def test_on_load_on_disk_and_saved_are_the_same(plain: Path, tmp_path: Path, scheme: str) -> None:
    quantize(plain, tmp_path / "disk", scheme, max_shard_bytes=SHARD, progress=False)
    on_load, from_disk = loaded(plain, scheme), loaded(tmp_path / "disk")
    assert len(list((tmp_path / "disk").glob("model-*.safetensors"))) > 1
    assert torch.equal(on_load(IDS), from_disk(IDS))
    Llama4(loaded(plain, scheme, "bfloat16"), None).save_pretrained(tmp_path / "saved")
    assert same(tmp_path / "disk", tmp_path / "saved")
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("disk", "saved")]
    assert config[0]["quantization_config"] == config[1]["quantization_config"]
    convert(tmp_path / "disk", tmp_path / "again", "hf", progress=False)
    assert same(tmp_path / "disk", tmp_path / "again")


def assert_equal(ours: Llama4Model, other: nn.Module) -> None:
    """Where inputs are rounded to e4m3, a sum in another order rounds one of them the other way now and then."""
    for module in other.modules():
        scheme: Any = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.input_activations:
            module.register_forward_pre_hook(per_token)
            module.register_forward_hook(lambda _, inputs, out: out[0] if out.ndim == 3 and len(out) == 1 else out)
    rows = IDS.view(-1, 8).split(1)
    equal = [relative_error(ours(row), other(row).logits) < 1e-5 for row in rows]
    rounds_inputs = any(module.format.kind == "fp8" for _, module in packed(ours))
    assert sum(equal) >= (6 if rounds_inputs else len(rows))


def per_token(module: nn.Linear, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """compressed-tensors takes one scale for all tokens where a Linear gets two dimensions; give it three."""
    return (inputs[0][None],) if inputs[0].ndim == 2 else inputs


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.inference_mode()
def test_transformers_reads_what_we_write(plain: Path, tmp_path: Path, scheme: str) -> None:
    quantize(plain, tmp_path / "model", scheme, head=scheme == "int8", progress=False)
    other = theirs(tmp_path / "model")
    quantized = [m for m in other.modules() if getattr(m, "quantization_scheme", None) is not None]
    ours = loaded(tmp_path / "model")
    assert_equal(ours, other)
    linears = 3 * 4 * sum(".experts.gate_up_proj" in name for name, m in packed(ours))
    linears += sum(".experts." not in name for name, m in packed(ours))
    assert len(quantized) == linears, "the same modules are quantized"


def packed(model: nn.Module) -> list[tuple[str, QuantizedWeight]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedWeight)]


W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
W8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
EXPERTS_ONLY = ["re:.*self_attn.*"]


def write_theirs(
    source: Path, target: Path, weights: dict[str, Any], inputs: dict[str, Any] | None, format: str, ignore: list[str]
) -> None:
    """Quantize with compressed-tensors: a Linear per expert, its own scales, its own compressor."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**inputs) if inputs else None,
        format=CompressionFormat(format),
    )
    assert scheme.weights is not None
    compressor, written = BaseCompressor.get_value_from_registry(format), dict[str, Tensor]()
    left = (".norm.", "norm", "router", "embed", "vision", "multi_modal", "lm_head")
    for key, tensor in load_file(source / "model.safetensors").items():
        linears = {key: tensor}
        if ".experts." in key:
            path, _, name = key.rpartition(".")
            halves = ("gate", "up") if name.startswith("gate") else ("down",)
            linears = {
                f"{path}.{i}.{half}_proj.weight": matrix.mT.chunk(len(halves))[k].contiguous()
                for i, matrix in enumerate(tensor)
                for k, half in enumerate(halves)
            }
        for name, weight in linears.items():
            if any(part in name for part in left) or ("self_attn" in name and EXPERTS_ONLY[0] in ignore):
                written[name] = weight
                continue
            size = scheme.weights.group_size or weight.shape[1]
            groups = weight.unflatten(-1, (-1, size))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
            parts = compressor.compress({"weight": weight, "weight_scale": scale.bfloat16()}, scheme)
            module = name.removesuffix(".weight")
            written |= {f"{module}.{part}": value for part, value in parts.items()}
    shutil.copytree(source, target)
    save_file({k: v.contiguous() for k, v in written.items()}, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "ignore": ["re:.*router", "re:.*lm_head", "re:.*vision_model.*", "re:.*multi_modal_projector.*", *ignore],
    }
    (target / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("weights", "inputs", "format", "kind"),
    [
        (W4, None, "pack-quantized", "int4"),
        (W8, None, "pack-quantized", "int8"),
        (W8, None, "int-quantized", "int8"),
        (FP8, TOKENS, "float-quantized", "fp8"),
    ],
    ids=["w4a16", "w8a16 packed", "w8a16", "fp8 dynamic"],
)
@pytest.mark.parametrize("ignore", [[], EXPERTS_ONLY], ids=["all", "experts only"])
@torch.inference_mode()
def test_we_read_what_compressed_tensors_writes(
    plain: Path,
    tmp_path: Path,
    weights: dict[str, Any],
    inputs: dict[str, Any] | None,
    format: str,
    kind: str,
    ignore: list[str],
) -> None:
    write_theirs(plain, tmp_path / "model", weights, inputs, format, ignore)
    ours, other = loaded(tmp_path / "model"), theirs(tmp_path / "model")
    assert {module.format.kind for _, module in packed(ours)} == {kind}
    assert any("self_attn" in name for name, _ in packed(ours)) == (not ignore)
    assert_equal(ours, other)


@torch.inference_mode()
def test_fbgemm_checkpoints(plain: Path, tmp_path: Path) -> None:
    """The codes and scales of our own FP8, in the layout of transformers' modules: the same model to the bit."""
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Llama4TextExperts

    truth, written = loaded(plain, "fp8"), dict[str, Tensor]()
    with torch.device("meta"):
        experts = FbgemmFp8Llama4TextExperts(reference_config(head_dim=32).text_config)
    shapes = {name: parameter.shape for name, parameter in experts.named_parameters()}
    source = ModelSource(truth)
    for key in source.names():
        path, _, part = key.rpartition(".")
        if path not in source.plan:
            written[key] = source.read(key)
            continue
        tensor, scale = source.read(key), part == "weight_scale"
        name = path.rpartition(".")[2] + ("_scale" if scale else "")
        turned = tensor if name == "down_proj_scale" else tensor.mT.contiguous()
        assert turned.shape == shapes[name]
        written[path + ("_scale" if scale else "")] = turned
    directory = config_with(tmp_path / "model", plain, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
    save_file(written, directory / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(loaded(directory)(IDS), truth(IDS))
    convert(directory, tmp_path / "converted", "hf", progress=False)
    assert torch.equal(loaded(tmp_path / "converted")(IDS), truth(IDS))
    broken = next(key for key, tensor in written.items() if tensor.dtype == torch.float8_e4m3fn)
    save_file(written | {broken: written[broken].float()}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"must be float8_e4m3fn"):
        loaded(directory)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_packed_head_of_tied_embeddings(plain: Path, tmp_path: Path, scheme: str) -> None:
    """It is what the embeddings were packed to, which are not compared with it."""
    tied = Path(shutil.copytree(plain, tmp_path / "tied"))
    config = json.loads((tied / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    (tied / "config.json").write_text(json.dumps(config))
    content = load_file(tied / "model.safetensors")
    embeddings, head = (next(key for key in content if part in key) for part in ("embed_tokens", "lm_head"))
    content[head] = content[embeddings].clone()
    save_file(content, tied / "model.safetensors", metadata={"format": "pt"})
    quantize(tied, tmp_path / "packed", scheme, head=True, progress=False)
    model = loaded(tmp_path / "packed")
    assert model.config.text.tie_word_embeddings
    assert isinstance(model.language_model.lm_head, QuantizedWeight)


def config_with(target: Path, source: Path, content: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": content}))
    return target


def ct(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": []}


def rotated(*locations: str) -> dict[str, Any]:
    """As SpinQuant says what is rotated."""
    steps = [{"targets": ["re:.*down_proj$"], "location": location, "inverse": False} for location in locations]
    return {"config_groups": {"R4": {"type": "hadamard", "apply": steps}}}


def test_rotated_weights_are_weights() -> None:
    assert len(read_groups(ct(W4) | {"transform_config": rotated("weight_input", "weight_output")})) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"quant_method": "aqlm"},
            r"by AQLM \(quant_method 'aqlm'\), which .* not read; .*'compressed-tensors'",
        ),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
        (ct(W4 | {"num_bits": 9}), r"group_0 are .*'num_bits': 9.*take one of those, or bf16"),
        (ct(FP8 | {"num_bits": 5}), r"'num_bits': 5"),
        (ct(W4 | {"dynamic": True}), r"'dynamic': True"),
        (ct(W4 | {"strategy": "attn_head"}), r"'strategy': 'attn_head'"),
        (ct(W4 | {"group_size": 0}), r"'group_size': 0"),
        (ct(W4 | {"group_size": "many"}), r"group_0 of quantization_config has a value of the wrong kind"),
        (ct(FP8 | {"strategy": "block", "block_structure": [128]}), r"a value of the wrong kind"),
        (
            ct(W4) | {"transform_config": rotated("weight_output", "input")},
            r"rotates input of its modules while it runs \(R4 of transform_config\)",
        ),
        (
            ct(W4) | {"transform_config": {"config_groups": {"R4": {"apply": 5}}}},
            r"R4 of transform_config has apply 5; it must be a list",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(plain: Path, tmp_path: Path, content: object, message: str) -> None:
    """Before anything is read: there are no weights."""
    directory = config_with(tmp_path / "model", plain, content)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=message):
        Llama4.from_pretrained(directory)


def test_zero_points_that_do_not_fit_are_refused(plain: Path, tmp_path: Path) -> None:
    quantize(plain, tmp_path / "model", "int4", progress=False)
    content = load_file(tmp_path / "model" / "model.safetensors")
    key = next(key for key in content if key.endswith("q_proj.weight_scale"))
    content[key.replace("scale", "zero_point")] = torch.zeros(1, dtype=torch.int32)
    save_file(content, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj is stored in int4.* has zero points \[1\] beside scales"):
        loaded(tmp_path / "model")


@pytest.mark.parametrize("part", ["weight_scale", "weight_packed"])
def test_an_expert_that_is_missing_is_named(plain: Path, tmp_path: Path, part: str) -> None:
    quantize(plain, tmp_path / "model", "int4", progress=False)
    content = load_file(tmp_path / "model" / "model.safetensors")
    missing = f"language_model.model.layers.1.feed_forward.experts.2.up_proj.{part}"
    del content[missing]
    save_file(content, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"of quantized matrices some parts are missing") as caught:
        loaded(tmp_path / "model")
    assert missing in str(caught.value)


def test_what_is_quantized_is_not_quantized_again(plain: Path, tmp_path: Path) -> None:
    quantize(plain, tmp_path / "model", "fp8_mixed", progress=False)
    with pytest.raises(ValueError, match=r"quantized already \(fp8\); load it without quantization='int4'"):
        loaded(tmp_path / "model", "int4")
    with pytest.raises(ValueError, match=r"quantized already"):
        quantize(tmp_path / "model", tmp_path / "again", "int4")
    with pytest.raises(ValueError, match=r"is quantized, for which Meta's layout has no form"):
        convert(tmp_path / "model", tmp_path / "again", "meta")
    with pytest.raises(ValueError, match=r"exists already"):
        quantize(plain, tmp_path / "model", "int4")
    with pytest.raises(ValueError, match=r"quantization='int5' is not known; choose one of int4"):
        loaded(plain, "int5")
    assert not (tmp_path / "again").exists()


def test_several_formats_in_one_checkpoint(plain: Path, tmp_path: Path) -> None:
    """Attention in int8 and experts in int4: groups by target."""
    quantize(plain, tmp_path / "model", "int4", progress=False)
    quantize(plain, tmp_path / "bytes", "int8", progress=False)
    content = load_file(tmp_path / "model" / "model.safetensors")
    content = {key: value for key, value in content.items() if "self_attn" not in key}
    content |= {k: v for k, v in load_file(tmp_path / "bytes" / "model.safetensors").items() if "self_attn" in k}
    save_file(content, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = ct(W8)["config_groups"]["group_0"] | {"targets": ["re:.*self_attn.*"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = loaded(tmp_path / "model")
    kinds = {"self_attn" in name: module.format.kind for name, module in packed(model)}
    assert kinds == {True: "int8", False: "int4"}
    Llama4(loaded(tmp_path / "model", dtype="bfloat16"), None).save_pretrained(tmp_path / "saved")
    assert same(tmp_path / "model", tmp_path / "saved")
    assert torch.equal(loaded(tmp_path / "saved")(IDS), model(IDS))


# -- interrupted, and larger than memory ---------------------------------------------------------------------------


STEPWISE = """
import sys
import llama4.weights.safetensors as saver
save = saver._save_shard
def save_and_wait(files, keys, path, *others):
    save(files, keys, path, *others)
    print(path.name, flush=True)
    sys.stdin.readline()
saver._save_shard = save_and_wait
from llama4.weights.convert import quantize
quantize(sys.argv[1], sys.argv[2], "int4", max_shard_bytes=int(sys.argv[3]), progress=False)
"""


def run(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, env=environment)


def test_killed_and_run_again(plain: Path, tmp_path: Path) -> None:
    """kill -9 after the second shard: nothing under the final name; the next run writes only what was missing."""
    truth = tmp_path / "truth/model"  # a model card has the directory's name
    quantize(plain, truth, "int4", max_shard_bytes=SHARD, progress=False)
    with run(STEPWISE, plain, tmp_path / "model", SHARD) as first:
        assert first.stdin is not None and first.stdout is not None
        done = [first.stdout.readline().strip()]
        print(file=first.stdin, flush=True)
        done.append(first.stdout.readline().strip())
        first.send_signal(signal.SIGKILL)
    assert not (tmp_path / "model").exists()
    kept = tmp_path / ".model-partial" / "content"
    written = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}
    assert set(done) <= written.keys()
    with run(STEPWISE, plain, tmp_path / "model", SHARD) as second:
        output, errors = second.communicate()
    assert second.returncode == 0, errors
    assert not set(output.split()) & set(done)
    assert not kept.exists()
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(path.name for path in truth.iterdir())
    for path in truth.iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()


def test_what_was_begun_otherwise_is_begun_anew(plain: Path, tmp_path: Path) -> None:
    with run(STEPWISE, plain, tmp_path / "model", SHARD) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with pytest.raises(CheckpointError, match=r"process \d+ on .* since .* is writing .*model; wait"):
            quantize(plain, tmp_path / "model", "int4", max_shard_bytes=SHARD, progress=False)
        first.kill()
    quantize(plain, tmp_path / "model", "int8", max_shard_bytes=SHARD, progress=False)
    quantize(plain, tmp_path / "truth", "int8", max_shard_bytes=SHARD, progress=False)
    assert same(tmp_path / "model", tmp_path / "truth")


LIMITED = """
import resource, sys
import torch
from llama4.weights.convert import quantize
torch.set_num_threads(1)
quantize(sys.argv[3], sys.argv[2] + ".warm", "int8", progress=False)  # imports and lazy initialisation
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[4]),) * 2)
quantize(sys.argv[1], sys.argv[2], "int8", max_shard_bytes=8_000_000, progress=False)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 MB in over twenty shards."""
    config = reference_config(hidden_size=256, intermediate_size=512, num_local_experts=16, num_hidden_layers=20)
    return write_large(config, tmp_path_factory.mktemp("wide") / "model", max_shard_size="12MB")


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def test_a_checkpoint_larger_than_memory(plain: Path, wide: Path, tmp_path: Path) -> None:
    """Through a process that may take half of its size."""
    limit = 120_000_000
    assert len(list(wide.glob("model-*.safetensors"))) >= 20
    assert size_of(wide) > 2 * limit
    with run(LIMITED, wide, tmp_path / "out", plain, limit) as child:
        _, errors = child.communicate()
    assert child.returncode == 0, errors
    config, source = open_checkpoint(tmp_path / "out")
    with torch.device("meta"):
        small = Llama4Model(config)
    swap_modules(small, source.plan)
    load(small, source)


WATCHED = """
import sys, threading, torch
from llama4.api import Llama4
torch.set_num_threads(1)  # each has buffers
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
Llama4.from_pretrained(sys.argv[2], quantization="int8", progress=False)  # imports and lazy initialisation
before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
llm = Llama4.from_pretrained(sys.argv[1], quantization="int8", dtype="bfloat16", progress=False)
done.set()
thread.join()
peak = max(peak, anonymous())  # the thread may have had no turn
print(peak - before)
"""


def test_quantizing_while_loading_takes_the_packed_model_and_one_tensor(
    plain: Path, wide: Path, tmp_path: Path
) -> None:
    """Memory that is the process's own; the file's pages are the system's to drop. What malloc keeps of freed blocks is
    allowed for; the unquantized model would be 250 MB more."""
    quantize(wide, tmp_path / "packed", "int8", progress=False)
    with run(WATCHED, wide, plain) as child:
        output, errors = child.communicate()
    assert child.returncode == 0, errors
    largest = 16 * 256 * 1024 * 2
    assert 0.8 * size_of(tmp_path / "packed") < int(output) < size_of(tmp_path / "packed") + largest + 60e6
