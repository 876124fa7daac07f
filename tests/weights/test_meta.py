"""Meta's own checkpoints, written here by hand from a model of transformers, after the rules of llama-models' loading
and resharding code: which dimension of which tensor the ranks divide, and what is stacked or flattened."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from llama_models.llama4 import tokenizer as meta_tokenizer
from torch import Tensor

from llama4 import Llama4
from llama4.cli.main import main
from llama4.config import Llama4Config, guard4
from llama4.errors import CheckpointError, ConfigError
from llama4.model.multimodal import Llama4Model
from llama4.text import tokenizer as tokenizer_module
from llama4.text.added_tokens import AddedToken
from llama4.text.tokenizer import Tokenizer
from llama4.text.tokenizer_files import to_json
from llama4.weights import huggingface
from llama4.weights.convert import convert
from llama4.weights.meta import layout as meta_layout
from llama4.weights.meta.layout import write_tokenizer_model
from llama4.weights.meta.names import pieces
from llama4.weights.meta.params import params_from_config, read_params
from llama4.weights.meta.source import MetaSource, check_order
from llama4.weights.source import Source, View
from tests import small_model
from tests.parity.references import PATCH, ReferenceModel, reference_config, reference_model, relative_error

FIRST_SPECIAL = PATCH - 92
VISION = "vision_embeddings.vision_encoder"


def make_reference(is_maverick: bool) -> ReferenceModel:
    """Eight heads of each kind, so that up to eight ranks can share them; head_dim is D / H, as Meta's code has it."""
    config = reference_config(is_maverick, num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    vision: Any = config.vision_config
    vision.num_attention_heads = 8
    return reference_model(config, seed=3)


def params(is_maverick: bool, **change: Any) -> dict[str, Any]:
    """The widths come out as in the reference: 2/3 * 3 * 64 = 128 and 2/3 * 4 * 64 = 170, rounded up to 176."""
    moe = {
        "num_experts": 4,
        "capacity_factor": 1.0,
        "auto_scale_F": False,
        "top_k": 1,
        "interleave_moe_layer_step": 2 if is_maverick else 1,
    }
    vision = {
        "image_size": {"height": 56, "width": 56},
        "patch_size": {"height": 14, "width": 14},
        "dim": 32,
        "n_layers": 2,
        "n_heads": 8,
        "mlp_ratio": 4.0,
        "output_dim": 64,
        "pixel_shuffle_ratio": 0.5,
    }
    content = {
        "dim": 64,
        "n_layers": 4,
        "n_heads": 8,
        "n_kv_heads": 8,
        "vocab_size": 512,
        "ffn_exp": 3.0,
        "ffn_dim_multiplier": 1.0,
        "multiple_of": 8,
        "norm_eps": 1e-5,
        "attention_chunk_size": 32,
        "rope_theta": 500000.0,
        "use_scaled_rope": not is_maverick,
        "nope_layer_interval": 4,
        "use_qk_norm": not is_maverick,
        "attn_temperature_tuning": True,
        "floor_scale": 16,
        "moe_args": moe,
        "vision_args": vision,
    }
    return content | change


def share(tensor: Tensor, rank: int, ranks: int, dim: int) -> Tensor:
    return tensor.chunk(ranks, dim=dim)[rank]


def rank_of(weights: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """One rank's file."""

    def col(name: str) -> Tensor:
        return share(weights[name], rank, ranks, 0)

    def row(name: str) -> Tensor:
        return share(weights[name], rank, ranks, 1)

    state: dict[str, Any] = {
        "tok_embeddings.weight": col("language_model.model.embed_tokens.weight"),
        "norm.weight": weights["language_model.model.norm.weight"],
        "output.weight": col("language_model.lm_head.weight"),
        "rope.freqs": torch.zeros(4),
    }
    for i in range(4):
        ours, theirs = f"language_model.model.layers.{i}", f"layers.{i}"
        state[f"{theirs}.attention.wqkv.weight"] = torch.cat([col(f"{ours}.self_attn.{x}_proj.weight") for x in "qkv"])
        state[f"{theirs}.attention.wqkv._extra_state"] = io.BytesIO()
        state[f"{theirs}.attention.wo.weight"] = row(f"{ours}.self_attn.o_proj.weight")
        state[f"{theirs}.attention.wqkv.layer_norm_weight"] = weights[f"{ours}.input_layernorm.weight"]
        ours, theirs = f"{ours}.feed_forward", f"{theirs}.feed_forward"
        norm = weights[ours.replace("feed_forward", "post_attention_layernorm.weight")]
        if f"{ours}.router.weight" in weights:
            gate, up = weights[f"{ours}.experts.gate_up_proj"].chunk(2, dim=-1)
            down = weights[f"{ours}.experts.down_proj"]
            state[f"{theirs}.norm.weight"] = norm
            state[f"{theirs}.router_DE"] = weights[f"{ours}.router.weight"].T
            state[f"{theirs}.running_gate_stats_3E"] = torch.zeros(3, 4)
            state[f"{theirs}.experts.moe_w_in_eD_F"] = share(gate, rank, ranks, 2).reshape(4 * 64, -1)
            state[f"{theirs}.experts.moe_w_swiglu_eD_F"] = share(up, rank, ranks, 2).reshape(4 * 64, -1)
            state[f"{theirs}.experts.moe_w_out_eF_D"] = share(down, rank, ranks, 1).reshape(-1, 64)
            state[f"{theirs}.w_in_shared_FD.weight"] = col(f"{ours}.shared_expert.gate_proj.weight")
            state[f"{theirs}.w_swiglu_FD.weight"] = col(f"{ours}.shared_expert.up_proj.weight")
            state[f"{theirs}.w_out_shared_DF.weight"] = row(f"{ours}.shared_expert.down_proj.weight")
        else:
            state[f"{theirs}.mlp.layer_norm_weight"] = norm
            state[f"{theirs}.mlp.fc1_weight"] = torch.cat([col(f"{ours}.{x}_proj.weight") for x in ("gate", "up")])
            state[f"{theirs}.mlp.fc2_weight"] = row(f"{ours}.down_proj.weight")
    if "multi_modal_projector.linear_1.weight" in weights:
        state["vision_projection.weight"] = col("multi_modal_projector.linear_1.weight")
        state["vision_embeddings.vision_adapter.mlp.c_fc.weight"] = col("vision_model.vision_adapter.mlp.fc1.weight")
        state["vision_embeddings.vision_adapter.mlp.c_proj.weight"] = row("vision_model.vision_adapter.mlp.fc2.weight")
        state[f"{VISION}.conv1._linear.weight"] = col("vision_model.patch_embedding.linear.weight")
        for name in ("class_embedding", "positional_embedding_vlm"):
            state[f"{VISION}.{name}"] = weights[f"vision_model.{name}"]
        for kind, at in itertools.product(("weight", "bias"), ("pre", "post")):
            state[f"{VISION}.ln_{at}.{kind}"] = weights[f"vision_model.layernorm_{at}.{kind}"]
        for i, kind in itertools.product(range(2), ("weight", "bias")):
            ours, theirs = f"vision_model.model.layers.{i}", f"{VISION}.transformer.resblocks.{i}"
            state[f"{theirs}.ln_1.{kind}"] = weights[f"{ours}.input_layernorm.{kind}"]
            state[f"{theirs}.ln_2.{kind}"] = weights[f"{ours}.post_attention_layernorm.{kind}"]
            for x in "qkv":
                state[f"{theirs}.attn.w{x}.{kind}"] = col(f"{ours}.self_attn.{x}_proj.{kind}")
            state[f"{theirs}.mlp.c_fc.{kind}"] = col(f"{ours}.mlp.fc1.{kind}")
            for whole, name in ((f"{theirs}.attn.wo", "self_attn.o_proj"), (f"{theirs}.mlp.c_proj", "mlp.fc2")):
                of = f"{ours}.{name}.{kind}"
                state[f"{whole}.{kind}"] = row(of) if kind == "weight" else weights[of]
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def write_tokenizer(directory: Path, count: int = FIRST_SPECIAL) -> None:
    """A vocabulary without merges, of as many ranks as come before the special tokens."""
    tokens = [*(bytes([byte]) for byte in range(256)), *(b"ab%d" % i for i in range(count - 256))]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (directory / "tokenizer.model").write_bytes(b"".join(lines))


def write_meta(directory: Path, model: ReferenceModel, content: dict[str, Any], ranks: int) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(content))
    write_tokenizer(directory)
    for rank in range(ranks):
        torch.save(rank_of(model.state_dict(), rank, ranks), directory / f"consolidated.{rank:02d}.pth")
    return directory


@pytest.fixture(scope="module", params=[False, True], ids=["scout", "maverick"])
def kind(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def reference(kind: bool) -> ReferenceModel:
    return make_reference(kind)


def prompt() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 400, (1, 90), generator=torch.Generator().manual_seed(1))
    ids[0, 5:9] = ids[0, 40:44] = PATCH
    return ids, torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@torch.inference_mode()
def test_any_number_of_ranks_gives_transformers_logits(
    reference: ReferenceModel, kind: bool, ranks: int, tmp_path: Path
) -> None:
    llm = Llama4.from_pretrained(write_meta(tmp_path / "meta", reference, params(kind), ranks))
    ids, pixels = prompt()
    assert llm.config.image_token_index == PATCH
    truth = reference(ids, pixel_values=pixels).logits
    assert relative_error(llm.model(ids, pixel_values=pixels), truth) < 1e-5


@torch.inference_mode()
def test_text_only(reference: ReferenceModel, kind: bool, tmp_path: Path) -> None:
    directory = write_meta(tmp_path / "meta", reference, params(kind, vision_args=None), 2)
    for path in directory.glob("*.pth"):
        state = torch.load(path, weights_only=False)  # written above
        torch.save({key: value for key, value in state.items() if "vision" not in key}, path)
    llm = Llama4.from_pretrained(directory)
    ids = prompt()[0] % 400
    assert llm.config.vision is None
    assert relative_error(llm.model(ids), reference(ids).logits) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_there_and_back_is_bit_exact(reference: ReferenceModel, kind: bool, ranks: int, tmp_path: Path) -> None:
    """Hugging Face -> Meta -> Hugging Face; and what is in between is, bit by bit, what the rules above give."""
    reference.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta", ranks=ranks)
    for rank in range(ranks):
        written = torch.load(tmp_path / "meta" / f"consolidated.{rank:02d}.pth", weights_only=True)
        wanted = rank_of(reference.state_dict(), rank, ranks)
        wanted = {key: value for key, value in wanted.items() if not re.search("freqs|_extra|stats", key)}
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[key], wanted[key]) for key in wanted)
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    again = ReferenceModel.from_pretrained(tmp_path / "back")
    before = reference.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in again.state_dict().items())
    first, last = (Llama4Config.from_directory(tmp_path / name) for name in ("hf", "back"))
    assert first.image_token_index == last.image_token_index
    for name in ("attention_chunk_size", "layer_types", "moe_layers", "no_rope_layers", "rope_scaling", "rms_norm_eps"):
        assert getattr(first.text, name) == getattr(last.text, name), name
    assert Tokenizer(tmp_path / "back").ranks == Tokenizer(tmp_path / "hf").ranks


def test_guard_has_a_piece_for_every_parameter() -> None:
    with torch.device("meta"):
        names = {name for name, _ in Llama4Model(guard4()).named_parameters()}
    assert set(pieces(guard4())) == names


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    """Two ranks in bf16, put together: what is allocated never passes the model's size plus one tensor. Pages of the
    files, which the system may drop, do not count. Tolerance: 25 MB for the allocator."""
    tensors, size = 12, 1024 * 8192
    for rank in range(2):
        state = {f"layers.{i}.attention.wo.weight": torch.ones(1024, 4096).bfloat16() for i in range(tensors)}
        torch.save(state, tmp_path / f"consolidated.{rank:02d}.pth")
    script = f"""
import re, threading, time, torch
from pathlib import Path
from llama4.config import Llama4Config, TextConfig
from llama4.weights.meta.source import MetaSource
config = Llama4Config(TextConfig(num_hidden_layers={tensors}), None)
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
peak, done = 0, False
torch.set_num_threads(1)  # each has buffers
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
torch.cat([torch.ones(2, 2).bfloat16(), torch.ones(2, 2).bfloat16()])
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
source = MetaSource({str(tmp_path)!r}, config)
model = [source.read(f"language_model.model.layers.{{i}}.self_attn.o_proj.weight") for i in range({tensors})]
done = True
thread.join()
peak = max(peak, anonymous())  # the thread may have had no turn
assert all(tensor.shape == (1024, 8192) and tensor.eq(1).all() for tensor in model)
print(peak - before)
"""
    grown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    model, one = tensors * size * 2, size * 2
    assert model * 0.9 < int(grown.stdout) * 1024 < model + one + 25e6


def in_fp8(directory: Path, ranks: int) -> Path:
    """Routed experts of the middle layers as Meta's quantizer leaves them: each rank rounds the rows of its transposed
    matrices, lays the codes down as the weights lay, and names the scales after its own model's parameters."""
    names = {"w1": "moe_w_in_eD_F", "w3": "moe_w_swiglu_eD_F", "w2": "moe_w_out_eF_D"}
    for rank in range(ranks):
        path, scales = directory / f"consolidated.{rank:02d}.pth", {}
        state = torch.load(path, weights_only=False)
        for i, (short, name) in itertools.product((1, 2), names.items()):
            key = f"layers.{i}.feed_forward.experts.{name}"
            if key not in state:
                continue
            turned = state[key].unflatten(0, (4, -1)).mT.float()
            scale = turned.abs().amax(-1) / 448
            codes = (turned / scale[..., None]).to(torch.float8_e4m3fn)
            state[key] = codes.mT.reshape(state[key].shape).contiguous()
            scales[f"layers.{i}.feed_forward.experts.{short}"] = scale
        torch.save(state, path)
        torch.save(scales, directory / f"fp8_scales_{rank}.pt")
    return directory


def through_e4m3(x: Tensor) -> Tensor:
    """Each row with a scale of its own."""
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


@pytest.mark.parametrize("ranks", [1, 2, 8])
@torch.inference_mode()
def test_experts_in_fp8(tmp_path: Path, kind: bool, reference: ReferenceModel, ranks: int) -> None:
    """Each rank rounds its inputs and multiplies with its share of an expert; what they give is added up."""
    directory = in_fp8(write_meta(tmp_path / "meta", reference, params(kind), ranks), ranks)
    llm = Llama4.from_pretrained(directory, dtype="float32", progress=False)
    layers = [layer.feed_forward for layer in small_model.layers(llm.model)]
    quantized = [i for i, layer in enumerate(layers) if "Quantized" in type(getattr(layer, "experts", None)).__name__]
    assert quantized == ([1] if kind else [1, 2])
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(4))
    truth = torch.zeros(12, 64, dtype=torch.float64)
    for rank in range(ranks):
        state = torch.load(directory / f"consolidated.{rank:02d}.pth", weights_only=False)
        scales = torch.load(directory / f"fp8_scales_{rank}.pt")

        def matrix(name: str, short: str, expert: int, state: Any = state, scales: Any = scales) -> Tensor:
            codes = state[f"layers.1.feed_forward.experts.{name}"].unflatten(0, (4, -1))[expert].double()
            return codes * scales[f"layers.1.feed_forward.experts.{short}"][expert].double()

        for expert in range(4):
            rows = slice(3 * expert, 3 * expert + 3)
            gate = through_e4m3(x[rows]) @ matrix("moe_w_in_eD_F", "w1", expert)
            up = through_e4m3(x[rows]) @ matrix("moe_w_swiglu_eD_F", "w3", expert)
            hidden = torch.nn.functional.silu(gate) * up
            truth[rows] += through_e4m3(hidden) @ matrix("moe_w_out_eF_D", "w2", expert)
    assert relative_error(layers[1].experts(x, torch.full((4,), 3)), truth) < 1e-5

    llm.save_pretrained(tmp_path / "saved")
    again = Llama4.from_pretrained(tmp_path / "saved", dtype="float32", progress=False)
    ids, pixels = prompt()
    assert torch.equal(again.model(ids, pixel_values=pixels), llm.model(ids, pixel_values=pixels))


def swap(a: Path, b: Path) -> None:
    kept = a.rename(a.with_suffix(".kept"))
    b.rename(a)
    kept.rename(b)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "fp8_scales_1.pt").unlink(), r"not their scales(.|\n)*fp8_scales_1\.pt"),
        (lambda d: torch.save({}, d / "fp8_scales_1.pt"), r"lacks scales of (.|\n)*experts\.w1 \(fp8_scales_1\.pt\)"),
        (
            lambda d: swap(d / "fp8_scales_0.pt", d / "fp8_scales_1.pt"),
            r"0\.pt was written as fp8_scales_1\.pt: the ranks",
        ),
        (lambda d: (d / "int4_scales_0.pt").touch(), r"Meta's int4, which .*'int4_mixed'"),
    ],
    ids=["missing", "empty", "swapped", "int4"],
)
def test_fp8_without_its_scales(
    tmp_path: Path, kind: bool, reference: ReferenceModel, spoil: Any, message: str
) -> None:
    directory = in_fp8(write_meta(tmp_path / "meta", reference, params(kind), 2), 2)
    spoil(directory)
    with pytest.raises(CheckpointError, match=message):
        Llama4.from_pretrained(directory, progress=False)


def test_swapped_scales_of_many_ranks(tmp_path: Path) -> None:
    """By their numbers 2 comes before 10, by their letters after it."""
    paths = [tmp_path / f"fp8_scales_{rank}.pt" for rank in range(11)]
    for path in paths:
        torch.save({}, path)
    check_order(paths)
    swap(paths[0], paths[1])
    with pytest.raises(CheckpointError, match=r"0\.pt was written as fp8_scales_1\.pt: the ranks"):
        check_order(paths)


class TestDamage:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return write_meta(tmp_path / "meta", make_reference(False), params(False), 4)

    def refuses(self, directory: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            Llama4.from_pretrained(directory)

    def test_missing_rank(self, directory: Path) -> None:
        (directory / "consolidated.01.pth").unlink()
        self.refuses(directory, r"lacks 1 of its 4 files(.|\n)*consolidated\.01\.pth")

    def test_lost_last_rank(self, directory: Path) -> None:
        (directory / "consolidated.03.pth").unlink()
        self.refuses(directory, "of another shape")

    def test_no_ranks(self, directory: Path) -> None:
        for path in directory.glob("*.pth"):
            path.unlink()
        self.refuses(directory, r"no consolidated\.00\.pth")

    def test_truncated_rank(self, directory: Path) -> None:
        path = directory / "consolidated.02.pth"
        path.write_bytes(path.read_bytes()[:-1000])
        self.refuses(directory, r"consolidated\.02\.pth cannot be read as weights")

    def test_what_would_be_executed_is_refused(self, directory: Path, tmp_path: Path) -> None:
        class Payload:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "executed",)

        torch.save({"norm.weight": Payload()}, directory / "consolidated.00.pth")
        self.refuses(directory, "cannot be read as weights: it would call .*nothing in a file is executed")
        assert not (tmp_path / "executed").exists()

    def test_missing_and_unexpected_keys_in_metas_names(self, directory: Path) -> None:
        for path in directory.glob("*.pth"):
            state = torch.load(path, weights_only=False)  # written above
            state["layers.9.new"] = state.pop("layers.1.attention.wqkv.weight")
            torch.save(state, path)
        self.refuses(
            directory, r"3 keys missing, 1 unexpected(.|\n)*layers\.1\.attention\.wqkv\.weight(.|\n)*layers\.9"
        )

    def test_ranks_of_two_models(self, directory: Path) -> None:
        torch.save({"norm.weight": torch.zeros(64), "new": torch.zeros(1)}, directory / "consolidated.02.pth")
        lost = r"missing: layers\.0\.attention\.wo\.weight"
        self.refuses(directory, rf"consolidated\.02\.pth .* other keys(.|\n)*{lost}(.|\n)*unexpected: new$")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([torch.zeros(1)], "holds a list; .* tensors by name"),
            ({"step": 3}, "'step' in .* is a int, no tensor"),
            (
                {"norm.weight": torch.zeros(64).to(torch.float8_e4m3fn)},
                "is quantized .*float8_e4m3fn.* bf16 checkpoint",
            ),
            ({"norm.weight": torch.zeros(64, dtype=torch.int8)}, "is quantized .*int8.* bf16 checkpoint"),
        ],
        ids=["list", "number", "fp8", "int8"],
    )
    def test_a_rank_of_something_else(self, directory: Path, content: object, message: str) -> None:
        torch.save(content, directory / "consolidated.01.pth")
        self.refuses(directory, message)

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"dim": "wide", "n_layers": 4, "n_heads": 8}'])
    def test_broken_params(self, directory: Path, content: str) -> None:
        (directory / "params.json").write_text(content)
        with pytest.raises(ConfigError, match=r"params\.json"):
            read_params(directory)


class TestCommand:
    def test_both_ways(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["convert", "tiny", str(tmp_path / "hf"), "--to", "hf"]) == 0
        assert capsys.readouterr() == ("", f"{tmp_path / 'hf'}: Hugging Face's layout\n")
        assert main(["generate", "--model", str(tmp_path / "hf"), "--max-new-tokens", "2", "Hello"]) == 0

    def test_metas_layout_serves_every_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        reference = make_reference(True)
        directory = str(write_meta(tmp_path / "meta", reference, params(True), 2))
        assert main(["info", directory, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["parameters"] == sum(p.numel() for p in reference.parameters())
        assert main(["generate", "--model", directory, "--raw", "--json", "--max-new-tokens", "2", "ab"]) == 0
        assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] == 2

    def test_an_interrupt_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        directory = write_meta(tmp_path / "meta", make_reference(False), params(False), 1)
        written = []

        def interrupted(file: BinaryIO, data: memoryview) -> None:
            """In the middle of what `torch.save` writes."""
            written.append(Path(file.name).parent.name)
            if len(data) > 1000:
                raise KeyboardInterrupt

        monkeypatch.setattr("llama4.weights.meta.write.write_pieces", interrupted)
        assert main(["convert", str(directory), str(tmp_path / "out"), "--to", "meta", "--ranks", "2"]) == 130
        assert set(written) == {"content"}
        assert [path.name for path in tmp_path.iterdir()] == ["meta"]

    def test_what_cannot_work_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "file").write_text("mine")
        assert main(["convert", "tiny", str(tmp_path / "used"), "--to", "hf"]) == 1
        assert "exists already" in capsys.readouterr().err
        assert (tmp_path / "used" / "file").read_text() == "mine"
        assert main(["convert", "tiny", str(tmp_path / "meta"), "--to", "meta"]) == 1  # head_dim is not D / H
        said = capsys.readouterr().err
        assert "no field for head_dim = 64 (it would be read as 48)" in said
        assert "rope_scaling's original_max_position_embeddings = 512 (it would be read as 8192)" in said
        assert "RopeScaling(" not in said and "write Hugging Face's layout (hf) or GGUF" in said
        assert main(["convert", str(tmp_path / "used"), str(tmp_path / "used"), "--to", "hf"]) == 1
        assert "is the source itself" in capsys.readouterr().err
        assert main(["convert", str(tmp_path / "none"), str(tmp_path / "x"), "--to", "hf"]) == 1
        for wrong in (["--to", "gguf"], ["--to", "hf", "--ranks", "2"], []):
            with pytest.raises(SystemExit):
                main(["convert", "tiny", str(tmp_path / "x"), *wrong])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["used"]

    def test_ranks_that_do_not_divide(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_meta(tmp_path / "meta", make_reference(False), params(False), 1)
        out = tmp_path / "out"
        assert main(["convert", str(tmp_path / "meta"), str(out), "--to", "meta", "--ranks", "3"]) == 1
        assert "num_attention_heads = 8" in capsys.readouterr().err
        assert not out.exists()


class TestTokenizer:
    @pytest.mark.parametrize("by_way_of_json", [False, True])
    def test_ranks_come_out_byte_by_byte(self, by_way_of_json: bool, tmp_path: Path) -> None:
        """Of the first 3000 lines of the genuine file."""
        genuine = Path(meta_tokenizer.__file__).with_name("tokenizer.model").read_bytes()
        lines = b"".join(genuine.splitlines(keepends=True)[:3000])
        (tmp_path / "tokenizer.model").write_bytes(lines)
        tokenizer = Tokenizer(tmp_path / "tokenizer.model")
        if by_way_of_json:
            tokenizer.save(tmp_path)
            tokenizer = Tokenizer(tmp_path / "tokenizer.json")
        write_tokenizer_model(tokenizer, tmp_path / "again.model")
        assert (tmp_path / "again.model").read_bytes() == lines

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("swap", r"<\|eot\|> is {eom} in .*, where Meta's layout has {eot}; 2 special tokens"),
            ("own name", r"<SQL> is {eot} in .*, where Meta's layout has no such token"),
            ("text", r"'<SQL>' is a token of .* that is text"),
            ("first", r"ordinary tokens are not 0 to 416"),
            ("pattern", r"cuts text by a pattern of its own"),
        ],
    )
    def test_what_a_tokenizer_model_cannot_say_is_refused(self, change: str, message: str, tmp_path: Path) -> None:
        directory = write_meta(tmp_path / "meta", make_reference(False), params(False), 1)
        convert(directory, tmp_path / "hf", "hf")
        (tmp_path / "hf/tokenizer.model").unlink()
        path = tmp_path / "hf/tokenizer.json"
        content = json.loads(path.read_text())
        added, eom, eot = content["added_tokens"], FIRST_SPECIAL + 7, FIRST_SPECIAL + 8
        if change == "swap":
            added[7]["content"], added[8]["content"] = added[8]["content"], added[7]["content"]
        elif change in ("own name", "text"):
            added[8] |= {"content": "<SQL>", "special": change == "own name"}
        elif change == "first":
            vocabulary = content["model"]["vocab"]
            last = max(vocabulary, key=vocabulary.__getitem__)
            vocabulary[last] += 95
            added[:] = [token for token in added if token["id"] != vocabulary[last]]
        else:
            content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\p{L}+|[^\\p{L}]+"
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message.format(eom=eom, eot=eot)):
            convert(tmp_path / "hf", tmp_path / "again", "meta")
        assert not (tmp_path / "again").exists()


class TestSelfCheck:
    """Mistakes that a converter could make, made on purpose: the result never gets its name."""

    def refuses(self, source: Path, layout: str, message: str) -> None:
        target = source.parent / "target"
        with pytest.raises(CheckpointError, match=message):
            convert(source, target, layout)
        assert not list(source.parent.glob("*target*"))

    @pytest.fixture
    def meta(self, tmp_path: Path) -> Path:
        return write_meta(tmp_path / "meta", make_reference(False), params(False), 2)

    @pytest.fixture
    def hf(self, meta: Path) -> Path:
        convert(meta, meta.with_name("hf"), "hf")
        return meta.with_name("hf")

    def test_one_bit_of_one_weight(self, meta: Path, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(source: Source, *args: Any, **options: Any) -> Any:
            return write(Perturbed(source), *args, **options)

        for layout, module, name in (("hf", huggingface, "write_safetensors"), ("meta", meta_layout, "write_ranks")):
            write = getattr(module, name)
            with monkeypatch.context() as patch:
                patch.setattr(module, name, wrong)
                self.refuses(meta, layout, r"1 tensors .* the first is \S+\.1\.self_attn\.o_proj\.weight")

    def test_ids_of_special_tokens(self, meta: Path, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def swapped(ranks: Any, added: Sequence[AddedToken], *rest: Any) -> Any:
            names = {i: token.content for i, token in enumerate(added)} | {7: added[8].content, 8: added[7].content}
            return to_json(ranks, [replace(token, content=names[i]) for i, token in enumerate(added)], *rest)

        monkeypatch.setattr(tokenizer_module, "to_json", swapped)
        self.refuses(meta, "hf", r"<\|eom\|> and 1 more special tokens have other ids")

        def shorter(tokenizer: Tokenizer, path: Path) -> None:
            write_tokenizer_model(tokenizer, path)
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))

        monkeypatch.setattr(meta_layout, "write_tokenizer_model", shorter)
        self.refuses(hf, "meta", "image_token_index is")

    def test_a_configuration_that_computes_something_else(self, hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Seen in the logits of a short prompt."""

        def wrong(config: Llama4Config) -> dict[str, Any]:
            return params_from_config(config) | {"rope_theta": 10000.0}

        monkeypatch.setitem(meta_layout._PARAMS, "llama4", wrong)
        self.refuses(hf, "meta", "logits are others")


class Perturbed(View):
    """One weight's lowest bit is another."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, {name: name for name in source.names()}, source.plan)

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        if name.endswith("1.self_attn.o_proj.weight") and "vision" not in name:
            tensor = tensor.clone()
            tensor.view(torch.int32)[3, 5] ^= 1
        return tensor


def test_one_rank_is_mapped_not_copied(tmp_path: Path) -> None:
    directory = write_meta(tmp_path / "meta", make_reference(True), params(True), 1)
    source = MetaSource(directory, read_params(directory))
    name = "language_model.model.layers.0.self_attn.k_proj.weight"
    first, again = source.read(name), source.read(name)
    assert first.data_ptr() == again.data_ptr()
