"""What fine-tuning takes, by hand, and beside what is counted of models that are here."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from llama4.adapters.config import LoraConfig
from llama4.adapters.lora import Adapter
from llama4.analysis import finetuning
from llama4.analysis.finetuning import Training
from llama4.analysis.hardware import Rates
from llama4.analysis.planner import Deployment, make_deployment
from llama4.cli.main import main
from llama4.config import TextConfig
from llama4.errors import ArgumentError
from llama4.families import PRESETS
from llama4.model.device import DTYPES
from llama4.model.multimodal import Llama4Model
from llama4.train.memory import Kept, code_bytes, estimate
from tests import small_model

GIB = 2**30
TINY = TextConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=384,
    intermediate_size_mlp=512,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=4,
    interleave_moe_layer_step=2,
)


def training(method: str = "lora", tokens: int = 4096, **options: object) -> Training:
    lora = LoraConfig(**options)  # type: ignore[arg-type]
    return Training(method, lora, batch_tokens=tokens, length=2048)


def placed(name: str = "scout", weights: str = "auto", devices: int = 8) -> Deployment:
    return make_deployment(PRESETS[name](), weights=weights, devices=devices, device_memory=80 * GIB)


def test_parameters_and_states_by_hand() -> None:
    r, D, F, E = 16, 5120, 8192, 16
    attention = r * (2 * (D + 5120) + 2 * (D + 1024))
    layer = attention + E * r * (D + 2 * F + F + D) + 3 * r * (D + F)
    scout = PRESETS["scout"]()
    assert finetuning.num_trained(scout, training()) == 48 * layer
    assert finetuning.num_trained(scout, training(targets=("attention",), rank=4)) == 48 * attention // 4
    assert finetuning.num_trained(scout, training("full")) == scout.num_parameters()
    dense = r * 3 * (D + 16384)
    experts = attention + 128 * r * (D + 2 * F + F + D) + 3 * r * (D + F)
    assert finetuning.num_trained(PRESETS["maverick"](), training()) == 24 * (attention + dense) + 24 * experts

    need = finetuning.needs(placed(), training(), (0, 0))
    assert need.weights == 2 * scout.num_parameters() / 8
    assert need.training.trained == 16 * 48 * layer / 8  # itself, its gradient and two states, in float32
    full = replace(training("full"), optimizer_states="int8")
    need = finetuning.needs(placed(), full, (0, 0))
    assert need.training.trained == round(scout.num_parameters() * (2 + 2 * (1 + 4 / 256)) / 8)
    assert need.gathered == 2 * 2 * 202048 * D
    assert need.training.logits == 3 * (64 << 20) + 4 * 202048 * D
    assert finetuning.needs(placed(devices=1), full, (0, 0)).gathered == 0


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_narrow_models_are_those_of_the_whole(method: str, dtype: str) -> None:
    """Beside what the run itself counts, of the whole model; without what oneDNN keeps on a CPU."""
    how = training(method, tokens=1000, rank=8)
    model = Llama4Model(replace(small_model.config(), text=TINY, vision=None)).to(DTYPES[dtype])
    model.init_weights()
    model.requires_grad_(method == "full")
    trained = dict(model.named_parameters())
    if method == "lora":
        adapter = Adapter.create(model, how.lora).train()
        adapter.attach(model)
        trained = dict(adapter.named_parameters())
    found = finetuning.count_activations(TINY, how, dtype)
    for recomputed in (False, True):
        kept, layer = found.of(1000, recomputed)
        whole = estimate(model, trained, 1000, recomputed=recomputed)
        assert kept == pytest.approx(whole.activations - code_bytes(model, trained), rel=1e-3)
        assert layer == pytest.approx(whole.layer, rel=1e-3)
    assert found.of(1000, True)[0] < 0.3 * found.of(1000, False)[0]
    assert sum(p.numel() for p in trained.values()) == finetuning.num_trained(model.config, how)


def test_the_fewest_devices_are_the_first_that_fit() -> None:
    for method, weights in (("lora", "auto"), ("qlora", "int4"), ("full", "auto")):
        how, kept = training(method), (4 * GIB, 3 * GIB)
        fewest = finetuning.fewest_devices(placed(weights=weights), how, kept)
        assert fewest is not None
        assert finetuning.fits(placed(weights=weights, devices=fewest), how, kept)
        assert fewest == 1 or not finetuning.fits(placed(weights=weights, devices=fewest // 2), how, kept)
    assert finetuning.fewest_devices(placed(), training(), (80 * GIB, 0)) is None


def test_a_batch_fits_where_more_devices_are_of_no_use() -> None:
    """Activations are of each device's own batch: half of it takes half of them, a second device nothing."""
    how, kept = training(), Kept(layers=[0], head=0)
    each = 20 * GIB // 1024  # bytes of a token: 80 GiB of 4096, of which 2 or 1 fit beside the weights' share
    counted = finetuning.Activations(1, ((replace(kept, outside=64 * each), replace(kept, outside=192 * each)),))
    assert counted.of(4096, False) == (80 * GIB, 0)
    assert finetuning.fewest_devices(placed(), how, counted.of(4096, False)) is None
    assert finetuning.fitting_batch(placed(), how, counted, False) == 2048
    assert finetuning.fitting_batch(placed(devices=4), how, counted, False) == 1024
    assert finetuning.fitting_batch(placed(devices=2), how, counted, False) is None


def test_time_by_hand() -> None:
    """With rates of one for one thing and no end for the others, a time is a count."""
    one = {"num_hidden_layers": 1, "moe_layers": (0,), "no_rope_layers": (1,), "layer_types": ("chunked_attention",)}
    text = replace(TINY, **one)  # type: ignore[arg-type]
    r, D, F = 2, 256, 384
    base = D * (256 + 128 + 128 + 256) + 4 * D + 2 * 3 * D * F + 512 * D  # attention, router, experts, head
    added = r * (2 * (D + 256) + 2 * (D + 128) + (D + 2 * F) + (F + D) + 3 * (D + F))
    lora, full = replace(training(rank=r), length=3), replace(training("full"), length=3)
    pairs = 4 * 4 * 64 * 6 / 3
    assert finetuning.flops_per_token(text, lora, False) == (2 * 2 * base + 3 * 2 * added, 3.5 * pairs)
    again = 2 * (base - 512 * D)
    assert finetuning.flops_per_token(text, full, True) == (3 * 2 * base + again, 4.5 * pairs)
    deployment = replace(placed(devices=2), config=replace(small_model.config(), text=text, vision=None))
    never = float("inf")
    products = Rates(never, never, 1.0, never, "")
    assert finetuning.tokens_per_second(deployment, lora, False, products) == 2 / (4 * base + 6 * added)
    attention = Rates(never, never, never, 1.0, "")
    assert finetuning.tokens_per_second(deployment, full, False, attention) == 2 / (3.5 * pairs)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "maverick", "--finetune", "qlora", "--devices", "4", "--rank", "8", "--targets", "experts"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "rank 8 on experts" in shown and "weights in int4" in shown and "DOES NOT FIT" in shown
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    plain, less = facts["ways"]["plain"], facts["ways"]["gradient_checkpointing"]
    assert less["fits"] and not plain["fits"] and less["tokens_per_second"] < plain["tokens_per_second"]
    assert facts["trained"] == 24 * 128 * 8 * (5120 + 16384 + 8192 + 5120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--finetune", "full", "--weights", "int4"], "packed weights are not trained"),
        (["--finetune", "lora", "--targets", "vision"], "pictures are not planned"),
        (["--finetune", "lora", "--cache", "fp8"], "--cache is not of a training"),
        (["--finetune", "lora", "--device", "cpu"], "needs --gemm-rate"),
        (["--rank", "8"], "--rank is of a training"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["plan", "scout", *arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "") and message in captured.err


def test_targets_that_a_model_lacks() -> None:
    with pytest.raises(ArgumentError, match="this model has no dense"):
        finetuning.num_trained(PRESETS["scout"](), training(targets=("dense",)))
    with pytest.raises(ArgumentError, match="this model ties its head to its embeddings"):
        finetuning.num_trained(PRESETS["smollm2-135m"](), training(targets=("embeddings",)))
